"""Kind 4: pages of the hypervisor in a guest."""

from __future__ import annotations

import pytest
from audited import FREE, grave, pair, results
from builders import hooks, kernels, paging
from builders.hooks import Victim
from builders.machine import Guest
from builders.paging import HostRam

from volatility3_ept.core.audit_finding import Kind, Severity


@pytest.fixture
def victim() -> Victim:
    return Victim(HostRam())


def test_a_guest_that_maps_its_own_ept(victim):
    table = victim.tables.table_pages[-1]
    hooks.alias(victim, table)
    found = results(victim.ram)
    assert (Kind.EXPOSURE, Severity.HIGH, FREE) in grave(found)
    assert {f.kind for f in found if f.severity > Severity.INFO} == {Kind.EXPOSURE}


def test_a_guest_that_reads_its_control_structure(victim):
    victim.tables.map(FREE, victim.ram.allocate())
    victim.tables.map(FREE, victim.tables.table_pages[1], bits=hooks.READ_ONLY)
    assert grave(results(victim.ram)) == [(Kind.EXPOSURE, Severity.MEDIUM, FREE)]


def test_another_guests_tables_and_the_page_of_the_guest_that_holds_them():
    ram, first, second = pair()
    hooks.alias(first, second.tables.table_pages[2])
    found = [f for f in results(ram) if f.severity > Severity.INFO]
    assert [(f.machine, f.kind, f.gpa) for f in found] == [("0", Kind.EXPOSURE, FREE)]
    assert "machine 1's" in found[0].evidence


def test_the_hypervisors_code():
    ram = HostRam()
    host = kernels.Hypervisor(ram)
    guest = host.guest()
    values = host.vmcs(guest)
    guest.vcpu(host_cr3=values["HOST_CR3"], host_rip=values["HOST_RIP"], host_rsp=values["HOST_RSP"])
    assert grave(results(ram)) == []
    code = host.tables.get(kernels.HOST_KERNEL, "PTE") & ~0xFFF & (1 << 52) - 1
    guest.tables.map(FREE, code)
    found = [f for f in results(ram) if f.severity > Severity.INFO]
    assert {(f.kind, f.gpa, f.hpa) for f in found} == {(Kind.EXPOSURE, FREE, code)}
    assert any("code" in f.evidence for f in found)


def test_the_tables_of_a_hypervisor_in_a_guest_are_that_guests_own():
    ram = HostRam()
    outer = Guest(ram, paging.EPT_4, pages=96)
    outer.vcpu()
    inner = Guest(outer.ram, paging.EPT_4, pages=16, layout="kvm")
    inner.vcpu()
    assert grave(results(ram)) == []
