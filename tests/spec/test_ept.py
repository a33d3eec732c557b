"""EPT entries and the EPT pointer. The bits are spelled out as in SDM Vol. 3C, "Format of an EPT ... Entry"."""

from __future__ import annotations

import pytest
from builders.agreement import assert_array_equals_scalars, every_bit

from volatility3_ept.spec import ept, paging
from volatility3_ept.spec.ept import Eptp
from volatility3_ept.spec.paging import PDE, PDPTE, PML4E, PML5E, PTE, Access

F46 = ept.ept_format(5, 46)
MBEC = ept.ept_format(4, mode_based_execute=True)
NO_XO = ept.EptFormat("no execute-only", paging.FOUR_LEVELS, execute_only=False)
NO_XO_MBEC = ept.EptFormat("no execute-only", paging.FOUR_LEVELS, mode_based_execute=True, execute_only=False)
ALL_LEVELS = (PML5E, PML4E, PDPTE, PDE, PTE)

# level, raw, leaf, address it points to, rights, memory type with IPAT as bit 3, flags
SOUND = {
    "PML5E": (PML5E, 0x0000_2345_6789_A007, False, 0x2345_6789_A000, "RWX", ()),
    "PML4E": (PML4E, 0x0000_0000_0012_3107, False, 0x12_3000, "RWX", ("A",)),
    "PML4E, ignored bits": (PML4E, 0xFFF0_0000_0012_3F07, False, 0x12_3000, "RWX", ("A", "UX")),
    "PDPTE, table": (PDPTE, 0x3FFF_FFFF_F007, False, 0x3FFF_FFFF_F000, "RWX", ()),
    "PDPTE, read only": (PDPTE, 0x1001, False, 0x1000, "R--", ()),
    "PDE, table, execute only": (PDE, 0x1004, False, 0x1000, "--X", ()),
    "1G": (PDPTE, 0x3FFF_C000_00B7, True, 0x3FFF_C000_0000, "RWX", ()),
    "1G at 0": (PDPTE, 0xB7, True, 0, "RWX", ()),
    "2M": (PDE, 0x3FFF_FFE0_0BF7, True, 0x3FFF_FFE0_0000, "RWX", ("IPAT", "A", "D")),
    "2M, KVM": (PDE, 0x0600_0000_7FE0_0BF7, True, 0x7FE0_0000, "RWX", ("IPAT", "A", "D", "VGP", "PW")),
    "4K": (PTE, 0x3FFF_FFFF_F037, True, 0x3FFF_FFFF_F000, "RWX", ()),
    "4K, KVM": (PTE, 0x0600_0000_0123_4B77, True, 0x123_4000, "RWX", ("IPAT", "A", "D", "VGP", "PW")),
    "4K, KVM, not writable": (PTE, 0x0000_0000_0123_4975, True, 0x123_4000, "R-X", ("IPAT", "A")),
    "4K, bit 7 ignored": (PTE, 0x1_00B7, True, 0x1_0000, "RWX", ()),
    "4K, execute only": (PTE, 0x1_0034, True, 0x1_0000, "--X", ()),
    "4K, read and write": (PTE, 0x1_0033, True, 0x1_0000, "RW-", ()),
    "4K, ignored high bits": (PTE, 0xFFF0_0000_0001_0037, True, 0x1_0000, "RWX", ("VGP", "PW", "SSS", "SPP", "SVE")),
    "4K, UC": (PTE, 0x1_0007, True, 0x1_0000, "RWX", ()),
    "4K, WC": (PTE, 0x1_000F, True, 0x1_0000, "RWX", ()),
    "4K, WT": (PTE, 0x1_0027, True, 0x1_0000, "RWX", ()),
    "4K, WP": (PTE, 0x1_002F, True, 0x1_0000, "RWX", ()),
}  # fmt: skip


