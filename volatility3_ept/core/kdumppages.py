"""The pages of a compressed dump as a source of bytes: those that are stored as they are, or with zlib.

Offsets are ranks times 4096: the dumped pages one behind the other. Other compressions need another reader.
"""

from __future__ import annotations

import functools
import zlib

import numpy as np

from volatility3_ept.core import kdump
from volatility3_ept.core.kdump import Kdump
from volatility3_ept.core.memory import Bools, HostMemory, Int64, Words
from volatility3_ept.core.source import WORDS_PER_PAGE
from volatility3_ept.spec.bits import PAGE_SHIFT, PAGE_SIZE

#: What this module decodes: methods as :attr:`.kdump.Kdump.methods` names them.
METHODS = frozenset({"zlib"})
#: Pages that are kept decoded, for reads of a few bytes each: 16 MiB.
_KEPT = 4096


def memory(dump: Kdump) -> HostMemory:
    """Return the physical memory of a dump whose methods are among :data:`METHODS`."""
    return HostMemory(PageSource(dump.file, dump.descriptors), dump.starts, dump.lengths, dump.ranks << PAGE_SHIFT)


class PageSource:
    """Decodes dumped pages. A page that cannot be decoded is unreadable."""

    def __init__(self, file: HostMemory, descriptors: int) -> None:
        """Take the dump's file, and the offset of the table of descriptors in it."""
        self._file, self._descriptors = file, descriptors
        self._page = functools.lru_cache(_KEPT)(self._one)

    def __reduce__(self) -> tuple[object, ...]:
        """Open the file again in another process."""
        return PageSource, (self._file, self._descriptors)

    def read(self, offset: int, length: int) -> bytes | None:
        """Return ``length`` bytes from ``offset``, None when a page of them cannot be decoded."""
        first, end = offset >> PAGE_SHIFT, -(-(offset + length) >> PAGE_SHIFT)
        within = offset & (PAGE_SIZE - 1)
        if end - first == 1:
            page = self._page(first)
            return None if page is None else page[within : within + length]
        rows = self.block(first << PAGE_SHIFT, end - first)
        return None if rows is None else rows.tobytes()[within : within + length]

    def pages(self, offsets: Int64) -> tuple[Words, Bools]:
        """Decode page by page."""
        out = np.zeros((offsets.size, WORDS_PER_PAGE), dtype=np.uint64)
        good = np.zeros(offsets.size, dtype=np.bool_)
        for row, offset in enumerate(offsets.tolist()):
            data = self.read(offset, PAGE_SIZE) if offset >= 0 else None
            if data is not None:
                out[row] = np.frombuffer(data, dtype=np.uint64)
                good[row] = True
        return out, good

    def block(self, offset: int, count: int) -> Words | None:
        """Decode pages that were dumped one behind the other."""
        table = kdump.descriptors(self._file, self._descriptors, offset >> PAGE_SHIFT, count)
        out = np.empty((count, WORDS_PER_PAGE), dtype=np.uint64)
        before, page = 0, None
        for row, (at, size, flags) in enumerate(
            zip(*(table[f].tolist() for f in ("offset", "size", "flags")), strict=True)
        ):
            # Pages of zeros share their data: they are decoded once.
            page = page if at == before else self._decode(at, size, flags)
            if page is None:
                return None
            out[row] = np.frombuffer(page, dtype=np.uint64)
            before = at
        return out

    def extents(self) -> tuple[Int64, Int64] | None:
        """Compressed pages of zeros are not told apart."""
        return None

    def release(self, offset: int, length: int) -> None:
        """Nothing is kept but a few pages."""

    def _one(self, rank: int) -> bytes | None:
        (row,) = kdump.descriptors(self._file, self._descriptors, rank, 1).tolist()
        return self._decode(*row[:3])

    def _decode(self, offset: int, size: int, flags: int) -> bytes | None:
        if not 0 < size <= PAGE_SIZE:
            return None
        data = self._file.read(offset, size)
        if data is not None and flags == kdump.ZLIB:
            try:
                # At most a page goes in: what comes out is bounded too.
                data = zlib.decompress(data)
            except zlib.error:
                return None
        elif flags:
            return None
        return data if data is not None and len(data) == PAGE_SIZE else None
