from __future__ import annotations

import time

import numpy as np
import pytest
from builders import paging
from builders.paging import EPT_4, LEAF_SIZES, LONG_4, NPT_4, SHAPES, HostRam, Tables
from readers import READERS, memory_of

from volatility3_ept.core import leaves
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource
from volatility3_ept.core.walk import walk
from volatility3_ept.spec import dialect
from volatility3_ept.spec.dialect import State
from volatility3_ept.spec.paging import Access, Outcome

FRAME = 0x9000


def traversed(tables: Tables, who=dialect.GENERIC, fmt=None):
    return leaves.traverse(memory_of(tables.ram), fmt or READERS[tables.shape], tables.register, who)


def runs(tables: Tables, **kwargs):
    """The runs as ``(gpa, length, hpa, letters, page size)``."""
    return [(r.gpa, r.length, r.hpa, r.access.letters(), r.page_size) for r in traversed(tables, **kwargs).runs()]


def by_name(value):
    return value.name if hasattr(value, "name") else None


@pytest.mark.parametrize("shape", SHAPES, ids=by_name)
def test_leaves_of_every_size_come_out_in_order(shape):
    tables = Tables(HostRam(), shape)
    base = 0x40_0000_0000 if shape.width == 8 else 0x4000_0000
    expected = [(gpa << 30, size, base + (gpa << 30), size) for gpa, size in enumerate(LEAF_SIZES[shape.name], start=1)]
    for gpa, size, target, _ in reversed(expected):
        tables.map(gpa, target, size)
    top = 1 << shape.rungs[0][1] + shape.rungs[0][2]
    tables.map(top - 0x1000, 0x1000)
    expected.append((top - 0x1000, 0x1000, 0x1000, 0x1000))
    found = traversed(tables)
    assert [(r.gpa, r.length, r.hpa, r.page_size) for r in found.runs()] == expected
    assert found.findings.tables == len(tables.table_pages)
    assert found.findings.notes == ()


@pytest.mark.parametrize("shape", SHAPES, ids=by_name)
def test_a_self_describing_guest_reads_back_its_own_addresses(shape):
    """Builder to map to memory and back: every page holds its own address."""
    tables = Tables(HostRam(), shape)
    gpas = [0x1000 * n for n in (0, 1, 2, 5, 511, 512, 1023, 1024, 0x4_0000, 0xF_FFFF)]
    placed = tables.back(gpas)
    below = memory_of(tables.ram)
    found = leaves.traverse(below, READERS[shape], tables.register)
    assert found.to_hpa(np.array(gpas)).tolist() == [placed[gpa] for gpa in gpas]
    guest = found.memory(below)
    for gpa in gpas:
        assert guest.read(gpa, 0x1000) == paging.stamp(gpa)
    assert guest.size == len(gpas) * 0x1000


def test_a_guest_in_a_guest_reads_through_both_hierarchies():
    """Three address spaces: L2 through NPT in L1's memory, which EPT maps."""
    ram = HostRam()
    outer = Tables(ram, EPT_4)
    placed = outer.back([0x1000 * n for n in range(64)])
    inner = Tables(paging.GuestRam(ram, placed), NPT_4)
    l2 = {0x0: 0x30_000, 0x5000: 0x31_000, 0x8000_0000: 0x20_000}
    for l2_gpa, l1_gpa in l2.items():
        inner.map(l2_gpa, l1_gpa)
    host = memory_of(ram)
    l1 = leaves.traverse(host, READERS[EPT_4], outer.register).memory(host)
    guest = leaves.traverse(l1, READERS[NPT_4], inner.register).memory(l1)
    for l2_gpa, l1_gpa in l2.items():
        assert guest.read(l2_gpa, 0x1000) == paging.stamp(l1_gpa)


