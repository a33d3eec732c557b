"""The Windows kernel of a guest: found from registers, from its PDB record, or not at all; never a file's."""

from __future__ import annotations

import functools
import struct
from dataclasses import replace

import numpy as np
import pytest
from builders import paging, windows
from builders.machine import Guest
from builders.paging import PAGE, HostRam, Tables
from builders.windows_pe import GUID_TEXT, RDATA, RESOURCES, Pe
from readers import READERS, memory_of

from volatility3_ept.core import guestvirtual, identify, search, wintables
from volatility3_ept.core import windows as kernels
from volatility3_ept.core.guestcpu import Registers
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import ia32e

NAME = f"Windows 10.0.19041 (ntkrnlmp.pdb {GUID_TEXT}-1)"
SHAPES = pytest.mark.parametrize("shape", [paging.EPT_4, paging.NPT_4], ids=lambda shape: shape.name)


def discovered(ram: HostRam):
    """Return the only machine of a host."""
    (machine,) = search.discover(memory_of(ram)).machines
    return machine


@functools.cache
def standard(shape=paging.EPT_4, **options):
    """Return a guest and its machine, for tests that change neither."""
    ram, guest = windows.host(shape, **options)
    return guest, discovered(ram)


def found(machine, registers: bool = True):
    """Return the kernel of a machine, with or without what its vCPUs hold."""
    states = guestvirtual.states(machine) if registers else ()
    return kernels.find(machine.memory, machine.paging, machine.spaces, states)


@SHAPES
@pytest.mark.parametrize("options", [{}, {"shadow": True}, {"has_version_block": True}], ids=str)
def test_the_registers_lead_to_the_kernel(shape, options):
    guest, machine = standard(shape, **options)
    kernel = found(machine)
    assert (kernel.name, kernel.base, kernel.gpa) == (NAME, guest.base, guest.page(guest.base))
    assert (kernel.by_registers, kernel.is_shadowed) == (True, bool(options.get("shadow")))
    assert kernel.image.missing == ()


@SHAPES
def test_where_a_users_page_tables_are_loaded_the_kernels_are_found(shape):
    """KVA shadow: CR3 in the control structure maps no more of the kernel than its entry code."""
    guest, machine = standard(shape, shadow=True)
    kernel = found(machine)
    own = guest.roots[windows.PROCESSES[-1].pid].root
    assert guest.cr3 & ~0xFFF == guest.user_root != own
    assert kernel.space.cr3 & ~0xFFF == own
    assert "KVA shadow" in kernel.why


@pytest.mark.parametrize("right", [True, False])
def test_of_all_tables_that_map_themselves_one_counts_that_has_the_handlers_where_the_users_has_them(right):
    """The pair cannot be told by its user entries here, and another Windows has its kernel at the same address."""
    ram, guest = windows.host(shadow=True, first=0x700_0000)
    guest.ram.write_entry(guest.user_root + 8 * 3, 0x67)
    if not right:
        for tables in guest.roots.values():
            guest.ram.write_entry(tables.root + 8 * guest.self_index, 0)
    other = windows.Windows(HostRam(ram.reserve(1 << 24)), first=0x600_0000, pe=Pe(guid=bytes(16)))
    for gpa, at in other.placed.items():
        if gpa >= other.first:
            ram.write(at, bytes(other.below.page(at)))
            guest.slat.map(gpa, at)
    machine = search.discover(memory_of(ram)).machines[0]
    assert {space.cr3 for space in wintables.spaces(machine.memory, ia32e.four_level())} >= {other.own.root}
    kernel = kernels._by_registers(machine.memory, guestvirtual.states(machine)[0])
    assert (kernel.image.pdb.guid if kernel else None) == (GUID_TEXT if right else None)


