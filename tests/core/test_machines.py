"""Which machines there are, who holds whom, and what does not become one."""

from __future__ import annotations

import pytest
from builders import control, machine, paging
from builders.machine import Guest
from builders.paging import PAGE, HostRam
from readers import memory_of

from volatility3_ept.core import search

KINDS = {paging.EPT_4: "EPT", paging.EPT_5: "EPT", paging.NPT_4: "NPT", paging.NPT_5: "NPT"}


def discover(ram: HostRam):
    return search.discover(memory_of(ram))


def roots(found) -> dict[str, int]:
    return {m.id: m.root.raw for m in found.all()}


@pytest.mark.parametrize("shape", KINDS, ids=lambda shape: shape.name)
def test_a_guest_of_each_kind_is_found_with_its_memory_and_system(shape):
    ram, (guest,) = machine.host(shape)
    found = discover(ram)
    assert roots(found) == {"0": guest.root}
    (only,) = found.machines
    assert (only.root.kind, only.root.levels) == (KINDS[shape], len(shape.rungs))
    assert only.guest_map.mapped_bytes == 32 * PAGE
    assert only.system == "Linux 6.6.6-test"
    assert [v.hpa for v in only.vcpus] == guest.structures


def test_two_guests_are_two_machines_in_the_order_of_their_roots():
    ram, (first, second) = machine.host(paging.EPT_4, paging.NPT_4)
    assert roots(discover(ram)) == {"0": first.root, "1": second.root}


@pytest.mark.parametrize("shape", [paging.EPT_4, paging.NPT_4], ids=lambda shape: shape.name)
def test_vcpus_with_one_root_are_one_machine(shape):
    ram, (guest,) = machine.host(shape)
    guest.vcpu()
    guest.vcpu()
    (only,) = discover(ram).machines
    assert [v.hpa for v in only.vcpus] == guest.structures


@pytest.mark.parametrize("shape", [paging.EPT_4, paging.NPT_4], ids=lambda shape: shape.name)
def test_a_copy_of_a_control_structure_is_no_further_vcpu(shape):
    """A page cache or a crash buffer may hold one: it names the same per-vCPU pages as the original."""
    ram, (guest,) = machine.host(shape)
    copy = ram.allocate()
    ram.write(copy, bytes(ram.page(guest.structures[0])))
    (only,) = discover(ram).machines
    assert len(only.vcpus) == 1


@pytest.mark.parametrize(
    "page",
    [control.vmxon(0x12), control.vmxon(0x2B), control.host_save_area(), control.xen_host_vmcb(), b"\xff" * PAGE],
    ids=["VMXON", "VMXON of Bochs", "HSAVE", "Xen host VMCB", "all ones"],
)
def test_pages_that_look_alike_are_no_machine(page):
    ram = HostRam()
    ram.write(ram.allocate(), page)
    assert discover(ram).machines == ()


def test_a_control_structure_whose_root_is_an_ordinary_page_is_no_machine():
    ram = HostRam()
    target = ram.allocate()
    ram.write(target, b"just text, no tables " * 190)
    ram.write(ram.allocate(), control.vmcs(eptp=target | 0x5E))
    found = discover(ram)
    assert found.machines == ()
    assert len(found.rejected) == 1, "a rejected candidate is kept, for -vv"


def test_a_control_structure_whose_root_is_not_in_the_capture_is_no_machine_and_says_why():
    ram, (guest,) = machine.host(paging.EPT_4)
    ram.drop(guest.tables.root)
    found = discover(ram)
    assert found.machines == ()
    (rejected,) = found.rejected
    assert any("not in the capture" in item.detail for item in rejected.evidence)


def test_a_stale_cr3_does_not_hide_a_machine_with_many_pages():
    """On recent processors the guest fields of a VMCS in memory may be those of long ago."""
    ram = HostRam()
    guest = Guest(ram)
    guest.vcpu(guest_cr3=0x1F_F000)
    assert roots(discover(ram)) == {"0": guest.root}


def test_the_guest_of_a_guest_is_its_child():
    ram = HostRam()
    outer = Guest(ram, paging.EPT_4, pages=96)
    outer.vcpu()
    inner = Guest(outer.ram, paging.EPT_4, pages=16, layout="kvm")
    inner.vcpu()
    found = discover(ram)
    assert roots(found) == {"0": outer.root, "0.0": inner.root}
    child = found.find("0.0")
    assert child.tables_in == "0"
    assert child.memory.read(inner.kernel_gpa, 13) == b"Linux version"


