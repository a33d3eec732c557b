"""An axis of addresses for a picture: long holes are drawn short, and any number of ranges is counted in bins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from volatility3_ept.core import gpamap
from volatility3_ept.core.memory import Int64
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec.bits import PAGE_SIZE, size_name

Floats = npt.NDArray[np.float64]
Range = tuple[Int64, Int64]

#: Width of an axis in units, of a hole that is drawn short, and how many of these there may be.
WIDTH, GAP_WIDTH, MAX_GAPS = 1000, 24, 8
#: A hole longer than this share of what is used is drawn short.
_LONG = 1 / 24
#: Labels are this many units apart.
_APART = 140


@dataclass(frozen=True)
class Axis:
    """Addresses and where they are drawn: ascending knots, straight between them. ``gaps`` are drawn short."""

    addresses: Floats
    units: Floats
    gaps: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, used: Range, top: int) -> Axis:
        """Return the axis from 0 to ``top``, of which ``used`` (disjoint, ascending) is to be seen."""
        top = max(top, PAGE_SIZE)
        total = max(int((used[1] - used[0]).sum()), 1)
        starts, ends = np.concatenate(([0], used[1])), np.concatenate((used[0], [top]))
        lengths = np.maximum(ends - starts, 0)
        chosen = np.sort(np.argsort(-lengths, kind="stable")[:MAX_GAPS])
        gaps = [(int(starts[i]), int(ends[i])) for i in chosen if lengths[i] > max(total * _LONG, PAGE_SIZE)]
        shown = top - sum(end - start for start, end in gaps)
        if not shown:
            gaps, shown = [], top
        scale = (WIDTH - GAP_WIDTH * len(gaps)) / shown
        addresses, units = [0.0], [0.0]
        for start, end in gaps:
            if start > addresses[-1]:
                units.append(units[-1] + (start - addresses[-1]) * scale)
                addresses.append(float(start))
            units.append(units[-1] + GAP_WIDTH)
            addresses.append(float(end))
        if top > addresses[-1]:
            addresses.append(float(top))
            units.append(float(WIDTH))
        return cls(np.array(addresses), np.array(units), tuple(gaps))

    @property
    def top(self) -> int:
        """The address at the axis's end."""
        return int(self.addresses[-1])

    def at(self, address: int) -> float:
        """Return where an address is drawn."""
        return float(np.interp(address, self.addresses, self.units))

    def edges(self, count: int) -> Int64:
        """Return the addresses at which ``count`` bins of equal width begin, and where the last one ends.

        They are page addresses, so that no page is in two bins.
        """
        exact = np.interp(np.linspace(0, WIDTH, count + 1), self.units, self.addresses)
        edges: Int64 = (exact / PAGE_SIZE).round().astype(np.int64) * PAGE_SIZE
        edges[-1] = -(-self.top // PAGE_SIZE) * PAGE_SIZE
        return edges

    def labels(self, apart: float = _APART) -> list[tuple[float, str]]:
        """Return round addresses and where they are drawn, not too close to each other: where holes end first."""
        kept: list[tuple[float, str]] = []
        steps: list[int] = []
        for low, high, left, right in zip(
            self.addresses[:-1].astype(np.int64).tolist(), self.addresses[1:].astype(np.int64).tolist(),
            self.units[:-1].tolist(), self.units[1:].tolist(), strict=True,
        ):  # fmt: skip
            if (low, high) in self.gaps:
                continue
            step = PAGE_SIZE
            while right > left and step * (right - left) < apart * (high - low):
                step *= 2
            steps += range(-(-low // step) * step, high, step)
        for address in [*(end for _, end in self.gaps if end < self.top), 0, self.top, *steps]:
            where = self.at(address)
            # The first and the last label do not stand over their addresses but begin and end there.
            if all(abs(where - other) >= apart * (1.4 if max(where, other) > WIDTH - 20 else 1) for other, _ in kept):
                kept.append((where, size_name(address) if address else "0"))
        return sorted(kept)


def bytes_in(ranges: Range, edges: Int64) -> Floats:
    """Return how many bytes of disjoint ascending ranges lie in each bin."""
    starts, ends = ranges
    if not starts.size:
        return np.zeros(edges.size - 1)
    total = np.concatenate(([0], np.cumsum(ends - starts)))
    index = np.searchsorted(starts, edges, side="right")
    beyond = np.where(index > 0, np.maximum(ends[np.maximum(index - 1, 0)] - edges, 0), 0)
    return np.diff(total[index] - beyond).astype(np.float64)


def grid(gpas: Int64, lengths: Int64, hpas: Int64, columns: Int64, rows: Int64) -> Floats:
    """Return how many bytes of the runs lie in each cell ``[row, column]``; the edges of both are ascending."""
    index, column, low, high = overlaps(gpas, gpas + lengths, columns[:-1], columns[1:])
    starts = hpas[index] + low - gpas[index]
    piece, row, low, high = overlaps(starts, starts + high - low, rows[:-1], rows[1:])
    cells = row * (columns.size - 1) + column[piece]
    counted = np.bincount(cells, weights=high - low, minlength=(columns.size - 1) * (rows.size - 1))
    cells_by_row: Floats = counted.astype(np.float64).reshape(rows.size - 1, columns.size - 1)
    return cells_by_row


def merged(ranges: Range) -> Range:
    """Return ranges sorted, disjoint and ascending."""
    return gpamap.union(*ranges)
