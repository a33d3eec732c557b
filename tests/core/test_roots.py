from __future__ import annotations

import time
from dataclasses import replace

import captures
import numpy as np
import pytest
from builders import paging
from builders import roots as built
from builders.paging import EPT_4, EPT_5, LONG_5, NPT_4, NPT_5, PAGE, HostRam, Tables
from builders.roots import G1, M2, plant, small_guest
from readers import memory_of

from volatility3_ept.core import roots
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.roots import Certainty
from volatility3_ept.core.source import FileSource, ReaderSource

PIB2 = 1 << 51
SHAPES = pytest.mark.parametrize("shape", [EPT_4, EPT_5, NPT_4, NPT_5], ids=lambda shape: shape.name)


def found(ram: HostRam, **kwargs) -> list[tuple[str, int, int, Certainty]]:
    return seen(memory_of(ram), **kwargs)


def seen(memory: HostMemory, **kwargs) -> list[tuple[str, int, int, Certainty]]:
    return [(f.root.kind, f.root.address, f.root.levels, f.certainty) for f in roots.find(memory, **kwargs)]


def exactly(planted: built.Planted, certainty: Certainty = Certainty.CERTAIN) -> list[tuple[str, int, int, Certainty]]:
    shape = planted.tables.shape
    kind = "NPT" if shape.page & 0x7F == 0x67 else "EPT"
    return [(kind, planted.root, len(shape.rungs), certainty)]


# The shapes that a hierarchy can have.


@SHAPES
@pytest.mark.parametrize("empty", [0, built.SUPPRESS_VE], ids=["zero", "bit 63"])
def test_a_small_guest_is_found_and_nothing_else(shape, empty):
    """Entries that only carry bit 63 (KVM since 6.10, Xen) are empty; a peer finds no root among them."""
    ram = HostRam()
    planted = plant(ram, shape, empty=empty)
    assert found(ram) == exactly(planted)


@SHAPES
@pytest.mark.parametrize(
    "leaves",
    [
        [(M2 * n, M2) for n in range(24)],
        [(G1 * n, G1) for n in range(6)],
        [(0, PAGE), (PAGE, PAGE), (M2, M2), (2 * M2, M2), (G1, G1), (4 * G1, G1), *small_guest(0x8000, 32)],
        [(3 << 39 | gpa, size) for gpa, size in small_guest()],
        [(n << 39 | gpa, size) for n in range(12) for gpa, size in small_guest(pages=16)],
        [(M2 * 8 + gpa, size) for gpa, size in small_guest()],
    ],
    ids=["2M only", "1G only", "mixed", "slot 0 empty", "12 slots", "nothing near 0"],
)
def test_layouts_of_the_guest_physical_space(shape, leaves):
    ram = HostRam()
    planted = plant(ram, shape, leaves)
    result = found(ram)
    assert [row[:3] for row in result] == [row[:3] for row in exactly(planted)]
    assert result[0][3] is not Certainty.POSSIBLE


@pytest.mark.parametrize("shape", [built.KVM_EPT, built.XEN_EPT], ids=lambda shape: shape.name)
def test_the_entries_of_each_hypervisor(shape):
    ram = HostRam()
    planted = plant(ram, shape, empty=built.SUPPRESS_VE)
    for number in range(64):
        planted.tables.put(0xFEC0_0000 + number * PAGE, "PTE", 0xFEC0_0000 + number * PAGE | 0x6)
    assert found(ram) == exactly(planted)
    assert roots.find(memory_of(ram))[0].root.dialect == shape.name


def test_nested_markers_for_mmio_are_no_pages():
    ram = HostRam()
    planted = plant(ram, NPT_4)
    for gpa in (0xFEC0_0000, 0xFEE0_0000):
        planted.tables.put(gpa, "PTE", 0x0008_0000_0000_0000 | gpa | 0x7)
    assert found(ram) == exactly(planted)


def test_every_page_access_tracked():
    """A processor without A/D flags: KVM clears all rights of the pages whose use it watches."""
    ram = HostRam()
    planted = plant(ram, replace(built.KVM_EPT, page=built.TRACKED))
    assert found(ram) == exactly(planted)


def test_recalculation_pending_everywhere():
    """Xen: memory type 7 at the root and in leaves. The processor refuses it, the frames are valid."""
    ram = HostRam()
    planted = plant(ram, built.XEN_EPT, empty=built.SUPPRESS_VE)
    for name, gpas in (("PML4E", [0]), ("PTE", [gpa for gpa, _ in small_guest()[1::3]])):
        for gpa in gpas:
            planted.tables.put(gpa, name, planted.tables.get(gpa, name) | 0x38)
    assert found(ram) == exactly(planted)