def entries(*changes: int, shape=EPT_4) -> Tables:
    """Eight pages, contiguous on both sides; ``changes`` are XORed into the first leaves, in order."""
    tables = Tables(HostRam(), shape)
    for index in range(8):
        tables.map(index << 12, FRAME + (index << 12))
    for index, change in enumerate(changes):
        tables.put(index << 12, "PTE", tables.get(index << 12, "PTE") ^ change)
    return tables


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ((), [8]),
        ((0x2,), [1, 7]),
        ((0, 0x4), [1, 1, 6]),
        ((0, 0, 0x30), [2, 1, 5]),
        ((0, 0x8000), [1, 1, 6]),
        ((0x340, 0xC00), [8]),
        ((0x3, 0x3), [2, 6]),
        ((0x37,), [7]),
    ],
    ids=["same", "W", "X", "type", "address", "IPAT, A, D, ignored", "same rights", "absent"],
)
def test_neighbours_are_one_run_only_when_address_rights_and_type_agree(changes, lengths):
    assert [run.length >> 12 for run in traversed(entries(*changes)).runs()] == lengths


def test_runs_join_across_tables_but_not_across_page_sizes():
    tables = Tables(HostRam())
    for index in range(0x1FE, 0x202):
        tables.map(index << 12, 0x800_0000 + (index << 12))
    tables.map(0x40_0000, 0x840_0000, 0x20_0000)
    tables.map(0x60_0000, 0x860_0000, 0x20_0000)
    assert runs(tables) == [
        (0x1F_E000, 0x4000, 0x81F_E000, "RWX", 0x1000),
        (0x40_0000, 0x40_0000, 0x840_0000, "RWX", 0x20_0000),
    ]


def test_rights_are_the_and_over_all_levels():
    tables = entries()
    tables.map(0x20_0000, 0x80_0000, 0x20_0000)
    tables.put(0, "PDE", tables.get(0, "PDE") ^ 0x2)
    tables.put(0, "PML4E", tables.get(0, "PML4E") ^ 0x4)
    assert [row[3] for row in runs(tables)] == ["R--", "RW-"]


def test_an_execute_only_page_is_a_leaf():
    assert [row[3] for row in runs(entries(0x3))] == ["--X", "RWX"]


def test_a_table_whose_entries_are_all_equal_is_still_a_table():
    tables = Tables(HostRam())
    for index in range(512):
        tables.map(index << 12, FRAME)
    found = traversed(tables)
    assert (len(found), found.mapped_bytes, set(found.hpas.tolist())) == (512, 0x20_0000, {FRAME})


def test_a_table_outside_the_capture_is_unreadable_with_its_span():
    tables = entries()
    tables.map(0x20_0000, FRAME)
    tables.map(0x4000_0000, FRAME)
    tables.ram.drop(tables.table_pages[3])
    found = traversed(tables)
    assert [run.gpa for run in found.runs()] == [0x20_0000, 0x4000_0000]
    assert found.findings.unreadable.tolist() == [[0, 0x20_0000, tables.table_pages[3]]]


def test_a_table_that_the_capture_holds_in_part_is_unreadable_as_a_whole():
    """The walk, which reads single entries, still uses what there is. Both say so; neither takes it for absent."""
    tables = entries()
    data, segments = tables.ram.segments()
    (start, length, offset) = segments[0]
    last = tables.table_pages[3]
    cut = HostMemory.from_segments(FileSource(data), [(start, last + 0x10 - start, offset)])
    assert length == last + 0x1000 - start
    found = leaves.traverse(cut, READERS[EPT_4], tables.register)
    assert (len(found), found.findings.unreadable.tolist()) == (0, [[0, 0x20_0000, last]])
    outcomes = [walk(cut, READERS[EPT_4], tables.register, gpa).outcome for gpa in (0x1000, 0x2000)]
    assert outcomes == [Outcome.OUT_OF_RANGE, Outcome.UNREADABLE]


@pytest.mark.parametrize("shape", SHAPES, ids=by_name)
def test_an_unreadable_root_is_a_finding_and_not_an_empty_guest(shape):
    tables = Tables(HostRam(), shape)
    tables.ram.drop(tables.root)
    tables.ram.allocate()
    found = traversed(tables)
    whole = 1 << shape.rungs[0][1] + shape.rungs[0][2]
    assert found.findings.unreadable.tolist() == [[0, whole, tables.root]]
    assert len(found) == 0


def test_frames_outside_the_capture_stay_in_the_map_and_are_holes_of_the_memory():
    tables = entries()
    found = traversed(tables)
    assert found.mapped_bytes == 0x8000
    assert found.memory(memory_of(tables.ram)).size == 0


