"""Holes of a sparse capture are memory, and zeros; a search need not look at them."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from builders.paging import PAGE, stamp

from volatility3_ept.core import tables
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource

HOLE = 1 << 24


@pytest.fixture
def sparse(tmp_path):
    """A file of 64 MiB with a page at each 16 MiB."""
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        file.truncate(4 * HOLE)
        for address in range(0, 4 * HOLE, HOLE):
            file.seek(address)
            file.write(stamp(address))
        file.flush()
        os.fsync(file.fileno())
    if FileSource(path).extents() is None:
        pytest.skip("this file system does not tell holes from data")
    return path


def test_a_search_sees_what_was_written_and_little_else(sparse):
    memory = HostMemory.from_file(sparse)
    seen = {address: rows[0] for address, rows in memory.blocks(max_pages=1)}
    assert {address for address, row in seen.items() if row.any()} == set(range(0, 4 * HOLE, HOLE))
    assert len(seen) < 4 * 64
    assert memory.size == 4 * HOLE


def test_holes_are_zeros_not_missing(sparse):
    memory = HostMemory.from_file(sparse)
    assert memory.read(HOLE - PAGE, 2 * PAGE) == bytes(PAGE) + stamp(HOLE)
    assert memory.read(5 * PAGE, PAGE) == bytes(PAGE)
    rows, good = memory.words(np.array([5 * PAGE, HOLE, 4 * HOLE]))
    assert good.tolist() == [True, True, False]
    assert [row.tobytes() for row in rows] == [bytes(PAGE), stamp(HOLE), bytes(PAGE)]


@pytest.mark.parametrize("shift", [0, 32, 4000])
def test_pages_that_begin_anywhere_in_the_file_are_kept_whole(sparse, shift):
    """Headers of a container move the pages: one may lie half in a hole."""
    memory = HostMemory.from_segments(FileSource(sparse), [(0, 3 * HOLE, shift)])
    whole = HostMemory.from_bytes(sparse.read_bytes()[shift : shift + 3 * HOLE])
    expected = {
        a: r.tobytes() for first, rows in whole.blocks() for a, r in zip(*_rows(first, rows), strict=True) if r.any()
    }
    found = {
        a: r.tobytes() for first, rows in memory.blocks() for a, r in zip(*_rows(first, rows), strict=True) if r.any()
    }
    assert found == expected


def _rows(first, rows):
    return range(first, first + len(rows) * PAGE, PAGE), rows


def test_a_guest_in_many_pieces_skips_holes_too(sparse):
    gpas = np.arange(0, 4 * HOLE, PAGE)
    guest = HostMemory.from_file(sparse).remap(gpas, np.full(gpas.size, PAGE), gpas[::-1].copy())
    assert guest.size == 4 * HOLE
    total = [address for addresses, rows in tables.pages_of(guest) for address in addresses[rows.any(axis=1)].tolist()]
    assert total == [4 * HOLE - PAGE - n * HOLE for n in (3, 2, 1, 0)]


def test_what_was_released_can_be_read_again(sparse):
    source = FileSource(sparse)
    source.release(100, PAGE)
    source.release(3 * HOLE, HOLE)
    assert source.read(3 * HOLE, PAGE) == stamp(3 * HOLE)


def test_a_memory_goes_to_another_process_without_its_bytes(sparse):
    memory = HostMemory.from_file(sparse)
    packed = pickle.dumps(memory)
    assert len(packed) < 2000
    assert pickle.loads(packed).read(HOLE, PAGE) == stamp(HOLE)


def test_which_ranges_are_held():
    memory = HostMemory.from_segments(FileSource(bytes(0x3000)), [(0x1000, 0x1000, 0), (0x2000, 0x800, 0x2000)])
    cases = {
        (0x1000, 0x1800): True,
        (0x1800, 0x1000): True,
        (0x1000, 0x1801): False,
        (0xFFF, 2): False,
        (0x9000, 0): True,
    }
    assert {case: memory.holds(*case) for case in cases} == cases
