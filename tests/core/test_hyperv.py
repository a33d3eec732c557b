"""Partitions and trust levels are named by what is there, and only by that."""

from __future__ import annotations

import pytest
from builders import hyperv, machine, paging, windows
from builders.hyperv import HyperV
from builders.paging import PAGE, HostRam
from builders.windows_pe import Pe
from readers import memory_of

from volatility3_ept.core import hyperv as roles
from volatility3_ept.core import search

SHAPES = pytest.mark.parametrize(
    ("shape", "pdb"), [(paging.EPT_4, "hvix64.pdb"), (paging.NPT_4, "hvax64.pdb")], ids=["EPT", "NPT"]
)


def named(ram: HostRam):
    """Return the role of each machine of a host."""
    memory = memory_of(ram)
    found = search.discover(memory)
    return {machine.id: roles.role(machine, found, memory) for machine in found.all()}, found


@SHAPES
def test_root_and_child_partitions(shape, pdb):
    hypervisor = HyperV(pdb=pdb)
    hypervisor.root(shape)
    hypervisor.child(shape)
    found, _ = named(hypervisor.ram)
    assert {key: role.name for key, role in found.items()} == {
        "0": "Hyper-V root partition", "1": "Hyper-V child partition"
    }  # fmt: skip
    assert all(pdb in role.evidence[0] for role in found.values())


@SHAPES
def test_two_roots_of_one_partition_are_its_trust_levels(shape, pdb):
    """VTL1's tables map more, so they are the machine's own, and VTL0's are a view; the ordinary kernel is named."""
    hypervisor = HyperV(pdb=pdb)
    guest = hypervisor.root(shape)
    tables = hyperv.secure_level(guest, **(hypervisor.host if shape is paging.EPT_4 else {}))
    found, discovery = named(hypervisor.ram)
    (only,) = discovery.machines
    assert (only.root.raw, [view.root.raw for view in only.views]) == (tables.register, [guest.slat.register])
    assert only.system.startswith("Windows 10.0.19041 (ntkrnlmp.pdb")
    assert found["0"].name == "Hyper-V root partition, VTL0 and VTL1"
    assert f"mapped by {only.root.kind} root {tables.register:#x} (VTL1)" in found["0"].evidence[-1]
    assert f"not by {only.root.kind} root {guest.slat.register:#x} (VTL0)" in found["0"].evidence[-1]


def test_a_view_with_a_secure_kernel_and_no_other_is_vtl1():
    ram = HostRam(0x200_0000)
    guest = windows.Windows(ram, paging.EPT_4, first=0x40_0000, base=windows.KERNEL)
    hyperv.secure_level(guest)
    for rva in (0, 0x6000):
        ram.write(guest.placed[guest.page(guest.base + rva)], bytes(PAGE))
    found, discovery = named(ram)
    (only,) = discovery.machines
    assert only.system.startswith("Windows secure kernel 10.0.19041 (securekernel.pdb")
    assert found["0"].name == "VTL1 (securekernel)"


def test_an_image_in_a_file_cache_of_another_hypervisor_makes_no_partition():
    """A KVM host that has a Windows disk in its page cache has Hyper-V's image in no guest's memory."""
    ram, _ = windows.host()
    base = ram.reserve(Pe().size)
    for rva, data in Pe(pdb="hvix64.pdb").parts().items():
        ram.write(base + rva, data)
    found, _ = named(ram)
    assert found == {"0": None}


def test_an_identity_map_without_an_image_is_no_root_partition():
    ram = HostRam(0x200_0000)
    guest = windows.Windows(ram, paging.NPT_4, first=0x40_0000, identity=True)
    guest.vcpu()
    found, _ = named(ram)
    assert found == {"0": None}


def test_hyper_vs_file_in_the_memory_of_that_windows_makes_no_root_partition():
    ram = HostRam(0x200_0000)
    guest = windows.Windows(ram, paging.NPT_4, first=0x40_0000, identity=True)
    for rva, data in Pe(pdb="hvax64.pdb").parts().items():
        guest.write(0xFFFF_C180_0000_0000 + rva, data)
    guest.vcpu()
    found, _ = named(ram)
    assert found == {"0": None}


def test_two_roots_that_both_map_the_secure_kernel_are_no_trust_levels():
    hypervisor = HyperV()
    guest = hypervisor.root()
    hyperv.secure_level(guest, **hypervisor.host)
    for gpa in range(hyperv.SECURE_GPA, hyperv.SECURE_GPA + 12 * PAGE, PAGE):
        guest.slat.map(gpa, gpa)
    found, discovery = named(hypervisor.ram)
    assert len(discovery.machines[0].views) == 1
    assert found["0"].name == "Hyper-V root partition"


def test_a_secure_kernels_file_in_the_only_view_is_no_trust_level():
    ram, guest = windows.host()
    for rva, data in Pe(pdb="securekernel.pdb").parts().items():
        guest.write(0xFFFF_C180_0000_0000 + rva, data)
    found, _ = named(ram)
    assert found == {"0": None}


def test_the_hypervisors_header_is_not_needed():
    hypervisor = HyperV()
    guest = hypervisor.root()
    hypervisor.tables.put(hyperv.IMAGE, "PTE", 0)
    found, _ = named(hypervisor.ram)
    assert found["0"].name == "Hyper-V root partition"
    assert guest.identity


def test_hyper_v_in_a_guest_of_another_hypervisor():
    """KVM runs a Windows with Hyper-V: the guest is a host, and its partitions stand below it."""
    ram = HostRam()
    outer = machine.Guest(ram, pages=320)
    outer.vcpu()
    HyperV(outer.ram).child()
    found, _ = named(ram)
    assert {key: role.name for key, role in found.items()} == {"0": "Hyper-V host", "0.0": "Hyper-V child partition"}
    assert "hvix64.pdb" in found["0"].evidence[0]


def test_a_host_without_windows_is_not_searched(monkeypatch):
    ram, _ = machine.host(paging.EPT_4)
    monkeypatch.setattr("volatility3_ept.core.rsds.search", lambda memory: pytest.fail("searched"))
    memory = memory_of(ram)
    monkeypatch.setattr("volatility3_ept.core.search.identify.windows.find", lambda *_: None)
    found = search.discover(memory)
    assert [roles.role(m, found, memory) for m in found.all()] == [None]
