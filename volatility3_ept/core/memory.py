"""Physical memory as the algorithms see it: present ranges, byte reads, and pages as numpy rows.

A :class:`HostMemory` is a table of segments over a :class:`Source`. A guest is the same thing: :meth:`HostMemory.remap`
composes the guest's runs with the host's segments, so that reading a guest, or a guest's guest, costs one look-up.
Unreadable is not zero: a read that the capture cannot satisfy returns None.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from volatility3_ept.spec.bits import PAGE_SHIFT, PAGE_SIZE

Int64 = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

WORDS_PER_PAGE = PAGE_SIZE // 8


class Source(Protocol):
    """Where the bytes come from. Offsets are the source's own: a file's, or a Volatility layer's addresses."""

    def read(self, offset: int, length: int) -> bytes | None:
        """Return exactly ``length`` bytes, or None when some of them cannot be read."""

    def pages(self, offsets: Int64) -> tuple[Words, Bools]:
        """Return the pages that begin at these byte offsets as rows of 512 words, and which of them were readable."""

    def block(self, offset: int, count: int) -> Words | None:
        """Return ``count`` pages that lie one behind the other as rows of 512 words, without a copy if possible."""


class FileSource:
    """A plain file, memory-mapped read-only; or bytes that are in memory already."""

    def __init__(self, data: Path | bytes | npt.NDArray[np.uint8]) -> None:
        """Map the file. An empty one has no bytes; OSError where it cannot be opened."""
        if isinstance(data, Path):
            size = data.stat().st_size
            self._bytes: npt.NDArray[np.uint8] = (
                np.memmap(data, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)
            )
        else:
            self._bytes = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
        self._rows: dict[int, Words] = {}

    @property
    def size(self) -> int:
        """Length in bytes."""
        return int(self._bytes.size)

    def read(self, offset: int, length: int) -> bytes | None:
        """Return ``length`` bytes from ``offset``; None beyond the end."""
        if offset < 0 or offset + length > self._bytes.size:
            return None
        return self._bytes[offset : offset + length].tobytes()

    def pages(self, offsets: Int64) -> tuple[Words, Bools]:
        """Gather pages at any offsets. Those that agree modulo 4096 are taken by one index operation."""
        good = (offsets >= 0) & (offsets + PAGE_SIZE <= self._bytes.size)
        if offsets.size == 0 or not good.any():
            return np.zeros((offsets.size, WORDS_PER_PAGE), dtype=np.uint64), good
        phases = offsets & (PAGE_SIZE - 1)
        if good.all() and (phases == phases[0]).all():
            return self._phase(int(phases[0]))[offsets >> PAGE_SHIFT], good
        out = np.zeros((offsets.size, WORDS_PER_PAGE), dtype=np.uint64)
        for phase in np.unique(phases[good]):
            chosen = good & (phases == phase)
            out[chosen] = self._phase(int(phase))[offsets[chosen] >> PAGE_SHIFT]
        return out, good

    def block(self, offset: int, count: int) -> Words | None:
        """Return a view; None beyond the end."""
        if offset < 0 or offset + count * PAGE_SIZE > self._bytes.size:
            return None
        first = offset >> PAGE_SHIFT
        return self._phase(offset & (PAGE_SIZE - 1))[first : first + count]

    def _phase(self, phase: int) -> Words:
        """Return the file from byte ``phase`` on as rows of one page each."""
        if phase not in self._rows:
            count = (self._bytes.size - phase) >> PAGE_SHIFT
            body = self._bytes[phase : phase + (count << PAGE_SHIFT)]
            self._rows[phase] = body.view(np.uint64).reshape(count, WORDS_PER_PAGE)
        return self._rows[phase]


