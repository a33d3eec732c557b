from __future__ import annotations

import pytest
from builders import paging
from builders.paging import EPT_4, EPT_5, LEAF_SIZES, LEGACY, LONG_4, NPT_4, PAE, SHAPES, HostRam, Tables
from readers import READERS, memory_of

from volatility3_ept.core.walk import walk
from volatility3_ept.spec import dialect, ept, ia32e, npt
from volatility3_ept.spec.dialect import State
from volatility3_ept.spec.paging import Access, EntryKind, Outcome

FRAME = 0x9000
GPA = 0x4030_2000 | 0x123


@pytest.fixture
def ram():
    ram = HostRam()
    ram.write(FRAME, paging.stamp(GPA & ~0xFFF))
    return ram


def walked(tables: Tables, address: int = GPA, fmt=None, who=dialect.GENERIC):
    return walk(memory_of(tables.ram), fmt or READERS[tables.shape], tables.register, address, who)


def mapped(ram: HostRam, shape=EPT_4) -> Tables:
    tables = Tables(ram, shape)
    tables.map(GPA & ~0xFFF, FRAME)
    return tables


EVERY_SIZE = [(shape, size) for shape in SHAPES for size in LEAF_SIZES[shape.name]]


@pytest.mark.parametrize(("shape", "size"), EVERY_SIZE, ids=lambda v: v.name if hasattr(v, "name") else f"{v:#x}")
def test_leaf_of_each_size_in_each_format(ram, shape, size):
    """The offset within a large page counts in full: a reversed subtraction shows on large pages alone."""
    tables = Tables(ram, shape)
    _, shift, index_bits = shape.rungs[0]
    gpa = (1 << shift + index_bits) - size
    tables.map(gpa, 0x8000_0000, size)
    offset = size - 0x1000 + 0x678
    ram.write(0x8000_0000 + offset, b"here")
    result = walked(tables, gpa + offset)
    assert (result.outcome, result.target, result.page_size) == (Outcome.MAPPED, 0x8000_0000 + offset, size)
    assert Access.ALL & ~Access.USER in result.access
    assert memory_of(ram).read(result.target, 4) == b"here"


def test_every_entry_read_is_kept_with_its_place_and_meaning(ram):
    tables = mapped(ram)
    result = walked(tables)
    assert [step.level.name for step in result.steps] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert [step.entry_address for step in result.steps] == [
        tables.entry_address(GPA, name) for name in ("PML4E", "PDPTE", "PDE", "PTE")
    ]
    assert [step.kind for step in result.steps] == [EntryKind.TABLE] * 3 + [EntryKind.LEAF]
    assert result.steps[-1].entry == FRAME | 0x37
    assert (result.memory_type, result.state) == (6, State.PLAIN)
    assert f"the PTE at {result.steps[-1].entry_address:#x}" in result.reason


def test_an_execute_only_page_is_present(ram):
    """Bit 0 alone is not the present bit in EPT; the rule of ordinary paging loses this page."""
    tables = Tables(ram)
    tables.map(GPA & ~0xFFF, FRAME, bits=0x34)
    result = walked(tables)
    assert (result.outcome, result.target, result.access.letters()) == (Outcome.MAPPED, FRAME | 0x123, "--X")


