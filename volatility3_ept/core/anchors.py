"""The cheap part of finding control structures: a few masked comparisons, on all pages of a block at once.

A block of memory is an array of 64-bit words, one row of 512 per page. Each anchor reads one column, so a
block costs as many cache lines per page as anchors are tried, and later anchors are tried on the survivors
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]


class Anchor(NamedTuple):
    """A comparison on one field: it passes when ``value & mask == wanted`` for one of the pairs."""

    name: str
    #: Column of the field in a page of 64-bit words, and its lowest bit there.
    column: int
    shift: int
    accepts: tuple[tuple[int, int], ...]
    #: Bits of which at least one must be set; 0 asks nothing.
    nonzero: int = 0

    def test(self, words: Words, rows: Rows) -> Flags:
        """Test the field in the given rows."""
        values = words[rows, self.column] >> np.uint64(self.shift)
        passed = np.zeros(len(rows), dtype=np.bool_)
        for mask, wanted in self.accepts:
            passed |= (values & np.uint64(mask)) == np.uint64(wanted)
        if self.nonzero:
            passed &= (values & np.uint64(self.nonzero)) != 0
        return passed


def anchor(name: str, offset: int, *accepts: tuple[int, int], nonzero: int = 0) -> Anchor:
    """Place an anchor at a byte offset in the page; aligned fields never straddle two words."""
    return Anchor(name, offset // 8, offset % 8 * 8, accepts, nonzero)


def count(anchors: Sequence[Anchor], words: Words, rows: Rows) -> npt.NDArray[np.int64]:
    """Count for each of the given rows the anchors that pass."""
    votes = np.zeros(len(rows), dtype=np.int64)
    for item in anchors:
        votes += item.test(words, rows)
    return votes


def survivors(anchors: Sequence[Anchor], words: Words, rows: Rows) -> Rows:
    """Keep the rows that pass every anchor, reading each next column for what the last one left."""
    for item in anchors:
        if not len(rows):
            break
        rows = rows[item.test(words, rows)]
    return rows