@pytest.mark.parametrize(("level", "raw", "leaf", "address", "letters", "flags"), SOUND.values(), ids=SOUND)
def test_entries_that_the_processor_follows(level, raw, leaf, address, letters, flags):
    assert F46.present(raw)
    assert not F46.misconfigured(raw, level)
    assert F46.is_leaf(raw, level) is leaf
    assert (F46.frame(raw, level) if leaf else F46.table(raw)) == address
    assert Access(F46.rights(raw, level)).letters() == letters
    assert F46.flags(raw, level) == flags


@pytest.mark.parametrize(
    ("raw", "memory_type"), [(0x07, 0), (0x0F, 1), (0x27, 4), (0x2F, 5), (0x37, 6), (0x77, 0b1110), (0x47, 0b1000)]
)
def test_memory_type_with_ipat_as_bit_3(raw, memory_type):
    assert F46.memory_type(raw) == memory_type
    assert memory_type & 7 in set(paging.MemoryType)


REFUSED = {
    "W without R": (PTE, 0x1032),
    "W and X without R": (PTE, 0x1036),
    "W without R in a table": (PML4E, 0x1002),
    "memory type 2": (PTE, 0x1017),
    "memory type 3": (PDE, 0x20_009F),
    "memory type 7": (PDPTE, 0x4000_00BF),
    "PML5E, bit 3": (PML5E, 0x100F),
    "PML5E, bit 7": (PML5E, 0x1087),
    "PML4E, bit 6": (PML4E, 0x1047),
    "PML4E, bit 7": (PML4E, 0x1087),
    "PDPTE, table, bit 3": (PDPTE, 0x100F),
    "PDPTE, table, bit 6": (PDPTE, 0x1047),
    "PDE, table, bit 5": (PDE, 0x1027),
    "1G, bit 12": (PDPTE, 0x4000_10B7),
    "1G, bit 29": (PDPTE, 0x6000_00B7),
    "2M, bit 12: no PAT in EPT": (PDE, 0x20_10B7),
    "2M, bit 20": (PDE, 0x30_00B7),
    "address bit 46 with MAXPHYADDR 46": (PTE, 0x4000_0000_1037),
    "address bit 51": (PML4E, 0x0008_0000_0000_1007),
}


@pytest.mark.parametrize(("level", "raw"), REFUSED.values(), ids=REFUSED)
def test_entries_that_the_processor_refuses(level, raw):
    assert F46.present(raw)
    assert F46.misconfigured(raw, level)


@pytest.mark.parametrize("number", [46, 51])
def test_address_bits_are_not_reserved_when_maxphyaddr_is_unknown(number):
    assert not ept.EPT_4.misconfigured(1 << number | 0x1037, PTE)


@pytest.mark.parametrize(
    ("fmt", "raw", "present", "refused", "rights"),
    [
        (ept.EPT_4, 0x1430, False, False, Access.NONE),
        (MBEC, 0x1430, True, False, Access.USER),
        (MBEC, 0x1034, True, False, Access.EXECUTE),
        (MBEC, 0x1437, True, False, Access.ALL),
        (ept.EPT_4, 0x1037, True, False, Access.ALL),
        (ept.EPT_4, 0x1033, True, False, Access.READ | Access.WRITE),
        (MBEC, 0x1432, True, True, Access.WRITE | Access.USER),
        (ept.EPT_4, 0x1034, True, False, Access.EXECUTE | Access.USER),
        (NO_XO, 0x1034, True, True, Access.EXECUTE | Access.USER),
        (NO_XO, 0x1035, True, False, Access.READ | Access.EXECUTE | Access.USER),
        (NO_XO_MBEC, 0x1430, True, True, Access.USER),
        (NO_XO_MBEC, 0x1434, True, True, Access.EXECUTE | Access.USER),
        (NO_XO_MBEC, 0x1431, True, False, Access.READ | Access.USER),
    ],
)
def test_mode_based_execute_and_execute_only(fmt, raw, present, refused, rights):
    """Bit 10 counts only with mode-based execute control; execute without read only where the capability is."""
    assert fmt.present(raw) is present
    assert (fmt.present(raw) and fmt.misconfigured(raw, PTE)) is refused
    assert Access(fmt.rights(raw, PTE)) & (Access.ALL if present else Access.NONE) == rights


