"""Hierarchies that are cheap to write and endless to follow, in a host that also holds an honest guest."""

from __future__ import annotations

import pytest
from builders import machine, paging
from builders.machine import Guest
from builders.paging import EPT_4, EPT_5, NPT_4, NPT_5, PAGE, HostRam
from readers import READERS, memory_of

from volatility3_ept.core import descent, leaves, search
from volatility3_ept.core.root import Root

SHAPES = pytest.mark.parametrize("shape", [EPT_4, EPT_5, NPT_4, NPT_5], ids=lambda shape: shape.name)
KINDS = pytest.mark.parametrize("shape", [EPT_4, NPT_4], ids=lambda shape: shape.name)
M2, G1 = 0x20_0000, 0x4000_0000
#: Tables that a traversal may read: each once a level, and the repeats that it allows.
MOST = leaves.MAX_REPEATS + 64


def host(shape: paging.Shape) -> tuple[HostRam, Guest]:
    """Return a host with one honest guest."""
    ram, (guest,) = machine.host(shape)
    return ram, guest


def traversed(ram: HostRam, shape: paging.Shape, root: int):
    return leaves.traverse(memory_of(ram), READERS[shape], root | shape.register)


def assert_honest(ram: HostRam, guest: Guest, others: int = 0):
    """The honest guest is found, whole, beside at most so many others."""
    result = search.discover(memory_of(ram))
    mine = [m for m in result.machines if m.root.address == guest.tables.root & ~0xFFF]
    assert len(mine) == 1
    assert mine[0].memory.size == 32 * PAGE
    assert mine[0].guest_map.findings.notes == ()
    assert len(result.all()) <= 1 + others
    return result


def announce(ram: HostRam, guest: Guest, shape: paging.Shape, root: int) -> None:
    """Write a control structure of the host that names a root: it must be looked at."""
    name = "eptp" if shape in (EPT_4, EPT_5) else "ncr3"
    bitmap = "msr_bitmap" if name == "eptp" else "msrpm"
    ram.write(ram.allocate(), guest.control_page(**{name: root | shape.register, bitmap: 0x77_0000}))


@SHAPES
@pytest.mark.parametrize("depth", range(4))
def test_a_table_that_names_itself(shape, depth, tables_read):
    """At each level: the entry that should lead on leads back to its own table."""
    ram, guest = host(shape)
    bad = paging.Tables(ram, shape)
    bad.map(0, ram.allocate())
    name = shape.rungs[min(depth, len(shape.rungs) - 1)][0]
    at = bad.entry_address(1 << 12, name)
    ram.write_entry(at & ~0xFFF, at & ~0xFFF | shape.table)
    announce(ram, guest, shape, bad.root)
    found = traversed(ram, shape, bad.root)
    assert found.mapped_bytes <= 2 << 20
    if name != "PTE":
        assert any("(a cycle)" in note for note in found.findings.notes)
    assert sum(tables_read) < 32
    assert_honest(ram, guest, others=1)


@SHAPES
def test_a_cycle_over_all_levels(shape, tables_read):
    """The last table names the first as a table, the first the second, and so on: no end by itself."""
    ram, guest = host(shape)
    ring = [ram.allocate() for _ in range(3)]
    for number, table in enumerate(ring):
        for entry in range(512):
            ram.write_entry(table + 8 * entry, ring[(number + 1) % 3] | shape.table)
    announce(ram, guest, shape, ring[0])
    found = traversed(ram, shape, ring[0])
    assert any("(a cycle)" in note or "repeated references" in note for note in found.findings.notes)
    assert sum(tables_read) < MOST
    assert_honest(ram, guest)


@SHAPES
def test_one_table_in_every_entry_of_every_level(shape, tables_read):
    """512^4 leaves (512^5) from one page for each level; each is expanded once where they are too many."""
    ram, guest = host(shape)
    below = ram.allocate()
    for rung in range(len(shape.rungs)):
        bits = shape.page if rung == 0 else shape.table
        table = ram.allocate()
        for entry in range(512):
            ram.write_entry(table + 8 * entry, below | bits)
        below = table
    announce(ram, guest, shape, below)
    found = traversed(ram, shape, below)
    assert any("repeated references" in note and "were not expanded" in note for note in found.findings.notes)
    assert len(found) <= 512 * MOST
    assert sum(tables_read) < MOST
    # A structure in the host's own memory announced it: it is shown, and its map says what was cut.
    others = [m for m in assert_honest(ram, guest, others=1).all() if m.root.address == below]
    assert all(m.guest_map.findings.notes for m in others)


