"""Compressed dumps of makedumpfile: what is there, what was left out, and what is damaged."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from builders.paging import PAGE, HostRam
from cli import containers as writers
from hypothesis import given
from hypothesis import strategies as st

from volatility3_ept.core import kdump, kdumppages

#: Pages that the machine of these tests had and its dump leaves out.
EXCLUDED = [0x3000, 0x9000, 0xA000]
#: Where the first data lies: two headers, two bitmaps of a block each, nine descriptors.
DATA = 4 * PAGE + 9 * 24


@pytest.fixture(scope="module")
def ram() -> HostRam:
    """Nine pages in three stretches; two of them are zeros, one does not compress."""
    ram = HostRam()
    for page in (1, 2, 4, 5, 6, 7, 8, 0x40, 0x41):
        ram.write(page * PAGE, bytes([page]) * 100 + b"end")
    ram.write(0x2000, bytes(103))
    ram.write(0x5000, bytes(103))
    ram.write(0x6000, np.random.default_rng(1).bytes(PAGE))
    return ram


def read(tmp_path, data):
    path = tmp_path / "dump"
    path.write_bytes(data)
    return kdump.read(path)


def contents(memory):
    """Return the memory as the builder gives it."""
    runs = zip(memory.starts.tolist(), memory.lengths.tolist(), strict=True)
    return [(start, memory.read(start, length)) for start, length in runs]


@pytest.mark.parametrize("form", [bytes, writers.flattened], ids=["file", "flattened"])
def test_every_dumped_page_is_read(ram, tmp_path, form):
    dump = read(tmp_path, form(writers.kdump_file(ram)))
    assert contents(kdumppages.memory(dump)) == ram.runs()
    assert (dump.memory, dump.dumped, dump.unwritten, dump.incomplete, dump.methods) == (9, 9, 0, False, {"zlib"})
    assert dump.describe() == ""


def test_what_was_left_out_is_absent_and_counted(ram, tmp_path):
    dump = read(tmp_path, writers.kdump_file(ram, EXCLUDED, level=31))
    memory = kdumppages.memory(dump)
    assert contents(memory) == ram.runs()
    assert [memory.read(address, 8) for address in EXCLUDED] == [None] * 3
    assert (dump.memory, dump.dumped, dump.excluded, dump.level) == (12, 9, 3, 31)
    assert dump.describe().startswith("3 of 12 pages of memory (12K) were left out when it was made (dump level 31)")
    assert "guests" in dump.describe()


def test_the_level_that_keeps_processes_says_nothing_of_guests(ram, tmp_path):
    assert "guests" not in read(tmp_path, writers.kdump_file(ram, EXCLUDED, level=17)).describe()


def test_a_dumped_page_of_zeros_is_zeros(ram, tmp_path):
    """Zeros are known, whatever the level: makedumpfile dumps them all as one."""
    memory = kdumppages.memory(read(tmp_path, writers.kdump_file(ram, EXCLUDED, level=31)))
    assert memory.read(0x2000, PAGE) == memory.read(0x5000, PAGE) == bytes(PAGE)


def test_words_blocks_and_reads_agree(ram, tmp_path):
    memory = kdumppages.memory(read(tmp_path, writers.kdump_file(ram)))
    wanted = np.array([0x1000, 0x3000, 0x6000, 0x41000])
    words, good = memory.words(wanted)
    assert good.tolist() == [True, False, True, True]
    assert [row.tobytes() for row in words[good]] == [bytes(ram.pages[a]) for a in (0x1000, 0x6000, 0x41000)]
    assert [(start, rows.tobytes()) for start, rows in memory.blocks()] == ram.runs()
    assert memory.read(0x7FFE, 6) == bytes(ram.pages[0x7000][-2:] + ram.pages[0x8000][:4])


@pytest.mark.parametrize("cut", [1, PAGE])
def test_a_page_whose_data_was_cut_off_is_absent(ram, tmp_path, cut):
    dump = read(tmp_path, writers.kdump_file(ram)[:-cut])
    kept = contents(kdumppages.memory(dump))
    assert dump.incomplete and dump.unwritten
    assert sum(len(data) for _, data in kept) == (9 - dump.unwritten) * PAGE
    whole = ram.image()
    assert all(whole[start : start + len(data)] == data for start, data in kept)
    assert f"the data of {dump.unwritten} pages" in dump.describe()


def test_descriptors_that_were_cut_off_name_no_page(ram, tmp_path):
    dump = read(tmp_path, writers.kdump_file(ram)[: 4 * PAGE + 24 * 4 + 5])
    assert (dump.dumped, dump.unwritten, dump.incomplete, dump.starts.size) == (9, 9, True, 0)


def test_a_dump_that_says_it_is_incomplete(ram, tmp_path):
    assert read(tmp_path, writers.kdump_file(ram, status=1 | 8)).incomplete


def test_a_flattened_file_without_its_end_is_incomplete(ram, tmp_path):
    flat = writers.flattened(writers.kdump_file(ram), end=False)
    dump = read(tmp_path, flat)
    assert dump.incomplete and not dump.unwritten
    dump = read(tmp_path, flat[:-700])
    assert dump.incomplete
    whole = ram.image()
    assert all(whole[start : start + len(data)] == data for start, data in contents(kdumppages.memory(dump)))


def test_a_page_that_a_gap_of_a_flattened_file_holds_is_absent(ram, tmp_path):
    """The rearranged file would have zeros there: uncompressed, they would be a page."""
    data = writers.kdump_file(ram)
    (where,) = [at for at, size, flag, _ in struct.iter_unpack("<QIIQ", data[4 * PAGE : DATA]) if not flag]
    flat = writers.flattened(data[:where])[:-16]
    rest = data[where + PAGE :]
    flat += struct.pack(">qq", where + PAGE, len(rest)) + rest + struct.pack(">qq", -1, -1)
    dump = read(tmp_path, flat)
    assert (dump.unwritten, dump.incomplete) == (1, True)
    assert kdumppages.memory(dump).read(0x6000, 1) is None


def test_the_last_of_two_equal_writes_counts(ram, tmp_path):
    """makedumpfile writes the header anew when the disk is full."""
    flat = writers.flattened(writers.kdump_file(ram))[:-16]
    header = writers.kdump_file(ram, status=9)[:PAGE]
    dump = read(tmp_path, flat + struct.pack(">qq", 0, PAGE) + header + struct.pack(">qq", -1, -1))
    assert dump.incomplete and not dump.unwritten


def test_writes_that_overlap_are_refused(ram, tmp_path):
    flat = writers.flattened(writers.kdump_file(ram))[:-16] + struct.pack(">qq", PAGE + 1, 2) + b"ab"
    with pytest.raises(kdump.KdumpError, match="makedumpfile -R"):
        read(tmp_path, flat)


def test_a_damaged_page_is_unreadable_and_its_neighbours_are_not(ram, tmp_path):
    data = bytearray(writers.kdump_file(ram))
    data[DATA + len(zlib.compress(bytes(PAGE))) + 1] ^= 0xFF  # The page at 0x1000, after that of zeros.
    memory = kdumppages.memory(read(tmp_path, bytes(data)))
    assert memory.read(0x1000, 8) is None
    assert memory.read(0x4000, 1) == b"\4"
    assert 0x1000 not in [start for start, _ in memory.blocks()]
    assert sum(len(rows) for _, rows in memory.blocks()) == 8


def test_a_page_that_unpacks_to_another_size_is_unreadable(ram, tmp_path):
    data = bytearray(writers.kdump_file(ram))
    bomb = zlib.compress(bytes(1 << 21))
    struct.pack_into("<QII", data, 4 * PAGE, len(data), len(bomb), 1)
    memory = kdumppages.memory(read(tmp_path, bytes(data) + bomb))
    assert memory.read(0x1000, 8) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"machine": b"aarch64"}, "'aarch64'"), ({"split": 1}, "--reassemble")],
    ids=["machine", "split"],
)
def test_kinds_that_are_refused(ram, tmp_path, changes, says):
    with pytest.raises(kdump.KdumpError, match=says):
        read(tmp_path, writers.kdump_file(ram, **changes))


def test_a_dump_without_vmcoreinfo_names_no_machine(ram, tmp_path):
    assert read(tmp_path, writers.kdump_file(ram, machine=b"")).dumped == 9


@pytest.mark.parametrize("flag", [2, 4, 0x20, 0x40])
def test_other_methods_are_named(ram, tmp_path, flag):
    data = bytearray(writers.kdump_file(ram))
    struct.pack_into("<I", data, 4 * PAGE + 12, flag)
    dump = read(tmp_path, bytes(data))
    assert dump.methods == {"zlib", {2: "lzo", 4: "snappy", 0x20: "zstd", 0x40: "method 0x40"}[flag]}
    assert kdumppages.memory(dump).read(0x1000, 1) is None


def test_the_format_is_told_from_others(ram):
    data = writers.kdump_file(ram)
    assert kdump.recognised(data[: kdump.HEAD])
    assert kdump.recognised(writers.flattened(data)[: kdump.HEAD])
    assert not kdump.recognised(writers.flattened(b"\x7fELF".ljust(9000, b"\0"))[: kdump.HEAD])
    assert not kdump.recognised(b"DISKDUMP" + data[8 : kdump.HEAD])


@given(st.integers(0, 2 * PAGE + 4), st.binary(min_size=1, max_size=12), st.booleans())
def test_damage_in_the_headers_never_does_more_than_refuse(tmp_path_factory, at, junk, flat):
    ram = HostRam()
    ram.write(0x2000, b"page")
    data = bytearray(writers.kdump_file(ram))
    if flat:
        data = bytearray(writers.flattened(bytes(data)))
    data[at : at + len(junk)] = junk
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        dump = kdump.read(path)
    except kdump.KdumpError:
        return
    for start, rows in kdumppages.memory(dump).blocks():
        assert start < 1 << 52 and rows.shape[1] == 512
