"""Physical memory as the algorithms see it: present ranges, byte reads, and pages as numpy rows.

A :class:`HostMemory` is a table of segments over a :class:`~volatility3_ept.core.source.Source`. A guest is the same
thing: :meth:`HostMemory.remap` composes the guest's runs with the host's segments, and to read a guest, or a guest's
guest, costs one look-up. Unreadable is not zero: a read that the capture cannot satisfy returns None.
"""

from __future__ import annotations

import bisect
import functools
import weakref
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from volatility3_ept.core.source import Bools, FileSource, Int64, Source, Words
from volatility3_ept.spec.bits import PAGE_SHIFT, PAGE_SIZE

#: The types of arrays are for everybody who works on a memory.
__all__ = ["Bools", "HostMemory", "Int64", "Words", "join_runs"]

#: Rows of a table that are worked on together: what is made of them on the way stays small.
_BLOCK = 1 << 18

# The C library gives large blocks back to the system as they are freed, and each new one is paid for in page faults.
# Once a block of nearly 32 MiB was freed, glibc keeps such memory: arrays made on the way then cost half as much.
np.empty(31 << 20, dtype=np.uint8)


class HostMemory:
    """Segments of physical memory over a source. Immutable.

    ``starts`` (physical address), ``lengths`` (bytes) and ``offsets`` (of the source) are parallel; starts ascend and
    segments do not overlap.
    """

    def __init__(self, source: Source, starts: Int64, lengths: Int64, offsets: Int64) -> None:
        """Take the tables as they are; ValueError when segments overlap or are out of order."""
        self.source = source
        self.starts = np.ascontiguousarray(starts, dtype=np.int64)
        self.lengths = np.ascontiguousarray(lengths, dtype=np.int64)
        self.offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        # Views that give plain integers: a single look-up is several times as fast through them.
        self._table = (self.starts.data, self.lengths.data, self.offsets.data)
        #: What hierarchies in this memory map, for as long as somebody holds it: by whatever names the hierarchy.
        self.maps: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        if any((self.starts[b] - self.starts[a] < self.lengths[a]).any() for a, b in _neighbours(self.starts.size)):
            raise ValueError("physical memory segments overlap or are out of order")

    @classmethod
    def from_bytes(cls, data: bytes, start: int = 0) -> HostMemory:
        """Return the memory that holds these bytes from physical address ``start`` on."""
        return cls.from_segments(FileSource(data), [(start, len(data), 0)])

    @classmethod
    def from_file(cls, path: str | Path) -> HostMemory:
        """Return a raw image, in which a byte's offset is its physical address."""
        source = FileSource(Path(path))
        return cls.from_segments(source, [(0, source.size, 0)])

    @classmethod
    def from_segments(cls, source: Source, segments: list[tuple[int, int, int]]) -> HostMemory:
        """Return the memory made of ``(start, length, source offset)``; empty segments are left out."""
        table = np.array(sorted(s for s in segments if s[1] > 0), dtype=np.int64).reshape(-1, 3)
        return cls(source, table[:, 0], table[:, 1], table[:, 2])

    def __reduce__(self) -> tuple[object, ...]:
        """Make it anew from its tables in another process."""
        return HostMemory, (self.source, self.starts, self.lengths, self.offsets)

    def __deepcopy__(self, memo: dict[int, object]) -> HostMemory:
        """Return itself: nothing in it changes, and Volatility copies whole contexts."""
        return self

    @property
    def top(self) -> int:
        """The first address above all present memory; 0 when there is none."""
        return int(self.starts[-1] + self.lengths[-1]) if self.starts.size else 0

    @property
    def size(self) -> int:
        """Present bytes, holes not counted."""
        return int(self.lengths.sum())

    def _segment(self, address: int) -> int:
        """Return the index of the segment that holds ``address``, or -1."""
        starts, lengths, _ = self._table
        index = bisect.bisect_right(starts, address) - 1
        return index if index >= 0 and address < starts[index] + lengths[index] else -1

    def __contains__(self, address: int) -> bool:
        """Tell whether the byte at a physical address is in the capture."""
        return self._segment(address) >= 0

    def holds(self, address: int, length: int) -> bool:
        """Tell whether all bytes of a range are present."""
        starts, lengths, _ = self._table
        end = address + length
        while address < end:
            index = self._segment(address)
            if index < 0:
                return False
            address = starts[index] + lengths[index]
        return True

    def read(self, address: int, length: int) -> bytes | None:
        """Return exactly ``length`` bytes at a physical address, or None when any of them is not there."""
        starts, lengths, offsets = self._table
        parts: list[bytes | memoryview] = []
        piece = self.source.view if isinstance(self.source, FileSource) else self.source.read
        while length > 0:
            index = self._segment(address)
            if index < 0:
                return None
            within = address - starts[index]
            take = min(length, lengths[index] - within)
            if take == length and not parts:
                return self.source.read(offsets[index] + within, take)
            part = piece(offsets[index] + within, take)
            if part is None:
                return None
            parts.append(part)
            address += take
            length -= take
        return b"".join(parts)

    def locate(self, addresses: Int64, length: int | Int64 = PAGE_SIZE) -> Int64:
        """Return the source offsets of these addresses, -1 where the ``length`` bytes there are not one piece."""
        if not self.starts.size:
            return np.full(addresses.shape, -1, dtype=np.int64)
        index = np.searchsorted(self.starts, addresses, side="right") - 1
        safe = np.maximum(index, 0)
        within = addresses - self.starts[safe]
        held = (index >= 0) & (within + length <= self.lengths[safe])
        return np.where(held, self.offsets[safe] + within, np.int64(-1))

    def words(self, addresses: Int64) -> tuple[Words, Bools]:
        """Return the 4 KiB pages at these addresses as ``uint64[n, 512]``, and which of them the capture holds.

        A page that the capture does not hold whole is a row of zeros and False.
        """
        addresses = np.asarray(addresses, dtype=np.int64)
        offsets = self.locate(addresses)
        out, good = self.source.pages(offsets)
        split = np.flatnonzero(~good & (self.locate(addresses, 1) >= 0))
        for row in split.tolist():
            # The page straddles two segments: the rare case, read piece by piece.
            data = self.read(int(addresses[row]), PAGE_SIZE)
            if data is not None:
                out[row] = np.frombuffer(data, dtype=np.uint64)
                good[row] = True
        return out, good

    def release(self, addresses: Int64) -> None:
        """Let go of the pages at some addresses, which were looked at: a mapped file then takes no memory for them."""
        offsets = self.locate(addresses)
        offsets = offsets[offsets >= 0]
        if offsets.size:
            low = int(offsets.min())
            self.source.release(low, int(offsets.max()) + PAGE_SIZE - low)

    @functools.cached_property
    def written(self) -> HostMemory:
        """The same memory without the holes of a sparse capture: whole pages that are zeros because nothing is there.

        Holes are memory, and read as zeros; a search need not look at them.
        """
        extents = self.source.extents()
        if extents is None or not self.starts.size:
            return self
        starts, ends = extents
        # A page may begin anywhere in the file: one that is partly in a hole is kept whole.
        starts, ends = np.maximum(starts - PAGE_SIZE + 1, 0), ends + PAGE_SIZE - 1
        new = np.ones(starts.size, dtype=np.bool_)
        new[1:] = starts[1:] > ends[:-1]
        starts, ends = starts[new], ends[np.roll(new, -1)]
        return HostMemory(self.source, starts, ends - starts, starts).remap(self.starts, self.lengths, self.offsets)

    def blocks(self, max_pages: int = 4096) -> Iterator[tuple[int, Words]]:
        """Yield all whole, aligned pages in ascending order as ``(address of the first, uint64[n, 512])``.

        Rows may be a view of the mapped file. A block that cannot be read is split, and its bad pages left out, as are
        the holes of a sparse file.
        """
        memory = self.written
        for start, length, offset in zip(*memory._table, strict=True):
            skip = -start % PAGE_SIZE
            first, count = start + skip, (length - skip) >> PAGE_SHIFT
            for page in range(0, count, max_pages):
                take = min(max_pages, count - page)
                where = page * PAGE_SIZE
                block = self.source.block(offset + skip + where, take)
                if block is not None:
                    yield first + where, block
                    self.source.release(offset + skip + where, take * PAGE_SIZE)
                else:
                    yield from self._page_by_page(first + where, take)

    def _page_by_page(self, address: int, count: int) -> Iterator[tuple[int, Words]]:
        for page in range(count):
            rows, good = self.words(np.array([address + page * PAGE_SIZE], dtype=np.int64))
            if good[0]:
                yield address + page * PAGE_SIZE, rows

    def remap(self, gpas: Int64, lengths: Int64, hpas: Int64) -> HostMemory:
        """Return the memory of a guest whose runs ``gpas`` (ascending) lie at ``hpas`` of this memory.

        What this memory lacks, the guest's lacks too. Nothing is copied.
        """
        gpas, lengths, hpas = (np.asarray(a, dtype=np.int64) for a in (gpas, lengths, hpas))
        offsets: Int64 = np.empty_like(hpas)
        for part in _slices(hpas.size):
            offsets[part] = self.locate(hpas[part], lengths[part])
        if (offsets >= 0).all():
            return HostMemory(self.source, *join_runs(gpas, lengths, offsets))
        cut = [self._cut(gpas[part], lengths[part], hpas[part]) for part in _slices(hpas.size)]
        return HostMemory(self.source, *join_runs(*(np.concatenate(column) for column in zip(*cut, strict=True))))

    def _cut(self, gpas: Int64, lengths: Int64, hpas: Int64) -> tuple[Int64, Int64, Int64]:
        """Return the pieces of some runs that lie in one segment each, as starts, lengths and source offsets."""
        if not self.starts.size:
            return gpas[:0], lengths[:0], hpas[:0]
        first = np.maximum(np.searchsorted(self.starts, hpas, side="right") - 1, 0)
        last = np.maximum(np.searchsorted(self.starts, hpas + lengths - 1, side="right") - 1, 0)
        count = last - first + 1
        run = np.repeat(np.arange(gpas.size), count)
        segment = first[run] + np.arange(run.size) - np.repeat(np.cumsum(count) - count, count)
        low = np.maximum(hpas[run], self.starts[segment])
        high = np.minimum(hpas[run] + lengths[run], self.starts[segment] + self.lengths[segment])
        held = high > low
        run, segment, low, high = run[held], segment[held], low[held], high[held]
        return gpas[run] + low - hpas[run], high - low, self.offsets[segment] + low - self.starts[segment]


def _slices(count: int) -> Iterator[slice]:
    """Yield the rows of a table in blocks."""
    return (slice(begin, min(begin + _BLOCK, count)) for begin in range(0, count, _BLOCK))


def _neighbours(count: int) -> Iterator[tuple[slice, slice]]:
    """Yield all pairs of neighbouring rows of a table in blocks, as two slices of it."""
    return ((part, slice(part.start + 1, part.stop + 1)) for part in _slices(count - 1))


def join_runs(starts: Int64, lengths: Int64, targets: Int64) -> tuple[Int64, Int64, Int64]:
    """Join neighbours that continue each other on both sides. ``starts`` must ascend.

    Attributes in the low bits of ``targets`` are compared along with the addresses: equal ones cancel out.
    """
    new = np.ones(starts.size, dtype=np.bool_)
    for this, after in _neighbours(starts.size):
        step = lengths[this]
        new[after] = (starts[after] - starts[this] != step) | (targets[after] - targets[this] != step)
    if new.all():
        return starts, lengths, targets
    first = np.flatnonzero(new)
    last = np.append(first[1:], starts.size) - 1
    begins = starts[first]
    return begins, starts[last] + lengths[last] - begins, targets[first]
