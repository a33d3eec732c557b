"""From top tables downwards, many at once: which of them head a hierarchy, and what its upper tables name.

:func:`descend` follows a sample of the tables below each candidate and keeps those whose every level reads as its
level. A page that many candidates share is read once a level, so the work is bounded by the memory's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from volatility3_ept.core import mask
from volatility3_ept.core.memory import Bools, HostMemory, Int64
from volatility3_ept.core.tables import BATCH_PAGES, MIN_INSIDE, classify
from volatility3_ept.spec import ept
from volatility3_ept.spec.bits import PAGE_SHIFT
from volatility3_ept.spec.paging import Format, Level

#: Counts: of integers, or sums of them, which numpy returns as floats.
Numbers = npt.NDArray[Any]

#: Tables below one table, and below one root at each level, that are looked at.
_PER_TABLE = 6
_PER_ROOT = 16
#: Candidates that are followed together.
_TOGETHER = 1 << 15
_FRAME_BITS = 40
#: Share of present entries that hardware may refuse: damage and smear.
MAX_REFUSED = 0.05
#: Share of a nested hierarchy's pages that users may reach. In Xen's some tables may lack the bit for a while.
_MIN_USER = 0.75


@dataclass(frozen=True)
class Descent:
    """Roots whose levels all read as their levels, and what a sample of their tables holds."""

    roots: Int64
    #: Leaves seen; but for EPT, only those whose frames the memory holds.
    leaves: Int64
    #: Of all leaves seen, the share whose frames the memory holds.
    inside: Numbers
    #: Of the tables of the last level seen, the share that holds nothing.
    empty: Numbers


def descend(memory: HostMemory, fmt: Format, roots: Int64) -> Descent:
    """Follow a sample of each candidate's tables down to the last level, many candidates together."""
    parts = [_descend(memory, fmt, roots[i : i + _TOGETHER]) for i in range(0, max(roots.size, 1), _TOGETHER)]
    return Descent(*(np.concatenate(column) for column in zip(*((p.roots, p.leaves, p.inside, p.empty) for p in parts),
                                                              strict=True)))  # fmt: skip


def _descend(memory: HostMemory, fmt: Format, roots: Int64) -> Descent:
    owners, tables = np.arange(roots.size), roots
    leaves, held, total = (np.zeros(roots.size, dtype=np.int64) for _ in range(3))
    alive = np.ones(roots.size, dtype=np.bool_)
    empty: Numbers = np.zeros(roots.size)
    # EPT's entries are so particular that its frames need not be in the capture (a kernel dump leaves them out).
    inside = 0.0 if isinstance(fmt, ept.EptFormat) else MIN_INSIDE
    user = 0.0 if fmt.is_linear else _MIN_USER
    for level in fmt.levels:
        pages, index = np.unique(tables, return_inverse=True)
        seen = _look(memory, fmt, level, pages)
        counts = _Counts(*(np.bincount(owners, row[index], roots.size) for row in seen.counts))
        alive &= (counts.readable >= MIN_INSIDE * np.bincount(owners, minlength=roots.size)) | (leaves > 0)
        alive &= counts.refused <= MAX_REFUSED * (counts.leaf + counts.table + counts.refused)
        alive &= (counts.held >= inside * counts.leaf) & (counts.user >= user * counts.leaf)
        held += counts.held.astype(np.int64)
        total += counts.leaf.astype(np.int64)
        leaves = held if inside else total
        empty = counts.empty / np.maximum(np.bincount(owners, minlength=roots.size), 1)
        owners, tables = _sampled(*_below(owners, index, seen, alive))
    alive &= leaves > 0
    return Descent(roots[alive], leaves[alive], held[alive] / np.maximum(total[alive], 1), empty[alive])


def references(memory: HostMemory, fmt: Format, roots: Int64, wanted: Int64) -> Int64:
    """Return for each page of ``wanted`` (ascending) how many entries of the roots' own tables name it."""
    total = np.zeros(wanted.size, dtype=np.int64)
    for begin in range(0, roots.size, BATCH_PAGES):
        words, _ = memory.words(roots[begin : begin + BATCH_PAGES])
        found = classify(fmt, fmt.levels[0], words)
        targets = found.targets[found.table]
        index = np.minimum(np.searchsorted(wanted, targets), wanted.size - 1)
        total += np.bincount(index[wanted[index] == targets], minlength=wanted.size)
    return total


