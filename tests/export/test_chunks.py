"""Memory in pieces: each byte once, in order, whatever lies where in the capture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource, ReaderSource
from volatility3_ept.export import chunks

PAGE = 4096


def memory(segments: list[tuple[int, int]], seed: int = 1) -> HostMemory:
    """Return segments ``(address, length)`` of random bytes, stored in reverse order and at an odd offset."""
    data, table = bytearray(b"odd"), []
    for start, length in reversed(segments):
        table.append((start, length, len(data)))
        data += np.random.default_rng([seed, start]).bytes(length)
    return HostMemory.from_segments(FileSource(bytes(data)), table)


@st.composite
def layouts(draw):
    """Segments in units of a quarter page: aligned ones and others, neighbours and holes."""
    found, position = [], 0
    for gap, length in draw(st.lists(st.tuples(st.sampled_from([0, 0, 1, 4, 9]), st.integers(1, 30)), max_size=8)):
        position += gap * 1024
        found.append((position, length * 1024))
        position += length * 1024
    return found


@given(layouts(), st.sampled_from([PAGE, 2 * PAGE, 8 * PAGE]))
def test_the_pieces_are_the_memory(layout, size):
    held = memory(layout)
    for start, length in chunks.stretches(held):
        found = list(chunks.chunks(held, start, length, size))
        assert b"".join(chunk.data.tobytes() for chunk in found) == held.read(start, length)
        assert [chunk.gpa for chunk in found] == [
            start + sum(c.data.size for c in found[:i]) for i in range(len(found))
        ]
        assert all(chunk.data.size <= size and not chunk.unreadable for chunk in found)
        assert all(chunk.gpa % PAGE == 0 for chunk in found[1:])


@given(layouts(), st.integers(0, 40), st.integers(0, 40))
def test_a_part_of_a_memory_is_what_lies_between_two_addresses(layout, first, count):
    held, start, stop = memory(layout), first * 1024, (first + count) * 1024
    part = chunks.clip(held, start, stop)
    for address in range(0, 64 * 1024, 1024):
        inside = start <= address < stop
        assert part.read(address, 1024) == (held.read(address, 1024) if inside else None)


def test_neighbours_are_one_stretch_wherever_their_bytes_lie():
    assert chunks.stretches(memory([(0, PAGE), (PAGE, PAGE), (8 * PAGE, PAGE)])) == [(0, 2 * PAGE), (8 * PAGE, PAGE)]


def test_pages_that_cannot_be_read_are_zeros_and_are_named():
    def reader(offset: int, length: int) -> bytes | None:
        return None if offset < 3 * PAGE and offset + length > PAGE else b"x" * length

    held = HostMemory.from_segments(ReaderSource(reader), [(0, 4 * PAGE, 0)])
    (chunk,) = chunks.chunks(held, 0, 4 * PAGE)
    assert chunk.unreadable == ((PAGE, 2 * PAGE),)
    assert chunk.data.tobytes() == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE


@pytest.mark.parametrize("where", [0, 1, 255, 256, 2049, 4095])
def test_one_byte_makes_a_page_filled(where):
    data = bytearray(6 * PAGE)
    data[2 * PAGE + where] = data[3 * PAGE] = data[5 * PAGE + where] = 1
    found = chunks.filled(np.frombuffer(data, dtype=np.uint8))
    assert found == [(2 * PAGE, 4 * PAGE), (5 * PAGE, 6 * PAGE)]