@pytest.mark.parametrize("raw", [0, 0x8000_0000_0000_0000, 0x5A0, 0x8000_0000_0000_05A0, 0x000F_FFFF_FFFF_F0F8])
def test_an_entry_without_r_w_and_x_is_absent_whatever_else_it_holds(raw):
    assert not ept.EPT_4.present(raw)


@pytest.mark.parametrize("fmt", [F46, MBEC, NO_XO, NO_XO_MBEC], ids=["46", "MBEC", "no XO", "no XO, MBEC"])
@pytest.mark.parametrize("level", ALL_LEVELS, ids=lambda level: level.name)
def test_arrays_and_single_entries_agree(fmt, level):
    raws = every_bit(0, 0x7, 0x37, 0xB7, 0x0600_0000_0123_4B77, 0xFFFF_FFFF_FFFF_FFFF)
    for predicate in (fmt.present, fmt.memory_type, fmt.table):
        assert_array_equals_scalars(predicate, raws)
    for predicate in (fmt.rights, fmt.misconfigured, fmt.is_leaf, fmt.frame):
        assert_array_equals_scalars(lambda entry, call=predicate: call(entry, level), raws)


@pytest.mark.parametrize(
    ("raw", "root", "levels", "memory_type", "access_dirty", "shadow_stack"),
    [
        (0x1_2345_601E, 0x1_2345_6000, 4, 6, False, False),
        (0x1_2345_605E, 0x1_2345_6000, 4, 6, True, False),
        (0x1_2345_6066, 0x1_2345_6000, 5, 6, True, False),
        (0x1_2345_6026, 0x1_2345_6000, 5, 6, False, False),
        (0x000F_FFFF_FFFF_F098, 0x000F_FFFF_FFFF_F000, 4, 0, False, True),
    ],
)
def test_ept_pointer(raw, root, levels, memory_type, access_dirty, shadow_stack):
    eptp = Eptp(raw)
    assert (eptp.root_hpa, eptp.levels, eptp.memory_type) == (root, levels, memory_type)
    assert (eptp.access_dirty, eptp.shadow_stack) == (access_dirty, shadow_stack)
    assert eptp.faults() == ()
    assert [level.name for level in eptp.format().levels] == [level.name for level in ALL_LEVELS[5 - levels :]]


@pytest.mark.parametrize(
    ("raw", "physical_bits", "fault"),
    [
        (0x1000 | 0x1D, 52, "memory type 5"),
        (0x1000 | 0x16, 52, "page-walk length 3"),
        (0x1000 | 0x2E, 52, "page-walk length 6"),
        (0x1000 | 0x11E, 52, "bits 11:8 not zero"),
        (0x1000 | 0x81E, 52, "bits 11:8 not zero"),
        (1 << 39 | 0x101E, 39, "bits above MAXPHYADDR 39"),
        (1 << 52 | 0x101E, 52, "bits above MAXPHYADDR 52"),
        (0x01E, 52, "no table address"),
    ],
)
def test_an_ept_pointer_that_vm_entry_refuses_says_why(raw, physical_bits, fault):
    assert Eptp(raw).faults(physical_bits) == (fault,)


def test_an_ept_pointer_just_below_maxphyaddr_is_sound_and_faults_add_up():
    assert Eptp(1 << 38 | 0x101E).faults(39) == ()
    assert len(Eptp(0xF01).faults()) == 4


@pytest.mark.parametrize("levels", [1, 3, 6])
def test_ept_has_four_or_five_levels(levels):
    with pytest.raises(ValueError, match="4 or 5 levels"):
        ept.ept_format(levels)