class _Counts(NamedTuple):
    """For each table, or each root's sample of them: is it readable, and how many entries are what."""

    readable: Numbers
    leaf: Numbers
    #: Leaves whose frames the memory holds.
    held: Numbers
    refused: Numbers
    table: Numbers
    #: Leaves that users may reach.
    user: Numbers
    #: Nothing in it is present.
    empty: Numbers


@dataclass(frozen=True)
class _Seen:
    """What the distinct tables of one level hold: counts, and some of the tables that each names."""

    counts: _Counts
    first: Int64
    number: Int64
    targets: Int64


def _look(memory: HostMemory, fmt: Format, level: Level, pages: Int64) -> _Seen:
    """Classify tables of one level, and return some of the tables that each names."""
    parts: list[list[Numbers]] = []
    rows: list[Int64] = [np.empty(0, dtype=np.int64)]
    targets: list[Int64] = [np.empty(0, dtype=np.int64)]
    most = _PER_ROOT if level is fmt.levels[0] else _PER_TABLE
    for begin in range(0, pages.size, BATCH_PAGES):
        words, good = memory.words(pages[begin : begin + BATCH_PAGES])
        found = classify(fmt, level, words)
        held = found.leaf & (memory.locate(found.targets, 1) >= 0)
        kinds = (found.leaf, held, found.refused, found.table, found.leaf & found.user)
        numbers = [np.bincount(found.rows, chosen, len(words)) for chosen in kinds]
        parts.append([good, *numbers, numbers[0] + numbers[2] + numbers[3] == 0])
        row, target = _spread(found.rows[found.table], found.targets[found.table], most)
        rows.append(row + begin)
        targets.append(target)
    none = [[np.empty(0)] * 7]
    counts = _Counts(*(np.concatenate(column) for column in zip(*(parts or none), strict=True)))
    row = np.concatenate(rows)
    first = np.searchsorted(row, np.arange(pages.size))
    return _Seen(counts, first, np.bincount(row, minlength=pages.size), np.concatenate(targets))


def _spread(owners: Int64, tables: Int64, most: int) -> tuple[Int64, Int64]:
    """Return at most ``most`` of each owner's tables, evenly chosen. ``owners`` ascend."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    lengths = np.diff(starts, append=owners.size)
    rank = np.arange(owners.size) - np.repeat(starts, lengths)
    chosen = rank % np.repeat(np.maximum(-(-lengths // most), 1), lengths) == 0
    return owners[chosen], tables[chosen]


def _below(owners: Int64, index: Int64, seen: _Seen, alive: Bools) -> tuple[Int64, Int64]:
    """Return the pairs of owner and table one level further down, of the owners that are still in the race."""
    racing = alive[owners]
    owners, index = owners[racing], index[racing]
    number = seen.number[index]
    start = np.repeat(seen.first[index] - (np.cumsum(number) - number), number)
    return np.repeat(owners, number), seen.targets[start + np.arange(start.size)]


def _sampled(owners: Int64, tables: Int64) -> tuple[Int64, Int64]:
    """Return some distinct tables of each owner."""
    # One number for both: page numbers have 40 bits, and of candidates there are no more than fit beside them.
    pairs = mask.distinct(owners << _FRAME_BITS | tables >> PAGE_SHIFT)
    return _spread(pairs >> _FRAME_BITS, (pairs & ((1 << _FRAME_BITS) - 1)) << PAGE_SHIFT, _PER_ROOT)


def upper(memory: HostMemory, fmt: Format, root: int, rungs: int = 2) -> Int64:
    """Return the addresses of the tables on the first rungs below a root."""
    tables = np.array([root], dtype=np.int64)
    below = [np.empty(0, dtype=np.int64)]
    for level in fmt.levels[:rungs]:
        words, _ = memory.words(tables)
        found = classify(fmt, level, words)
        tables = np.unique(found.targets[found.table])
        below.append(tables)
    return np.unique(np.concatenate(below))


def repeats(memory: HostMemory, fmt: Format, root: int, enough: int) -> tuple[int, int]:
    """Return how often one of the upper levels names tables that it names already, and the tables read to learn it.

    Stops at a level with more than ``enough``.
    """
    tables, most, read = np.array([root], dtype=np.int64), 0, 0
    for level in fmt.levels[:-2]:
        named = [np.empty(0, dtype=np.int64)]
        for begin in range(0, tables.size, BATCH_PAGES):
            words, _ = memory.words(tables[begin : begin + BATCH_PAGES])
            found = classify(fmt, level, words)
            named.append(found.targets[found.table])
        targets = np.concatenate(named)
        read += tables.size
        tables = np.unique(targets)
        most = max(most, targets.size - tables.size)
        if most > enough:
            break
    return most, read
