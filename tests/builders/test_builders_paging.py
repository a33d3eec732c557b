from __future__ import annotations

import struct

import pytest
from builders import paging
from builders.paging import HostRam, Tables


def test_a_page_that_was_never_written_is_not_in_the_capture():
    ram = HostRam()
    ram.write(0x3FFC, b"12345678")
    assert sorted(ram.pages) == [0x3000, 0x4000]
    assert ram.runs() == [(0x3000, bytes(0xFFC) + b"1234" + b"5678" + bytes(0xFFC))]


def test_the_raw_image_fills_holes_with_zeros():
    ram = HostRam()
    ram.write(0x2000, b"\x01")
    assert ram.image() == bytes(0x2000) + b"\x01" + bytes(0xFFF)
    assert HostRam().image() == b""


def test_segments_name_the_file_offset_of_every_run():
    ram = HostRam()
    ram.write(0x1000, b"A")
    ram.write(0x5000, b"B")
    data, table = ram.segments(prefix=b"xyz")
    assert table == [(0x1000, 0x1000, 3), (0x5000, 0x1000, 0x1006)]
    assert (data[3:4], data[0x1006:0x1007]) == (b"A", b"B")


def test_lime_headers_state_inclusive_ends():
    ram = HostRam()
    ram.write(0x5000, b"B")
    assert struct.unpack_from("<IIQQQ", ram.lime()) == (0x4C694D45, 1, 0x5000, 0x5FFF, 0)


@pytest.mark.parametrize(
    ("shape", "address", "size", "path"),
    [
        (paging.EPT_4, 0x80_4020_1000, 0x1000, [(0, 1, 0x7), (1, 1, 0x7), (2, 1, 0x7), (3, 1, 0x37)]),
        (paging.EPT_4, 0x80_4020_0000, 0x20_0000, [(0, 1, 0x7), (1, 1, 0x7), (2, 1, 0xB7)]),
        (paging.EPT_5, 0x1_0080_4000_0000, 0x4000_0000, [(0, 1, 0x7), (1, 1, 0x7), (2, 1, 0xB7)]),
        (paging.NPT_4, 0, 0x1000, [(0, 0, 0x27), (1, 0, 0x27), (2, 0, 0x27), (3, 0, 0x67)]),
        (paging.PAE, 0xC020_1000, 0x1000, [(0, 3, 0x1), (1, 1, 0x23), (2, 1, 0x63)]),
        (paging.LEGACY, 0xFFFF_F000, 0x1000, [(0, 1023, 0x23), (1, 1023, 0x63)]),
    ],
    ids=lambda value: value.name if isinstance(value, paging.Shape) else None,
)
def test_entries_are_where_the_manual_says(shape, address, size, path):
    ram = HostRam()
    tables = Tables(ram, shape)
    tables.map(address, 0x4000_0000, size)
    table = tables.root
    for position, (_, index, bits) in enumerate(path):
        entry = ram.read_entry(table + index * shape.width, shape.width)
        assert entry & 0xFFF == bits, position
        table = entry & 0x000F_FFFF_FFFF_F000
    assert table == 0x4000_0000


def test_the_pae_directory_is_not_page_aligned_and_a_4m_page_may_lie_above_4g():
    assert Tables(HostRam(), paging.PAE).root & 0xFFF == 0x7E0
    tables = Tables(HostRam(), paging.LEGACY)
    tables.map(0x40_0000, 0x12_8040_0000, 0x40_0000)
    assert tables.get(0x40_0000, "PDE") == 0x8040_0000 | 0x12 << 13 | 0xE3


def test_a_raw_entry_replaces_what_the_builder_would_write():
    tables = Tables(HostRam())
    at = tables.put(0x1000, "PTE", 0xDEAD)
    assert (tables.ram.read_entry(at), tables.get(0x1000, "PTE")) == (0xDEAD, 0xDEAD)
    with pytest.raises(ValueError, match="has no PML5E"):
        tables.put(0, "PML5E", 0)


def test_every_word_of_a_backed_page_is_its_own_address():
    ram = HostRam()
    placed = Tables(ram).back([0x1000, 0x2000])
    assert placed[0x2000] < placed[0x1000]
    assert bytes(ram.page(placed[0x2000])) == paging.stamp(0x2000)
    assert struct.unpack_from("<Q", paging.stamp(0x2000), 0x10) == (0x2010,)


def test_a_guest_writes_its_own_tables_through_the_host():
    ram = HostRam()
    placed = Tables(ram).back([0x1000 * n for n in range(8)])
    inner = Tables(paging.GuestRam(ram, placed), paging.LONG_4)
    inner.map(0x40_0000, 0x7000)
    assert inner.table_pages == [0, 0x1000, 0x2000, 0x3000]
    assert ram.read_entry(placed[0x3000] + 8 * 0) == 0x7000 | 0x63
