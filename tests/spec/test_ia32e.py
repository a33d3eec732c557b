"""Ordinary paging in every mode. The bits are spelled out as in SDM Vol. 3A, "Paging"."""

from __future__ import annotations

import pytest
from builders.agreement import assert_array_equals_scalars, every_bit

from volatility3_ept.spec import ia32e
from volatility3_ept.spec.paging import PDE, PDPTE, PML4E, PML5E, PTE, Access

LONG = ia32e.five_level(46)
PAE = ia32e.pae(40)
LEGACY = ia32e.legacy()
NO_PSE = ia32e.legacy(large_pages=False)
PAE_PDPTE = PAE.levels[0]
PDE4M, PTE4 = LEGACY.levels
PDE_NO_PSE = NO_PSE.levels[0]
NX = 1 << 63

# format, level, raw, leaf, address it points to, rights, flags
SOUND = {
    "PML5E": (LONG, PML5E, 0x3FFF_FFFF_F027, False, 0x3FFF_FFFF_F000, "RWX", True, ("US", "A")),
    "PML4E, supervisor": (LONG, PML4E, 0x1023, False, 0x1000, "RWX", False, ("A",)),
    "PML4E, no execute": (LONG, PML4E, NX | 0x1023, False, 0x1000, "RW-", False, ("A", "NX")),
    "PML4E, ignored bits": (LONG, PML4E, 0x7FF0_0000_0000_1F63, False, 0x1000, "RWX", False, ("A",)),
    "PDPTE, table": (LONG, PDPTE, 0x1007, False, 0x1000, "RWX", True, ("US",)),
    "1G": (LONG, PDPTE, 0x3FFF_C000_01E3, True, 0x3FFF_C000_0000, "RWX", False, ("A", "D", "G")),
    "1G, PAT": (LONG, PDPTE, 0x4000_10E3, True, 0x4000_0000, "RWX", False, ("A", "D")),
    "2M": (LONG, PDE, 0x20_00E3, True, 0x20_0000, "RWX", False, ("A", "D")),
    "2M, PAT": (LONG, PDE, 0x20_10E3, True, 0x20_0000, "RWX", False, ("A", "D")),
    "2M, protection key": (LONG, PDE, 0x7800_0000_0020_00E3, True, 0x20_0000, "RWX", False, ("A", "D")),
    "4K, PAT is bit 7": (LONG, PTE, 0x10E3, True, 0x1000, "RWX", False, ("A", "D")),
    "4K, read only": (LONG, PTE, NX | 0x1001, True, 0x1000, "R--", False, ("NX",)),
    "4K, PWT and PCD": (LONG, PTE, 0x101B, True, 0x1000, "RWX", False, ("PWT", "PCD")),
    "PAE directory": (PAE, PAE_PDPTE, 0xFF_FFFF_F001, False, 0xFF_FFFF_F000, "RWX", True, ()),
    "PAE directory, ignored bits": (PAE, PAE_PDPTE, 0x1E19, False, 0x1000, "RWX", True, ("PWT", "PCD")),
    "PAE 2M": (PAE, PDE, 0xFF_FFE0_00E7, True, 0xFF_FFE0_0000, "RWX", True, ("US", "A", "D")),
    "PAE 4K": (PAE, PTE, NX | 0xFF_FFFF_F063, True, 0xFF_FFFF_F000, "RW-", False, ("A", "D", "NX")),
    "32-bit PDE": (LEGACY, PDE4M, 0xFFFF_F067, False, 0xFFFF_F000, "RWX", True, ("US", "A")),
    "32-bit 4M": (LEGACY, PDE4M, 0xFFC0_00E3, True, 0xFFC0_0000, "RWX", False, ("A", "D")),
    "32-bit 4M, PAT": (LEGACY, PDE4M, 0x40_10E3, True, 0x40_0000, "RWX", False, ("A", "D")),
    "32-bit 4M, PSE-36 bit 32": (LEGACY, PDE4M, 0x40_20E3, True, 0x1_0040_0000, "RWX", False, ("A", "D")),
    "32-bit 4M, PSE-36 bit 39": (LEGACY, PDE4M, 0x50_00E3, True, 0x80_0040_0000, "RWX", False, ("A", "D")),
    "32-bit 4K": (LEGACY, PTE4, 0xFFFF_F061, True, 0xFFFF_F000, "R-X", False, ("A", "D")),
    "32-bit without PSE: bit 7 ignored": (NO_PSE, PDE_NO_PSE, 0x40_10E3, False, 0x40_1000, "RWX", False, ("A",)),
}


@pytest.mark.parametrize(
    ("fmt", "level", "raw", "leaf", "address", "letters", "user", "flags"), SOUND.values(), ids=SOUND
)
def test_entries_that_the_processor_follows(fmt, level, raw, leaf, address, letters, user, flags):
    assert fmt.present(raw)
    assert not fmt.misconfigured(raw, level)
    assert fmt.is_leaf(raw, level) is leaf
    assert (fmt.frame(raw, level) if leaf else fmt.table(raw)) == address
    rights = Access(fmt.rights(raw, level))
    assert (rights.letters(), Access.USER in rights) == (letters, user)
    assert fmt.flags(raw, level) == flags
    assert fmt.memory_type(raw) == 0


