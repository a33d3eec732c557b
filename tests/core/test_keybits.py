"""The C-bit and KeyIDs in entries and root registers: stripped, and never mistaken for address."""

from __future__ import annotations

import pytest
from builders import machine, paging
from builders.machine import Guest
from builders.paging import PAGE, HostRam, Tables
from readers import memory_of

from volatility3_ept.core import keybits, search
from volatility3_ept.core.root import Root
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.paging import Outcome


def encrypt(tables: Tables, key: int) -> None:
    """Set key bits in every entry of a hierarchy that is not empty."""
    for table in tables.table_pages:
        for at in range(table, table + PAGE, 8):
            entry = tables.ram.read_entry(at)
            if entry:
                tables.ram.write_entry(at, entry | key)


def host(shape: paging.Shape, key: int, in_register: bool = True) -> tuple[HostRam, Guest]:
    ram, (guest,) = machine.host(shape)
    encrypt(guest.tables, key)
    name = "eptp" if shape in (paging.EPT_4, paging.EPT_5) else "ncr3"
    if in_register:
        ram.write(guest.structures[0], guest.control_page(**{name: guest.root | key}))
    return ram, guest


@pytest.mark.parametrize("in_register", [True, False])
@pytest.mark.parametrize(("shape", "key", "bit"), [
    (paging.NPT_4, 1 << 47, 47), (paging.NPT_4, 1 << 51, 51), (paging.NPT_5, 1 << 51, 51), (paging.NPT_4, 1 << 43, 43),
    (paging.EPT_4, 1 << 45, 45), (paging.EPT_4, 0b1010 << 42, 43), (paging.EPT_5, 1 << 51, 51),
])  # fmt: skip
def test_a_machine_is_found_whole_whatever_key_its_tables_carry(shape, key, bit, in_register):
    ram, guest = host(shape, key, in_register)
    (found,) = search.discover(memory_of(ram)).machines
    assert found.root.key_bit == bit
    assert [str(bit) in item.detail for item in found.evidence if item.name == "memory encryption"] == [True]
    assert {gpa: int(found.guest_map.to_hpa(gpa)) for gpa in guest.placed} == guest.placed
    assert found.paging == ia32e.four_level()


def test_the_search_by_structure_knows_the_c_bit_that_a_vmcb_shows():
    ram, guest = host(paging.NPT_4, 1 << 51)
    (found,) = search.discover(memory_of(ram)).machines
    assert (found.root.address, found.found_by) == (guest.root, "VMCB, page tables")


@pytest.mark.parametrize("shape", [paging.NPT_4, paging.EPT_4], ids=["NPT", "EPT"])
def test_the_fast_traversal_and_the_walk_agree_on_keys(shape):
    ram, guest = host(shape, 1 << 47)
    memory = memory_of(ram)
    (found,) = search.discover(memory).machines
    for gpa, hpa in guest.placed.items():
        walk = found.root.walk(memory, gpa)
        assert (walk.outcome, walk.target) == (Outcome.MAPPED, hpa)


@pytest.mark.parametrize("shape", [paging.NPT_4, paging.EPT_4], ids=["NPT", "EPT"])
def test_no_key_is_seen_where_there_is_none(shape):
    ram, (guest,) = machine.host(shape)
    assert keybits.infer(memory_of(ram), Root("NPT" if shape is paging.NPT_4 else "EPT", guest.root)) == 0


def test_frames_above_a_cut_capture_are_addresses_and_no_keys():
    """A capture of the low memory alone: stripped of a high bit, a frame that is missing would be another page's."""
    ram = HostRam()
    tables = Tables(ram, paging.NPT_4)
    low = ram.allocate()
    for page in range(64):
        tables.map(page * PAGE, low | 1 << 38)
    assert keybits.infer(memory_of(ram), Root("NPT", tables.root)) == 0


def test_a_devices_registers_far_above_memory_are_no_key():
    ram, (guest,) = machine.host(paging.EPT_4)
    for page in range(512):
        guest.tables.put(0xF_0000_0000 + page * PAGE, "PTE", 0x3800_0010_0000 + page * PAGE | 7)  # uncached
    (found,) = search.discover(memory_of(ram)).machines
    assert found.root.key_bit == 0
    assert int(found.guest_map.to_hpa(0xF_0000_1000)) == 0x3800_0010_1000


def test_kvms_markers_for_a_frame_buffer_are_no_c_bit():
    """On a host without SME the marker is bit 51, and the guest's number of the page may be memory of the host's."""
    ram, (guest,) = machine.host(paging.NPT_4)
    for page in range(512):
        ram.page(0x80_0000 + page * PAGE)
        guest.tables.put(0x80_0000 + page * PAGE, "PTE", 1 << 51 | 0x80_0000 + page * PAGE | 0x5)
    (found,) = search.discover(memory_of(ram)).machines
    assert found.root.key_bit == 0
    assert len(found.guest_map.findings.mmio) == 512


def test_a_given_key_is_left_as_it_is():
    ram, guest = host(paging.NPT_4, 1 << 47)
    root = Root("NPT", guest.root, key_bit=51)
    assert keybits.resolved(memory_of(ram), root) is root


def test_the_c_bit_of_npt_is_one_bit_and_a_keyid_all_above_it():
    assert Root("NPT", 0x1000, key_bit=47).format.key_bits == 1 << 47
    assert Root("EPT", 0x105E, key_bit=41, physical_bits=46).format.key_bits == 0x1F << 41
    assert Root("EPT", 0x105E, key_bit=41).format.key_bits == 0x7FF << 41


def test_kvms_markers_are_told_from_pages_where_the_c_bit_is_bit_51():
    """With SME KVM's marker sets the reserved bits below the C-bit too; a page sets the C-bit alone."""
    ram, (guest,) = machine.host(paging.NPT_4)
    guest.tables.put(0xFEE0_0000, "PTE", 0x000F_F800_FEE0_0000 | 0x5)
    encrypt(guest.tables, 1 << 51)
    memory = memory_of(ram)
    root = Root("NPT", guest.root | 1 << 51, key_bit=51)
    found = root.traverse(memory)
    assert [row[0] for row in found.findings.mmio.tolist()] == [0xFEE0_0000]
    assert found.mapped_bytes == PAGE * len(guest.placed)


def test_a_guests_own_c_bit_is_taken_out_of_its_cr3_and_tables():
    ram = HostRam()
    guest = Guest(ram, paging.NPT_4, first=PAGE)
    encrypt(guest.own, 1 << 47)
    guest.vcpu(nested=0b11, cr3=guest.own.root | 1 << 47)
    (found,) = search.discover(memory_of(ram)).machines
    assert found.paging is not None
    assert found.paging.key_bits == 1 << 47
    assert any(item.name == "guest page tables" and item.held for item in found.evidence)
