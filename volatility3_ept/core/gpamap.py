"""A guest's physical address space as sorted runs: what the traversal of its EPT or NPT gives.

One run is a stretch of guest-physical addresses that lies in one piece in the memory below it, with the same rights,
memory type and page size throughout. Twenty-four bytes a run: the attributes share a word with the address, whose
low twelve bits are free.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from volatility3_ept.core.memory import HostMemory, Int64, join_runs
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.dialect import State
from volatility3_ept.spec.paging import Access

#: Attributes of a run, in the low twelve bits of its address word: access 3:0, memory type 6:4, state 9:7, size 11:10.
MEMORY_TYPE_SHIFT: Final = 4
STATE_SHIFT: Final = 7
SIZE_SHIFT: Final = 10
ATTRIBUTES: Final = PAGE_SIZE - 1
#: Page sizes by their two-bit code. 4M exists in 32-bit paging only.
SIZES: Final = (1 << 12, 1 << 21, 1 << 30, 1 << 22)


class Run(NamedTuple):
    """A stretch of guest-physical memory. Addresses and length in bytes; ``hpa`` is in the space below the guest."""

    gpa: int
    length: int
    hpa: int
    access: Access
    memory_type: int
    page_size: int
    state: State


@dataclass(frozen=True)
class Findings:
    """What a traversal met beside pages. Each array holds one entry per row; nothing is skipped silently.

    ``mmio``, ``misconfigured``: ``gpa, span, raw entry`` (the entry as uint64 bits in int64). ``unreadable``: ``gpa,
    span, address of the table`` that the capture lacks. ``notes``: what was cut short, and why.
    """

    mmio: Int64 = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    misconfigured: Int64 = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    unreadable: Int64 = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    tables: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuestMap:
    """The runs of one guest, ascending by guest-physical address, and the findings of the traversal."""

    gpas: Int64
    lengths: Int64
    words: Int64
    findings: Findings = field(default_factory=Findings)

    def __deepcopy__(self, memo: dict[int, object]) -> GuestMap:
        """Return itself: nothing in it changes, and Volatility copies whole contexts."""
        return self

    def __len__(self) -> int:
        """Return the number of runs."""
        return int(self.gpas.size)

    @property
    def hpas(self) -> Int64:
        """Where each run lies in the memory below."""
        hpas: Int64 = self.words & ~np.int64(ATTRIBUTES)
        return hpas

    @property
    def mapped_bytes(self) -> int:
        """Bytes that the tables map, in the capture or not."""
        return int(self.lengths.sum())

    @property
    def top(self) -> int:
        """The first guest-physical address above all mapped memory."""
        return int(self.gpas[-1] + self.lengths[-1]) if self.gpas.size else 0

    @property
    def accesses(self) -> npt.NDArray[np.int64]:
        """Rights of each run as :class:`Access` bits."""
        return self.words & 0xF

    def page_counts(self) -> dict[int, int]:
        """Return the number of leaves by page size in bytes."""
        codes = self.words >> SIZE_SHIFT & 3
        return {
            size: int(self.lengths[codes == code].sum()) // size
            for code, size in enumerate(SIZES)
            if (codes == code).any()
        }

    def run(self, index: int) -> Run:
        """Return one run, decoded."""
        word = int(self.words[index])
        return Run(
            int(self.gpas[index]),
            int(self.lengths[index]),
            word & ~ATTRIBUTES,
            Access(word & 0xF),
            word >> MEMORY_TYPE_SHIFT & 7,
            SIZES[word >> SIZE_SHIFT & 3],
            State(word >> STATE_SHIFT & 7),
        )

    def runs(self) -> Iterator[Run]:
        """Yield every run, ascending."""
        for index in range(len(self)):
            yield self.run(index)

    def find(self, gpas: Int64) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """Return for each address the index of the run that holds it, and whether there is one."""
        gpas = np.asarray(gpas, dtype=np.int64)
        if not len(self):
            return np.zeros(gpas.shape, dtype=np.int64), np.zeros(gpas.shape, dtype=np.bool_)
        index = np.maximum(np.searchsorted(self.gpas, gpas, side="right") - 1, 0)
        inside = (gpas >= self.gpas[index]) & (gpas < self.gpas[index] + self.lengths[index])
        return index, inside

    def to_hpa(self, gpas: Int64) -> Int64:
        """Translate many guest-physical addresses at once; -1 where nothing is mapped."""
        index, inside = self.find(gpas)
        if not len(self):
            return np.full(np.shape(gpas), -1, dtype=np.int64)
        return np.where(inside, self.hpas[index] + np.asarray(gpas) - self.gpas[index], np.int64(-1))

    def inverse(self) -> tuple[Int64, Int64, Int64]:
        """Return ``(hpa, length, gpa)`` arrays of the runs, ascending by address in the memory below.

        Two guest-physical pages may share a frame, so ranges may overlap.
        """
        order = np.argsort(self.hpas, kind="stable")
        hpas: Int64 = self.words[order]
        hpas &= ~np.int64(ATTRIBUTES)
        return hpas, self.lengths[order], self.gpas[order]

    def to_gpas(self, hpa: int) -> list[int]:
        """Return every guest-physical address at which one byte of the memory below appears."""
        held = (self.hpas <= hpa) & (hpa < self.hpas + self.lengths)
        return [int(self.gpas[i]) + hpa - int(self.hpas[i]) for i in np.flatnonzero(held)]

    def frame_ranges(self) -> tuple[Int64, Int64]:
        """Return the ranges ``(start, end)`` of the memory below that the guest uses, ascending and disjoint."""
        return self._frame_ranges

    @functools.cached_property
    def _frame_ranges(self) -> tuple[Int64, Int64]:
        """Kept: a search compares each guest with each other one, and to sort the frames of a large one takes long."""
        order = np.argsort(self.hpas)
        starts: Int64 = self.words[order]
        starts &= ~np.int64(ATTRIBUTES)
        ends = self.lengths[order]
        del order
        ends += starts
        return _union_of_ascending(starts, ends)

    def memory(self, below: HostMemory) -> HostMemory:
        """Return the guest's physical memory over the memory that its frames are addresses of."""
        return below.remap(*join_runs(self.gpas, self.lengths, self.hpas))


