"""Two maps of one guest-physical space, stretch by stretch: which addresses differ in frame, in rights, in presence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import mask
from volatility3_ept.core.gpamap import MEMORY_TYPE_SHIFT, GuestMap
from volatility3_ept.core.memory import Bools, Int64
from volatility3_ept.spec.paging import Access

_RIGHTS = int(Access.READ | Access.WRITE | Access.EXECUTE)
#: Rights, and what of the attributes is the entry's own: the user right (mode-based execute control), the memory type.
_ENTRY = _RIGHTS | int(Access.USER) | 7 << MEMORY_TYPE_SHIFT


@dataclass(frozen=True)
class MapDifference:
    """Stretches of guest-physical memory, ascending; each is mapped in one way throughout by either map.

    ``first`` and ``second`` are the frames, -1 where a map has none; ``rights`` of each as :class:`Access` bits, with
    the memory type above them as in a map's words.
    """

    gpas: Int64
    lengths: Int64
    first: Int64
    second: Int64
    first_rights: Int64
    second_rights: Int64

    def __len__(self) -> int:
        """Return the number of stretches."""
        return int(self.gpas.size)

    def take(self, chosen: Bools) -> MapDifference:
        """Return some of the stretches."""
        return MapDifference(
            self.gpas[chosen],
            self.lengths[chosen],
            self.first[chosen],
            self.second[chosen],
            self.first_rights[chosen],
            self.second_rights[chosen],
        )

    @property
    def in_both(self) -> Bools:
        """Tell which stretches both maps have."""
        both: Bools = (self.first >= 0) & (self.second >= 0)
        return both

    @property
    def moved(self) -> Bools:
        """Tell which stretches lie in other frames."""
        moved: Bools = self.in_both & (self.first != self.second)
        return moved

    @property
    def changed_rights(self) -> Int64:
        """Return the rights that only one of the maps gives, where both have the stretch; 0 elsewhere."""
        return np.where(self.in_both, (self.first_rights ^ self.second_rights) & _RIGHTS, 0)

    def letters(self, index: int) -> tuple[str, str]:
        """Return the rights of one stretch in both maps as letters."""
        first, second = (Access(int(each[index]) & _RIGHTS) for each in (self.first_rights, self.second_rights))
        return first.letters(), second.letters()

    @property
    def types(self) -> tuple[Int64, Int64]:
        """Return the memory types of both."""
        return self.first_rights >> MEMORY_TYPE_SHIFT & 7, self.second_rights >> MEMORY_TYPE_SHIFT & 7


def difference(first: GuestMap, second: GuestMap, types: bool = False) -> MapDifference:
    """Return every stretch that the two maps do not map alike: another frame or rights; with ``types``, type too."""
    points = mask.distinct(
        np.concatenate([part for each in (first, second) for part in (each.gpas, each.gpas + each.lengths)])
    )
    gpas, lengths = points[:-1], np.diff(points)
    frames, rights = [], []
    for each in (first, second):
        frames.append(each.to_hpa(gpas))
        index, inside = each.find(gpas)
        own = each.words[index] & _ENTRY if len(each) else np.zeros(gpas.size, dtype=np.int64)
        rights.append(np.where(inside, own, 0))
    whole = MapDifference(gpas, lengths, frames[0], frames[1], rights[0], rights[1])
    # No run of either map ends within a stretch: what holds for its first byte holds for all of it.
    compared = _ENTRY if types else _RIGHTS
    alike = (whole.first == whole.second) & (whole.first_rights & compared == whole.second_rights & compared)
    return whole.take(~alike)
