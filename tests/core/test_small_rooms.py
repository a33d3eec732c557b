"""Masking, ranges, widths, identification, guest registers and the two-dimensional walk."""

from __future__ import annotations

import numpy as np
import pytest
from builders import machine, paging
from builders.machine import KERNEL, Guest
from builders.paging import PAGE, HostRam
from readers import memory_of

from volatility3_ept.core import guestcpu, identify, mask, nested, physaddr, ranges, search
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.paging import Outcome


def arrays(*pairs):
    rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


@pytest.mark.parametrize(("ranges_", "taken", "left"), [
    ([(0, 10)], [], [(0, 10)]), ([(0, 10)], [(0, 10)], []), ([(0, 10)], [(2, 4)], [(0, 2), (4, 10)]),
    ([(0, 10), (20, 30)], [(5, 25)], [(0, 5), (25, 30)]), ([(5, 9)], [(0, 5), (9, 20)], [(5, 9)]),
    ([(0, 4), (6, 9)], [(4, 6)], [(0, 4), (6, 9)]), ([], [(0, 4)], []),
])  # fmt: skip
def test_subtraction_of_ranges(ranges_, taken, left):
    starts, lengths = mask.subtract(arrays(*ranges_), arrays(*taken))
    assert [(s, s + n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)] == left


def test_ranges_tell_each_address_its_fate():
    ram = HostRam()
    tables = paging.Tables(ram)
    tables.back([0, PAGE, 2 * PAGE])
    tables.put(5 * PAGE, "PTE", 5 * PAGE | 6)  # KVM's marker: W and X, no R, its own number
    tables.put(6 * PAGE, "PTE", 0x9000 | 2)  # write without read: refused
    tables.map(7 * PAGE, 0x7FFF_F000)  # not in the capture
    tables.put(8 << 21, "PDE", 0x7FFF_0000 | 7)  # its table is not in the capture
    memory = memory_of(ram)
    found = Root.parse(f"eptp={tables.register:#x}").traverse(memory)
    fates = {item.gpa: item.what for item in ranges.listing(found, memory)}
    assert fates[0] == "mapped"
    assert fates[5 * PAGE] == "MMIO"
    assert fates[6 * PAGE] == "misconfigured (entry 0x9002)"
    assert fates[7 * PAGE] == "outside the capture"
    assert fates[8 << 21] == "table unreadable"
    assert list(fates) == sorted(fates)


def test_a_page_partly_in_the_capture_says_how_much_is_not():
    ram = HostRam()
    tables = paging.Tables(ram)
    base = ram.reserve(0x20_0000)
    ram.write(base, b"x" * PAGE)
    tables.map(0, base, 0x20_0000)
    memory = memory_of(ram)
    (only,) = ranges.listing(Root.parse(f"eptp={tables.register:#x}").traverse(memory), memory)
    assert only.what == "mapped, 0x1ff000 bytes outside the capture"


@pytest.mark.parametrize(("marker", "shape", "bounds"), [
    (0x0000_0005_0000_0006, paging.EPT_4, (32, 52)),
    (0x000F_FF80_0000_003A, paging.EPT_4, (39, 39)),  # VirtualBox: all bits from 39 on
    (0x0008_0000_0000_5001, paging.NPT_4, (32, 51)),
], ids=["nothing said", "VirtualBox", "KVM on AMD"])  # fmt: skip
def test_the_width_of_physical_addresses_as_the_tables_give_it_away(marker, shape, bounds):
    ram = HostRam()
    tables = paging.Tables(ram, shape)
    tables.back([0])
    tables.put(5 * PAGE, "PTE", marker)
    memory = memory_of(ram)
    root = Root("EPT" if shape is paging.EPT_4 else "NPT", tables.register)
    width = physaddr.derive(memory, root.traverse(memory), root)
    assert (width.low, width.high) == bounds


def test_a_given_width_counts():
    root = Root.parse("eptp=0x105e,maxphyaddr=46")
    memory = HostMemory.from_bytes(bytes(PAGE * 2))
    assert str(physaddr.derive(memory, root.traverse(memory), root)) == "46: given"


@pytest.mark.parametrize(("content", "system"), [
    (b"Linux version 6.1.0-53-amd64 (a@b) (gcc) #1 SMP\n", "Linux 6.1.0-53-amd64"),
    (b"Linux version %s (%s)", "unknown"),
    (b"Linux version \x1b[31m6.1 (a)", "unknown"),
    (b"RSDS" + bytes(range(20)) + b"ntkrnlmp.pdb\0", "Windows (ntkrnlmp.pdb)"),
    (b"nothing to see", "unknown"),
])  # fmt: skip
def test_a_system_is_named_only_by_what_cannot_be_anything_else(content, system):
    assert identify.system(HostMemory.from_bytes(content.ljust(2 * PAGE, b"\0"))) == system


@pytest.mark.parametrize(("cr0", "cr4", "efer", "names"), [
    (0x8000_0011, 0x20, 0xD01, ["4-level"]), (0x8000_0011, 0x1020, 0xD01, ["5-level"]),
    (0x8000_0011, 0x20, 0, ["PAE", "4-level"]), (0x8000_0011, 0x20, 0x100, ["4-level", "PAE"]),
    (0x8000_0011, 0x10, 0, ["32-bit"]), (0x11, 0x20, 0xD01, []),
])  # fmt: skip
def test_paging_modes_by_registers_with_efer_stale_or_missing(cr0, cr4, efer, names):
    modes = guestcpu.formats(guestcpu.Registers(cr0=cr0, cr4=cr4, efer=efer))
    assert [mode.name for mode in modes] == names


@pytest.fixture(scope="module")
def one():
    """A host with one EPT guest, its memory, and the machine that was found."""
    ram, (guest,) = machine.host(paging.EPT_4)
    memory = memory_of(ram)
    (found,) = search.discover(memory).machines
    return guest, memory, found


def test_the_two_dimensional_walk_counts_every_reference(one):
    guest, memory, found = one
    result = nested.walk(memory, found.root, found.memory, ia32e.four_level(), guest.own.root, KERNEL + 0x10)
    assert result.outcome is Outcome.MAPPED
    assert (result.gpa, result.hpa) == (guest.kernel_gpa + 0x10, guest.placed[guest.kernel_gpa] + 0x10)
    assert sum(reference.count for reference in result.references) == 24
    assert [reference.step is None for reference in result.references] == [False] * 4 + [True]


def test_a_guest_table_that_the_second_level_lacks_is_named_as_the_reason(one):
    _, memory, found = one
    result = nested.walk(memory, found.root, found.memory, ia32e.four_level(), 0x7FFF_F000, KERNEL)
    assert result.outcome is Outcome.NOT_PRESENT
    assert "guest-physical 0x7fffff" in result.reason


def test_a_guest_entry_that_is_not_present_is_the_guests_own_matter(one):
    guest, memory, found = one
    result = nested.walk(memory, found.root, found.memory, ia32e.four_level(), guest.own.root, 0x40_0000)
    assert result.outcome is Outcome.NOT_PRESENT
    assert result.reason.startswith("guest:")


def test_rights_are_the_and_of_both_dimensions():
    ram = HostRam()
    guest = Guest(ram)
    guest.tables.map(guest.kernel_gpa, guest.placed[guest.kernel_gpa], bits=0x35)  # R and X
    guest.vcpu()
    memory = memory_of(ram)
    (found,) = search.discover(memory).machines
    result = nested.walk(memory, found.root, found.memory, ia32e.four_level(), guest.own.root, KERNEL)
    assert result.access.letters() == "R-X"