@pytest.mark.parametrize(("shape", "pe", "base", "cr4", "efer"), [
    (paging.PAE, Pe(machine=0x14C, pdb="ntkrpamp.pdb"), 0x8260_0000, 0x6F8, 0x800),
    (paging.LEGACY, Pe(machine=0x14C, pdb="ntoskrnl.pdb"), 0x804D_7000, 0x6D8, 0),
    (paging.LONG_5, Pe(pdb="ntkrla57.pdb"), windows.KERNEL, 0x1_76F8, 0xD01),
], ids=["PAE", "32-bit", "5-level"])  # fmt: skip
@pytest.mark.parametrize("by", ["KdVersionBlock", "IDT handler 0", "RIP", "its RSDS record"])
def test_every_paging_mode_of_windows(shape, pe, base, cr4, efer, by):
    ram = HostRam()
    tables = Tables(ram, shape)
    wide = shape is paging.LONG_5
    idt, region, block = base + 0x10_0000, base + 0x20_0000, base + 0x30_0000
    pages = {}
    for address in (*(base + rva for rva in pe.parts()), base + windows.HANDLERS, idt, region, block):
        pages[address] = ram.allocate()
        tables.map(address, pages[address])
    for rva, data in pe.parts().items():
        ram.write(pages[base + rva], data)
    handler = base + windows.HANDLERS + 0x40
    if wide:
        gate = struct.pack("<HHBBHII", handler & 0xFFFF, 0x10, 0, 0x8E, handler >> 16 & 0xFFFF, handler >> 32, 0)
        ram.write(pages[region] + 0x18, struct.pack("<Q", region))
        ram.write(pages[region] + 0x108, struct.pack("<Q", block))
    else:
        gate = struct.pack("<HHBBH", handler & 0xFFFF, 8, 0, 0x8E, handler >> 16)
        ram.write(pages[region] + 0x1C, struct.pack("<I", region))
        ram.write(pages[region] + 0x34, struct.pack("<I", block))
    ram.write(pages[idt], gate)
    ram.write(pages[block] + 0x10, struct.pack("<Q", base | (0 if wide else 0xFFFF_FFFF_0000_0000)))
    held = {
        "KdVersionBlock": {"gs_base" if wide else "fs_base": region},
        "IDT handler 0": {"idtr_base": idt},
        "RIP": {},
    }
    if by in held:
        state = Registers(cr0=0x8005_0033, cr3=tables.register, cr4=cr4, efer=efer, rip=handler, **held[by])
        kernel = kernels.find(memory_of(ram), states=[state])
    else:
        kernel = kernels.find(memory_of(ram), READERS[shape], [tables.register])
    assert (kernel.base, kernel.gpa, kernel.image.pdb.name) == (base, pages[base], pe.pdb)
    assert kernel.how.startswith(f"found from {by} ")


@SHAPES
def test_each_source_of_an_address_is_named(shape):
    how = found(standard(shape)[1]).how
    assert ("LSTAR" if shape is paging.NPT_4 else "IDT handler 0") in how
    assert ("VMCB" if shape is paging.NPT_4 else "VMCS") in how


def test_without_registers_the_record_and_the_page_tables_lead_there():
    guest, machine = standard()
    kernel = found(machine, registers=False)
    assert (kernel.name, kernel.base, kernel.by_registers) == (NAME, guest.base, False)
    assert "RSDS record" in kernel.why


def test_without_a_known_root_a_table_that_maps_itself_leads_there():
    guest, machine = standard()
    kernel = kernels.find(machine.memory)
    assert (kernel.base, kernel.space.cr3) == (guest.base, guest.own.root)


def test_without_any_page_tables_the_image_is_named_and_no_address_is_given():
    memory = HostMemory.from_bytes(flat_image())
    kernel = kernels.find(memory)
    assert (kernel.name, kernel.base, kernel.space, kernel.gpa) == (NAME, None, None, 0x3000)


def flat_image(pe: Pe | None = None, at: int = 0x3000) -> bytes:
    """Return memory in which an image lies in one piece."""
    pe = pe or Pe()
    out = bytearray(at + pe.size)
    for rva, data in pe.parts().items():
        out[at + rva : at + rva + len(data)] = data
    return bytes(out)


@pytest.mark.parametrize(("rva", "missing"), [
    (RDATA, "debug directory not in memory"), (RESOURCES, "resource directory not in memory")
])  # fmt: skip
@SHAPES
def test_a_page_of_the_image_that_is_paged_out_is_missing_and_the_kernel_is_found(shape, rva, missing):
    ram, guest = windows.host(shape)
    guest.own.put(guest.base + rva, "PTE", 0x80 << 32 | 0x80)  # in a pagefile
    kernel = found(discovered(ram))
    assert kernel.base == guest.base
    assert kernel.image.missing == (missing,)
    assert missing in kernel.why
    if rva == RESOURCES:
        assert kernel.name == NAME, "the version is taken from the page that all processes share"
    else:
        assert kernel.name == "Windows 10.0.19041 (its PDB record is not in memory)"


