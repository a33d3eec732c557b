"""Kind 5: where the hypervisor is entered, and whose code that is."""

from __future__ import annotations

import pytest
from audited import audited, grave, results
from builders import kernels, paging
from builders.kernels import HOST_KERNEL, Hypervisor
from builders.machine import Guest
from builders.paging import LONG_4, PAGE, HostRam, Tables

from volatility3_ept.core import audit_entry
from volatility3_ept.core.audit_finding import Finding, Kind, Severity
from volatility3_ept.core.audit_host import HostKernel, Part

BASE = HOST_KERNEL & (1 << 48) - 1
KERNEL, MODULE = Part("kernel", BASE - 0x10_0000, BASE), Part("kvm_intel", BASE, BASE + PAGE)


class Host:
    """A hypervisor with one guest on Intel's processors, whose VMCS names the host's own tables."""

    def __init__(self) -> None:
        self.ram = HostRam()
        self.below = Hypervisor(self.ram)
        self.guest = self.below.guest()

    def run(self, guest: Guest | None = None, **values: int) -> None:
        """Give the guest a vCPU."""
        own = self.below.vmcs(self.guest)
        given = {"host_cr3": own["HOST_CR3"], "host_rip": own["HOST_RIP"], "host_rsp": own["HOST_RSP"], **values}
        (guest or self.guest).vcpu(**given)

    def findings(self, *parts: Part) -> list[Finding]:
        """Return the audit with the symbols of the kernel that has these parts."""
        hosts = {"": HostKernel(self.below.tables.root, 4, parts)} if parts else None
        return results(self.ram, hosts=hosts)


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_module_of_the_kernel_is_named(host):
    host.run()
    (row,) = host.findings(KERNEL, MODULE)
    assert (row.kind, row.severity) == (Kind.ENTRY, Severity.INFO)
    assert f"entered at HOST_RIP {HOST_KERNEL + kernels.BEHIND:#x}, in kvm_intel" in row.evidence


def test_code_that_no_module_has(host):
    host.run()
    (row,) = host.findings(KERNEL)
    assert (row.kind, row.severity) == (Kind.ENTRY, Severity.MEDIUM)
    assert "in no known module: none of the 1 that the kernel lists" in row.evidence


def test_an_address_space_of_its_own(host):
    """A monitor that switches to tables of its own may run at an address where the kernel has a module."""
    own = Tables(host.ram, LONG_4)
    kernels.furnish(own, HOST_KERNEL)
    host.run(host_cr3=own.root)
    (row,) = host.findings(KERNEL, MODULE)
    assert (row.kind, row.severity) == (Kind.ENTRY, Severity.MEDIUM)
    assert "in an address space that is not the kernel's" in row.evidence


def test_without_symbols_two_entry_points_far_apart_are_two_hypervisors(host):
    host.run()
    host.below.tables.map(HOST_KERNEL + 0x4000_0000, host.ram.allocate())
    host.run(host.below.guest(), host_rip=HOST_KERNEL + 0x4000_0000)
    assert grave(host.findings()) == [(Kind.ENTRY, Severity.LOW, None)]


def test_without_symbols_entry_points_in_one_module_agree(host):
    host.run()
    host.run(host.below.guest(), host_rip=HOST_KERNEL + 0x200)
    assert host.findings() == []


def test_an_entry_point_that_may_not_be_executed(host):
    host.run(host_rip=HOST_KERNEL + kernels.DATA)
    found = host.findings()
    assert grave(found) == [(Kind.ENTRY, Severity.LOW, None)]
    assert "without X" in found[0].evidence


VMRUN = b"\x0f\x01\xda" + b"\x90" * 8 + b"\x0f\x01\xd8" + b"\x90" * 8 + b"\x0f\x01\xdb"


def amd(code: bytes) -> tuple[HostRam, HostKernel]:
    """Return a host on AMD's processors whose kernel has this code in its module."""
    ram = HostRam()
    below = Hypervisor(ram)
    below.guest(shape=paging.NPT_4).vcpu()
    ram.write(below.tables.get(HOST_KERNEL, "PTE") & 0xF_FFFF_F000 | 0x200, code)
    return ram, HostKernel(below.tables.root, 4, (KERNEL, MODULE))


def test_a_vmcb_does_not_say_and_vmrun_is_looked_for():
    ram, kernel = amd(VMRUN)
    (row,) = results(ram, hosts={"": kernel})
    assert (row.kind, row.severity) == (Kind.ENTRY, Severity.INFO)
    assert f"VMRUN at {HOST_KERNEL + 0x20B:#x}, in kvm_intel" in row.evidence


def test_vmrun_in_no_module():
    ram, kernel = amd(VMRUN)
    (row,) = results(ram, hosts={"": HostKernel(kernel.cr3, 4, (KERNEL,))})
    assert (row.kind, row.severity) == (Kind.ENTRY, Severity.MEDIUM)


def test_three_bytes_alone_are_no_vmrun():
    ram, kernel = amd(b"\x0f\x01\xd8")
    assert results(ram, hosts={"": kernel}) == []


def test_more_code_than_is_searched_is_noted(monkeypatch):
    monkeypatch.setattr(audit_entry, "MAX_CODE", 0)
    ram, kernel = amd(VMRUN)
    result = audited(ram, hosts={"": kernel})
    assert not result.findings
    assert any("was not searched for VMRUN" in note for note in result.notes)
