"""Kind 7: pages that were put in another's place, and code that the guest's own tables make writable elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from volatility3_ept.core import audit_bytes
from volatility3_ept.core.audit_finding import Finding, Kind, Ranges, Severity, Subject
from volatility3_ept.core.audit_kernel import Kernel
from volatility3_ept.core.gpamap import union
from volatility3_ept.core.memory import Int64
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.paging import Access

#: Stretches that are looked into one by one.
MAX_STRETCHES = 1024
#: A stretch longer than this was not changed page by page.
_FEW_PAGES = 16


def findings(subject: Subject, kernel: Kernel, notes: list[str]) -> Iterator[Finding]:
    """Yield what was put in another page's place, by EPT or NPT or by the guest's own tables."""
    disputed = list(_disputed(subject, kernel, notes))
    yield from disputed
    told = {row.gpa for row in disputed}
    yield from (row for row in _substituted(subject, kernel, notes) if row.gpa not in told)
    yield from _remapped(subject, kernel, notes)
    yield from _writable(subject, kernel, notes)


def _disputed(subject: Subject, kernel: Kernel, notes: list[str]) -> Iterator[Finding]:
    """Yield pages for which EPT or NPT has another frame than the process that the guest's memory belongs to.

    Linux keeps the two alike: it takes an entry away before it changes the page below it (``mmu_notifier``).
    """
    machine = subject.machine
    rows = list(machine.recovery.conflicts.T) if machine.recovery else []
    if not rows or not rows[0].size:
        return
    what = f"machine {machine.id}: stretches have other frames by EPT or NPT"
    for gpa, length, ours, theirs in _first(rows, what, notes, "by the monitor's tables"):
        code = bool(kernel.code.meets(np.array([gpa]), np.array([length]))[0])
        text = f"the monitor's process has frame {theirs:#x} there" + ("; in the guest kernel's code" if code else "")
        both = audit_bytes.first_difference((subject.below, subject.below), (theirs, ours), length)
        grave = Severity.MEDIUM
        if both is not None:
            at, difference = both
            text += f"; {difference.text(subject.disassemble, kernel.gva(gpa + at) if code else None, at)}"
            if not difference.places:
                grave = Severity.LOW
            elif code or difference.is_copy:
                grave = Severity.HIGH
        yield Finding(machine.id, Kind.SUBSTITUTED, grave, gpa, length, ours, text)


def _substituted(subject: Subject, kernel: Kernel, notes: list[str]) -> Iterator[Finding]:
    """Yield pages of kernel code whose frame was put in the place of another, which still holds nearly the same.

    The frames around continue each other, this one lies elsewhere, and the frame that would continue them is a copy
    with other bytes.
    """
    guest_map, name = subject.machine.guest_map, subject.machine.id
    rows = _misplaced(guest_map.gpas, guest_map.lengths, guest_map.hpas)
    rows = [column[kernel.code.hold(rows[0])] for column in rows]
    for gpa, length, hpa, expected in _first(rows, f"machine {name}: stretches of kernel code lie elsewhere", notes):
        both = audit_bytes.first_difference((subject.below, subject.below), (expected, hpa), length)
        if both is not None and both[1].is_copy:
            at, difference = both
            text = f"frame {expected:#x} would continue its neighbours; "
            text += difference.text(subject.disassemble, kernel.gva(gpa + at), at)
            yield Finding(name, Kind.SUBSTITUTED, Severity.HIGH, gpa, length, hpa, text)


def _remapped(subject: Subject, kernel: Kernel, notes: list[str]) -> Iterator[Finding]:
    """Yield the same one level up: pages of code that the guest's own tables put in another's place."""
    name = subject.machine.id
    rows = _misplaced(*kernel.chosen(is_code=True))
    for gva, length, gpa, expected in _first(rows, f"machine {name}: pages of code lie elsewhere", notes):
        both = audit_bytes.first_difference((subject.machine.memory,) * 2, (expected, gpa), length)
        if both is not None and both[1].is_copy:
            at, difference = both
            text = f"GVA {kernel.canonical(gva):#x}: GPA {expected:#x} would continue its neighbours; "
            text += difference.text(subject.disassemble, kernel.canonical(gva + at), at)
            yield Finding(name, Kind.GUEST_REMAP, Severity.HIGH, gpa, length, _frame(subject, gpa), text)


def _writable(subject: Subject, kernel: Kernel, notes: list[str]) -> Iterator[Finding]:
    """Yield code that the kernel may not write where it runs, and may write at another of its addresses.

    A few pages of it: a kernel that leaves all of its code so keeps no code apart from data (one row, info).
    """
    name = subject.machine.id
    fixed = kernel.accesses & int(Access.WRITE | Access.EXECUTE) == int(Access.EXECUTE)
    code = Ranges(*union(kernel.gpas[fixed], (kernel.gpas + kernel.lengths)[fixed]))
    written = (kernel.accesses & int(Access.WRITE)) != 0
    gvas, lengths, gpas = kernel.gvas[written], kernel.lengths[written], kernel.gpas[written]
    run, _, low, high = overlaps(gpas, gpas + lengths, code.starts, code.ends)
    if not run.size:
        return
    starts, ends = union(low, high)
    total, few = int((ends - starts).sum()), _FEW_PAGES * PAGE_SIZE
    if total > few:
        text = f"{total:#x} bytes of kernel code are writable at other addresses of the kernel"
        yield Finding(name, Kind.WRITABLE_CODE, Severity.INFO, int(starts[0]), total, None, text)
        return
    rows = [gvas[run] + low - gpas[run], low, high]
    for gva, begin, end in _first(rows, f"machine {name}: pages of code are mapped more often", notes):
        text = f"runs at GVA {kernel.gva(begin) or 0:#x}, and is writable at GVA {kernel.canonical(gva):#x}"
        yield Finding(name, Kind.WRITABLE_CODE, Severity.MEDIUM, begin, end - begin, _frame(subject, begin), text)


def _frame(subject: Subject, gpa: int) -> int | None:
    hpa = int(subject.machine.guest_map.to_hpa(np.array([gpa], dtype=np.int64))[0])
    return hpa if hpa >= 0 else None


def _first(
    rows: Sequence[Int64], what: str, notes: list[str], than: str = "their neighbours"
) -> Iterator[tuple[int, ...]]:
    """Yield the first rows of some columns, and note what is left out."""
    if rows[0].size > MAX_STRETCHES:
        notes.append(f"{what} than {than}: {rows[0].size}, the first {MAX_STRETCHES} were looked into")
    yield from zip(*(column[:MAX_STRETCHES].tolist() for column in rows), strict=True)


def _misplaced(starts: Int64, lengths: Int64, targets: Int64) -> list[Int64]:
    """Return short stretches that lie elsewhere than both neighbours, which continue each other across them.

    Columns: ``start, length, target, target that would continue the neighbours``.
    """
    nothing = [np.empty(0, dtype=np.int64)] * 4
    if starts.size < 3:
        return nothing
    delta = targets - starts
    new = np.ones(starts.size, dtype=np.bool_)
    new[1:] = (starts[1:] != starts[:-1] + lengths[:-1]) | (delta[1:] != delta[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], starts.size) - 1
    begin, end, delta = starts[first], starts[last] + lengths[last], delta[first]
    if begin.size < 3:
        return nothing
    odd = (begin[1:-1] == end[:-2]) & (begin[2:] == end[1:-1]) & (delta[:-2] == delta[2:])
    odd &= (end[1:-1] - begin[1:-1]) <= _FEW_PAGES * PAGE_SIZE
    index = np.flatnonzero(odd) + 1
    return [begin[index], end[index] - begin[index], begin[index] + delta[index], begin[index] + delta[index - 1]]
