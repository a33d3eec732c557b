"""The pages that a VMM's process has in a guest's slots, compared with what EPT or NPT says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from volatility3_ept.core import gpamap, mask, slots
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.hosttables import Leaves
from volatility3_ept.core.memory import Int64, join_runs
from volatility3_ept.core.slots import Slot
from volatility3_ept.spec.linux_pte import HostEntry

#: How a resident page is mapped: as data, as code (no NX bit), or PROT_NONE, which does not say.
DATA, CODE, HIDDEN = range(3)
#: What has no page that could be read. NONE stands for a table of the host that is not in the capture.
GONE = (HostEntry.NONE, HostEntry.SWAPPED, HostEntry.MIGRATING, HostEntry.ELSEWHERE)


@dataclass
class Found:
    """What one pass over the VMM's pages gathers of one slot; ``resident`` and ``agreed`` by how it is mapped.

    ``read_only`` are those of the resident pages that the VMM itself may not write, by how they are mapped.
    """

    resident: tuple[list[Int64], ...] = field(default_factory=lambda: ([], [], []))
    read_only: tuple[list[Int64], ...] = field(default_factory=lambda: ([], [], []))
    agreed: list[int] = field(default_factory=lambda: [0, 0, 0])
    conflicts: list[Int64] = field(default_factory=list)
    gone: dict[HostEntry, list[Int64]] = field(default_factory=lambda: {kind: [] for kind in GONE})

    @property
    def alien(self) -> int:
        """The way of mapping that is not this slot's: one mapping is data or code throughout."""
        return DATA if self.agreed[CODE] > self.agreed[DATA] else CODE


def gather(chunk: Leaves, slot: Slot, guest_map: GuestMap, found: Found) -> None:
    """Compare the pages of one chunk that lie in one slot with the guest's map."""
    first = int(np.searchsorted(chunk.hvas, slot.hva - chunk.size, side="right"))
    last = int(np.searchsorted(chunk.hvas, slot.hva + slot.length, side="left"))
    if first >= last:
        return
    part = slice(first, last)
    starts = np.maximum(chunk.hvas[part], slot.hva)
    lengths = np.minimum(chunk.hvas[part] + chunk.size, slot.hva + slot.length) - starts
    hpas = chunk.hpas[part] + starts - chunk.hvas[part]
    gpas = starts - slot.distance
    near = _window(guest_map, int(gpas[0]), int(gpas[-1] + lengths[-1]))
    kinds, data = chunk.kinds[part], chunk.no_execute[part]
    present = kinds == HostEntry.PRESENT
    for way, chosen in ((DATA, present & data), (CODE, present & ~data), (HIDDEN, kinds == HostEntry.PROT_NONE)):
        rest, conflicts, agreed = _compare(*join_runs(gpas[chosen], lengths[chosen], hpas[chosen]), near)
        found.resident[way].append(_with_hva(rest, slot))
        found.conflicts.append(conflicts)
        found.agreed[way] += agreed
        chosen = chosen & chunk.read_only[part]
        if chosen.any():
            rest, _, _ = _compare(*join_runs(gpas[chosen], lengths[chosen], hpas[chosen]), near)
            found.read_only[way].append(_with_hva(rest, slot))
    for kind in GONE:
        chosen = kinds == kind
        rest, _, _ = _compare(gpas[chosen], lengths[chosen], hpas[chosen], near)
        found.gone[kind].append(_with_hva(rest, slot))


def _with_hva(rows: Int64, slot: Slot) -> Int64:
    return np.hstack((rows, rows[:, :1] + slot.distance))


def _window(guest_map: GuestMap, low: int, high: int) -> tuple[Int64, Int64, Int64]:
    """Return ``(starts, ends, hpas)`` of the runs that touch a range."""
    first = max(int(np.searchsorted(guest_map.gpas, low, side="right")) - 1, 0)
    last = int(np.searchsorted(guest_map.gpas, high, side="left"))
    starts, words = guest_map.gpas[first:last], guest_map.words[first:last]
    return starts, starts + guest_map.lengths[first:last], words & ~np.int64(gpamap.ATTRIBUTES)


def _compare(gpas: Int64, lengths: Int64, hpas: Int64, near: tuple[Int64, Int64, Int64]) -> tuple[Int64, Int64, int]:
    """Return what the guest's map lacks ``(gpa, length, hpa)``, where it differs, and the bytes that agree."""
    starts, ends, frames = near
    index, run, low, high = slots.overlaps(gpas, gpas + lengths, starts, ends)
    theirs, ours = frames[run] + low - starts[run], hpas[index] + low - gpas[index]
    differ = theirs != ours
    conflicts = np.stack([low, high - low, theirs, ours], axis=1)[differ]
    lacking, left = mask.subtract((gpas, gpas + lengths), (starts, ends))
    # A remaining stretch may span several host pages: cut it at their borders again.
    _, index, begin, end = slots.overlaps(lacking, lacking + left, gpas, gpas + lengths)
    rest = np.stack([begin, end - begin, hpas[index] + begin - gpas[index]], axis=1)
    return rest, conflicts, int((high - low)[~differ].sum())


def no_rows(columns: int) -> Int64:
    """Return an empty array of rows."""
    return np.empty((0, columns), dtype=np.int64)


def sorted_rows(parts: Sequence[Int64], columns: int) -> Int64:
    """Return rows ascending by guest-physical address."""
    rows = np.concatenate([no_rows(columns), *parts])
    ordered: Int64 = rows[np.argsort(rows[:, 0], kind="stable")]
    return ordered


def joined_rows(rows: Int64) -> Int64:
    """Join neighbouring rows ``gpa, length, address, ...`` that continue each other in every column."""
    if rows.shape[0] < 2:
        return rows
    lengths = rows[:-1, 1]
    new = np.ones(rows.shape[0], dtype=np.bool_)
    new[1:] = (np.diff(rows[:, (0, *range(2, rows.shape[1]))], axis=0) != lengths[:, None]).any(axis=1)
    first = np.flatnonzero(new)
    joined: Int64 = rows[first]
    joined[:, 1] = np.add.reduceat(rows[:, 1], first)
    return joined
