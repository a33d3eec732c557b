from __future__ import annotations

import pytest

from volatility3_ept.spec import ept, ia32e, npt, paging
from volatility3_ept.spec.paging import Access, Outcome


@pytest.mark.parametrize(
    ("level", "page_size", "entries", "index"),
    [
        (paging.PML5E, 1 << 48, 512, 0x1FF),
        (paging.PML4E, 1 << 39, 512, 0x0AA),
        (paging.PDPTE, 1 << 30, 512, 0x155),
        (paging.PDE, 1 << 21, 512, 0x0F0),
        (paging.PTE, 1 << 12, 512, 0x10F),
        (ia32e.pae().levels[0], 1 << 30, 4, 0x1),
        (ia32e.legacy().levels[0], 1 << 22, 1024, 0x178),
        (ia32e.legacy().levels[1], 1 << 12, 1024, 0x10F),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_levels(level, page_size, entries, index):
    address = 0x1FF << 48 | 0x0AA << 39 | 0x155 << 30 | 0x0F0 << 21 | 0x10F << 12 | 0xFFF
    assert (level.page_size, level.entries, level.index(address)) == (page_size, entries, index)


@pytest.mark.parametrize(
    ("fmt", "address_bits", "table_bytes", "entry_bytes"),
    [
        (ept.EPT_4, 48, 4096, 8),
        (ept.EPT_5, 57, 4096, 8),
        (npt.NPT_4, 48, 4096, 8),
        (npt.NPT_5, 57, 4096, 8),
        (npt.npt_format(3), 32, 4096, 8),
        (npt.npt_format(2), 32, 4096, 4),
        (ia32e.four_level(), 48, 4096, 8),
        (ia32e.five_level(), 57, 4096, 8),
        (ia32e.pae(), 32, 4096, 8),
        (ia32e.legacy(), 32, 4096, 4),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_format_dimensions(fmt, address_bits, table_bytes, entry_bytes):
    assert (fmt.address_bits, fmt.table_bytes, fmt.entry_bytes) == (address_bits, table_bytes, entry_bytes)


@pytest.mark.parametrize(
    ("fmt", "root", "address"),
    [
        (ept.EPT_4, 0x1_2345_605E, 0x1_2345_6000),
        (ept.ept_format(4, 39), 0x7F_FFFF_F05E | 1 << 39, 0x7F_FFFF_F000),
        (ia32e.four_level(), 0x8000_0000_1234_5FFF, 0x1234_5000),  # CR3: bit 63 and a PCID
        (ia32e.pae(), 0x1234_57E0 | 0x1F, 0x1234_57E0),
        (ia32e.legacy(), 0xFFFF_FFFF, 0xFFFF_F000),
        (npt.npt_format(4, key_bits=1 << 47), 0x8000_1234_5000, 0x1234_5000),  # nCR3 with the C-bit
        (npt.npt_format(3), 0x1234_57E0, 0x1234_57E0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_root_register_to_table_address(fmt, root, address):
    assert fmt.root_hpa(root) == address


@pytest.mark.parametrize(
    ("physical_bits", "key_bits", "reserved"),
    [
        (52, 0, 0),
        (51, 0, 0x0008_0000_0000_0000),
        (39, 0, 0x000F_FF80_0000_0000),
        (46, 0xF << 47, 0x0008_4000_0000_0000),
    ],
)
def test_address_bits_from_maxphyaddr_on_are_reserved_unless_they_carry_a_key(physical_bits, key_bits, reserved):
    fmt = npt.npt_format(4, physical_bits, key_bits)
    assert fmt.reserved_address == reserved


@pytest.mark.parametrize(
    ("access", "letters"),
    [(0, "---"), (1, "R--"), (2, "-W-"), (4, "--X"), (7, "RWX"), (8, "---"), (15, "RWX"), (5, "R-X")],
)
def test_access_letters_leave_the_user_bit_out(access, letters):
    assert Access(access).letters() == letters


def test_outcomes_read_as_words():
    assert [str(outcome) for outcome in Outcome] == [
        "mapped", "not present", "misconfigured", "MMIO", "unreadable", "outside the capture",
    ]  # fmt: skip


def test_only_a_guests_own_tables_translate_linear_addresses():
    formats = (ept.EPT_4, npt.NPT_4, npt.npt_format(3), ia32e.four_level(), ia32e.pae())
    assert [fmt.is_linear for fmt in formats] == [False, False, False, True, True]
