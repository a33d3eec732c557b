"""``ept.audit`` as a user runs it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import captures
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


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """A second capture that is none."""
    path = tmp_path_factory.mktemp("later") / "later.raw"
    path.write_bytes(b"Dear analyst, the image is on the other disk.\n" * 400)
    return path


@pytest.fixture(scope="module", autouse=True)
def _all_at_once(vol, hooked, clean, real, later):
    vol.prepare(
        ("-s", captures.SYMBOLS, "-f", real.path, "-r", "json", "ept.audit"),
        ("-f", hooked, "ept.audit"),
        ("-f", hooked, "-r", "json", "ept.audit", "--guest", "0"),
        ("-f", clean, "-r", "json", "ept.audit", "--diff", hooked, "--severity", "medium"),
        ("-f", real.path, "ept.audit", "--no-host-check"),
        ("-f", clean, "ept.audit", "--diff", "/nowhere.raw"),
        ("-f", clean, "ept.audit", "--diff", later),
        ("-f", clean, "ept.audit", "--diff", later.parent),
    )


def test_a_hook_is_one_row(vol, hooked, victim):
    head, row = vol("-f", hooked, "ept.audit").check().rows
    assert head == COLUMNS
    assert row[:4] == ["0", "execute-only page", "high", f"{victim.code[3]:#x}"]


def test_rows_of_one_machine(vol, hooked, victim):
    (row,) = vol("-f", hooked, "-r", "json", "ept.audit", "--guest", "0").check().json
    assert [row[name] for name in COLUMNS[:5]] == ["0", "execute-only page", "high", victim.code[3], 4096]
    assert row["Evidence"].count("code: ") == 1 or "iced-x86 is not installed" in row["Evidence"]


def test_a_clean_capture_has_no_rows_and_says_what_was_not_checked(vol, real):
    result = vol("-f", real.path, "ept.audit", "--no-host-check").check()
    head, *rows = result.rows
    assert (head, rows) == (COLUMNS, [])
    assert result.err.count("WARNING") == 1
    assert "no symbols of the kernel of the host" in result.err


def test_the_hosts_symbols_tell_which_module_the_hypervisor_is(vol, real):
    (row,) = vol("-s", captures.SYMBOLS, "-f", real.path, "-r", "json", "ept.audit").check().json
    assert set(row) == {*COLUMNS, "__children"}
    assert (row["Kind"], row["Severity"], row["GPA"]) == ("hypervisor's entry point", "info", None)
    assert ", in kvm_intel (VMCS at 0x294e000" in row["Evidence"]


@pytest.mark.slow
def test_on_amd_the_module_is_known_by_vmrun(vol):
    path = captures.get("kvm-npt").path
    (row,) = vol("-s", captures.SYMBOLS, "-f", path, "-r", "json", "ept.audit").check().json
    assert (row["Kind"], row["Severity"]) == ("hypervisor's entry point", "info")
    assert row["Evidence"].startswith("VMRUN at 0xffffffff")
    assert row["Evidence"].endswith(", in kvm_amd")


@pytest.mark.slow
@pytest.mark.corpus
def test_the_kernel_in_a_guest_is_looked_at_too(vol):
    path = captures.get("ept-nested").path
    rows = vol("-s", captures.SYMBOLS, "-f", path, "-r", "json", "ept.audit", "--severity", "info").check().json
    assert [(row["Machine"], row["Severity"]) for row in rows] == [("0", "info"), ("0.0", "info")]
    assert all(", in kvm_intel (VMCS" in row["Evidence"] for row in rows)


def test_what_changed_until_a_second_capture(vol, clean, hooked, victim):
    """The page that is merely mapped now is info, and filtered."""
    command = ("-f", clean, "-r", "json", "ept.audit", "--diff", hooked, "--severity", "medium")
    (row,) = vol(*command).check().json
    assert (row["Kind"], row["Severity"], row["GPA"]) == ("changed: frame", "high", victim.code[3])


def test_a_second_capture_that_is_not_there(vol, clean):
    assert_refused(vol("-f", clean, "ept.audit", "--diff", "/nowhere.raw"), "--diff /nowhere.raw: No such file")


def test_a_second_capture_that_is_none(vol, clean, later):
    assert_refused(vol("-f", clean, "ept.audit", "--diff", later), "text")
    assert_refused(vol("-f", clean, "ept.audit", "--diff", later.parent), f"--diff {later.parent}: it is a folder")


def test_a_machine_that_is_not_there(vol, hooked):
    assert_refused(vol("-f", hooked, "ept.audit", "--guest", "7"), "no such machine")


def test_a_root_is_no_machine(vol, hooked):
    assert_refused(vol("-f", hooked, "ept.audit", "--guest", "eptp=0x100000"), "name one by its id")


@pytest.mark.slow
def test_the_commands_in_its_documentation_parse(vol):
    """Every plugin is there, and every option is one of its own or of vol."""
    commands = [shlex.split(line)[1:] for page in sorted(DOCS.glob("*.md")) for line in commands_in(page.read_text())]
    assert len(commands) > len(list(DOCS.glob("*.md"))) - 2, "each page has one"
    split = [next(i for i, word in enumerate(words) if "." in word and not PATH.search(word)) for words in commands]
    plugins = {words[at] for words, at in zip(commands, split, strict=True)}
    vol.prepare(("--help",), *((plugin, "--help") for plugin in plugins))
    common = options(vol("--help").check().out)
    for words, at in zip(commands, split, strict=True):
        own = options(vol(words[at], "--help").check().out)
        assert options(" ".join(words[:at])) <= common, words
        assert options(" ".join(words[at:])) <= own, words


DOCS = Path(__file__).parents[2] / "docs" / "audit"
PATH = re.compile(r"\.(raw|elf)$")


def commands_in(text: str) -> list[str]:
    """Return the lines of the shell blocks of a page."""
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def options(text: str) -> set[str]:
    """Return the options that a text names."""
    return set(re.findall(r"(?:(?<=\s)|^|(?<=\[))(--?[a-z][a-z-]*)", text))
