"""Kind 3: frames at two addresses of one guest, and frames of two guests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from volatility3_ept.core import gpamap, mask
from volatility3_ept.core.audit_finding import Finding, Kind, Severity, Subject
from volatility3_ept.core.audit_kernel import Kernel
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import Bools, HostMemory, Int64
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.paging import Access

#: Stretches that are looked into one by one: frames at more than two addresses, frames in another's place.
MAX_STRETCHES = 1024
#: Below this address firmware and video memory are seen twice on every PC.
_LEGACY = 1 << 20
#: A stretch of this size that two guests map alike is a shared-memory device, not a manipulated page.
_DEVICE_BYTES = 1 << 16
#: Addresses of one frame that are named.
_NAMED = 4
#: Bytes that are read together.
_CHUNK = 4 << 20


def aliases(subject: Subject, kernel: Kernel) -> Iterator[Finding]:
    """Yield frames that a guest maps at several addresses, and that nothing ordinary explains."""
    guest_map, name = subject.machine.guest_map, subject.machine.id
    frames = _ByFrame(guest_map, kernel)
    low, high, (depth,), writable = _elementary([frames])
    twice = depth == 2
    writes, gpas = frames.where(low[twice], high[twice])
    first, second = np.minimum(gpas[::2], gpas[1::2]), np.maximum(gpas[::2], gpas[1::2])
    written = writes[::2] | writes[1::2]
    sizes = high[twice] - low[twice]
    code = kernel.code.meets(first, sizes) | kernel.code.meets(second, sizes)
    groups = _grouped(_Common(first, second, low[twice], sizes, written & (code | (first >= _LEGACY)), code))
    odd = [
        (group, np.array([group.first, group.second]))
        for group in groups[:MAX_STRETCHES]
        if _is_odd(group, subject.below)
    ]
    more = (depth > 2) & writable
    for group, found in _often(subject.below, [frames], low[more], high[more]):
        if group.first >= _LEGACY or group.code:
            odd.append((group, found[0]))
    for group, gpa in odd:
        named = ", ".join(f"{each:#x}" for each in gpa[:_NAMED].tolist())
        named += f" and {gpa.size - _NAMED} more" if gpa.size > _NAMED else ""
        text = f"one frame at GPA {named}" + ("; one of them is the guest kernel's code" if group.code else "")
        at = int(gpa[int(np.argmax(kernel.code.hold(gpa)))])
        grave = Severity.HIGH if group.code else Severity.MEDIUM
        yield Finding(name, Kind.ALIAS, grave, at, group.size, group.hpa, text)
    ordinary = int((high - low)[depth > 1].sum()) - sum(group.size for group, _ in odd)
    if ordinary:
        text = f"{ordinary:#x} bytes of frames at several addresses, as KSM, zero pages or firmware leave them"
        text += _cut_short(int(more.sum()), len(groups))
        yield Finding(name, Kind.ALIAS, _rest(int(more.sum()), len(groups)), None, ordinary, None, text)


def shared(subjects: Sequence[tuple[Subject, Kernel]]) -> Iterator[Finding]:
    """Yield frames that two guests of one hypervisor map, and that nothing ordinary explains."""
    if len(subjects) < 2:
        return
    frames = [_ByFrame(subject.machine.guest_map, kernel) for subject, kernel in subjects]
    for number, (one, _) in enumerate(subjects):
        for other in range(number + 1, len(subjects)):
            # Most guests share nothing, and to compare all with all takes long.
            maps = one.machine.guest_map.frame_ranges(), subjects[other][0].machine.guest_map.frame_ranges()
            if one.machine.tables_in == subjects[other][0].machine.tables_in and gpamap.overlap_bytes(*maps):
                yield from _pair(one, subjects[other][0], (frames[number], frames[other]))


def _pair(one: Subject, other: Subject, guests: tuple[_ByFrame, _ByFrame]) -> Iterator[Finding]:
    low, high, depths, writable = _elementary(guests)
    both = (depths[0] > 0) & (depths[1] > 0)
    once = both & (depths[0] == 1) & (depths[1] == 1)
    more = both & ~once & writable
    sizes = high[once] - low[once]
    found = [each.where(low[once], high[once]) for each in guests]
    written = found[0][0] | found[1][0]
    code = guests[0].kernel.code.meets(found[0][1], sizes) | guests[1].kernel.code.meets(found[1][1], sizes)
    common = _Common(found[0][1], found[1][1], low[once], sizes, written, code)
    groups = _grouped(common)
    odd = [group for group in groups[:MAX_STRETCHES] if _is_odd(group, one.below)]
    odd += [group for group, _ in _often(one.below, guests, low[more], high[more])]
    for group in odd:
        text = f"GPA {group.first:#x} of {one.machine.id} and {group.second:#x} of {other.machine.id}, writable"
        text += "; a guest kernel's code" if group.code else ""
        grave = Severity.HIGH if group.code else Severity.MEDIUM
        yield Finding(one.machine.id, Kind.SHARED, grave, group.first, group.size, group.hpa, text)
    ordinary = int((high - low)[both].sum()) - sum(group.size for group in odd)
    if ordinary:
        text = (
            f"{ordinary:#x} bytes with machine {other.machine.id}, as KSM, files or a shared-memory device leave them"
        )
        text += _cut_short(int(more.sum()), len(groups))
        yield Finding(one.machine.id, Kind.SHARED, _rest(int(more.sum()), len(groups)), None, ordinary, None, text)


@dataclass(frozen=True)
class _Common:
    """Stretches of frames at two addresses; ``odd`` tells which are writable where nothing ordinary is."""

    first: Int64
    second: Int64
    hpas: Int64
    sizes: Int64
    odd: Bools
    code: Bools


class _Group(NamedTuple):
    """Stretches that continue each other at both addresses."""

    first: int
    second: int
    hpa: int
    size: int
    odd: bool
    code: bool


def _grouped(common: _Common) -> list[_Group]:
    """Join stretches that continue each other, code apart from the rest. Returns what is odd, code first."""
    if not common.first.size:
        return []
    order = np.argsort(common.first, kind="stable")
    first, second, hpas, sizes, odd, code = (getattr(common, name)[order] for name in _Common.__dataclass_fields__)
    new = np.ones(first.size, dtype=np.bool_)
    new[1:] = (
        (first[1:] != first[:-1] + sizes[:-1]) | (second[1:] != second[:-1] + sizes[:-1]) | (code[1:] != code[:-1])
    )
    start = np.flatnonzero(new)
    columns = (
        first[start],
        second[start],
        hpas[start],
        np.add.reduceat(sizes, start),
        np.logical_or.reduceat(odd, start),
    )
    rows = zip(*(column.tolist() for column in (*columns, code[start])), strict=True)
    return sorted((group for group in map(_Group._make, rows) if group.odd), key=lambda group: not group.code)


def _is_odd(group: _Group, memory: HostMemory) -> bool:
    """Tell whether two addresses for the same frames are no device's memory and no page of one value."""
    return group.code or (group.size < _DEVICE_BYTES and not _is_plain(memory, group.hpa, group.hpa + group.size))