def test_recalculation_pending_in_a_nested_root():
    """Xen on AMD clears the user bit of the entries below which types are to be set anew."""
    ram = HostRam()
    planted = plant(ram, NPT_4)
    planted.tables.put(0, "PML4E", planted.tables.get(0, "PML4E") & ~4)
    assert [row[:3] for row in found(ram)] == [("NPT", planted.root, 4)]


def test_execute_only_pages():
    ram = HostRam()
    assert found(ram) == []
    planted = plant(ram, replace(EPT_4, page=0x34))
    assert found(ram) == exactly(planted)


def test_a_view_that_differs_in_a_few_leaves_is_a_root_too():
    """altp2m, EPTP switching: two roots over the same frames, and both are returned."""
    ram = HostRam()
    planted = plant(ram)
    view = Tables(ram)
    for gpa, frame in planted.placed.items():
        view.map(gpa, frame, bits=0x34 if gpa == 0x3000 else None)
    assert sorted(row[1] for row in found(ram)) == sorted([planted.root, view.root])


# Where the host's memory lies.


@SHAPES
@pytest.mark.parametrize("start", [1 << 40, 5 << 40, 1 << 46, 1 << 50], ids=hex)
def test_a_host_far_above_one_tebibyte(shape, start):
    """Addresses say nothing about the amount of memory; a peer reserves all bits from 40 on."""
    ram = HostRam(start)
    planted = plant(ram, shape)
    ram.write(0x1000, b"low memory")
    assert found(ram) == exactly(planted)


def test_addresses_of_52_bits():
    ram = HostRam(PIB2)
    planted = plant(ram)
    assert found(ram) == exactly(planted)
    assert found(ram, physical_bits=52) == exactly(planted)
    assert found(ram, physical_bits=46) == []


@SHAPES
def test_tables_that_the_capture_lacks(shape):
    """One page directory and its half of the guest are missing: the other half is found."""
    ram = HostRam()
    planted = plant(ram, shape, [*small_guest(), *small_guest(G1, 40), *small_guest(2 * G1, 40)])
    for gpa in (G1, 2 * G1):
        ram.drop(planted.tables.entry_address(gpa, "PDE"))
    result = roots.find(memory_of(ram))
    assert [f.root.address for f in result] == [planted.root]
    assert len(result[0].guest_map.findings.unreadable) == 2


def test_a_guest_without_long_mode_is_likely_in_ept_and_possible_in_npt():
    """Nothing parses through: the shape alone speaks, and NPT's is weaker."""
    ram = HostRam()
    first, second = plant(ram, EPT_4, kernel=None), plant(ram, NPT_4, kernel=None)
    assert found(ram) == exactly(first, Certainty.LIKELY) + exactly(second, Certainty.POSSIBLE)


def test_a_guest_with_five_levels_of_its_own():
    ram = HostRam()
    planted = plant(ram, NPT_4, kernel=LONG_5)
    assert found(ram) == exactly(planted)
    assert roots.find(memory_of(ram))[0].paging.name == "5-level"


def test_many_guests():
    ram = HostRam()
    planted = [plant(ram, (EPT_4, EPT_5)[n % 2]) for n in range(6)]
    assert found(ram) == sorted(row for one in planted for row in exactly(one))


def test_a_host_whose_entries_carry_the_c_bit():
    ram = HostRam()
    planted = plant(ram, NPT_4)
    for table in planted.tables.table_pages:
        for offset in range(0, PAGE, 8):
            if entry := ram.read_entry(table + offset):
                ram.write_entry(table + offset, entry | 1 << 47)
    assert found(ram) == []
    assert found(ram, key_bit=47) == exactly(planted)


def test_a_hypervisor_that_slid_under_a_running_system():
    """Its EPT maps every address to itself, and the system's own tables parse through it."""
    ram = HostRam()
    built.process(ram)
    tables = Tables(ram)
    for address in range(0, 4 * M2, M2):
        tables.map(address, address, M2)
    assert found(ram) == [("EPT", tables.root, 4, Certainty.CERTAIN)]


def test_frames_that_the_capture_lacks_are_a_near_miss_of_ept():
    """A kernel dump keeps the hypervisor's tables and leaves its guests' memory out: unreadable is not absent."""
    ram = HostRam()
    planted = plant(ram)
    for frame in planted.placed.values():
        ram.drop(frame)
    result = roots.search(memory_of(ram))
    assert result.found == ()
    assert [(miss.root.address, miss.reason) for miss in result.near_misses] == [
        (planted.root, "not a guest's: mapped memory")
    ]


