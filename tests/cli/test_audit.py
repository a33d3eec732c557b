"""``ept.audit`` as a user runs it."""

from __future__ import annotations

import pytest
from builders import hooks
from builders.hooks import Victim
from builders.paging import HostRam
from cli import containers
from cli.test_errors import assert_refused

COLUMNS = ["Machine", "Kind", "Severity", "GPA", "Size", "HPA", "Evidence", "Benign cause"]


@pytest.fixture(scope="module")
def victim() -> Victim:
    """A guest with one execute-only hook, and one page of memory that its first capture lacks."""
    victim = Victim(HostRam())
    hooks.execute_only_hook(victim)
    hooks.alias(victim, victim.ram.allocate())
    return victim


@pytest.fixture(scope="module")
def hooked(victim, tmp_path_factory):
    return containers.elf(victim.ram, tmp_path_factory.mktemp("hooked"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return containers.elf(Victim(HostRam()).ram, tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module", autouse=True)
def _all_at_once(vol, hooked, clean, real):
    vol.prepare(
        ("-f", hooked, "ept.audit"),
        ("-f", hooked, "-r", "json", "ept.audit", "--guest", "0"),
        ("-f", clean, "-r", "json", "ept.audit", "--diff", hooked, "--severity", "medium"),
        ("-f", real.path, "ept.audit"),
        ("-f", clean, "ept.audit", "--diff", "/nowhere.raw"),
    )


def test_a_hook_is_one_row(vol, hooked, victim):
    head, row = vol("-f", hooked, "ept.audit").check().rows
    assert head == COLUMNS
    assert row[:4] == ["0", "execute-only page", "high", f"{victim.code[3]:#x}"]


def test_rows_of_one_machine(vol, hooked, victim):
    (row,) = vol("-f", hooked, "-r", "json", "ept.audit", "--guest", "0").check().json
    assert [row[name] for name in COLUMNS[:5]] == ["0", "execute-only page", "high", victim.code[3], 4096]
    assert row["Evidence"].count("code: ") == 1 or "iced-x86 is not installed" in row["Evidence"]


def test_a_clean_capture_has_no_rows(vol, real):
    head, *rows = vol("-f", real.path, "ept.audit").check().rows
    assert (head, rows) == (COLUMNS, [])


def test_what_changed_until_a_second_capture(vol, clean, hooked, victim):
    """The page that is merely mapped now is info, and filtered."""
    command = ("-f", clean, "-r", "json", "ept.audit", "--diff", hooked, "--severity", "medium")
    (row,) = vol(*command).check().json
    assert (row["Kind"], row["Severity"], row["GPA"]) == ("changed: frame", "high", victim.code[3])


def test_a_second_capture_that_is_not_there(vol, clean):
    assert_refused(vol("-f", clean, "ept.audit", "--diff", "/nowhere.raw"), "--diff /nowhere.raw: No such file")


def test_a_machine_that_is_not_there(vol, hooked):
    assert_refused(vol("-f", hooked, "ept.audit", "--guest", "7"), "no such machine")


def test_a_root_is_no_machine(vol, hooked):
    assert_refused(vol("-f", hooked, "ept.audit", "--guest", "eptp=0x100000"), "name one by its id")
