"""What fuzzing has found, each with the input made readable. docs/fuzzing.md has the table."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from builders import control, paging, vmm
from builders.machine import Guest, host
from builders.paging import PAGE, HostRam
from readers import READERS, memory_of

from volatility3_ept.core import backing, containers, keybits, layouts, leaves, search, structural, vmcb
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.index import Index
from volatility3_ept.core.machines import Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT, Root, RootError
from volatility3_ept.core.slots import Slot

# What a guest writes into its own memory


def writable(guest: Guest, count: int) -> list[int]:
    """Return pages of a guest, by their address in the host, that its kernel does not need."""
    return [guest.placed[gpa] for gpa in sorted(guest.placed)[-count:]]


def found_again(memory: HostMemory, guest: Guest) -> list[Machine]:
    return [machine for machine in search.discover(memory).machines if machine.root.raw == guest.root]


def test_a_forged_map_of_the_whole_host_does_not_make_the_neighbour_vanish():
    """It held the neighbour's control structure, and was held by its author: neither was shown."""
    ram, (neighbour, author) = host(paging.EPT_4, paging.EPT_4)
    top, directory, structure = writable(author, 3)
    ram.write_entry(top, directory | 0x7)
    ram.write_entry(directory, 0xB7)  # 1G, all of the host
    ram.write(structure, control.vmcs(eptp=top | 0x5E))
    (machine,) = found_again(memory_of(ram), neighbour)
    assert [vcpu.hpa for vcpu in machine.vcpus] == neighbour.structures


@pytest.mark.parametrize(("shape", "register"), [(paging.EPT_5, 0x5E), (paging.EPT_4, 0x66)])
def test_a_forged_structure_does_not_decide_how_many_levels_a_neighbours_root_has(shape, register):
    """It lay at the lower address, and its EPTP was taken for both."""
    ram = HostRam()
    author, neighbour = Guest(ram, paging.EPT_4), Guest(ram, shape)
    author.vcpu()
    neighbour.vcpu()
    (page,) = writable(author, 1)
    ram.write(page, control.vmcs(eptp=neighbour.root & -PAGE | register))
    (machine,) = found_again(memory_of(ram), neighbour)
    assert [vcpu.hpa for vcpu in machine.vcpus] == neighbour.structures
    assert len(machine.root.format.levels) == len(shape.rungs)


def test_a_guest_cannot_write_its_own_npt():
    """A VMCB does not say how many levels there are: read with one too many, the guest's first page is a table.

    Here it is the guest's own top table, in whose lower half it has written the frames of its pages, and of the host's.
    """
    ram, (guest,) = host(paging.NPT_4)
    for number in range(256):
        frame = guest.placed.get(number * PAGE, 0x10_0000 + number * PAGE)
        ram.write_entry(guest.placed[guest.own.root] + 8 * number, frame | 0x67)
    (machine,) = search.discover(memory_of(ram)).machines
    assert len(machine.root.format.levels) == 4
    assert machine.guest_map.mapped_bytes == 32 * PAGE


def test_a_key_is_not_taken_out_of_an_address_that_is_nothing_else():
    """A forged root of one high bit, in a guest that has a page at address 0, was an exception."""
    memory = HostMemory.from_bytes(bytes(16 * PAGE))
    root = Root(EPT, 1 << 45 | 0x5E)
    assert keybits.resolved(memory, root) == root


def test_a_monitor_that_has_its_guest_at_address_0_is_no_exception():
    """A guest that is a hypervisor may be its own monitor, and write any page tables."""
    monitored = vmm.Guest(vmm.Host(), vmm.Tables(HostRam()))
    monitored.vmm = monitored.host.process()
    monitored.back(0, 0, 1)
    memory = memory_of(monitored.host.ram)
    guest_map = leaves.traverse(memory, READERS[monitored.slat.shape], monitored.slat.register)
    (slot,) = backing.recover(memory, guest_map, [monitored.vmm.root]).slots
    assert (slot.gpa, slot.hva, slot.length, slot.confirmed) == (0, 0, PAGE, False)


def test_a_process_that_maps_all_frames_again_with_each_entry_is_passed_over():
    """512 entries of 1G each met every one of 2**18 scattered frames: 2**27 votes, from one page of forged tables."""
    scattered = np.random.default_rng(0).permutation(1 << 18).astype(np.int64) << 12
    gpas = np.arange(1 << 18, dtype=np.int64) << 12
    guest_map = GuestMap(gpas, np.full(1 << 18, PAGE, dtype=np.int64), 1 << 32 | scattered | 0x67)
    monitor = vmm.Host()
    process = monitor.process()
    for number in range(512):
        process.map(number << 30, 1 << 32, 1 << 30, vmm.DATA | 0x80)
    monitor.ram.page((5 << 30) - PAGE)
    found = backing.recover(memory_of(monitor.ram), guest_map, [process.root], confirm=False)
    assert not found.slots
    assert any("over and over" in note for note in found.notes)


@pytest.mark.parametrize("pointer", [0xFFFF_FFFF_8108_0000, 1 << 52, 0])
def test_the_address_of_an_encrypted_save_area_is_a_physical_one(pointer):
    """A kernel's address was counted as evidence for a VMCB that the search itself passed over."""
    found = vmcb.examine(control.sev_es_vmcb(vmsa=pointer), 0x1000)
    assert found is None or "VMSA" in [item.name for item in found.failed]
    good = vmcb.examine(control.sev_es_vmcb(), 0x1000)
    assert good is not None
    assert not good.failed


# Text that is read back


