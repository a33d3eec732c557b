"""Memory slots of a guest, from evidence alone: where in its VMM's address space the guest's frames appear.

A hypervisor like KVM gives the guest slots: stretches of guest-physical addresses at a constant distance (HVA - GPA)
in the address space of its process. Each frame that EPT or NPT and the process both map votes for one distance.
Frames that appear often (merged by KSM, the zero page, firmware seen twice) vote for several; at each guest-physical
page the distance with most votes in all is believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from volatility3_ept.core import mask
from volatility3_ept.core.gpamap import GuestMap, union
from volatility3_ept.core.hosttables import Frames, Leaves
from volatility3_ept.core.memory import Int64, join_runs
from volatility3_ept.spec.linux_pte import HostEntry

#: A frame that the guest maps more often than this says nothing about where it belongs.
MAX_ALIASES = 4
#: Distances that are looked into, those with most votes first. A VMM has a handful of slots.
MAX_DISTANCES = 256
#: Slots that are looked into, those with most matches first: frames that match by accident make slots of their own.
MAX_SLOTS = 512
#: Pieces of the guest's frames that one process may map: so many, and so many times what there are of runs and pages.
#: Each piece costs some hundred bytes, and forged tables can map all frames again with each entry.
MAX_PIECES, MAX_TIMES = 1 << 20, 4
#: The window of legacy video memory: memory of the guest only where EPT or NPT maps a page in it.
_VIDEO = (0xA_0000, 0xC_0000)


@dataclass(frozen=True, slots=True)
class Slot:
    """A stretch of guest-physical memory in the address space of the VMM at ``root`` (its CR3).

    ``matched`` bytes are mapped by EPT or NPT and by the process at the same frame: the evidence. ``confirmed``: the
    bounds are those of KVM's own record; otherwise the slot reaches from its first to its last match.
    """

    gpa: int
    length: int
    hva: int
    root: int
    matched: int
    confirmed: bool = False
    #: Levels of the address space's tables: 4, or 5 where the host uses LA57.
    levels: int = 4

    def __str__(self) -> str:
        """Return the slot as text that :meth:`parse` reads back."""
        numbers = (self.gpa, self.length, self.hva, self.root, self.matched, int(self.confirmed), self.levels)
        return ":".join(f"{number:#x}" for number in numbers)

    @classmethod
    def parse(cls, text: str) -> Slot:
        """Return the slot that a text names; ValueError when it names none."""
        gpa, length, hva, root, matched, confirmed, levels = (int(part, 0) for part in text.split(":"))
        wide = max(gpa + length, root, matched) >> 52 or hva >> 57
        if min(gpa, length, hva, root, matched) < 0 or wide or levels not in (4, 5):
            raise ValueError(f"{text!r} is no slot")
        return cls(gpa, length, hva, root, matched, bool(confirmed), levels)

    @property
    def distance(self) -> int:
        """HVA - GPA."""
        return self.hva - self.gpa


@dataclass(frozen=True)
class Inverse:
    """A guest's frames: layers of disjoint runs ``(starts, ends, gpas)`` ascending by host address.

    A frame that the guest maps at several addresses is in several layers; ``shared`` bytes were too common to help.
    """

    layers: tuple[tuple[Int64, Int64, Int64], ...]
    shared: int
    guest_map: GuestMap

    @classmethod
    def of(cls, guest_map: GuestMap) -> Inverse:
        """Sort a map's runs by host address, and into layers."""
        hpas, ends, gpas = guest_map.inverse()
        ends += hpas
        layers: list[tuple[Int64, Int64, Int64]] = []
        for _ in range(MAX_ALIASES):
            if not hpas.size:
                break
            free = np.ones(hpas.size, dtype=np.bool_)
            free[1:] = hpas[1:] >= np.maximum.accumulate(ends)[:-1]
            if free.all():
                layers.append((hpas, ends, gpas))
                hpas = ends = gpas = hpas[:0]
                break
            layers.append((hpas[free], ends[free], gpas[free]))
            hpas, ends, gpas = hpas[~free], ends[~free], gpas[~free]
        if hpas.size:
            # Too common: what still overlaps is left out of every layer.
            often = union(hpas, ends)
            layers = [_without(layer, often) for layer in layers]
        return cls(tuple(layers), int((ends - hpas).sum()), guest_map)

    @property
    def frames(self) -> Frames:
        """The frames that can vote."""
        if not self.shared:
            return Frames(*self.guest_map.frame_ranges())
        starts = np.concatenate([np.empty(0, dtype=np.int64), *(layer[0] for layer in self.layers)])
        ends = np.concatenate([np.empty(0, dtype=np.int64), *(layer[1] for layer in self.layers)])
        return Frames(*union(starts, ends))

    @property
    def votes(self) -> int:
        """Bytes of guest-physical memory whose frames can vote."""
        return sum(int((ends - starts).sum()) for starts, ends, _ in self.layers)


