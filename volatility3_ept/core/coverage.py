"""Where each page of a guest is, or what became of it: disjoint ranges that add up to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from volatility3_ept.core import gpamap, mask
from volatility3_ept.core.backing import Recovery
from volatility3_ept.core.gpamap import GuestMap, union
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.dialect import State


class Fate(str, Enum):
    """What became of a guest-physical page. Where several hold, the first one counts."""

    MAPPED = "mapped"
    RECOVERED = "recovered"
    #: Mapped or recovered, and its frame is not in the capture.
    OUTSIDE = "outside the capture"
    MMIO = "MMIO"
    SWAPPED = "swapped out"
    MIGRATING = "migrating"
    ELSEWHERE = "device page or marker"
    MISCONFIGURED = "misconfigured"
    #: The table that would tell, of EPT or NPT or of the host, is not in the capture.
    UNREADABLE = "table unreadable"
    #: Within a slot, and the host never gave it a page (or took it back).
    NEVER_BACKED = "never backed"
    #: In no table and in no slot: a hole, or memory of which nothing is known.
    NOT_MAPPED = "not mapped"

    def __str__(self) -> str:
        """Return the fate in the words that the plugins print."""
        return self.value


_FATES = tuple(Fate)
Range = tuple[Int64, Int64]


class Part(NamedTuple):
    """A stretch of guest-physical memory, all of one fate."""

    gpa: int
    length: int
    fate: Fate


@dataclass(frozen=True)
class Coverage:
    """The whole of a guest's memory, from 0 to ``top``: ascending ranges without gap or overlap.

    ``fates`` are positions in :class:`Fate`.
    """

    gpas: Int64
    lengths: Int64
    fates: npt.NDArray[np.int8]

    def __len__(self) -> int:
        """Return the number of ranges."""
        return int(self.gpas.size)

    @property
    def top(self) -> int:
        """The first address above the guest's memory."""
        return int(self.gpas[-1] + self.lengths[-1]) if self.gpas.size else 0

    def parts(self) -> Iterator[Part]:
        """Yield every range, ascending."""
        for gpa, length, fate in zip(self.gpas.tolist(), self.lengths.tolist(), self.fates.tolist(), strict=True):
            yield Part(gpa, length, _FATES[fate])

    def totals(self) -> dict[Fate, int]:
        """Return the bytes of each fate, those that do not occur too; they add up to ``top``."""
        sums = np.zeros(len(_FATES), dtype=np.int64)
        np.add.at(sums, self.fates, self.lengths)
        return dict(zip(_FATES, sums.tolist(), strict=True))

    def count(self, fate: Fate) -> int:
        """Return the number of ranges of one fate."""
        return int((self.fates == _FATES.index(fate)).sum())

    def find(self, gpa: int) -> Fate | None:
        """Return what became of the page at one address; None above the guest's memory."""
        index = int(np.searchsorted(self.gpas, gpa, side="right")) - 1
        return _FATES[int(self.fates[index])] if 0 <= gpa < self.top else None


def account(guest_map: GuestMap, below: HostMemory, recovery: Recovery | None = None) -> Coverage:
    """Return the fate of every page below the top of the guest's memory.

    ``recovery`` is what :func:`.backing.recover` made of ``guest_map``; without one, nothing is known of what EPT or
    NPT lacks. A page of which a part is outside the capture is outside.
    """
    recovery = recovery or Recovery(guest_map)
    whole = recovery.guest_map
    top = max([whole.top, *(slot.gpa + slot.length for slot in recovery.slots)])
    found = dict(_ranges(whole, below, recovery))
    none = np.empty(0, dtype=np.int64)
    taken = (none, none)
    parts: list[tuple[Int64, Int64, npt.NDArray[np.int8]]] = []
    for code, fate in enumerate(_FATES):
        own = union(*found[fate]) if fate in found else (np.zeros(1, np.int64), np.full(1, top, np.int64))
        starts, lengths = mask.subtract(_clipped(own, top), taken)
        parts.append((starts, lengths, np.full(starts.size, code, dtype=np.int8)))
        taken = union(np.concatenate((taken[0], starts)), np.concatenate((taken[1], starts + lengths)))
    order = np.argsort(np.concatenate([part[0] for part in parts]), kind="stable")
    return Coverage(
        np.concatenate([part[0] for part in parts])[order],
        np.concatenate([part[1] for part in parts])[order],
        np.concatenate([part[2] for part in parts])[order],
    )


def _ranges(whole: GuestMap, below: HostMemory, recovery: Recovery) -> Iterator[tuple[Fate, Range]]:
    """Yield the ranges ``(starts, ends)`` of every fate but the last, which takes what is left."""
    again = (whole.words >> gpamap.STATE_SHIFT & 7) == int(State.RECOVERED)
    held = whole.memory(below)
    present = union(held.starts, held.starts + held.lengths)
    del held
    inner = np.stack((-(-present[0] // PAGE_SIZE) * PAGE_SIZE, present[1] // PAGE_SIZE * PAGE_SIZE))
    present = _clipped((inner[0], inner[1]), whole.top)
    for fate, chosen in ((Fate.MAPPED, ~again), (Fate.RECOVERED, again)):
        starts = whole.gpas[chosen]
        runs = union(starts, starts + whole.lengths[chosen])
        lost = mask.subtract(runs, present)
        yield fate, _plus(mask.subtract(runs, (lost[0], lost[0] + lost[1])))
    yield Fate.OUTSIDE, (whole.gpas, whole.gpas + whole.lengths)
    findings = whole.findings
    for fate, rows in (
        (Fate.MMIO, findings.mmio),
        (Fate.SWAPPED, recovery.swapped),
        (Fate.MIGRATING, recovery.migrating),
        (Fate.ELSEWHERE, recovery.elsewhere),
        (Fate.MISCONFIGURED, findings.misconfigured),
        (Fate.UNREADABLE, np.concatenate((findings.unreadable[:, :2], recovery.unreadable))),
        (Fate.NEVER_BACKED, recovery.never_backed),
    ):
        yield fate, (rows[:, 0], rows[:, 0] + rows[:, 1])


def _plus(pieces: Range) -> Range:
    return pieces[0], pieces[0] + pieces[1]


def _clipped(ranges: Range, top: int) -> Range:
    starts, ends = ranges[0], np.minimum(ranges[1], top)
    kept = starts < ends
    return starts[kept], ends[kept]
