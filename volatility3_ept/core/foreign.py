"""Pages that a process's tables would give to a guest, and that are plainly another guest's.

A guest may forge tables of a process of the host in memory that it once had. Whatever such tables say, a page in the
frames of another guest is that guest's. What several guests share by right (pages merged by KSM, the zero page, a
file's pages) each monitor's process maps read-only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volatility3_ept.core import gpamap, mask
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import Int64
from volatility3_ept.core.slots import overlaps

#: The end of every address.
_END = 1 << 62


def split(recovered: Int64, read_only: Int64, others: Sequence[GuestMap]) -> tuple[Int64, Int64]:
    """Return the rows to believe, and those that lie in the frames of ``others`` and are open to writing.

    Rows are ``gpa, length, hpa, hva``, ascending; ``read_only`` are those of them that the process may not write.
    """
    ranges = [each.frame_ranges() for each in others]
    if not recovered.size or not ranges:
        return recovered, recovered[:0]
    frames = gpamap.union(*(np.concatenate([pair[i] for pair in ranges]) for i in range(2)))
    order = np.argsort(recovered[:, 2], kind="stable")
    starts = recovered[order, 2]
    index, _, low, high = overlaps(starts, starts + recovered[order, 1], *frames)
    gpas = recovered[order[index], 0] + low - starts[index]
    shared = gpamap.union(read_only[:, 0], read_only[:, 0] + read_only[:, 1])
    begin, length = mask.subtract(gpamap.union(gpas, gpas + high - low), shared)
    if not begin.size:
        return recovered, recovered[:0]
    kept = np.append(0, begin + length), np.append(begin, _END)
    return _within(recovered, kept), _within(recovered, (begin, begin + length))


def _within(rows: Int64, spans: tuple[Int64, Int64]) -> Int64:
    """Return the parts of rows that lie in some guest-physical ranges."""
    index, _, low, high = overlaps(rows[:, 0], rows[:, 0] + rows[:, 1], *spans)
    moved = low - rows[index, 0]
    parts = np.stack([low, high - low, rows[index, 2] + moved, rows[index, 3] + moved], axis=1)
    return parts[parts[:, 1] > 0]
