"""Kind 1: pages that cannot be read, and pages of a kernel whose rights differ from those around them."""

from __future__ import annotations

import pytest
from audited import grave, results
from builders import hooks
from builders.hooks import Victim
from builders.paging import PAGE, HostRam

from volatility3_ept.core import audit_bytes, audit_rights
from volatility3_ept.core.audit_finding import Kind, Severity


@pytest.fixture
def victim() -> Victim:
    return Victim(HostRam())


def test_an_execute_only_hook_is_found_with_its_shadow_copy(victim):
    gpa = hooks.execute_only_hook(victim)
    found = results(victim.ram)
    assert grave(found) == [(Kind.UNREADABLE_PAGE, Severity.HIGH, gpa)]
    (only,) = found
    assert f"{victim.frame(gpa):#x}" in only.evidence
    assert "55488" in only.evidence, "the bytes that were replaced"
    assert "kernel's code" in only.evidence


def test_an_execute_only_page_outside_the_kernel_is_medium(victim):
    gpa = hooks.rights(victim, victim.data[2] + 8 * PAGE, hooks.EXECUTE_ONLY)
    assert grave(results(victim.ram)) == [(Kind.UNREADABLE_PAGE, Severity.MEDIUM, gpa)]


@pytest.mark.parametrize(
    ("part", "bits", "expected"),
    [
        ("code", hooks.NO_EXECUTE, Severity.HIGH),
        ("data", hooks.NO_EXECUTE, Severity.LOW),
        ("code", hooks.READ_ONLY, Severity.INFO),
    ],
)
def test_a_page_with_other_rights_than_its_neighbours(victim, part, bits, expected):
    """W alone is what dirty logging and KSM take away all the time."""
    gpa = hooks.rights(victim, getattr(victim, part)[4], bits)
    (only,) = results(victim.ram)
    assert (only.kind, only.severity) == (Kind.ODD_RIGHTS, expected)
    assert only.gpa == (gpa if expected else None)


def test_the_last_page_of_code_has_no_neighbour_on_one_side_and_is_not_judged(victim):
    hooks.rights(victim, victim.code[-1], hooks.NO_EXECUTE)
    assert grave(results(victim.ram)) == []


@pytest.mark.parametrize(
    ("controls", "bit", "name"),
    [
        ({"proc2": 1 << 22}, 1 << 10, "mode-based execute control"),
        ({"proc2": 1 << 23, "SPPTP": 0x7000}, 1 << 61, "sub-page write permission is on (SPPTP 0x7000)"),
        ({"proc": hooks.USE_TERTIARY, "TERTIARY": 1 << 2}, 1 << 58, "paging-write"),
        ({"proc": hooks.USE_TERTIARY, "TERTIARY": 1 << 3}, 1 << 57, "guest-paging verification"),
        ({"eptp": 1 << 7}, 1 << 60, "supervisor shadow-stack control"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_leaf_says_beyond_r_w_and_x(controls, bit, name):
    victim = Victim(HostRam(), layout="bochs_3_0")
    hooks.rights(victim, victim.code[2], 0x37 | bit)
    hooks.switch_on(victim, **controls)
    (row,) = [f for f in results(victim.ram) if f.kind is Kind.EXTRA_RIGHTS]
    assert (row.severity, row.gpa) == (Severity.INFO, victim.code[2])
    assert row.evidence.startswith(name)
    assert f"1 leaves use it: GPA {victim.code[2]:#x}" in row.evidence


@pytest.mark.parametrize(
    ("controls", "text"),
    [
        ({"proc2": 1 << 18, "VE_AREA": 0x9000}, "EPT violations as #VE is on (area at 0x9000)"),
        (
            {"proc": hooks.USE_TERTIARY, "TERTIARY": 1 << 1, "HLATP": 0x5000},
            "hypervisor-managed translation is on (HLATP",
        ),
    ],
    ids=["#VE", "HLAT"],
)
def test_what_a_control_structure_switches_on_beside_them(controls, text):
    victim = Victim(HostRam(), layout="bochs_3_0")
    hooks.switch_on(victim, **controls)
    (row,) = results(victim.ram)
    assert (row.kind, row.severity) == (Kind.EXTRA_RIGHTS, Severity.INFO)
    assert row.evidence.startswith(text)


def test_bits_that_no_control_switches_on_are_the_hypervisors_own():
    """KVM keeps notes in bits 57 and 58."""
    victim = Victim(HostRam(), layout="bochs_3_0")
    for gpa in victim.guest.placed:
        hooks.rights(victim, gpa, 0x37 | 3 << 57)
    assert results(victim.ram) == []


def test_copies_of_more_pages_than_are_looked_for(victim, monkeypatch):
    monkeypatch.setattr(audit_bytes, "MAX_WANTED", 1)
    first, second = (hooks.execute_only_hook(victim, page) for page in (2, 4))
    rows = {row.gpa: row.evidence for row in results(victim.ram)}
    assert "nearly the same page" in rows[first]
    assert "a copy of it was not looked for" in rows[second]


def test_odd_stretches_beyond_the_limit_are_counted(victim, monkeypatch):
    monkeypatch.setattr(audit_rights, "_MOST", 1)
    for page in (2, 5):
        hooks.rights(victim, victim.code[page], hooks.NO_EXECUTE)
    found = results(victim.ram)
    assert (Kind.ODD_RIGHTS, Severity.HIGH, victim.code[2]) in grave(found)
    assert any("stretches of kernel code; the first 1" in row.evidence for row in found)