def test_a_nested_structure_shows_its_address_in_the_guest_that_holds_it():
    ram = HostRam()
    outer = Guest(ram, paging.NPT_4, pages=96)
    outer.vcpu()
    inner = Guest(outer.ram, paging.NPT_4, pages=16)
    gpa = inner.vcpu()
    child = discover(ram).find("0.0")
    assert [(v.hpa, v.held_in) for v in child.vcpus] == [(gpa, "0")]


def test_a_third_level_hangs_below_the_second():
    ram = HostRam()
    outer = Guest(ram, paging.NPT_4, pages=200)
    outer.vcpu()
    middle = Guest(outer.ram, paging.NPT_4, pages=120)
    middle.vcpu()
    inner = Guest(middle.ram, paging.NPT_4, pages=16)
    inner.vcpu()
    assert roots(discover(ram)) == {"0": outer.root, "0.0": middle.root, "0.0.0": inner.root}


def test_outer_tables_of_a_nested_guest_are_a_child_and_not_a_neighbour():
    """VMCS02: the outer hypervisor maps the inner guest straight to its own frames."""
    ram = HostRam()
    outer = Guest(ram, paging.EPT_4, pages=96)
    outer.vcpu()
    inner = Guest(outer.ram, paging.EPT_4, pages=16)
    shadow = paging.Tables(ram, paging.EPT_4)
    for gpa, outer_gpa in inner.placed.items():
        shadow.map(gpa, outer.placed[outer_gpa])
    ram.write(ram.allocate(), inner.control_page(eptp=shadow.register, msr_bitmap=0x77_7000))
    outer.tables.put(inner.tables.root, "PTE", 0)  # the inner tables themselves are not to be found
    found = discover(ram)
    assert roots(found) == {"0": outer.root, "0.0": shadow.register}
    assert found.find("0.0").tables_in == ""


def test_a_copy_of_vmcs12_in_the_hosts_memory_belongs_to_the_guest_whose_memory_its_root_leads_to():
    """KVM works on a copy of its own: the page in the guest may hold nothing but its header."""
    ram = HostRam()
    outer = Guest(ram, paging.EPT_4, pages=96)
    outer.vcpu()
    bystander = Guest(ram, paging.EPT_4, pages=96)
    bystander.vcpu()
    inner = Guest(outer.ram, paging.EPT_4, pages=16, layout="kvm")
    kept = ram.allocate()
    ram.write(kept, inner.control_page(msr_bitmap=0x77_5000))
    found = discover(ram)
    assert roots(found) == {"0": outer.root, "0.0": inner.root, "1": bystander.root}
    (vcpu,) = found.find("0.0").vcpus
    assert (vcpu.hpa, vcpu.held_in) == (kept, "")


def test_inner_and_outer_tables_of_one_nested_guest_are_one_machine_with_two_views():
    ram = HostRam()
    outer = Guest(ram, paging.NPT_4, pages=96)
    outer.vcpu()
    inner = Guest(outer.ram, paging.NPT_4, pages=16)
    inner.vcpu()
    shadow = paging.Tables(ram, paging.NPT_4)
    for gpa, outer_gpa in inner.placed.items():
        shadow.map(gpa, outer.placed[outer_gpa])
    ram.write(ram.allocate(), inner.control_page(ncr3=shadow.register, msrpm=0x77_6000))
    found = discover(ram)
    assert roots(found) == {"0": outer.root, "0.0": inner.root}
    child = found.find("0.0")
    assert [(view.root.raw, view.tables_in) for view in child.views] == [(shadow.register, "")]
    assert len(child.vcpus) == 1


def test_inner_tables_that_are_mostly_gone_leave_the_outer_ones_as_the_machine():
    """KVM takes the pages around nested tables out of its own NPT: the inner hierarchy may then not be readable."""
    ram = HostRam()
    outer = Guest(ram, paging.NPT_4, pages=96)
    outer.vcpu()
    inner = Guest(outer.ram, paging.NPT_4, pages=16)
    inner.vcpu()
    shadow = paging.Tables(ram, paging.NPT_4)
    for gpa, outer_gpa in inner.placed.items():
        shadow.map(gpa, outer.placed[outer_gpa])
    ram.write(ram.allocate(), inner.control_page(ncr3=shadow.register, msrpm=0x77_6000))
    outer.tables.put(inner.tables.root, "PTE", 0)
    found = discover(ram)
    assert roots(found) == {"0": outer.root, "0.0": shadow.register}
    assert found.find("0.0").memory.read(inner.kernel_gpa, 13) == b"Linux version"