def test_a_record_far_above_its_header_is_found():
    """Volatility gives up after a hundred pages that are not there."""
    far = Pe(rdata=0x90_0000, size=0xA0_0000)
    ram, guest = windows.host(pe=far)
    kernel = found(discovered(ram))
    assert (kernel.name, kernel.base) == (NAME, guest.base)


def test_a_record_in_the_data_of_another_image_names_no_kernel():
    """A debugger's driver has a copy of the kernel's record; it is mapped where the kernel would be."""
    driver = Pe(pdb="kdriver.pdb")
    data = bytearray(flat_image(driver))
    data[0x3000 + 0x9000 : 0x3000 + 0x9000 + 60] = Pe().debug()[0x40:].ljust(60, b"\0")
    ram = HostRam(0x100_0000)
    ram.write(0, bytes(data))
    tables = Tables(ram, paging.LONG_4)
    for rva in range(0, driver.size, PAGE):
        tables.map(windows.KERNEL + rva, 0x3000 + rva)
    memory = memory_of(ram)
    assert [str(record.pdb) for record in kernels.rsds.search(memory)] == [f"ntkrnlmp.pdb {GUID_TEXT}-1"]
    assert kernels.find(memory) is None
    assert kernels.find(memory, ia32e.four_level(), [tables.root]) is None


def test_a_control_region_that_does_not_name_itself_is_none():
    ram, guest = windows.host(has_version_block=True)
    guest.word(windows.PCR + 0x18, windows.PCR + 8)
    assert found(discovered(ram)).how.startswith("found from IDT handler 0 ")


def test_a_gate_that_is_not_present_leads_nowhere():
    ram, guest = windows.host()
    guest.word(windows.IDT + 5, 0x0E, 1)
    assert found(discovered(ram)).how.startswith("found from IDT handler 3 ")


def test_a_drivers_image_around_rip_is_not_the_kernel():
    ram, guest = windows.host()
    driver = guest.base - 0x10_0000
    for rva, data in Pe(pdb="intelppm.pdb").parts().items():
        guest.write(driver + rva, data)
    machine = discovered(ram)
    state = replace(guestvirtual.states(machine)[0], rip=driver + 0x40, idtr_base=0)
    kernel = kernels.find(machine.memory, ia32e.four_level(), [guest.cr3], [state])
    assert (kernel.base, kernel.by_registers) == (guest.base, False)


def test_a_kernels_file_in_memory_is_not_the_kernel_that_runs():
    """Another build, as an update leaves it in the file cache, comes first in memory."""
    ram, guest = windows.host(first=0x700_0000)
    machine = discovered(ram)
    other = Pe(guid=bytes(16))
    pages = {}
    for rva, data in other.parts().items():
        pages[rva & -PAGE] = ram.allocate()
        ram.write(pages[rva & -PAGE] | rva % PAGE, data)
    for rva, page in pages.items():
        guest.slat.map(0x600_0000 + rva, page)
    memory = search.discover(memory_of(ram)).machines[0].memory
    assert kernels.rsds.search(memory)[0].pdb.guid == "0" * 32
    for states in (guestvirtual.states(machine), ()):
        kernel = kernels.find(memory, machine.paging, machine.spaces, states)
        assert (kernel.image.pdb.guid, kernel.base) == (GUID_TEXT, guest.base)


def test_a_linux_guest_has_no_windows_kernel():
    ram = HostRam()
    guest = Guest(ram)
    guest.vcpu()
    assert found(discovered(ram)) is None


def test_ept_scans_name_is_the_kernels():
    _, machine = standard()
    assert machine.system == NAME
    (evidence,) = [item for item in machine.evidence if item.name == "system"]
    assert evidence.held is True
    assert "IDT handler" in evidence.detail


def test_a_record_alone_is_named_as_before():
    memory = HostMemory.from_bytes(b"RSDS".ljust(24, b"\1") + b"ntkrnlmp.pdb\0".ljust(2 * PAGE, b"\0"))
    identity = identify.identify(memory)
    assert (identity.name, identity.is_certain) == ("Windows (ntkrnlmp.pdb)", False)


