"""Kinds 3 and 7: frames at two addresses, frames of two guests, and frames that were put in another's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from volatility3_ept.core import audit_bytes, mask
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
#: A stretch longer than this was not substituted page by page.
_FEW_PAGES = 16


def aliases(subject: Subject, kernel: Kernel) -> Iterator[Finding]:
    """Yield frames that a guest maps at several addresses, and that nothing ordinary explains."""
    guest_map, name = subject.machine.guest_map, subject.machine.id
    low, high, (depth,) = _elementary([guest_map])
    twice = depth == 2
    run, gpas = _where(guest_map, low[twice], high[twice])
    first, second = np.minimum(gpas[::2], gpas[1::2]), np.maximum(gpas[::2], gpas[1::2])
    written = ((guest_map.accesses[run[::2]] | guest_map.accesses[run[1::2]]) & int(Access.WRITE)) != 0
    sizes = high[twice] - low[twice]
    code = kernel.code.meets(first, sizes) | kernel.code.meets(second, sizes)
    groups = _grouped(_Common(first, second, low[twice], sizes, written & (code | (first >= _LEGACY)), code))
    odd = [(group, [group.first, group.second]) for group in groups[:MAX_STRETCHES] if _is_odd(group, subject.below)]
    more = depth > 2
    for group, found in _often(subject.below, [(guest_map, kernel)], low[more], high[more]):
        if group.first >= _LEGACY or group.code:
            odd.append((group, found[0]))
    for group, gpa in odd:
        named = ", ".join(f"{each:#x}" for each in gpa[:_NAMED]) + (" ..." if len(gpa) > _NAMED else "")
        text = f"one frame at GPA {named}" + ("; one of them is the guest kernel's code" if group.code else "")
        at = next((each for each in gpa if kernel.code.hold(np.array([each]))[0]), gpa[0])
        grave = Severity.HIGH if group.code else Severity.MEDIUM
        yield Finding(name, Kind.ALIAS, grave, at, group.size, group.hpa, text)
    ordinary = int((high - low)[twice | more].sum()) - sum(group.size for group, _ in odd)
    if ordinary:
        text = f"{ordinary:#x} bytes of frames at several addresses, as KSM, zero pages or firmware leave them"
        text += _cut_short(int(more.sum()), len(groups))
        yield Finding(name, Kind.ALIAS, _rest(len(groups)), None, ordinary, None, text)


def shared(subjects: Sequence[tuple[Subject, Kernel]]) -> Iterator[Finding]:
    """Yield frames that two guests of one hypervisor map, and that nothing ordinary explains."""
    for number, (one, kernel) in enumerate(subjects):
        for other, other_kernel in subjects[number + 1 :]:
            if one.machine.tables_in == other.machine.tables_in:
                yield from _pair(one, other, kernel, other_kernel)


def _pair(one: Subject, other: Subject, kernel: Kernel, other_kernel: Kernel) -> Iterator[Finding]:
    maps, kernels = (one.machine.guest_map, other.machine.guest_map), (kernel, other_kernel)
    low, high, depths = _elementary(maps)
    both = (depths[0] > 0) & (depths[1] > 0)
    once = both & (depths[0] == 1) & (depths[1] == 1)
    more = both & ~once
    sizes = high[once] - low[once]
    found = [_where(each, low[once], high[once]) for each in maps]
    rights = maps[0].accesses[found[0][0]] | maps[1].accesses[found[1][0]]
    code = kernel.code.meets(found[0][1], sizes) | other_kernel.code.meets(found[1][1], sizes)
    common = _Common(found[0][1], found[1][1], low[once], sizes, (rights & int(Access.WRITE)) != 0, code)
    groups = _grouped(common)
    odd = [group for group in groups[:MAX_STRETCHES] if _is_odd(group, one.below)]
    odd += [group for group, _ in _often(one.below, list(zip(maps, kernels, strict=True)), low[more], high[more])]
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
        yield Finding(one.machine.id, Kind.SHARED, _rest(len(groups)), None, ordinary, None, text)


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


def _elementary(maps: Sequence[GuestMap]) -> tuple[Int64, Int64, list[Int64]]:
    """Cut all frames where any run begins or ends: ``(low, high, for each map how many of its runs cover each)``."""
    points = mask.distinct(np.concatenate([part for each in maps for part in (each.hpas, each.hpas + each.lengths)]))
    depths = []
    for each in maps:
        steps = np.zeros(points.size, dtype=np.int64)
        np.add.at(steps, np.searchsorted(points, each.hpas), 1)
        np.add.at(steps, np.searchsorted(points, each.hpas + each.lengths), -1)
        depths.append(np.cumsum(steps)[:-1])
    return points[:-1], points[1:], depths


def _where(guest_map: GuestMap, low: Int64, high: Int64) -> tuple[Int64, Int64]:
    """Return the run and the guest-physical address of each covering of stretches, in the order of the stretches."""
    run, index, begin, _ = overlaps(guest_map.hpas, guest_map.hpas + guest_map.lengths, low, high)
    order = np.argsort(index, kind="stable")
    run, begin = run[order], begin[order]
    return run, guest_map.gpas[run] + begin - guest_map.hpas[run]


def _often(
    memory: HostMemory, guests: Sequence[tuple[GuestMap, Kernel]], low: Int64, high: Int64
) -> Iterator[tuple[_Group, list[list[int]]]]:
    """Yield those of some stretches with many addresses that are odd, and the addresses; the first ones only."""
    for begin, end in zip(low[:MAX_STRETCHES].tolist(), high[:MAX_STRETCHES].tolist(), strict=True):
        maps = [_mappings(guest_map, begin, end) for guest_map, _ in guests]
        gpas = [sorted(gpa for gpa, _ in part) for part in maps]
        written = any(access & Access.WRITE for part in maps for _, access in part)
        code = any(
            kernel.code.hold(np.array(part, dtype=np.int64)).any()
            for (_, kernel), part in zip(guests, gpas, strict=True)
        )
        if written and (code or not _is_plain(memory, begin, end)):
            yield _Group(gpas[0][0], gpas[-1][0], begin, end - begin, True, code), gpas


def _cut_short(many: int, groups: int) -> str:
    """Say what the limit cut."""
    return "".join(
        f"; {count} {what}, {MAX_STRETCHES} looked into"
        for count, what in ((many, "stretches with many addresses"), (groups, "writable stretches"))
        if count > MAX_STRETCHES
    )


def _rest(groups: int) -> Severity:
    """Return the severity of what is counted only: more writable stretches than were looked into are not ordinary."""
    return Severity.LOW if groups > MAX_STRETCHES else Severity.INFO


def _mappings(guest_map: GuestMap, low: int, high: int) -> list[tuple[int, Access]]:
    """Return where a stretch of frames appears, and with which rights: the first 64 addresses."""
    met = np.flatnonzero((guest_map.hpas < high) & (low < guest_map.hpas + guest_map.lengths))[:64]
    gpas = guest_map.gpas[met] + np.maximum(low - guest_map.hpas[met], 0)
    return [(gpa, Access(right)) for gpa, right in zip(gpas.tolist(), guest_map.accesses[met].tolist(), strict=True)]


def _is_plain(memory: HostMemory, low: int, high: int) -> bool:
    """Tell whether a stretch (of at most 4 MiB) is not in the capture, or is filled with one value."""
    pages = np.arange(low, min(high, low + (4 << 20)), PAGE_SIZE, dtype=np.int64)
    rows, held = memory.words(pages)
    return bool((~held | (rows == rows[:, :1]).all(axis=1)).all())


def substituted(subject: Subject, kernel: Kernel) -> Iterator[Finding]:
    """Yield pages of kernel code whose frame was put in the place of another, which still holds nearly the same.

    EPT or NPT: the frames around continue each other, this one lies elsewhere, and the frame that would continue them
    is a copy with other bytes. The guest's own tables: the same, one level up.
    """
    guest_map, name = subject.machine.guest_map, subject.machine.id
    for gpa, length, hpa, expected in _misplaced(guest_map.gpas, guest_map.lengths, guest_map.hpas):
        if not kernel.code.hold(np.array([gpa]))[0]:
            continue
        difference = audit_bytes.compare(subject.below, expected, hpa)
        if difference is not None and difference.is_copy:
            text = f"frame {expected:#x} would continue its neighbours; {_text(subject, difference, kernel.gva(gpa))}"
            yield Finding(name, Kind.SUBSTITUTED, Severity.HIGH, gpa, length, hpa, text)
    for gva, length, gpa, expected in _misplaced(*kernel.chosen(is_code=True)):
        difference = audit_bytes.compare(subject.machine.memory, expected, gpa)
        if difference is not None and difference.is_copy:
            at = gva | (1 << 64) - (1 << 48) if gva >> 47 == 1 else gva
            text = f"GVA {at:#x}: GPA {expected:#x} would continue its neighbours; {_text(subject, difference, at)}"
            hpa = int(guest_map.to_hpa(np.array([gpa], dtype=np.int64))[0])
            yield Finding(name, Kind.GUEST_REMAP, Severity.HIGH, gpa, length, hpa if hpa >= 0 else None, text)


def _text(subject: Subject, difference: audit_bytes.Difference, address: int | None) -> str:
    return difference.text(subject.disassemble, address)


def _misplaced(starts: Int64, lengths: Int64, targets: Int64) -> Iterator[tuple[int, int, int, int]]:
    """Yield short stretches that lie elsewhere than both neighbours, which continue each other across them.

    Each is ``(start, length, target, target that would continue the neighbours)``; at most :data:`MAX_STRETCHES`.
    """
    if starts.size < 3:
        return
    delta = targets - starts
    new = np.ones(starts.size, dtype=np.bool_)
    new[1:] = (starts[1:] != starts[:-1] + lengths[:-1]) | (delta[1:] != delta[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], starts.size) - 1
    begin, end, delta = starts[first], starts[last] + lengths[last], delta[first]
    if begin.size < 3:
        return
    odd = (begin[1:-1] == end[:-2]) & (begin[2:] == end[1:-1]) & (delta[:-2] == delta[2:])
    odd &= (end[1:-1] - begin[1:-1]) <= _FEW_PAGES * PAGE_SIZE
    for index in (np.flatnonzero(odd)[:MAX_STRETCHES] + 1).tolist():
        at, own, expected = int(begin[index]), int(delta[index]), int(delta[index - 1])
        yield at, int(end[index]) - at, at + own, at + expected