class _ByFrame:
    """The runs of a guest in the order of their frames: to look each of a million up in no order takes seconds."""

    def __init__(self, guest_map: GuestMap, kernel: Kernel) -> None:
        hpas = guest_map.hpas
        order = np.argsort(hpas, kind="stable")
        self.kernel = kernel
        self.hpas, self.lengths, self.gpas = hpas[order], guest_map.lengths[order], guest_map.gpas[order]
        self.ends = self.hpas + self.lengths
        self.written = (guest_map.accesses[order] & int(Access.WRITE)) != 0
        self._widest = int(self.lengths.max(initial=0))

    def depth(self, points: Int64, chosen: Bools | None = None) -> Int64:
        """Return how many of the runs, or of some of them, cover the stretch behind each of some ascending points."""
        starts, ends = (self.hpas, self.ends) if chosen is None else (self.hpas[chosen], self.ends[chosen])
        steps = np.bincount(np.searchsorted(points, starts), minlength=points.size)
        steps -= np.bincount(np.searchsorted(points, np.sort(ends)), minlength=points.size)
        return np.cumsum(steps)[:-1]

    def where(self, low: Int64, high: Int64) -> tuple[Bools, Int64]:
        """Return for each covering of some stretches, in their order, if it is writable, and its address."""
        run, index, begin, _ = overlaps(self.hpas, self.ends, low, high)
        order = np.argsort(index, kind="stable")
        run, begin = run[order], begin[order]
        return self.written[run], self.gpas[run] + begin - self.hpas[run]

    def covering(self, begin: int, end: int) -> tuple[Bools, Int64]:
        """Return the same for one stretch, however often it is covered, ascending by address."""
        near = slice(*np.searchsorted(self.hpas, (begin - self._widest, end)).tolist())
        met = near.start + np.flatnonzero(self.ends[near] > begin)
        gpas = self.gpas[met] + begin - self.hpas[met]
        order = np.argsort(gpas)
        return self.written[met][order], gpas[order]