def _without(layer: tuple[Int64, Int64, Int64], often: tuple[Int64, Int64]) -> tuple[Int64, Int64, Int64]:
    starts, ends, gpas = layer
    low, length = mask.subtract((starts, ends), often)
    # A remaining piece may span several runs of the layer: cut it at their starts again.
    run, low, high = overlaps(low, low + length, starts, ends)[1:]
    return low, high, gpas[run] + low - starts[run]


def overlaps(starts: Int64, ends: Int64, others: Int64, other_ends: Int64) -> tuple[Int64, Int64, Int64, Int64]:
    """Return every overlap of two lists of ranges as ``(index, index of the other, low, high)``.

    The others are disjoint and ascending.
    """
    first, count = _touched(starts, ends, others, other_ends)
    index = np.repeat(np.arange(starts.size), count)
    other = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(index.size)
    return index, other, np.maximum(starts[index], others[other]), np.minimum(ends[index], other_ends[other])


def _touched(starts: Int64, ends: Int64, others: Int64, other_ends: Int64) -> tuple[Int64, Int64]:
    """Return for each range the first of the others that it overlaps, and how many it does."""
    first = np.searchsorted(other_ends, starts, side="right")
    return first, np.maximum(np.searchsorted(others, ends, side="left") - first, 0)


@dataclass(frozen=True)
class Matched:
    """What one address space maps of the guest: segments ``(gpa, end, distance)`` ascending, each page once."""

    gpas: Int64
    ends: Int64
    distances: Int64

    @property
    def bytes(self) -> int:
        """Guest-physical bytes explained."""
        return int((self.ends - self.gpas).sum())

    @property
    def typical(self) -> float:
        """How many bytes share the distance of a typical byte."""
        weights = np.bincount(np.unique(self.distances, return_inverse=True)[1], weights=self.ends - self.gpas)
        return float((weights**2).sum() / max(weights.sum(), 1))


def match(leaves: Iterator[Leaves], inverse: Inverse) -> Matched | None:
    """Let every frame vote, and settle each guest-physical page on one distance.

    None: the process maps the guest's frames over and over, as no VMM does.
    """
    none = np.empty(0, dtype=np.int64)
    ballots: list[tuple[Int64, Int64, Int64]] = []
    pieces, allowed = 0, MAX_PIECES + MAX_TIMES * sum(starts.size for starts, _, _ in inverse.layers)
    for chunk in leaves:
        there = (chunk.kinds == HostEntry.PRESENT) | (chunk.kinds == HostEntry.PROT_NONE)
        sizes = np.full(int(there.sum()), chunk.size, dtype=np.int64)
        runs = join_runs(chunk.hvas[there], sizes, chunk.hpas[there])
        # Looked up in ascending order, neighbours are found in the cache: several times as fast.
        order = np.argsort(runs[2])
        hvas, lengths, hpas = (column[order] for column in runs)
        allowed += MAX_TIMES * hvas.size
        for starts, ends, gpas in inverse.layers:
            pieces += int(_touched(hpas, hpas + lengths, starts, ends)[1].sum())
            if pieces > allowed:
                return None
            index, run, low, high = overlaps(hpas, hpas + lengths, starts, ends)
            gpa = gpas[run] + low - starts[run]
            distance = hvas[index] + low - hpas[index] - gpa
            ballots.append(_joined(distance, gpa, high - low))
    distance, gpa, length = (np.concatenate([none, *(part[i] for part in ballots)]) for i in range(3))
    return _settled(*_joined(distance, gpa, length))


def _joined(distance: Int64, gpas: Int64, lengths: Int64) -> tuple[Int64, Int64, Int64]:
    """Sort votes by distance and address, and join neighbours. The same vote cast twice counts once."""
    order = np.lexsort((gpas, distance))
    distance, gpas, ends = distance[order], gpas[order], gpas[order] + lengths[order]
    if not gpas.size:
        return distance, gpas, ends
    new = np.ones(gpas.size, dtype=np.bool_)
    new[1:] = (distance[1:] != distance[:-1]) | (gpas[1:] > ends[:-1])
    first = np.flatnonzero(new)
    reach = np.maximum.reduceat(ends, first)
    return distance[first], gpas[first], reach - gpas[first]


