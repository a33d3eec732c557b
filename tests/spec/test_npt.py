"""Nested paging is ordinary paging, walked as user accesses (AMD APM Vol. 2, "Nested Paging")."""

from __future__ import annotations

import pytest
from builders.agreement import assert_array_equals_scalars, every_bit

from volatility3_ept.spec import npt
from volatility3_ept.spec.paging import PDE, PDPTE, PML4E, PML5E, PTE, Access

F = npt.npt_format(5, 48)
NX = 1 << 63

# level, raw, leaf, address it points to, rights
SOUND = {
    "PML5E": (PML5E, 0x1027, False, 0x1000, "RWX"),
    "PML4E": (PML4E, 0xFFFF_FFFF_F027, False, 0xFFFF_FFFF_F000, "RWX"),
    "PDPTE": (PDPTE, 0x1027, False, 0x1000, "RWX"),
    "1G": (PDPTE, 0xFFFF_C000_00E7, True, 0xFFFF_C000_0000, "RWX"),
    "1G, PAT": (PDPTE, 0x4000_10E7, True, 0x4000_0000, "RWX"),
    "2M, Xen": (PDE, 0x20_00E7, True, 0x20_0000, "RWX"),
    "2M, PAT, no execute": (PDE, NX | 0x20_10E7, True, 0x20_0000, "RW-"),
    "4K, Xen": (PTE, 0x1067, True, 0x1000, "RWX"),
    "4K, KVM": (PTE, 0x1F67, True, 0x1000, "RWX"),
    "4K, read only": (PTE, 0x1865, True, 0x1000, "R-X"),
    "4K, bit 7 is PAT": (PTE, 0x10E7, True, 0x1000, "RWX"),
}


@pytest.mark.parametrize(("level", "raw", "leaf", "address", "letters"), SOUND.values(), ids=SOUND)
def test_entries_that_the_processor_follows(level, raw, leaf, address, letters):
    assert F.present(raw)
    assert not F.misconfigured(raw, level)
    assert F.is_leaf(raw, level) is leaf
    assert (F.frame(raw, level) if leaf else F.table(raw)) == address
    rights = Access(F.rights(raw, level))
    assert (rights.letters(), Access.USER in rights) == (letters, True)


@pytest.mark.parametrize(
    ("level", "raw"),
    [
        (PML5E, 0x10A7),
        (PML4E, 0x10A7),
        (PDPTE, 0x4000_20E7),
        (PDE, 0x20_20E7),
        (PDE, 0x30_00E7),
        (PTE, 1 << 48 | 0x1067),
        (PTE, 0x0008_0000_FEC0_0037),
    ],
)
def test_entries_with_reserved_bits_are_refused(level, raw):
    assert F.misconfigured(raw, level)


@pytest.mark.parametrize("raw", [0x1063, NX | 0x1061])
def test_an_entry_without_the_user_bit_is_present_and_gives_no_right(raw):
    assert F.present(raw)
    assert F.rights(raw, PTE) == Access.NONE


@pytest.mark.parametrize("raw", [0, 0x1066, 0x8000_0000_0000_0000, 0x806F_FFFF_FFFF_F000, 0x5A0])
def test_bit_0_alone_makes_an_entry_present(raw):
    assert not F.present(raw)


def test_the_c_bit_is_stripped():
    fmt = npt.npt_format(4, 43, key_bits=1 << 47)
    assert fmt.frame(1 << 47 | 0x1067, PTE) == 0x1000
    assert not fmt.misconfigured(1 << 47 | 0x1067, PTE)


@pytest.mark.parametrize(
    ("levels", "names", "entry_bytes"),
    [
        (5, ["PML5E", "PML4E", "PDPTE", "PDE", "PTE"], 8),
        (4, ["PML4E", "PDPTE", "PDE", "PTE"], 8),
        (3, ["PDPTE", "PDE", "PTE"], 8),
        (2, ["PDE", "PTE"], 4),
    ],
)
def test_the_host_mode_decides_the_levels(levels, names, entry_bytes):
    fmt = npt.npt_format(levels)
    assert ([level.name for level in fmt.levels], fmt.entry_bytes) == (names, entry_bytes)
    assert fmt.name.startswith("NPT")


def test_another_number_of_levels_is_an_error():
    with pytest.raises(ValueError, match="not 1"):
        npt.npt_format(1)


@pytest.mark.parametrize("levels", [5, 4, 3, 2])
def test_arrays_and_single_entries_agree(levels):
    fmt = npt.npt_format(levels, 43, key_bits=1 << 47 if levels > 3 else 0)
    width = 8 * fmt.entry_bytes
    raws = every_bit(*(raw & (1 << width) - 1 for raw in (0, 0x27, 0xE7, NX | 0x67, (1 << 64) - 1)), width=width)
    for level in fmt.levels:
        for predicate in (fmt.rights, fmt.misconfigured, fmt.is_leaf, fmt.frame):
            assert_array_equals_scalars(lambda entry, call=predicate, at=level: call(entry, at), raws)
