"""A guest's memory in large pieces, ascending, for writers that never hold more than a few of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from volatility3_ept.core import gpamap
from volatility3_ept.core.memory import Bools, HostMemory, Int64, Words
from volatility3_ept.spec.bits import PAGE_SIZE

Bytes = npt.NDArray[np.uint8]

#: The largest piece. Much larger ones fall out of the processor's caches between copy and hash.
CHUNK_SIZE: Final = 1 << 21


class Chunk(NamedTuple):
    """Bytes that lie one behind the other from ``gpa`` on. ``unreadable`` are stretches ``(gpa, length)`` of zeros.

    A page is unreadable when the capture lists it and its bytes cannot be had (a damaged compressed block).
    """

    gpa: int
    data: Bytes
    unreadable: tuple[tuple[int, int], ...] = ()


def clip(memory: HostMemory, start: int, stop: int) -> HostMemory:
    """Return the part of a memory between two addresses."""
    low = np.maximum(memory.starts, start)
    high = np.minimum(memory.starts + memory.lengths, stop)
    kept = high > low
    return HostMemory(
        memory.source, low[kept], (high - low)[kept], (memory.offsets + low - memory.starts)[kept]
    )  # fmt: skip


def stretches(memory: HostMemory) -> list[tuple[int, int]]:
    """Return the present ranges as ``(address, length)``, neighbours joined wherever their bytes lie."""
    starts, ends = gpamap.union(memory.starts, memory.starts + memory.lengths)
    return list(zip(starts.tolist(), (ends - starts).tolist(), strict=True))


def chunks(memory: HostMemory, start: int, length: int, size: int = CHUNK_SIZE) -> Iterator[Chunk]:
    """Yield a present stretch in pieces of at most ``size`` bytes, which end at page boundaries."""
    stop = start + length
    while start < stop:
        end = min(stop, (start + size) // PAGE_SIZE * PAGE_SIZE)
        if start % PAGE_SIZE:
            end = min(stop, start // PAGE_SIZE * PAGE_SIZE + PAGE_SIZE)
        elif end % PAGE_SIZE and end - start > PAGE_SIZE:
            end = end // PAGE_SIZE * PAGE_SIZE
        whole = not (start % PAGE_SIZE or end % PAGE_SIZE)
        yield _pages(memory, start, end) if whole else _part(memory, start, end)
        start = end


def _pages(memory: HostMemory, start: int, end: int) -> Chunk:
    """Return whole pages: a view of the capture where they lie in one piece, gathered otherwise."""
    count = (end - start) // PAGE_SIZE
    offset = int(memory.locate(np.array([start], dtype=np.int64), end - start)[0])
    block = memory.source.block(offset, count) if offset >= 0 else None
    if block is not None:
        return Chunk(start, _flat(block))
    addresses = np.arange(start, end, PAGE_SIZE, dtype=np.int64)
    rows, good = memory.words(addresses)
    lost = addresses[~good]
    return Chunk(start, _flat(rows), _joined(lost) if lost.size else ())


def _part(memory: HostMemory, start: int, end: int) -> Chunk:
    """Return a part of a page: captures may begin and end anywhere."""
    data = memory.read(start, end - start)
    if data is None:
        return Chunk(start, np.zeros(end - start, dtype=np.uint8), ((start, end - start),))
    return Chunk(start, np.frombuffer(data, dtype=np.uint8))


def _flat(rows: Words) -> Bytes:
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)


def _joined(pages: Int64) -> tuple[tuple[int, int], ...]:
    starts, ends = gpamap.union(pages, pages + PAGE_SIZE)
    return tuple(zip(starts.tolist(), (ends - starts).tolist(), strict=True))


def filled(data: Bytes) -> list[tuple[int, int]]:
    """Return the stretches ``(start, end)`` of whole pages in which any byte is not zero."""
    # The data are in the cache: to fold all words of a page into one is faster than any way to look at fewer.
    used: Bools = np.bitwise_or.reduce(data.view(np.uint64).reshape(-1, PAGE_SIZE // 8), axis=1) != 0
    edges = np.flatnonzero(np.diff(used, prepend=False, append=False)) * PAGE_SIZE
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