class ReaderSource:
    """Anything with a read function: a compressed capture, a layer that decodes what it returns."""

    def __init__(self, reader: Callable[[int, int], bytes | None]) -> None:
        """``reader(offset, length)`` returns that many bytes, or None when some of them cannot be read."""
        self._reader = reader

    def read(self, offset: int, length: int) -> bytes | None:
        """Return ``length`` bytes from ``offset``, or None."""
        return self._reader(offset, length)

    def pages(self, offsets: Int64) -> tuple[Words, Bools]:
        """Read page by page: a decoding layer has no faster way."""
        out = np.zeros((offsets.size, WORDS_PER_PAGE), dtype=np.uint64)
        good = np.zeros(offsets.size, dtype=np.bool_)
        for row, offset in enumerate(offsets.tolist()):
            data = self._reader(offset, PAGE_SIZE)
            if data is not None:
                out[row] = np.frombuffer(data, dtype=np.uint64)
                good[row] = True
        return out, good

    def block(self, offset: int, count: int) -> Words | None:
        """Read the whole block at once."""
        data = self._reader(offset, count * PAGE_SIZE)
        return None if data is None else np.frombuffer(data, dtype=np.uint64).reshape(count, WORDS_PER_PAGE)


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
        if self.starts.size and (self.starts[1:] < (self.starts + self.lengths)[:-1]).any():
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
        index = int(bisect.bisect_right(self.starts, address)) - 1
        if index < 0 or address >= int(self.starts[index]) + int(self.lengths[index]):
            return -1
        return index

    def __contains__(self, address: int) -> bool:
        """Tell whether the byte at a physical address is in the capture."""
        return self._segment(address) >= 0

    def read(self, address: int, length: int) -> bytes | None:
        """Return exactly ``length`` bytes at a physical address, or None when any of them is not there."""
        parts: list[bytes] = []
        while length > 0:
            index = self._segment(address)
            if index < 0:
                return None
            within = address - int(self.starts[index])
            take = min(length, int(self.lengths[index]) - within)
            part = self.source.read(int(self.offsets[index]) + within, take)
            if part is None:
                return None
            parts.append(part)
            address += take
            length -= take
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def locate(self, addresses: Int64, length: int = PAGE_SIZE) -> Int64:
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

    def blocks(self, max_pages: int = 4096) -> Iterator[tuple[int, Words]]:
        """Yield all whole, aligned pages in ascending order as ``(address of the first, uint64[n, 512])``.

        Rows may be a view of the mapped file. A block that cannot be read is split, and its bad pages left out.
        """
        for start, length, offset in zip(
            self.starts.tolist(), self.lengths.tolist(), self.offsets.tolist(), strict=True
        ):
            skip = -start % PAGE_SIZE
            first, count = start + skip, (length - skip) >> PAGE_SHIFT
            for page in range(0, count, max_pages):
                take = min(max_pages, count - page)
                where = page * PAGE_SIZE
                block = self.source.block(offset + skip + where, take)
                if block is not None:
                    yield first + where, block
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
        if not self.starts.size or not gpas.size:
            empty = np.empty(0, dtype=np.int64)
            return HostMemory(self.source, empty, empty, empty)
        first = np.maximum(np.searchsorted(self.starts, hpas, side="right") - 1, 0)
        last = np.maximum(np.searchsorted(self.starts, hpas + lengths - 1, side="right") - 1, 0)
        count = last - first + 1
        run = np.repeat(np.arange(gpas.size), count)
        segment = first[run] + np.arange(run.size) - np.repeat(np.cumsum(count) - count, count)
        low = np.maximum(hpas[run], self.starts[segment])
        high = np.minimum(hpas[run] + lengths[run], self.starts[segment] + self.lengths[segment])
        held = high > low
        run, segment, low, high = run[held], segment[held], low[held], high[held]
        return HostMemory(
            self.source,
            *join_runs(gpas[run] + low - hpas[run], high - low, self.offsets[segment] + low - self.starts[segment]),
        )


def join_runs(starts: Int64, lengths: Int64, targets: Int64) -> tuple[Int64, Int64, Int64]:
    """Join neighbours that continue each other on both sides. ``starts`` must ascend."""
    if starts.size < 2:
        return starts, lengths, targets
    new = np.empty(starts.size, dtype=np.bool_)
    new[0] = True
    new[1:] = (starts[1:] != starts[:-1] + lengths[:-1]) | (targets[1:] != targets[:-1] + lengths[:-1])
    first = np.flatnonzero(new)
    return starts[first], np.add.reduceat(lengths, first), targets[first]
