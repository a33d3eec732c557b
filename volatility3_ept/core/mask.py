"""The host's memory without its guests': which ranges remain."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from volatility3_ept.core.gpamap import GuestMap, union
from volatility3_ept.core.memory import HostMemory, Int64


def without(memory: HostMemory, maps: Iterable[GuestMap]) -> tuple[Int64, Int64]:
    """Return ``(starts, lengths)`` of the present ranges that no guest maps, ascending.

    Pages that a guest shares with the host (merged by KSM, mapped from a file) are a guest's, and masked.
    """
    parts = [guest.frame_ranges() for guest in maps]
    taken_starts, taken_ends = union(
        np.concatenate([start for start, _ in parts] or [np.empty(0, dtype=np.int64)]),
        np.concatenate([end for _, end in parts] or [np.empty(0, dtype=np.int64)]),
    )
    return subtract((memory.starts, memory.starts + memory.lengths), (taken_starts, taken_ends))


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


def _inside(points: Int64, starts: Int64, ends: Int64) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    if not starts.size:
        return np.zeros(points.size, dtype=np.bool_)
    index = np.searchsorted(starts, points, side="right") - 1
    return (index >= 0) & (points < ends[np.maximum(index, 0)])