def test_a_memory_that_can_only_be_read_page_by_page():
    ram = HostRam()
    planted = plant(ram, NPT_4)
    below = memory_of(ram)
    source = ReaderSource(below.read)
    memory = HostMemory(source, below.starts, below.lengths, below.starts)
    assert seen(memory) == exactly(planted)
    assert seen(HostMemory.from_bytes(b"")) == []


def test_the_account_of_a_search():
    ram = HostRam()
    plant(ram)
    reports: list[float] = []
    result = roots.search(memory_of(ram), progress=lambda percentage, _: reports.append(percentage))
    assert result.pages == len(ram.pages)
    assert reports[-1] == 100
    text = result.found[0].explain()
    assert text.startswith("EPT root at 0x100000, 4 levels: certain")
    assert "+ guest page tables: 4-level tables at 0x0 parse through it" in text


# What is not a root.


def test_ordinary_systems_have_none():
    """Processes, a kernel, firmware's and boot loaders' identity maps, an I/O domain."""
    ram = HostRam(0x40_0000)
    for shape in (paging.LONG_4, LONG_5):
        built.process(ram, shape)
        built.process(ram, shape, base=0x1_0000)
    for table, leaf in ((0x63, 0x1E3), (0x23, 0xE3), (0x7, 0x183), (0x7, 0x87), (0x67, 0x1E3)):
        built.identity_map(ram, 1 << 30, table, leaf)
    built.dma_tables(ram)
    for address in range(0, 0x20_0000, PAGE):
        ram.page(address)
    assert found(ram) == []


def test_a_loader_that_maps_one_gigabyte_everywhere():
    """FreeBSD's: all entries of the two upper tables name the same table, and users may reach all of it."""
    ram = HostRam()
    tables = built.identity_map(ram, 1 << 30, 0x7, 0x87)
    for name, shift in (("PML4E", 39), ("PDPTE", 30)):
        for index in range(256 if name == "PML4E" else 512):
            tables.put(index << shift, name, tables.get(0, name))
    for address in range(0, 0x8_0000, PAGE):
        ram.page(address)
    assert found(ram) == []


def test_random_data_has_none():
    """256 MiB; 4 GiB were tried by hand."""
    data = np.random.default_rng(1).integers(0, 1 << 64, 1 << 25, dtype=np.uint64, endpoint=False)
    assert seen(HostMemory.from_segments(FileSource(data.view(np.uint8)), [(0, data.nbytes, 0)])) == []


@pytest.mark.parametrize("mask", [0x01FF_FFFF, 0x00FF_FF07, 0x00FF_F007, 0x01FF_F067], ids=hex)
def test_random_entries_that_name_pages_of_the_memory_have_none(mask):
    """The hardest noise: every word is an entry whose frame exists."""
    rng = np.random.default_rng(5)
    data = rng.integers(0, 1 << 64, 1 << 22, dtype=np.uint64, endpoint=False) & np.uint64(mask)
    data[rng.random(data.size) < 0.9] = 0
    assert seen(HostMemory.from_segments(FileSource(data.view(np.uint8)), [(0, data.nbytes, 0)])) == []


@SHAPES
def test_the_memory_of_a_plain_guest_holds_none(shape):
    ram = HostRam()
    plant(ram, shape)
    memory = memory_of(ram)
    assert seen(roots.find(memory)[0].guest_map.memory(memory)) == []


def test_a_guest_that_is_a_hypervisor_holds_the_root_of_its_guest():
    """The inner tables hold addresses of the outer guest: a root there, and none of the host."""
    ram = HostRam()
    outer = plant(ram, EPT_4, small_guest(pages=512), kernel=None)
    inner_ram = paging.GuestRam(ram, outer.placed)
    inner_ram._used = 300
    inner = Tables(inner_ram)
    placed = {}
    for number in range(64):
        gpa = inner_ram.allocate()
        inner.map(number * PAGE, gpa)
        placed[number * PAGE] = gpa
    built.plant_kernel(paging.GuestRam(inner_ram, placed))
    memory = memory_of(ram)
    result = roots.find(memory)
    assert [f.root.address for f in result] == [outer.root]
    assert [row[:3] for row in seen(result[0].guest_map.memory(memory))] == [("EPT", inner.root, 4)]


# What a hostile guest writes.