def test_hostile_headers_under_every_address_cost_a_few_reads(monkeypatch):
    """Each page below the handlers begins an image that claims nothing: only some are looked at."""
    ram, guest = windows.host(pages=400)
    for page in range(1, 200):
        guest.write(guest.base - page * PAGE, Pe(size=PAGE).headers())
    guest.own.put(guest.base, "PTE", 0)  # and the kernel's own is gone
    read = []
    identify_ = kernels.pe.identify
    monkeypatch.setattr(kernels.pe, "identify", lambda reader: read.append(1) or identify_(reader))
    memory = memory_of(ram)
    guest_memory = search.Root.parse(f"eptp={guest.slat.register:#x}").traverse(memory).memory(memory)
    space = kernels.Space(guest_memory, ia32e.four_level(), guest.cr3)
    assert kernels._image_below(space, space.plain(guest.base + windows.HANDLERS)) is None
    assert len(read) == kernels._MAX_HEADERS


def test_records_without_number_are_not_all_followed(monkeypatch):
    """Each lies where the guest maps its kernel, and none has a header."""
    ram, guest = windows.host(pages=400)
    record = b"RSDS" + bytes(20) + b"ntkrnlmp.pdb\0"
    for page in range(250):
        guest.write(guest.base + 0x100_0000 + page * PAGE, record * 8)
    guest.own.put(guest.base, "PTE", 0)
    memory = memory_of(ram)
    guest_memory = search.Root.parse(f"eptp={guest.slat.register:#x}").traverse(memory).memory(memory)
    looked = []
    below = kernels._image_below
    monkeypatch.setattr(kernels, "_image_below", lambda space, address: looked.append(1) or below(space, address))
    assert kernels.find(guest_memory, ia32e.four_level(), [guest.own.root]) is None
    assert 0 < len(looked) <= 2 * kernels._MAX_FOLLOWED


@pytest.mark.parametrize(("rows", "expected"), [
    ({0x1A7: 0x5000 | 0x63}, True),
    ({0x1A7: 0x5000 | 0x62}, False),  # not present
    ({0x1A7: 0x5000 | 0x63, 0x1A8: 0x5000 | 0x63}, False),  # twice: not what Windows writes
    ({0x0A7: 0x5000 | 0x63}, False),  # in the user's half
    ({0x1A7: 0x5000 | 0x63, 3: 0x9000 | 0xE3}, False),  # bit 7 is reserved in a top table
    ({0x1A7: 0x8000_0000_0000_5063}, True),
])  # fmt: skip
def test_which_tables_map_themselves(rows, expected):
    words = np.zeros((1, 512), dtype=np.uint64)
    for index, value in rows.items():
        words[0, index] = value
    assert wintables._maps_itself(words, np.array([0x5000], dtype=np.uint64)).tolist() == [expected]


@pytest.mark.parametrize(("major", "minor", "build", "version"), [
    (10, 0, 19041, "10.0.19041"), (6, 1, 0, "6.1"), (6, 3, 77, "6.3"), (7, 0, 0, ""), (10, 77, 1, ""), (0, 0, 0, ""),
])  # fmt: skip
def test_the_version_of_the_shared_page(major, minor, build, version):
    ram = HostRam()
    tables = Tables(ram, paging.LONG_4)
    page = ram.allocate()
    tables.map(windows.KUSER, page)
    ram.write(page + 0x260, struct.pack("<IIIII", build, 0, 0, major, minor))
    space = kernels.Space(memory_of(ram), ia32e.four_level(), tables.root)
    assert wintables.version(space) == version


def test_tables_are_looked_for_in_ranges_in_their_order():
    guest, machine = standard()
    memory, fmt = machine.memory, ia32e.four_level()
    roots = sorted(tables.root for tables in guest.roots.values())
    assert [space.cr3 for space in wintables.spaces(memory, fmt)] == roots
    assert [space.cr3 for space in wintables.spaces(memory, fmt, [(0x0, 0x10_0000)])] == []
    ranges = [(roots[1], PAGE), (roots[0], PAGE)]
    assert [space.cr3 for space in wintables.spaces(memory, fmt, ranges)] == [roots[1], roots[0]]
