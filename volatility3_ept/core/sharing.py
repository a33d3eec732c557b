"""Memory that is shared: frames of the host that a guest maps at several addresses, or that several guests map.

Sharing is ordinary. KSM merges equal pages, one zero page stands for every page that was only read, guests are started
from the same file, and firmware is seen at two addresses. It is counted here and is no finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import gpamap, mask
from volatility3_ept.core.gpamap import union
from volatility3_ept.core.lineage import HostRuns, Line
from volatility3_ept.core.memory import HostMemory, Int64


@dataclass(frozen=True)
class Shared:
    """What one guest shares, in bytes.

    ``repeated``: frames that it maps at more than one address; ``saved``: guest memory that these frames stand for
    beyond their own size. ``zero`` of the repeated ones hold nothing but zeros. ``others``: frames that guests beside
    it map too; ``with_guests`` are the ids of these. A machine's own nested guests are not beside it.
    """

    repeated: int = 0
    saved: int = 0
    zero: int = 0
    others: int = 0
    with_guests: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether anything is shared."""
        return bool(self.repeated or self.others)


def count(lines: Sequence[Line], runs: Sequence[HostRuns], memory: HostMemory) -> dict[str, Shared]:
    """Return what each machine shares, by id. ``runs`` are those of ``lines``; ``memory`` is the capture's."""
    frames = {line.id: own.frames() for line, own in zip(lines, runs, strict=True)}
    found = {}
    for line, own in zip(lines, runs, strict=True):
        repeated = often(own.hpas, own.hpas + own.lengths)
        size = _size(repeated)
        beside = [name for name in frames if not _related(name, line.id)]
        common = [name for name in beside if gpamap.overlap_bytes(frames[line.id], frames[name])]
        found[line.id] = Shared(
            size,
            own.bytes - _size(frames[line.id]) if size else 0,
            _size(mask.zero_pages(memory, repeated)),
            gpamap.overlap_bytes(frames[line.id], _all([frames[name] for name in common])),
            tuple(common),
        )
    return found


def often(starts: Int64, ends: Int64) -> tuple[Int64, Int64]:
    """Return the ranges, disjoint and ascending, that at least two of the given ones cover."""
    if not starts.size:
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    del order
    # What a range has in common with one that begins before it.
    shared = np.minimum(ends[1:], np.maximum.accumulate(ends)[:-1])
    twice = shared > starts[1:]
    return union(starts[1:][twice], shared[twice])


def _related(one: str, other: str) -> bool:
    """Tell whether a machine runs in the other, at any depth, or is the same."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _all(ranges: Sequence[tuple[Int64, Int64]]) -> tuple[Int64, Int64]:
    none = np.empty(0, dtype=np.int64)
    return union(*(np.concatenate([none, *(pair[i] for pair in ranges)]) for i in range(2)))


def _size(ranges: tuple[Int64, Int64]) -> int:
    return int((ranges[1] - ranges[0]).sum())
