"""Runs as a traversal finds them, gathered where they are to stay.

A scattered guest of 64 GiB has sixteen million runs. To gather them in pieces and to join the pieces afterwards would
touch twice the memory, and fresh memory is what costs time: so room for all that can come is taken at once, of which
the system provides only what is written to.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from volatility3_ept.core.memory import Int64, join_runs

Columns = tuple[Int64, Int64, Int64]


class RunBuffer:
    """Starts, lengths and targets of runs; neighbours that continue each other on both sides are joined."""

    def __init__(self, capacity: int) -> None:
        """Take room for so many runs."""
        self._columns = tuple(np.empty(capacity, dtype=np.int64) for _ in range(3))
        self._ascending = True
        self.count = 0

    def add(self, starts: Int64, lengths: Int64, targets: Int64) -> None:
        """Append runs that :func:`join_runs` could join no further."""
        if not starts.size:
            return
        own, last = self._columns, self.count - 1
        self._ascending &= bool((starts[1:] >= starts[:-1]).all())
        if last >= 0:
            step = int(own[1][last])
            self._ascending &= bool(starts[0] >= own[0][last])
            if starts[0] - own[0][last] == step and targets[0] - own[2][last] == step:
                own[1][last] += lengths[0]
                starts, lengths, targets = starts[1:], lengths[1:], targets[1:]
        end = self.count + starts.size
        for column, values in zip(own, (starts, lengths, targets), strict=True):
            column[self.count : end] = values
        self.count = end

    @property
    def ascending(self) -> bool:
        """Tell whether the starts ascend: then nothing is left to be joined."""
        return self._ascending

    def columns(self) -> Columns:
        """Return the runs: views, unless they would keep much more room than they fill."""
        few = self.count <= self._columns[0].size // 4
        starts, lengths, targets = (c[: self.count].copy() if few else c[: self.count] for c in self._columns)
        return starts, lengths, targets


def merged(buffers: Iterable[RunBuffer]) -> Columns:
    """Return the runs of some buffers, ascending."""
    used = [buffer for buffer in buffers if buffer.count]
    if len(used) == 1 and used[0].ascending:
        return used[0].columns()
    parts = [list(column) for column in zip(*(buffer.columns() for buffer in used), strict=True)]
    if not parts:
        none = np.empty(0, dtype=np.int64)
        return none, none, none
    used.clear()
    starts = _emptied(parts[0])
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    lengths, targets = (_emptied(part)[order] for part in parts[1:])
    return join_runs(starts, lengths, targets)


def _emptied(parts: list[Int64]) -> Int64:
    """Join arrays, and let go of them: of a large guest the runs take gigabytes, once."""
    whole = np.concatenate(parts)
    parts.clear()
    return whole