REFUSED = {
    "PML5E, bit 7": (LONG, PML5E, 0x10A7),
    "PML4E, bit 7": (LONG, PML4E, 0x10A7),
    "1G, bit 13": (LONG, PDPTE, 0x4000_20E3),
    "1G, bit 29": (LONG, PDPTE, 0x6000_00E3),
    "2M, bit 13": (LONG, PDE, 0x20_20E3),
    "2M, bit 20": (LONG, PDE, 0x30_00E3),
    "address bit 46 with MAXPHYADDR 46": (LONG, PTE, 0x4000_0000_1063),
    "address bit 51 in a table": (LONG, PDE, 0x0008_0000_0000_1063),
    "PAE directory, W": (PAE, PAE_PDPTE, 0x1003),
    "PAE directory, US": (PAE, PAE_PDPTE, 0x1005),
    "PAE directory, bit 5": (PAE, PAE_PDPTE, 0x1021),
    "PAE directory, bit 8": (PAE, PAE_PDPTE, 0x1101),
    "PAE directory, bit 52": (PAE, PAE_PDPTE, 1 << 52 | 0x1001),
    "PAE directory, bit 63": (PAE, PAE_PDPTE, NX | 0x1001),
    "PAE directory, address bit 40": (PAE, PAE_PDPTE, 1 << 40 | 0x1001),
    "PAE PDE, bit 52": (PAE, PDE, 1 << 52 | 0x1067),
    "PAE PTE, bit 62": (PAE, PTE, 1 << 62 | 0x1067),
    "PAE 2M, bit 13": (PAE, PDE, 0x20_20E3),
    "32-bit 4M, bit 21": (LEGACY, PDE4M, 0x60_00E3),
}


@pytest.mark.parametrize(("fmt", "level", "raw"), REFUSED.values(), ids=REFUSED)
def test_entries_with_reserved_bits_are_refused(fmt, level, raw):
    assert fmt.present(raw)
    assert fmt.misconfigured(raw, level)


@pytest.mark.parametrize("raw", [0, 0x1062, NX, 0xFFFF_FFFF_FFFF_FFFE])
def test_bit_0_alone_makes_an_entry_present(raw):
    assert not LONG.present(raw)


def test_the_key_bits_are_neither_address_nor_reserved():
    fmt = ia32e.four_level(43, key_bits=1 << 47)
    raw = 1 << 47 | 0x20_00E3
    assert (fmt.misconfigured(raw, PDE), fmt.frame(raw, PDE), fmt.table(raw)) == (False, 0x20_0000, 0x20_0000)
    assert fmt.misconfigured(raw | 1 << 46, PDE)


CASES = [(LONG, level) for level in LONG.levels] + [(PAE, level) for level in PAE.levels]
CASES += [(LEGACY, level) for level in LEGACY.levels] + [(NO_PSE, PDE_NO_PSE)]


@pytest.mark.parametrize(("fmt", "level"), CASES, ids=lambda value: value.name)
def test_arrays_and_single_entries_agree(fmt, level):
    width = 8 * fmt.entry_bytes
    raws = [raw & (1 << width) - 1 for raw in (0, 0x23, 0xE3, NX | 0x20_00E3, (1 << 64) - 1)]
    raws = every_bit(*raws, width=width)
    for predicate in (fmt.present, fmt.memory_type, fmt.table):
        assert_array_equals_scalars(predicate, raws)
    for predicate in (fmt.rights, fmt.misconfigured, fmt.is_leaf, fmt.frame):
        assert_array_equals_scalars(lambda entry, call=predicate: call(entry, level), raws)


PG, PSE, PAE_ON, LA57 = 1 << 31, 1 << 4, 1 << 5, 1 << 12
LME, LMA = 1 << 8, 1 << 10


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer", "name", "first_level"),
    [
        (1, PAE_ON, LME, None, None),
        (PG | 1, 0, 0, "32-bit", False),
        (PG | 1, PSE, 0, "32-bit", True),
        (PG | 1, PAE_ON | PSE, 0, "PAE", False),
        (PG | 1, PAE_ON, LME | LMA, "4-level", False),
        (PG | 1, PAE_ON, LMA, "4-level", False),
        (PG | 1, PAE_ON, LME, "4-level", False),
        (PG | 1, PAE_ON | LA57, LME | LMA, "5-level", False),
        (PG | 1, LA57, LMA, "32-bit", False),
    ],
)
def test_registers_select_the_paging_mode(cr0, cr4, efer, name, first_level):
    fmt = ia32e.guest_format(cr0, cr4, efer)
    assert (fmt and fmt.name) == name
    assert fmt is None or fmt.levels[0].may_be_leaf is first_level