def _elementary(guests: Sequence[_ByFrame]) -> tuple[Int64, Int64, list[Int64], Bools]:
    """Cut all frames where any run begins or ends.

    Returns ``(low, high, for each guest how many of its runs cover each, if one of these is writable)``.
    """
    points = mask.distinct(np.concatenate([part for each in guests for part in (each.hpas, each.ends)]))
    written = np.zeros(max(points.size - 1, 0), dtype=np.bool_)
    for each in guests:
        written |= each.depth(points, each.written) > 0
    return points[:-1], points[1:], [each.depth(points) for each in guests], written


def _often(
    memory: HostMemory, guests: Sequence[_ByFrame], low: Int64, high: Int64
) -> Iterator[tuple[_Group, list[Int64]]]:
    """Yield those of some writable stretches with many addresses that are odd, and the addresses in each guest.

    Of the stretches the first :data:`MAX_STRETCHES`.
    """
    for begin, end in zip(low[:MAX_STRETCHES].tolist(), high[:MAX_STRETCHES].tolist(), strict=True):
        code = False
        gpas = []
        for guest in guests:
            _, own = guest.covering(begin, end)
            is_code = guest.kernel.code.hold(own)
            code |= bool(is_code.any())
            # The kernel's code first: that is where a reader looks.
            gpas.append(np.concatenate((own[is_code], own[~is_code])))
        if code or not _is_plain(memory, begin, end):
            yield _Group(int(gpas[0][0]), int(gpas[-1][0]), begin, end - begin, True, code), gpas


def _cut_short(many: int, groups: int) -> str:
    """Say what the limit cut."""
    return "".join(
        f"; {count} {what}, {MAX_STRETCHES} looked into"
        for count, what in ((many, "writable stretches with many addresses"), (groups, "writable stretches"))
        if count > MAX_STRETCHES
    )


def _rest(many: int, groups: int) -> Severity:
    """Return the severity of what is counted only: more writable stretches than were looked into are not ordinary."""
    return Severity.LOW if max(many, groups) > MAX_STRETCHES else Severity.INFO


def _is_plain(memory: HostMemory, low: int, high: int) -> bool:
    """Tell whether a stretch is not in the capture, or each page of it is filled with one value."""
    for begin in range(low, high, _CHUNK):
        rows, held = memory.words(np.arange(begin, min(high, begin + _CHUNK), PAGE_SIZE, dtype=np.int64))
        if not (~held | (rows == rows[:, :1]).all(axis=1)).all():
            return False
    return True
