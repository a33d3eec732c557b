"""Kind 1: pages that cannot be read, and pages of a kernel whose rights differ from those around them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from volatility3_ept.core import audit_bytes, audit_kernel
from volatility3_ept.core.audit_finding import Finding, Kind, Severity, Subject
from volatility3_ept.core.audit_kernel import Kernel
from volatility3_ept.core.memory import Bools, Int64
from volatility3_ept.spec import bits
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.paging import Access

_READ_EXECUTE = int(Access.READ | Access.EXECUTE)
#: A stretch longer than this is no single hook: a region with rights of its own.
_FEW_PAGES = 16
#: Stretches that are looked into one by one.
_MOST = 1024


def findings(subject: Subject, kernel: Kernel) -> Iterator[Finding]:
    """Yield what a machine's rights give away."""
    yield from _unreadable(subject, kernel)
    seen: set[int] = set()
    yield from _odd(subject, kernel, True, seen)
    yield from _odd(subject, kernel, False, seen)


def _unreadable(subject: Subject, kernel: Kernel) -> Iterator[Finding]:
    """Yield stretches that the guest may execute and not read, or not use at all, though they are mapped."""
    guest_map, below = subject.machine.guest_map, subject.below
    hidden = np.flatnonzero((guest_map.accesses & int(Access.READ)) == 0)
    if hidden.size > _MOST:
        size = int(guest_map.lengths[hidden].sum())
        text = f"{size:#x} bytes in {hidden.size} stretches cannot be read; the first {_MOST} were looked into"
        yield Finding(subject.machine.id, Kind.UNREADABLE_PAGE, Severity.MEDIUM, None, size, None, text)
        hidden = hidden[:_MOST]
    in_code = kernel.code.meets(guest_map.gpas[hidden], guest_map.lengths[hidden])
    # Copies are looked for of few: the kernel's code first.
    small = [int(i) for i in hidden[np.argsort(~in_code, kind="stable")] if guest_map.lengths[i] == PAGE_SIZE]
    copies = audit_bytes.twins(below, [int(guest_map.hpas[i]) for i in small])
    unsought = {int(guest_map.hpas[i]) for i in small[audit_bytes.MAX_WANTED :]}
    for index, code in zip(hidden.tolist(), in_code.tolist(), strict=True):
        run = guest_map.run(index)
        executes = bool(run.access & Access.EXECUTE)
        text = f"{run.access.letters()}, leaf of {bits.size_name(run.page_size)}"
        text += "; in the guest kernel's code" if code else ""
        text += "; a copy of it was not looked for (too many such pages)" if run.hpa in unsought else ""
        copy = copies.get(run.hpa) if run.length == PAGE_SIZE else None
        if copy is not None:
            difference = audit_bytes.compare(below, copy, run.hpa)
            where = kernel.gva(run.gpa) if code else run.gpa
            if difference is not None:
                text += f"; nearly the same page lies at {copy:#x}, {difference.text(subject.disassemble, where)}"
        grave = Severity.HIGH if executes and (code or copy is not None) else Severity.MEDIUM
        yield Finding(subject.machine.id, Kind.UNREADABLE_PAGE, grave, run.gpa, run.length, run.hpa, text)


def _odd(subject: Subject, kernel: Kernel, is_code: bool, seen: set[int]) -> Iterator[Finding]:
    """Yield short stretches of a kernel's address space with other rights than both neighbours, which agree.

    Of code that lies scattered (modules) the kernel's map of all memory has the neighbours. ``seen``: told already.
    """
    gvas, lengths, gpas, hpas, rights = audit_kernel.through(kernel, subject.machine.guest_map, is_code)
    readable = (rights & int(Access.READ)) != 0  # The others are findings of their own.
    gvas, lengths, gpas, hpas, rights = (a[readable] for a in (gvas, lengths, gpas, hpas, rights))
    for mask in (_READ_EXECUTE, int(Access.WRITE)):
        first, last = _stretches(gvas, lengths, rights & mask)
        sizes = gvas[last] + lengths[last] - gvas[first]
        odd = _between_equals(gvas[first], sizes, (rights & mask)[first]) & (sizes <= _FEW_PAGES * PAGE_SIZE)
        if mask == int(Access.WRITE):
            # Written pages are writable, others may not be: only a count, and only for code.
            count = int(sizes[odd].sum()) if is_code else 0
            if count:
                text = f"{count:#x} bytes of kernel code differ from their neighbours in W alone"
                yield Finding(subject.machine.id, Kind.ODD_RIGHTS, Severity.INFO, None, count, None, text)
            continue
        count = int(odd.sum())
        if count > _MOST:
            text = f"{count} stretches of kernel {'code' if is_code else 'data'}; the first {_MOST} were looked into"
            yield Finding(subject.machine.id, Kind.ODD_RIGHTS, Severity.LOW, None, int(sizes[odd].sum()), None, text)
        for start in np.flatnonzero(odd)[:_MOST].tolist():
            at = int(first[start])
            if int(gpas[at]) in seen:
                continue
            seen.add(int(gpas[at]))
            around = Access(int(rights[first[start - 1]])).letters()
            own = Access(int(rights[at])).letters()
            code = is_code or bool(kernel.code.hold(gpas[at : at + 1])[0])
            part = "code" if code else "data"
            text = f"{own} between {around}, in the guest kernel's {part} at GVA {kernel.canonical(int(gvas[at])):#x}"
            grave = Severity.HIGH if code else Severity.LOW
            run = subject.machine.guest_map.run(int(subject.machine.guest_map.find(gpas[at : at + 1])[0][0]))
            if run.page_size > PAGE_SIZE:
                grave, text = Severity.INFO, f"{text}; in a large leaf"
            yield Finding(
                subject.machine.id, Kind.ODD_RIGHTS, grave, int(gpas[at]), int(sizes[start]), int(hpas[at]), text
            )


def _stretches(starts: Int64, lengths: Int64, values: Int64) -> tuple[Int64, Int64]:
    """Join neighbours with equal values; returns the first and the last index of each stretch."""
    if not starts.size:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    new = np.ones(starts.size, dtype=np.bool_)
    new[1:] = (starts[1:] != starts[:-1] + lengths[:-1]) | (values[1:] != values[:-1])
    first = np.flatnonzero(new)
    return first, np.append(first[1:], starts.size) - 1


def _between_equals(starts: Int64, sizes: Int64, values: Int64) -> Bools:
    """Tell which stretches touch one on either side, with values that are equal to each other and not to its own."""
    odd = np.zeros(starts.size, dtype=np.bool_)
    if starts.size > 2:
        touch = starts[1:] == starts[:-1] + sizes[:-1]
        odd[1:-1] = touch[:-1] & touch[1:] & (values[:-2] == values[2:]) & (values[1:-1] != values[:-2])
    return odd
