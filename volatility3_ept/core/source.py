"""Where the bytes of a capture come from: a file, or anything with a read function.

Offsets are the source's own. Unreadable is not zero: a read that the source cannot satisfy returns None.
"""

from __future__ import annotations

import bisect
import errno
import functools
import mmap
import os
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
#: Extents of a sparse file that are told apart; what lies above the last counts as data.
_MAX_EXTENTS = 1 << 18


class Source(Protocol):
    """Where the bytes come from. Offsets are the source's own: a file's, or a Volatility layer's addresses."""

    def read(self, offset: int, length: int) -> bytes | None:
        """Return exactly ``length`` bytes, or None when some of them cannot be read."""

    def pages(self, offsets: Int64) -> tuple[Words, Bools]:
        """Return the pages that begin at these byte offsets as rows of 512 words, and which of them were readable."""

    def block(self, offset: int, count: int) -> Words | None:
        """Return ``count`` pages that lie one behind the other as rows of 512 words, without a copy if possible."""

    def extents(self) -> tuple[Int64, Int64] | None:
        """Return the ranges ``(starts, ends)`` outside which every byte is zero, ascending; None: not known."""

    def release(self, offset: int, length: int) -> None:
        """Be told that these bytes were looked at and are not needed soon: they may leave the process's memory."""


class FileSource:
    """A plain file, memory-mapped read-only; or bytes that are in memory already."""

    def __init__(self, data: Path | bytes | npt.NDArray[np.uint8]) -> None:
        """Map the file. An empty one has no bytes; OSError where it cannot be opened."""
        self._given = data
        self._map: mmap.mmap | None = None
        if isinstance(data, Path) and data.stat().st_size:
            with data.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = (self._map or b"") if isinstance(data, Path) else data
        self._bytes = np.asarray(whole) if isinstance(whole, np.ndarray) else np.frombuffer(whole, dtype=np.uint8)
        self._view = self._bytes.data
        self._rows: dict[int, Words] = {}

    def __reduce__(self) -> tuple[object, ...]:
        """Open the file again in another process, and never send what it holds."""
        return FileSource, (self._given,)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return int(self._bytes.size)

    def read(self, offset: int, length: int) -> bytes | None:
        """Return ``length`` bytes from ``offset``; None beyond the end."""
        found = self.view(offset, length)
        return None if found is None else bytes(found)

    def view(self, offset: int, length: int) -> bytes | memoryview | None:
        """Return the same without a copy."""
        if offset < 0 or offset + length > self._bytes.size:
            return None
        if self._extents is not None and self._is_hole(offset, length):
            return bytes(length)
        return self._view[offset : offset + length]

    def extents(self) -> tuple[Int64, Int64] | None:
        """Return where a sparse file is no hole; None for a file without holes, and where nobody knows."""
        return self._extents

    @functools.cached_property
    def _extents(self) -> tuple[Int64, Int64] | None:
        if not isinstance(self._given, Path) or not hasattr(os, "SEEK_DATA"):
            return None
        with self._given.open("rb") as file:
            if os.fstat(file.fileno()).st_blocks * 512 >= self._bytes.size:
                return None
            found = list(_find_extents(file.fileno(), int(self._bytes.size)))
        table = np.array(found, dtype=np.int64).reshape(-1, 2)
        return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])

    def _is_hole(self, offset: int, length: int) -> bool:
        """Tell whether nothing is there. Read through the map, a hole would fill the page cache with zeros, slowly."""
        starts, ends = self._extent_table
        index = bisect.bisect_right(ends, offset)
        return index == len(ends) or starts[index] >= offset + length

    @functools.cached_property
    def _extent_table(self) -> tuple[memoryview, memoryview]:
        starts, ends = self._extents or (np.zeros(1, dtype=np.int64), np.array([self.size]))
        return starts.data, ends.data

    def release(self, offset: int, length: int) -> None:
        """Let the kernel unmap the bytes; they stay in its page cache, and the map brings them back when asked."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            begin = offset & -mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, begin, min(offset + length, self._bytes.size) - begin)

    def pages(self, offsets: Int64) -> tuple[Words, Bools]:
        """Gather pages at any offsets. Those that agree modulo 4096 are taken by one index operation."""
        good = (offsets >= 0) & (offsets + PAGE_SIZE <= self._bytes.size)
        wanted = good
        if self._extents is not None:
            starts, ends = self._extents
            index = np.searchsorted(ends, offsets, side="right")
            wanted = good & (np.append(starts, self._bytes.size)[index] < offsets + PAGE_SIZE)
        if offsets.size == 0 or not wanted.any():
            return np.zeros((offsets.size, WORDS_PER_PAGE), dtype=np.uint64), good
        phases = offsets & (PAGE_SIZE - 1)
        if wanted.all() and (phases == phases[0]).all():
            return self._phase(int(phases[0]))[offsets >> PAGE_SHIFT], good
        out = np.zeros((offsets.size, WORDS_PER_PAGE), dtype=np.uint64)
        for phase in np.unique(phases[wanted]):
            chosen = wanted & (phases == phase)
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


def _find_extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file that are not holes."""
    end = 0
    for _ in range(_MAX_EXTENTS):
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # The file system does not say; ENXIO: nothing but a hole is left.
                yield end, size
            return
        if start >= size:
            return
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        yield start, end
    if end < size:
        yield end, size


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

    def extents(self) -> tuple[Int64, Int64] | None:
        """A decoding layer does not say."""
        return None

    def release(self, offset: int, length: int) -> None:
        """Nothing is kept."""