def _settled(distance: Int64, gpas: Int64, lengths: Int64) -> Matched:
    none = np.empty(0, dtype=np.int64)
    names, where = np.unique(distance, return_inverse=True)
    weight = np.zeros(names.size, dtype=np.int64)
    np.add.at(weight, where, lengths)
    taken = (none, none)
    parts: list[tuple[Int64, Int64, Int64]] = []
    for choice in np.argsort(-weight, kind="stable")[:MAX_DISTANCES].tolist():
        low, high = np.searchsorted(where, [choice, choice + 1])
        own = (gpas[low:high], gpas[low:high] + lengths[low:high])
        starts, left = mask.subtract(own, taken)
        parts.append((starts, starts + left, np.full(starts.size, names[choice], dtype=np.int64)))
        taken = union(np.concatenate((taken[0], own[0])), np.concatenate((taken[1], own[1])))
    columns = [np.concatenate([none, *(part[i] for part in parts)]) for i in range(3)]
    order = np.argsort(columns[0], kind="stable")
    return Matched(*(column[order] for column in columns))


def derive(matched: Matched, guest_map: GuestMap, root: int, levels: int = 4) -> tuple[Slot, ...]:
    """Return the slots: the hulls of segments with one distance, nothing else between them.

    A slot ends at an MMIO marker, at the legacy video window if nothing is mapped there, at a segment with another
    distance, and where its part of the process's address space belongs to another slot.
    """
    walls = _walls(matched, guest_map)
    slots = _heaviest(_hulls(matched, walls, root))
    foreign = [
        (other.hva - slot.distance, other.hva + other.length - slot.distance)
        for slot in slots
        for other in slots
        if _intrudes(slot, other, matched)
    ]
    if foreign:
        extra = np.array(foreign, dtype=np.int64)
        low, high = union(np.concatenate((walls[0], extra[:, 0])), np.concatenate((walls[1], extra[:, 1])))
        slots = _heaviest(_hulls(matched, (low, high), root))
    return tuple(replace(slot, levels=levels) for slot in slots)


def _heaviest(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    kept = sorted(slots, key=lambda slot: -slot.matched)[:MAX_SLOTS]
    return tuple(sorted(kept, key=lambda slot: slot.gpa))


def _walls(matched: Matched, guest_map: GuestMap) -> tuple[Int64, Int64]:
    """Return the guest-physical ranges that no slot crosses."""
    mmio = guest_map.findings.mmio
    starts, ends = mmio[:, 0], mmio[:, 0] + mmio[:, 1]
    if not ((matched.gpas < _VIDEO[1]) & (matched.ends > _VIDEO[0])).any():
        starts, ends = np.append(starts, _VIDEO[0]), np.append(ends, _VIDEO[1])
    return union(starts, ends)


def _hulls(matched: Matched, walls: tuple[Int64, Int64], root: int) -> tuple[Slot, ...]:
    if not matched.gpas.size:
        return ()
    gaps = (matched.ends[:-1], matched.gpas[1:])
    blocked = np.searchsorted(walls[0], gaps[1], side="left") > np.searchsorted(walls[1], gaps[0], side="right")
    new = np.ones(matched.gpas.size, dtype=np.bool_)
    new[1:] = blocked | (matched.distances[1:] != matched.distances[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], new.size) - 1
    sums = np.add.reduceat(matched.ends - matched.gpas, first)
    rows = zip(matched.gpas[first].tolist(), matched.ends[last].tolist(), matched.distances[first].tolist(),
               sums.tolist(), strict=True)  # fmt: skip
    return tuple(Slot(gpa, end - gpa, gpa + distance, root, total) for gpa, end, distance, total in rows)


def _intrudes(slot: Slot, other: Slot, matched: Matched) -> bool:
    """Tell whether another slot lies in a gap of this one's host addresses.

    Two slots over the same memory (firmware at two places) are no intrusion: then this one has matches there too.
    """
    low, high = other.hva - slot.distance, other.hva + other.length - slot.distance
    if other.distance == slot.distance or high <= slot.gpa or low >= slot.gpa + slot.length:
        return False
    own = (matched.distances == slot.distance) & (matched.gpas < high) & (matched.ends > low)
    return not bool(own.any())