@KINDS
def test_a_table_that_names_every_page_of_the_host_as_a_table(shape):
    ram, guest = host(shape)
    root = ram.allocate()
    for entry, page in enumerate(sorted(ram.pages)[:512]):
        ram.write_entry(root + 8 * entry, page | shape.table)
    announce(ram, guest, shape, root)
    assert_honest(ram, guest, others=1)


@KINDS
def test_giant_pages_that_overlap(shape):
    """512 entries lead to one 1G frame: the map is one, the frames of the host are counted once."""
    ram, guest = host(shape)
    bad = paging.Tables(ram, shape)
    for number in range(512):
        bad.map(number * G1, 0, G1)
    announce(ram, guest, shape, bad.root)
    found = traversed(ram, shape, bad.root)
    assert found.mapped_bytes == 512 * G1
    starts, ends = found.frame_ranges()
    assert (starts.tolist(), ends.tolist()) == ([0], [G1])
    assert len(found.to_gpas(0x1000)) == 512
    result = assert_honest(ram, guest, others=1)
    # Whoever maps all of the host maps the honest guest's tables too, and its own: it owns nothing.
    assert not [m for m in result.all() if m.tables_in]


@SHAPES
def test_a_giant_page_beyond_all_physical_memory(shape):
    ram, guest = host(shape)
    bad = paging.Tables(ram, shape)
    bad.put(0, "PDPTE", 0x000F_FFFF_C000_0000 | shape.large)
    bad.put(G1, "PDPTE", 0xFFFF_FFFF_FFFF_FFFF & ~0x3FFF_F000 & ~(1 << 63))
    announce(ram, guest, shape, bad.root)
    found = traversed(ram, shape, bad.root)
    assert found.memory(memory_of(ram)).size == 0
    assert int((found.hpas + found.lengths).max(initial=0)) <= 1 << 52
    assert_honest(ram, guest)


@KINDS
def test_thousands_of_roots_that_share_their_tables(shape, small_bounds, tables_read):
    ram, guest = host(shape)
    shared = paging.Tables(ram, shape)
    for number in range(32):
        shared.map(number * PAGE, ram.allocate())
    second = ram.read_entry(shared.root)
    for number in range(2000):
        root = ram.allocate()
        ram.write_entry(root, second)
        ram.write_entry(root + 8 * (1 + number % 255), second)
    result = assert_honest(ram, guest, others=24)
    assert any("were not judged" in note for note in result.notes)
    assert sum(tables_read) < 8000


@KINDS
def test_thousands_of_control_structures_with_roots_that_share_their_tables(shape, small_bounds):
    ram, guest = host(shape)
    shared = paging.Tables(ram, shape)
    for number in range(32):
        shared.map(number * PAGE, ram.allocate())
    second = ram.read_entry(shared.root)
    for _ in range(300):
        root = ram.allocate()
        ram.write_entry(root, second)
        announce(ram, guest, shape, root)
    result = assert_honest(ram, guest, others=24)
    assert any("were walked, the most plausible first" in note for note in result.notes)


def test_a_sample_of_a_table_of_all_tables_is_bounded():
    """The first look at a candidate follows a few tables of each level, whatever they name."""
    ram = HostRam()
    tables = [ram.allocate() for _ in range(64)]
    for table in tables:
        for entry in range(512):
            ram.write_entry(table + 8 * entry, tables[entry % 64] | 7)
    memory = memory_of(ram)
    repeats, read = descent.repeats(memory, READERS[EPT_4], tables[0], leaves.MAX_REPEATS)
    assert repeats > leaves.MAX_REPEATS
    assert read <= 65
    assert Root.parse(f"eptp={tables[0] | 0x5E:#x}").traverse(memory).findings.tables < MOST
