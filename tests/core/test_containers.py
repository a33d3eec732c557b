"""Which files are read as they lie, and which are left to Volatility."""

from __future__ import annotations

import gzip
import os
import struct

import pytest
from builders import machine, paging
from builders.paging import HostRam
from cli import containers as writers

from volatility3_ept.core import containers
from volatility3_ept.core.containers import Segment


@pytest.fixture(scope="module")
def ram() -> HostRam:
    ram, _ = machine.host(paging.EPT_4)
    ram.page(0x2000)
    ram.write(0x30_0010, b"last")
    return ram


@pytest.mark.parametrize(("write", "kind"), [(writers.lime, "LiME"), (writers.elf, "ELF core")])
def test_ranges_and_where_they_lie(ram, tmp_path, write, kind):
    path = write(ram, tmp_path)
    found = containers.read(path)
    data = path.read_bytes()
    assert (found.kind, found.missing) == (kind, 0)
    assert [(s.start, data[s.offset : s.offset + s.length]) for s in found.segments] == ram.runs()


def test_a_raw_image(ram, tmp_path):
    path = writers.raw(ram, tmp_path)
    found = containers.read(path)
    assert found == ("raw", (Segment(0, path.stat().st_size, 0),), path.stat().st_size)


@pytest.mark.parametrize("write", [writers.lime, writers.elf, writers.raw])
def test_a_file_that_was_cut_says_how_much_is_missing(ram, tmp_path, write):
    path = write(ram, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-0x345])
    assert containers.read(path).missing == 0x345


@pytest.mark.parametrize(
    "write", [writers.crash_dump, writers.vmware, writers.qemu, writers.avml, writers.gz, writers.xz]
)
def test_other_formats_are_for_volatility(ram, tmp_path, write):
    assert containers.read(write(ram, tmp_path)) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 100, b"text\n" * 4000, gzip.compress(os.urandom(9000)), b"\x7fELF\x02\x01\x01" + bytes(9000),
     b"EMiL" + struct.pack("<IQQQ", 1, 0x1000, 0xFFF, 0) + bytes(9000),
     b"EMiL" + struct.pack("<IQQQ", 1, 0, 0xFFF, 0) + bytes(4096) + b"damaged header" + bytes(5000)],
    ids=["empty", "short", "text", "gzip", "elf-program", "lime-backwards", "lime-damaged"],
)  # fmt: skip
def test_a_file_that_may_be_no_capture_is_not_decided_here(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    assert containers.read(path) is None


def test_more_program_headers_than_their_count_can_hold(tmp_path):
    """PN_XNUM: the count is in the first section header."""
    count, at = 0xFFFF + 3, 64 + 64
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, at, 64, 0, 64, 56, 0xFFFF, 64, 1, 0)
    section = bytearray(64)
    struct.pack_into("<I", section, 44, count)
    body = at + 56 * count
    table = b"".join(struct.pack("<IIQQQQQQ", 1, 7, body, 0, n << 13, 4096, 4096, 0) for n in range(count))
    path = tmp_path / "many.elf"
    path.write_bytes(header + bytes(section) + table + bytes(4096))
    assert len(containers.read(path).segments) == count


@pytest.mark.parametrize("other", [0, 1, 40, 99])
def test_a_raw_image_whose_first_and_middle_pages_are_text_is_no_text(tmp_path, other):
    """Text lies anywhere in memory; a text file has nothing else."""
    pages = [b"text" * 1024] * 100
    path = tmp_path / "host.raw"
    path.write_bytes(b"".join(pages))
    assert containers.read(path) is None
    pages[other] = os.urandom(4096)
    path.write_bytes(b"".join(pages))
    assert (containers.read(path) is not None) == (other in _looked_at(100))


def _looked_at(count: int) -> set[int]:
    return {count * part // 64 for part in range(64)} | {count - 1}


def test_ranges_that_overlap_are_for_volatility(tmp_path):
    path = tmp_path / "odd.elf"
    rows = b"".join(struct.pack("<IIQQQQQQ", 1, 7, 64 + 112, 0, start, 4096, 4096, 0) for start in (0, 0x800))
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    path.write_bytes(header + rows + bytes(4096))
    assert containers.read(path) is None