def union(starts: Int64, ends: Int64) -> tuple[Int64, Int64]:
    """Return the union of half-open ranges as disjoint ascending ranges."""
    if not (starts[1:] < starts[:-1]).any():
        return _union_of_ascending(starts, ends.copy())
    order = np.argsort(starts)
    return _union_of_ascending(starts[order], ends[order])


def _union_of_ascending(starts: Int64, ends: Int64) -> tuple[Int64, Int64]:
    """Return the union of ranges whose starts ascend; ``ends`` is overwritten."""
    if not starts.size:
        return starts, ends
    np.maximum.accumulate(ends, out=ends)
    new = np.ones(starts.size, dtype=np.bool_)
    new[1:] = starts[1:] > ends[:-1]
    if new.all():
        return starts, ends
    first = np.flatnonzero(new)
    last = np.append(first[1:], starts.size) - 1
    return starts[first], ends[last]


def overlap_bytes(first: tuple[Int64, Int64], second: tuple[Int64, Int64]) -> int:
    """Return how many bytes two lists of disjoint ascending ranges ``(starts, ends)`` have in common."""
    (a_start, a_end), (b_start, b_end) = first, second
    if not a_start.size or not b_start.size:
        return 0
    return int(_covered(b_start, b_end, a_end).sum() - _covered(b_start, b_end, a_start).sum())


def _covered(starts: Int64, ends: Int64, points: Int64) -> Int64:
    """Return how many bytes of the ranges lie below each point."""
    total = np.concatenate(([0], np.cumsum(ends - starts)))
    index = np.searchsorted(starts, points, side="right")
    inside = np.maximum(index - 1, 0)
    beyond = np.where(index > 0, np.maximum(ends[inside] - points, 0), 0)
    return total[index] - beyond
