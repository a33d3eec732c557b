"""Kind 7: pages in another's place."""

from __future__ import annotations

import pytest
from audited import audited, grave, results
from builders import hooks
from builders.hooks import Victim
from builders.machine import KERNEL
from builders.paging import PAGE, HostRam

from volatility3_ept.core import audit_substitution
from volatility3_ept.core.audit_finding import Kind, Severity


@pytest.fixture
def victim() -> Victim:
    return Victim(HostRam())


def test_a_frame_in_the_place_of_another(victim):
    gpa = hooks.substitute(victim)
    found = results(victim.ram)
    assert grave(found) == [(Kind.SUBSTITUTED, Severity.HIGH, gpa)]
    assert f"{victim.frame(gpa):#x}" in found[0].evidence


def test_a_page_that_the_guests_own_tables_put_there(victim):
    copy = hooks.guest_remap(victim)
    found = results(victim.ram)
    assert grave(found) == [(Kind.GUEST_REMAP, Severity.HIGH, copy)]


def test_a_page_of_code_elsewhere_with_other_bytes_is_a_page_that_moved(victim):
    gpa = victim.code[3]
    frame = victim.ram.allocate()
    victim.ram.write(frame, hooks.code(99)[::-1])
    victim.tables.map(gpa, frame)
    assert grave(results(victim.ram)) == []


def test_kernel_code_that_the_guest_may_write_elsewhere(victim):
    gpa = hooks.writable_alias(victim)
    (row,) = results(victim.ram)
    assert (row.kind, row.severity) == (Kind.WRITABLE_CODE, Severity.MEDIUM)
    assert (row.gpa, row.hpa) == (gpa, victim.frame(gpa))
    assert f"runs at GVA {KERNEL + 3 * PAGE:#x}, and is writable at GVA {KERNEL + 0x180 * PAGE:#x}" in row.evidence


def test_a_kernel_that_may_write_all_of_its_code_elsewhere(victim, monkeypatch):
    """As kernels did before they protected their code: one row, info."""
    monkeypatch.setattr(audit_substitution, "_FEW_PAGES", 0)
    hooks.writable_alias(victim)
    (row,) = results(victim.ram)
    assert (row.kind, row.severity, row.length) == (Kind.WRITABLE_CODE, Severity.INFO, PAGE)


def test_pages_in_anothers_place_beyond_the_limit_are_noted(victim, monkeypatch):
    monkeypatch.setattr(audit_substitution, "MAX_STRETCHES", 1)
    for page in (2, 4):
        hooks.substitute(victim, page)
    found = audited(victim.ram)
    assert grave(list(found.findings)) == [(Kind.SUBSTITUTED, Severity.HIGH, victim.code[2])]
    assert any("lie elsewhere than their neighbours: 2, the first 1" in note for note in found.notes)