@pytest.mark.parametrize(
    ("shape", "entries", "letters"),
    [
        (EPT_4, {"PML4E": 0x5}, "R-X"),
        (EPT_4, {"PDPTE": 0x3, "PTE": 0x35}, "R--"),
        (EPT_4, {"PDE": 0x1, "PML4E": 0x5}, "R--"),
        (EPT_4, {"PDE": 0x4, "PTE": 0x33}, "---"),
        (NPT_4, {"PML4E": 0x25}, "R-X"),
        (NPT_4, {"PDE": 1 << 63 | 0x27, "PTE": 0x65}, "R--"),
        (NPT_4, {"PDPTE": 0x23}, "---"),
        (LONG_4, {"PDE": 0x21, "PML4E": 1 << 63 | 0x23}, "R--"),
        (LEGACY, {"PDE": 0x21}, "R-X"),
        (PAE, {"PDE": 0x21, "PTE": 1 << 63 | 0x63}, "R--"),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else str(value),
)
def test_rights_are_the_and_over_all_levels(ram, shape, entries, letters):
    """Rights read from the leaf alone, or ORed upwards, are a common bug."""
    tables = mapped(ram, shape)
    for name, bits in entries.items():
        raw = tables.get(GPA, name)
        tables.put(GPA, name, raw & 0x000F_FFFF_FFFF_F000 | bits)
    result = walked(tables)
    assert (result.outcome, result.access.letters()) == (Outcome.MAPPED, letters)


@pytest.mark.parametrize(
    ("shape", "user_at", "user"),
    [(LONG_4, ("PML4E", "PDPTE", "PDE", "PTE"), True), (LONG_4, ("PTE",), False), (PAE, ("PDE", "PTE"), True)],
)
def test_a_page_is_for_users_when_every_level_says_so(ram, shape, user_at, user):
    """PAE's directory entries have no such bit and do not take the right away."""
    tables = mapped(ram, shape)
    for name in user_at:
        tables.put(GPA, name, tables.get(GPA, name) | 4)
    assert (Access.USER in walked(tables).access) is user


@pytest.mark.parametrize(
    ("shape", "size", "name"),
    [
        (NPT_4, 1 << 21, "PDE"),
        (NPT_4, 1 << 30, "PDPTE"),
        (LONG_4, 1 << 21, "PDE"),
        (PAE, 1 << 21, "PDE"),
        (LEGACY, 1 << 22, "PDE"),
    ],
)
def test_the_pat_bit_of_a_large_page_does_not_leak_into_its_address(ram, shape, size, name):
    tables = Tables(ram, shape)
    tables.map(GPA & ~(size - 1), 0x4000_0000, size)
    tables.put(GPA, name, tables.get(GPA, name) | 0x1000)
    assert walked(tables).target == 0x4000_0000 | GPA & (size - 1)


def test_a_4m_page_can_lie_above_4g(ram):
    """PSE-36: bits 39:32 of the address are in bits 20:13 of the entry."""
    tables = Tables(ram, LEGACY)
    tables.map(0x40_0000, 0xFF_FFC0_0000, 1 << 22)
    result = walked(tables, 0x41_2345)
    assert (result.outcome, result.target) == (Outcome.OUT_OF_RANGE, 0xFF_FFC1_2345)


def test_without_pse_bit_7_of_a_directory_entry_means_nothing(ram):
    tables = mapped(ram, LEGACY)
    tables.put(GPA, "PDE", tables.get(GPA, "PDE") | 0x80)
    assert walked(tables, fmt=ia32e.legacy(large_pages=False)).target == FRAME | 0x123
    assert walked(tables).page_size == 1 << 22


@pytest.mark.parametrize("number", range(4))
def test_a_table_missing_from_the_capture_is_not_reported_as_absent(ram, number):
    tables = mapped(ram)
    ram.drop(tables.table_pages[number])
    result = walked(tables)
    assert (result.outcome, len(result.steps), result.steps[-1].entry) == (Outcome.UNREADABLE, number + 1, None)
    assert "not in the capture" in result.reason


def test_a_page_outside_the_capture_keeps_its_address(ram):
    tables = mapped(ram)
    ram.drop(FRAME)
    result = walked(tables)
    assert (result.outcome, result.target, result.access) == (Outcome.OUT_OF_RANGE, FRAME | 0x123, Access.ALL)


@pytest.mark.parametrize("name", ["PML4E", "PDPTE", "PDE", "PTE"])
def test_the_walk_ends_at_the_first_entry_that_is_not_present(ram, name):
    tables = mapped(ram)
    tables.put(GPA, name, 0x8000_0000_0000_0000)
    result = walked(tables)
    assert (result.outcome, result.steps[-1].level.name) == (Outcome.NOT_PRESENT, name)
    assert (result.target, result.access) == (None, Access.NONE)


@pytest.mark.parametrize(("shape", "bits"), [(EPT_4, 0x36), (EPT_4, 0x3F), (EPT_4, 0x32)])
def test_an_entry_that_the_processor_refuses_ends_the_walk(ram, shape, bits):
    tables = Tables(ram, shape)
    tables.map(GPA & ~0xFFF, FRAME, bits=bits)
    result = walked(tables)
    assert (result.outcome, result.target) == (Outcome.MISCONFIGURED, None)


@pytest.mark.parametrize(
    ("shape", "gpa", "raw"),
    [
        (EPT_4, 0xC_0000, 0xF8_000C_0046),
        (EPT_4, 0xFEE0_0000, 0x000F_FFFF_FEE0_003A),
        (NPT_4, 0xC_0000, 0x0008_0000_000C_0037),
        (NPT_4, 0xFEC0_0000, 0x0008_0000_FEC0_0037),
    ],
)
def test_a_marker_for_mmio_is_a_finding_and_not_a_page(ram, shape, gpa, raw):
    """Taken for a page, it points far outside the host; read by the manual alone, it looks like damage."""
    tables = Tables(ram, shape)
    tables.put(gpa, "PTE", raw)
    result = walked(tables, gpa | 0x20)
    assert (result.outcome, result.target, result.steps[-1].entry) == (Outcome.MMIO, None, raw)


def test_a_marker_above_the_last_level_counts_for_every_address_below_it(ram):
    """It holds the first address that its entry translates, not the one that is asked for."""
    tables = Tables(ram)
    tables.put(0xFEC0_0000, "PDE", 0xFEC0_0006)
    assert {walked(tables, gpa).outcome for gpa in (0xFEC0_0000, 0xFEC1_2345, 0xFEDF_FFFF)} == {Outcome.MMIO}


@pytest.mark.parametrize(
    ("who", "raw", "state", "letters"),
    [
        (dialect.KVM, 0x0750_0000_0000_0870, State.ACCESS_TRACKED, "R-X"),
        (dialect.XEN, 0x9C00_0000_0000_037F, State.RECALC_PENDING, "RWX"),
        (dialect.BHYVE, 0x0030_0000_0000_0034, State.EMULATED_AD, "RWX"),
    ],
)
def test_a_page_that_only_its_hypervisor_knows_is_mapped_in_its_dialect(ram, who, raw, state, letters):
    tables = mapped(ram)
    tables.put(GPA, "PTE", FRAME | raw)
    for name in ("PML4E", "PDPTE", "PDE"):
        tables.put(GPA, name, tables.get(GPA, name) | 0x800)
    result = walked(tables, who=who)
    assert (result.target, result.state, result.access.letters()) == (FRAME | 0x123, state, letters)


def test_a_table_that_refers_to_itself_ends(ram):
    """The recursive slot of Windows: four times through it and the table is a page of itself."""
    tables = Tables(ram, LONG_4)
    tables.put(0x1ED << 39, "PML4E", tables.root | 0x63)
    address = 0xFFFF_0000_0000_0000 | 0x1ED << 39 | 0x1ED << 30 | 0x1ED << 21 | 0x1ED << 12 | 0xF68
    result = walked(tables, address)
    assert (result.outcome, result.target, len(result.steps)) == (Outcome.MAPPED, tables.root | 0xF68, 4)


def test_a_table_whose_entries_are_all_equal_is_still_a_table(ram):
    """Volatility's Intel layers drop it, and chipsec reads its first entry only."""
    tables = mapped(ram)
    for index in range(512):
        tables.put((GPA & ~0x1F_FFFF) | index << 12, "PTE", FRAME | 0x37)
    assert {walked(tables, (GPA & ~0x1F_FFFF) | index << 12).target for index in (0, 1, 511)} == {FRAME}


@pytest.mark.parametrize(
    ("shape", "address", "outcome"),
    [
        (EPT_4, 1 << 48 | GPA, Outcome.NOT_PRESENT),
        (EPT_4, 0xFFFF_FF80_0000_0000 | GPA, Outcome.NOT_PRESENT),
        (NPT_4, 0xFFFF_FF80_0000_0000 | GPA, Outcome.NOT_PRESENT),
        (EPT_5, 1 << 57 | GPA, Outcome.NOT_PRESENT),
        (LONG_4, 0xFFFF_FF80_0000_0000 | GPA, Outcome.MAPPED),
        (LONG_4, 0x0000_FF80_0000_0000 | GPA, Outcome.MAPPED),
        (LONG_4, 0x0001_FF80_0000_0000 | GPA, Outcome.NOT_PRESENT),
        (LONG_4, 0x7FFF_FF80_0000_0000 | GPA, Outcome.NOT_PRESENT),
        (LEGACY, 1 << 32 | GPA, Outcome.NOT_PRESENT),
    ],
    ids=lambda value: value.name if hasattr(value, "rungs") else None,
)
def test_an_address_wider_than_the_hierarchy_is_not_wrapped(ram, shape, address, outcome):
    """Only linear addresses are sign-extended; a guest-physical one with high bits is outside."""
    tables = mapped(ram, shape)
    if shape is LONG_4:
        tables.map(0xFF80_0000_0000 | GPA & ~0xFFF, FRAME)
    result = walked(tables, address)
    assert result.outcome is outcome
    if outcome is Outcome.NOT_PRESENT:
        assert f"{address:#x} is wider" in result.reason


def test_a_key_in_the_address_bits_is_stripped_at_every_level(ram):
    """SME: with the C-bit set in nCR3 and in every entry, all addresses lie 128 TiB too high."""
    c_bit = 1 << 47
    tables = mapped(ram, NPT_4)
    for name in ("PTE", "PDE", "PDPTE", "PML4E"):
        tables.put(GPA, name, tables.get(GPA, name) | c_bit)
    fmt = npt.npt_format(4, 43, c_bit)
    result = walk(memory_of(ram), fmt, tables.root | c_bit, GPA)
    assert (result.outcome, result.target) == (Outcome.MAPPED, FRAME | 0x123)


def test_user_execute_counts_when_mode_based_execute_is_on(ram):
    tables = Tables(ram)
    tables.map(GPA & ~0xFFF, FRAME, bits=0x430)
    for name in ("PML4E", "PDPTE", "PDE"):
        tables.put(GPA, name, tables.get(GPA, name) | 0x400)
    assert walked(tables).outcome is Outcome.NOT_PRESENT
    result = walked(tables, fmt=ept.ept_format(4, mode_based_execute=True))
    assert (result.outcome, result.access) == (Outcome.MAPPED, Access.USER)
