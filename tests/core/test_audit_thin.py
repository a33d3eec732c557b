"""Kind 5: a hypervisor under a running system, and the ordinary ones that look the same."""

from __future__ import annotations

import pytest
from audited import grave, results
from builders import hooks, paging
from builders.hooks import Victim
from builders.machine import KERNEL, Guest
from builders.paging import PAGE, HostRam

from volatility3_ept.core import hyperv
from volatility3_ept.core.audit_finding import Kind, Severity


@pytest.mark.parametrize("shape", [paging.EPT_4, paging.NPT_4], ids=lambda shape: shape.name)
def test_a_hypervisor_under_a_running_system(shape):
    found = results(hooks.Thin(shape=shape).ram)
    assert grave(found) == [(Kind.THIN, Severity.HIGH, PAGE)]
    assert "100.0% of the guest lies at its own address" in found[0].evidence


def test_one_that_hides_nothing_is_exposed_too():
    found = results(hooks.Thin(hidden=False).ram)
    assert {f.kind for f in found if f.severity > Severity.INFO} == {Kind.THIN, Kind.EXPOSURE}
    assert "in the guest" in next(f for f in found if f.kind is Kind.THIN).evidence


def test_windows_own_hypervisor_is_called_by_its_name():
    image = b"MZ".ljust(0x80, b"\0") + hooks.pdb_record(b"hvix64")
    (only,) = results(hooks.Thin(image=image).ram)
    assert (only.kind, only.severity) == (Kind.THIN, Severity.INFO)
    assert "hvix64.pdb 030201000504070608090A0B0C0D0E0F1" in only.evidence


def test_a_file_of_that_name_in_the_guest_is_no_excuse():
    thin = hooks.Thin()
    thin.ram.write(0x8_0100, hooks.pdb_record(b"hvix64"))
    assert grave(results(thin.ram)) == [(Kind.THIN, Severity.HIGH, PAGE)]


def test_a_small_guest_beside_it_hides_nothing():
    thin = hooks.Thin()
    Guest(thin.ram, pages=16).vcpu()
    assert (Kind.THIN, Severity.HIGH, PAGE) in grave(results(thin.ram))


def test_two_guests_of_one_size_are_no_thin_hypervisor():
    ram = HostRam()
    Victim(ram)
    Victim(ram)
    assert Kind.THIN not in {f.kind for f in results(ram)}


@pytest.mark.parametrize("call", [hooks.VMCALL_PAGE, hooks.VMMCALL_PAGE], ids=["VMCALL", "VMMCALL"])
def test_a_hypercall_page_is_named_and_excuses_nothing(call):
    thin = hooks.Thin()
    page = thin.guest_ram.allocate()
    thin.ram.write(page, call)
    thin.own.map(KERNEL + PAGE, page)
    (row,) = results(thin.ram)
    assert (row.kind, row.severity) == (Kind.THIN, Severity.HIGH)
    assert f"a hypercall page at GPA {page:#x}" in row.evidence


def test_what_hyper_v_says_of_itself_is_taken_over(monkeypatch):
    role = hyperv.Role("Hyper-V root partition", ("hvix64.pdb at 0x1000, in no machine's memory",))
    monkeypatch.setattr(hyperv, "role", lambda machine, discovery, memory: role)
    (row,) = results(hooks.Thin().ram)
    assert (row.kind, row.severity) == (Kind.THIN, Severity.INFO)
    assert "Windows VBS or Hyper-V, Hyper-V root partition: hvix64.pdb" in row.evidence