@pytest.mark.parametrize("shape", [EPT_4, NPT_4], ids=lambda shape: shape.name)
def test_fakes_in_a_guest_that_name_the_real_root(shape):
    """Each is a five-level root over the real one, as far as its own page tells."""
    ram = HostRam()
    planted = plant(ram, shape, small_guest(pages=500))
    low = 0x7 if shape is EPT_4 else 0x67
    fakes = list(built.forged(ram, planted, [planted.root, *planted.tables.table_pages], low))
    began = time.monotonic()
    result = roots.search(memory_of(ram))
    assert time.monotonic() - began < 5
    assert len(fakes) == 468
    assert [f.root.address for f in result.found] == [planted.root]
    assert any("lies in the memory of the guest" in miss.reason for miss in result.near_misses)


def test_a_guest_that_maps_the_whole_host_claims_nothing():
    ram = HostRam()
    victim, attacker = plant(ram), plant(ram, EPT_4, small_guest(pages=128))
    page = (attacker.placed[0x40_000], attacker.placed[0x41_000])
    ram.write(page[0], bytes(PAGE))
    ram.write(page[1], bytes(PAGE))
    ram.write_entry(page[0], page[1] | 7)
    for number in range(4):
        ram.write_entry(page[1] + 8 * number, number * G1 | 0xB7)
    assert sorted(row[1] for row in found(ram)) == sorted([victim.root, attacker.root])


def test_a_flood_of_tables_is_cut_and_said(monkeypatch):
    monkeypatch.setattr(roots, "MAX_JUDGED", 3)
    ram = HostRam()
    for _ in range(5):
        plant(ram)
    result = roots.search(memory_of(ram))
    assert len(result.found) == 3
    assert "2 more tables read as hierarchies and were not judged" in result.notes


def test_a_flood_of_top_tables_is_cut_and_said(monkeypatch):
    monkeypatch.setattr(roots, "MAX_TOPS", 2)
    monkeypatch.setattr(roots, "_PAGES_PER_TABLE", 1 << 40)
    ram = HostRam()
    for _ in range(5):
        plant(ram)
    result = roots.search(memory_of(ram))
    assert len(result.found) < 5
    assert any("pages can be EPT top tables; 2 were followed, first those that lie alone" in n for n in result.notes)


def test_tables_that_all_name_each_other_are_not_traversed():
    """Every page is a sound table of every level, a hundred thousand times in a real attack."""
    rng = np.random.default_rng(2)
    data = rng.integers(1, 600, (600, 512), dtype=np.uint64) << np.uint64(12) | np.uint64(0x7)
    memory = HostMemory.from_segments(FileSource(data.reshape(-1).view(np.uint8)), [(0, data.nbytes, 0)])
    began = time.monotonic()
    result = roots.search(memory)
    assert time.monotonic() - began < 30
    assert result.found == ()
    assert any("again and again" in miss.reason for miss in result.near_misses)


# Real hosts.


def loaded(name: str, wipe: bool = False) -> HostMemory:
    capture = captures.get(name)
    segments = capture._segments
    if not wipe:
        return HostMemory.from_segments(FileSource(capture.path), segments)
    data = np.memmap(capture.path, dtype=np.uint8, mode="c")  # Copy on write: the file stays as it is.
    for structure in capture.truth["control_structures"]:
        hpa = int(structure["hpa"], 0)
        for start, size, offset in segments:
            if start <= hpa < start + size:
                data[offset + hpa - start : offset + hpa - start + PAGE] = 0
    return HostMemory.from_segments(FileSource(data), segments)


@pytest.mark.parametrize("wipe", [False, True], ids=["as captured", "control structures zeroed"])
@pytest.mark.parametrize("name", captures.every())
def test_the_roots_of_real_hosts_and_of_the_guests_in_them(name, wipe):
    """No control structure is used: with all of them overwritten the answer is the same."""
    capture = captures.get(name)
    structures = [s for s in capture.truth["control_structures"] if "slat_root" in s]
    host = {int(s["slat_root"], 0) for s in structures if "gpa" not in s}
    nested = {int(s["slat_root"], 0) for s in structures if "gpa" in s}
    memory = loaded(name, wipe)
    result = roots.search(memory)
    assert {f.root.address for f in result.found} == host
    assert len(result.found) == len(host)
    assert result.notes == ()
    shadows = {int(s["slat_root"], 0) for s in structures if s["role"] == "shadow"}
    sure = {f.root.address for f in result.found if f.certainty is Certainty.CERTAIN}
    assert sure >= host - shadows
    if wipe:
        return
    inside = [row[1] for f in result.found for row in seen(f.guest_map.memory(memory))]
    assert set(inside) <= nested
