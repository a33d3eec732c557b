"""The host's memory without its guests': which ranges remain.

A guest's memory is every frame that its tables map, and every one that only its VMM still holds for it. A frame that it
shares with the host is masked too: pages merged by KSM, pages of a file that the guest's memory was restored from. A
guest's kernel may lie there, and it is not to be taken for the host's; whoever wants such a page reads the host without
the mask. One kind of shared frame is the host's alone: the zero page, which stands for memory that was only read.
Nothing of a guest is in it, so pages of zeros that neither the guest nor its VMM may write are left to the host.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from volatility3_ept.core.gpamap import STATE_SHIFT, GuestMap, union
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.dialect import State
from volatility3_ept.spec.paging import Access

Ranges = tuple[Int64, Int64]

#: Pages that are compared with zero at once: 16 MiB.
_CHUNK = 4096


def without(memory: HostMemory, maps: Iterable[GuestMap], read_only: Iterable[Ranges] = ()) -> tuple[Int64, Int64]:
    """Return ``(starts, lengths)`` of the present ranges that no guest maps, ascending.

    ``read_only`` are ranges ``(starts, ends)`` of the guests' frames that may be the host's zero page: those of their
    pages that are all zeros remain. They are read, everything else is not.
    """
    starts, ends = _all([guest.frame_ranges() for guest in maps])
    zeros = zero_pages(memory, _all(read_only))
    if zeros[0].size:
        starts, lengths = subtract((starts, ends), zeros)
        ends = starts + lengths
    return subtract((memory.starts, memory.starts + memory.lengths), (starts, ends))


def read_only(guest_map: GuestMap, by_vmm: Int64) -> Ranges:
    """Return the frames of a guest that nothing shows to be its own: neither it nor its VMM may write them.

    ``by_vmm`` are the rows :attr:`.backing.Recovery.read_only` of the recovered pages in the map, whose rights EPT or
    NPT does not tell.
    """
    recovered = (guest_map.words >> STATE_SHIFT & 7) == int(State.RECOVERED)
    no_write = ((guest_map.words & int(Access.WRITE)) == 0) & ~recovered
    hpas, lengths = guest_map.hpas[no_write], guest_map.lengths[no_write]
    return union(
        np.concatenate((hpas, by_vmm[:, 2])), np.concatenate((hpas + lengths, by_vmm[:, 2] + by_vmm[:, 1]))
    )  # fmt: skip


def zero_pages(memory: HostMemory, ranges: Ranges) -> Ranges:
    """Return the pages of some ranges, disjoint and ascending, that the capture holds and that are all zeros."""
    counts = (ranges[1] - ranges[0]) // PAGE_SIZE
    before = np.cumsum(counts) - counts
    found = [np.empty(0, dtype=np.int64)]
    total = int(counts.sum())
    for start in range(0, total, _CHUNK):
        number = np.arange(start, min(start + _CHUNK, total))
        which = np.searchsorted(before, number, side="right") - 1
        pages = ranges[0][which] + (number - before[which]) * PAGE_SIZE
        rows, held = memory.words(pages)
        found.append(pages[held & ~rows.any(axis=1)])
    pages = np.concatenate(found)
    return union(pages, pages + PAGE_SIZE)


def _all(ranges: Iterable[Ranges]) -> Ranges:
    none = np.empty(0, dtype=np.int64)
    parts = list(ranges)
    return union(*(np.concatenate([none, *(pair[i] for pair in parts)]) for i in range(2)))


def subtract(ranges: tuple[Int64, Int64], taken: tuple[Int64, Int64]) -> tuple[Int64, Int64]:
    """Return ``(starts, lengths)`` of what is in ``ranges`` and not in ``taken``; both disjoint and ascending."""
    (starts, ends), (taken_starts, taken_ends) = ranges, taken
    points = distinct(np.concatenate((starts, ends, taken_starts, taken_ends)))
    low, high = points[:-1], points[1:]
    kept = _inside(low, starts, ends) & ~_inside(low, taken_starts, taken_ends)
    pieces = union(low[kept], high[kept])
    return pieces[0], pieces[1] - pieces[0]


def distinct(values: Int64) -> Int64:
    """Return the values in ascending order, each once.

    ``np.unique`` does the same, but since numpy 2.3 by hashing, which takes minutes for millions of page addresses. The
    stable sort merges lists that ascend already.
    """
    ordered = np.sort(values, kind="stable")
    new = np.ones(ordered.size, dtype=np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]


def turns(groups: Int64) -> Int64:
    """Return for each element how many equal ones stand before it: sorted by that, each group has its turn."""
    order = np.argsort(groups, kind="stable")
    new = np.ones(groups.size, dtype=np.bool_)
    new[1:] = groups[order[1:]] != groups[order[:-1]]
    first = np.flatnonzero(new)
    before: Int64 = np.empty(groups.size, dtype=np.int64)
    before[order] = np.arange(groups.size) - np.repeat(first, np.diff(first, append=groups.size))
    return before


def _inside(points: Int64, starts: Int64, ends: Int64) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    if not starts.size:
        return np.zeros(points.size, dtype=np.bool_)
    index = np.searchsorted(starts, points, side="right") - 1
    return (index >= 0) & (points < ends[np.maximum(index, 0)])