@pytest.mark.parametrize(
    ("shape", "gpa", "raw"),
    [
        (EPT_4, 0xC_0000, 0xF8_000C_0046),
        (EPT_4, 0xFEE0_0000, 0x000F_FFFF_FEE0_003A),
        (NPT_4, 0xC_0000, 0x0008_0000_000C_0037),
    ],
)
def test_markers_for_mmio_are_findings_with_their_raw_entry(shape, gpa, raw):
    tables = entries(shape=shape)
    tables.put(gpa, "PTE", raw)
    found = traversed(tables)
    assert found.findings.mmio.tolist() == [[gpa, 0x1000, raw]]
    assert found.mapped_bytes == 0x8000


def test_misconfigured_entries_are_findings_with_all_64_bits():
    tables = entries(0x1)
    tables.put(0x20_0000, "PDE", 0x8000_0000_0000_00B6)
    rows = traversed(tables).findings.misconfigured
    assert [(gpa, span, raw & (1 << 64) - 1) for gpa, span, raw in rows.tolist()] == [
        (0, 0x1000, FRAME | 0x36), (0x20_0000, 0x20_0000, 0x8000_0000_0000_00B6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("who", "bits", "state"),
    [
        (dialect.KVM, 0x0750_0000_0000_0870, State.ACCESS_TRACKED),
        (dialect.XEN, 0x9C00_0000_0000_037F, State.RECALC_PENDING),
        (dialect.BHYVE, 0x0030_0000_0000_0034, State.EMULATED_AD),
    ],
)
def test_a_page_that_only_its_hypervisor_knows_has_a_state(who, bits, state):
    tables = entries()
    for name in ("PML4E", "PDPTE", "PDE"):
        tables.put(0, name, tables.get(0, name) | 0x800)
    for index in range(8):
        tables.put(index << 12, "PTE", FRAME + (index << 12) | (0x0600_0000_0000_0B77 if index else bits))
    first = traversed(tables, who=who).run(0)
    assert (first.gpa, first.hpa, first.length, first.state) == (0, FRAME, 0x1000, state)


def author(shape, table_bits: int, leaf_bits: int, odd: tuple[int, int] | None = None):
    tables = Tables(HostRam(), shape)
    for index in range(8):
        tables.map(index << 12, FRAME + (index << 12), bits=leaf_bits)
    for name in ("PML4E", "PDPTE", "PDE"):
        tables.put(0, name, tables.get(0, name) & 0x000F_FFFF_FFFF_F000 | table_bits)
    if odd:
        tables.put(odd[0], "PTE", odd[1])
    return leaves.infer_dialect(memory_of(tables.ram), READERS[shape], tables.register).name


@pytest.mark.parametrize(
    ("shape", "table_bits", "leaf_bits", "odd", "name"),
    [
        (EPT_4, 0x907, 0x0600_0000_0000_0B77, None, "KVM"),
        (EPT_4, 0x907, 0x0600_0000_0000_0B77, (0xC_0000, 0xF8_000C_0046), "KVM"),
        (EPT_4, 0x907, 0x0600_0000_0000_0B77, (0x9000, 0x8000_0000_0000_0000), "KVM"),
        (EPT_4, 0x907, 0x0600_0000_0000_0B77, (0x9000, FRAME | 0x37), "generic"),
        (EPT_4, 0x7, 0x37, None, "generic"),
        (EPT_4, 0x9C00_0000_0000_0107, 0x9C00_0000_0000_0377, None, "Xen"),
        (EPT_4, 0x9C00_0000_0000_0107, 0x9C00_0000_0000_0377, (0x9000, 0x8040_0000_0000_0038), "Xen"),
        (EPT_4, 0x0030_0000_0000_0007, 0x0030_0000_0000_0037, None, "bhyve"),
        (NPT_4, 0xF27, 0xF67, None, "KVM"),
        (NPT_4, 0xF27, 0xF67, (0xC_0000, 0x8_0000_000C_0037), "KVM"),
        (NPT_4, 0x27, 0x67, None, "generic"),
        (LONG_4, 0x867, 0x863, None, "generic"),
    ],
)
def test_the_author_of_a_hierarchy(shape, table_bits, leaf_bits, odd, name):
    """The last row is Windows: its own tables set bit 11 too, and no hypervisor wrote them."""
    assert author(shape, table_bits, leaf_bits, odd) == name


def test_the_author_is_inferred_when_none_is_given():
    tables = Tables(HostRam())
    tables.map(0, FRAME, bits=0x0600_0000_0000_0B77)
    tables.map(0x1000, FRAME, bits=0x0750_0000_0000_0870)
    for name in ("PML4E", "PDPTE", "PDE"):
        tables.put(0, name, tables.get(0, name) | 0x900)
    found = leaves.traverse(memory_of(tables.ram), READERS[EPT_4], tables.register)
    assert [run.state for run in found.runs()] == [State.PLAIN, State.ACCESS_TRACKED]


# Hierarchies that somebody wrote to keep us busy.


def test_a_self_referencing_table_ends_and_says_what_was_not_followed():
    tables = Tables(HostRam(), LONG_4)
    tables.map(0x40_0000, FRAME)
    tables.put(0x1ED << 39, "PML4E", tables.root | 0x63)
    found = traversed(tables)
    assert [run.gpa for run in found.runs()] == [0x40_0000]
    assert "cycle" in found.findings.notes[0]


def test_a_cycle_over_several_tables_ends():
    tables = entries()
    tables.put(0x20_0000, "PDE", tables.table_pages[1] | 0x7)
    tables.put(0x9000, "PTE", tables.table_pages[0] | 0x37)
    found = traversed(tables)
    assert found.findings.notes == ("1 PT references to tables of a higher level were not followed (a cycle)",)
    assert found.to_hpa(np.array([0, 0x9000])).tolist() == [FRAME, tables.table_pages[0]]


@pytest.mark.parametrize("fan_out", [8, 16, 128, 512], ids=lambda count: f"{count} x 512^3")
def test_every_entry_to_the_same_table_ends_quickly_and_says_what_was_cut(fan_out):
    """512^4 pages out of four tables; and the counts just below a limit, where the next level pays."""
    tables = Tables(HostRam())
    tables.map(0, FRAME)
    for name, shift, count in (("PTE", 12, 512), ("PDE", 21, 512), ("PDPTE", 30, 512), ("PML4E", 39, fan_out)):
        raw = tables.get(0, name)
        for index in range(count):
            tables.put(index << shift, name, raw)
    memory = memory_of(tables.ram)
    began = time.monotonic()
    found = leaves.traverse(memory, READERS[EPT_4], tables.register, dialect.GENERIC)
    assert time.monotonic() - began < 5
    assert len(found.findings.notes) == 1
    assert "were not expanded" in found.findings.notes[0]
    assert found.findings.tables < 10_000
    assert found.to_hpa(np.array([0, 0x1F_F000])).tolist() == [FRAME, FRAME]


def test_a_table_that_two_entries_share_is_expanded_for_both():
    tables = entries()
    tables.put(0x20_0000, "PDE", tables.get(0, "PDE"))
    assert [row[:3] for row in runs(tables)] == [(0, 0x8000, FRAME), (0x20_0000, 0x8000, FRAME)]


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_never_raise(seed):
    data = np.random.default_rng(seed).integers(0, 256, 64 * 0x1000, dtype=np.uint8).tobytes()
    memory = HostMemory.from_bytes(data)
    for fmt in READERS.values():
        for who in dialect.DIALECTS.values():
            found = leaves.traverse(memory, fmt, 0x3000, who)
            for gpa in found.gpas[:20].tolist():
                assert walk(memory, fmt, 0x3000, gpa, who).outcome in (Outcome.MAPPED, Outcome.OUT_OF_RANGE)


def test_rights_of_a_nested_table_without_the_user_bit_are_none():
    tables = entries(shape=NPT_4)
    tables.put(0, "PDE", tables.get(0, "PDE") ^ 0x4)
    assert [run.access for run in traversed(tables).runs()] == [Access.NONE]
    assert [run.access for run in traversed(tables, who=dialect.XEN).runs()] == [Access.ALL]