def test_inner_tables_that_nobody_announced_and_their_outer_ones_are_one_machine():
    ram = HostRam()
    outer = Guest(ram, paging.EPT_4, pages=96)
    outer.vcpu()
    inner = Guest(outer.ram, paging.EPT_4, pages=16)
    shadow = paging.Tables(ram, paging.EPT_4)
    for gpa, outer_gpa in inner.placed.items():
        shadow.map(gpa, outer.placed[outer_gpa])
    ram.write(ram.allocate(), inner.control_page(eptp=shadow.register, msr_bitmap=0x77_7000))
    found = discover(ram)
    assert {m.id: m.root.address for m in found.all()} == {"0": outer.tables.root, "0.0": inner.tables.root}
    child = found.find("0.0")
    assert [view.root.raw for view in child.views] == [shadow.register]
    assert len(child.vcpus) == 1


@pytest.mark.parametrize(
    "shape", [paging.EPT_4, paging.EPT_5, paging.NPT_4, paging.NPT_5], ids=lambda shape: shape.name
)
def test_a_guest_without_any_control_structure_is_found_by_its_tables(shape):
    ram = HostRam()
    guest = Guest(ram, shape, pages=600)
    for page in range(64):
        guest.own.map(machine.KERNEL + (page + 1) * PAGE, (20 + page) * PAGE)
    found = discover(ram)
    (only,) = found.machines
    assert only.root.address == guest.tables.root
    assert (only.found_by, only.vcpus) == ("page tables", ())
    assert only.guest_cr3 == guest.own.root


def test_two_roots_that_map_the_same_pages_are_two_views_of_one_machine():
    ram, (guest,) = machine.host(paging.EPT_4)
    second = paging.Tables(ram, paging.EPT_4)
    for gpa, hpa in list(guest.placed.items())[:-1]:
        second.map(gpa, hpa)
    guest.vcpu(eptp=second.register)
    (only,) = discover(ram).machines
    assert only.root.raw == guest.root
    assert [view.root.raw for view in only.views] == [second.register]


def test_what_a_guest_forges_never_becomes_a_machine_of_the_host():
    """The forged root names host-physical tables; read where it lies, in the guest's own space, it is nothing."""
    ram, (victim, attacker) = machine.host(paging.EPT_4, paging.EPT_4)
    forged = attacker.ram.allocate()
    attacker.ram.write(forged, victim.control_page(msr_bitmap=0x66_6000))
    found = discover(ram)
    assert roots(found) == {"0": victim.root, "1": attacker.root}
    assert all(len(m.vcpus) == 1 for m in found.all())


def test_a_forged_root_that_maps_the_whole_host_does_not_swallow_it():
    ram = HostRam()
    honest = Guest(ram, paging.EPT_4, pages=64)
    honest.vcpu()
    fake = paging.Tables(honest.ram, paging.EPT_4)
    # The attacker knows the host's addresses of its own pages, and maps all host memory at itself.
    fake_at_host = {gpa: honest.placed[gpa] for gpa in fake.table_pages}
    page = honest.ram.allocate()
    honest.ram.write(page, honest.control_page(eptp=fake_at_host[fake.root] | 0x5E, msr_bitmap=0x66_6000))
    found = discover(ram)
    assert found.find("0").root.raw == honest.root


def test_a_guest_that_never_ran_is_found_by_its_tables_and_controls():
    ram = HostRam()
    guest = Guest(ram)
    ram.write(ram.allocate(), control.never_launched(eptp=guest.root))
    assert roots(discover(ram)) == {"0": guest.root}


@pytest.mark.parametrize("trap", [
    {"guest_cr4": 0x37_26B0 | 1 << 23}, {"guest_cr4": 0x37_26B0 | 1 << 24}, {"link": 0x50_0000},
    {"guest_efer": 0}, {"guest_efer": 0x500},
], ids=["CET", "PKS", "link pointer", "EFER never saved", "EFER stale"])  # fmt: skip
def test_traps_that_other_tools_fall_into(trap):
    ram = HostRam()
    guest = Guest(ram)
    ram.write(0x50_0000, control.vmxon(0x8000_0012))
    guest.vcpu(**trap)
    assert roots(discover(ram)) == {"0": guest.root}


def test_access_tracked_pages_of_kvm_belong_to_the_guest():
    """On processors without A/D flags KVM takes R, W and X away for a while: bits 52, 54 and 56 remember."""
    ram = HostRam()
    guest = Guest(ram)
    for table in guest.tables.table_pages:
        for index in range(512):
            entry = ram.read_entry(table + 8 * index)
            if entry:
                ram.write_entry(table + 8 * index, entry | 1 << 11)
    tracked = guest.first + 20 * PAGE
    at = guest.tables.entry_address(tracked, "PTE")
    ram.write_entry(at, ram.read_entry(at) & ~7 | 1 << 52 | 1 << 54 | 1 << 56)
    guest.vcpu()
    (only,) = discover(ram).machines
    assert only.root.dialect == "KVM"
    assert only.memory.read(tracked, 8) is not None