@pytest.mark.parametrize("dialect", ["KVM", "kvm", "Kvm", "XEN"])
def test_a_root_reads_back_as_itself_however_its_dialect_was_spelt(dialect):
    root = Root.parse(f"eptp=0x10005e,dialect={dialect}")
    assert Root.parse(str(root)) == root


@pytest.mark.parametrize("cbit", ["-1", "5", "52", "99999999999999999999"])
def test_a_key_lies_among_the_bits_of_an_address(cbit):
    with pytest.raises(RootError, match="cbit"):
        Root.parse(f"ncr3=0x100000,cbit={cbit}")


@pytest.mark.parametrize("text", [
    "0x0:0x1000:0xffffffff81000000:0x5000:0x1000:0x0:0x4", "0x0:0x1000:0x0:0x5000:0x8000000000000000:0x0:0x4",
])  # fmt: skip
def test_a_slot_that_fits_no_address_space_is_refused(text):
    with pytest.raises(ValueError, match="no slot"):
        Slot.parse(text)


KEPT = Index((0x1000, 0x2000), 10, {"/eptp=0x10005e": "unknown"}, {}, {"": ()}, {}, ("a note",))


@pytest.mark.parametrize(("old", "new"), [("4096", "4097"), ("0x10005e", "0x10105e"), ("a note", "a mote")])
def test_an_index_with_one_changed_character_is_not_used(old, new):
    """It is JSON all the same, and its key is that of the capture."""
    text = KEPT.to_json("key")
    assert text.count(old) == 1
    assert Index.from_json(text, "key") == KEPT
    assert Index.from_json(text.replace(old, new), "key") is None


def test_an_index_of_a_hundred_thousand_brackets_is_not_used():
    assert Index.from_json("[" * 100_000, "key") is None


def test_a_damaged_slot_in_an_index_is_searched_for_again():
    ram, (guest,) = host(paging.EPT_4)
    memory = memory_of(ram)
    first = search.discover(memory)
    (name,) = first.index.slots
    known = Index(**{**vars(first.index), "slots": {name: ("0x0:broken",)}})
    (machine,) = search.discover(memory, known=known).machines
    assert machine.root.raw == guest.root


@pytest.mark.parametrize("changed", [
    {"root": 5}, {"root": None}, {"paging": []}, {"cr3": "x"}, {"evidence": [["name", "yes", "", 1]]},
    {"evidence": [["\x1b[31m", True, "", 1]]}, {"evidence": 7}, {"certainty": {}},
])  # fmt: skip
def test_a_row_of_an_index_with_a_value_of_the_wrong_sort_is_not_used(changed):
    ram, (guest,) = host(paging.EPT_4)
    memory = memory_of(ram)
    (row,) = search.discover(memory).index.found[""]
    assert structural.rows_to_found([row], memory) is not None
    assert structural.rows_to_found([json.dumps({**json.loads(row), **changed})], memory) is None
    assert guest.root


def table(**changed: object) -> str:
    """Return the table of a layout with one field, some of its parts replaced."""
    field = {"offset": 320, "type": {"kind": "base", "name": "word"}}
    whole = {
        "base_types": {"word": {"size": 8}},
        "metadata": {"producer": {"layout": {"is_software": False}}},
        "symbols": {},
        "user_types": {"_VMCS": {"size": 4096, "fields": {"EPTP": {**field, **dict(changed.pop("field", {}))}}}},
    }
    return json.dumps({**whole, **changed})


@pytest.mark.parametrize("text", [
    table(field={"offset": 4090}), table(field={"offset": -8}), table(field={"offset": float("inf")}),
    table(base_types=[]), table(symbols=None), table(user_types="x"), table(metadata=1), "[" * 100_000, "{}",
])  # fmt: skip
def test_the_table_of_a_layout_that_is_none_is_refused(text):
    assert layouts.parse_isf("good", table()).fields["EPTP"] == (320, 8)
    with pytest.raises(ValueError):
        layouts.parse_isf("bad", text)


# Headers of files


def elf(table_at: int = 64, sections: int = 0, entry: int = 56, count: int = 1, address: int = 0x1000) -> bytes:
    numbers = (4, 62, 1, 0, table_at, sections, 0, 64, entry, count, 64, 0, 0)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", *numbers)
    return (head + struct.pack("<IIQQQQQQ", 1, 0, 0x1000, 0, address, 0x1000, 0x1000, 0)).ljust(0x2000, b"\0")


@pytest.mark.parametrize("data", [
    elf(table_at=1 << 63), elf(sections=1 << 63, count=0xFFFF), elf()[:63], elf(address=1 << 63), elf(address=1 << 52),
], ids=["table beyond any file", "section header beyond any file", "header cut short", "address of 64 bits", "2**52"],
)  # fmt: skip
def test_headers_that_no_core_has_leave_the_file_to_volatility(data, tmp_path):
    path = tmp_path / "core"
    path.write_bytes(elf())
    assert containers.read(path) is not None
    path.write_bytes(data)
    assert containers.read(path) is None


def test_a_table_of_terabytes_in_a_small_file_takes_no_memory(tmp_path):
    """65,535 bytes for each of 4,294,967,295 program headers were asked for in one read."""
    section = bytes(44) + struct.pack("<I", 0xFFFF_FFFF)
    data = bytearray(elf(sections=0x1800, entry=0xFFFF, count=0xFFFF))
    data[0x1800 : 0x1800 + len(section)] = section
    path = tmp_path / "core"
    path.write_bytes(data)
    found = containers.read(path)
    assert found is not None
    assert [(s.start, s.length, s.offset) for s in found.segments] == [(0x1000, 0x1000, 0x1000)]
