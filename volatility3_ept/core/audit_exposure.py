"""Kind 4: pages of the hypervisor, or of its other guests' tables, that a guest's own map leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import audit_views, leaves, places
from volatility3_ept.core import walk as walks
from volatility3_ept.core.audit_finding import Finding, Kind, Ranges, Severity, Subject
from volatility3_ept.core.gpamap import GuestMap, union
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec import bits, dialect, ia32e
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.paging import Access

#: Hypervisor address spaces that are looked into.
MAX_SPACES = 4
#: A hypervisor whose code is said to be more than this share of all memory keeps no code apart from data.
_NO_CODE = 0.125
#: What the host's registers point to in a VMCS: the pages that it cannot run without.
_LANDMARKS = ("HOST_RIP", "HOST_RSP", "HOST_GDTR_BASE", "HOST_IDTR_BASE", "HOST_TR_BASE", "HOST_GS_BASE")
_LA57 = ia32e.CR4_LA57


@dataclass(frozen=True)
class Protected:
    """Pages that no guest should reach: what they are, whose, and where (ranges disjoint and ascending)."""

    what: str
    machine: str
    ranges: Ranges


def findings(subjects: Sequence[Subject], notes: list[str]) -> Iterator[Finding]:
    """Yield what each machine's map leads to and should not. Only machines over the same memory can meet."""
    for space in dict.fromkeys(subject.machine.tables_in for subject in subjects):
        level = [subject for subject in subjects if subject.machine.tables_in == space]
        pages = list(_protected(level, notes))
        for subject in level:
            for item in pages:
                yield from _exposed(subject, item)


def _exposed(subject: Subject, item: Protected) -> Iterator[Finding]:
    """Yield the stretches of one kind of pages that a machine's map leads to."""
    guest_map = subject.machine.guest_map
    run, _, low, high = overlaps(
        guest_map.hpas, guest_map.hpas + guest_map.lengths, item.ranges.starts, item.ranges.ends
    )
    whose = "its own" if item.machine == subject.machine.id else f"machine {item.machine}'s" if item.machine else "the"
    for index in range(min(run.size, 1024)):
        gpa = int(guest_map.gpas[run[index]] + low[index] - guest_map.hpas[run[index]])
        access = Access(int(guest_map.accesses[run[index]]))
        grave = Severity.HIGH if access & Access.WRITE else Severity.MEDIUM
        text = f"{whose} {item.what}, {access.letters()}"
        size = int(high[index] - low[index])
        yield Finding(subject.machine.id, Kind.EXPOSURE, grave, gpa, size, int(low[index]), text)
    if run.size > 1024:
        text = f"{run.size} stretches of {whose} {item.what}; the first 1024 were looked into"
        yield Finding(subject.machine.id, Kind.EXPOSURE, Severity.HIGH, None, 0, None, text)


def _protected(level: Sequence[Subject], notes: list[str]) -> Iterator[Protected]:
    """Yield the pages of the hypervisor of some machines, in the memory that holds their tables."""
    for subject in level:
        machine, below = subject.machine, subject.below
        views, _ = audit_views.others(machine, below)
        roots = [machine.root, *(v.root for v in machine.views if v.tables_in == machine.tables_in)]
        roots += [view.root for view in views]
        for root in {each.address: each for each in roots}.values():
            tables = places.tables(below, root.format, root.raw, root.reader(below))
            for table, pages, _ in tables:
                yield Protected(f"{table.table} of {root.kind} root {root.raw:#x}", machine.id, _ranges(pages))
        for vcpu in machine.vcpus:
            if vcpu.held_in == machine.tables_in:
                yield Protected(vcpu.kind, machine.id, _ranges(np.array([vcpu.hpa], dtype=np.int64)))
    yield from _hypervisor(level, notes)


def _hypervisor(level: Sequence[Subject], notes: list[str]) -> Iterator[Protected]:
    """Yield the hypervisor's code and the pages that its registers point to, through its own page tables."""
    found = {
        (vcpu.host_cr3, bool(vcpu.fields.get("HOST_CR4", 0) & _LA57)): (vcpu, subject.below)
        for subject in level
        for vcpu in subject.machine.vcpus
        if vcpu.held_in == subject.machine.tables_in and vcpu.host_cr3
    }
    if len(found) > MAX_SPACES:
        notes.append(f"{len(found)} address spaces of the hypervisor; the first {MAX_SPACES} were looked into")
    for (cr3, five), (vcpu, below) in list(found.items())[:MAX_SPACES]:
        fmt = ia32e.five_level() if five else ia32e.four_level()
        assert cr3 is not None
        for name in _LANDMARKS:
            address = vcpu.fields.get(name, 0)
            target = walks.walk(below, fmt, cr3, address).target if address else None
            if target is not None:
                page = np.array([target & -PAGE_SIZE], dtype=np.int64)
                yield Protected(f"hypervisor's page that {name} points to", "", _ranges(page))
        if walks.walk(below, fmt, cr3, vcpu.host_rip or 0).target is not None:
            code = _code(leaves.traverse(below, fmt, cr3, dialect.GENERIC), below, 1 << (fmt.address_bits - 1))
            size = int((code.ends - code.starts).sum())
            if size > _NO_CODE * below.size:
                notes.append(
                    f"the hypervisor at CR3 {cr3:#x} may execute {bits.size_name(size)}: not taken as its code"
                )
                continue
            yield Protected("hypervisor's code", "", code)


def _code(space: GuestMap, below: HostMemory, half: int) -> Ranges:
    """Return what the upper half of an address space may execute and user mode may not reach."""
    own = (space.gpas >= half) & ((space.accesses & int(Access.USER | Access.EXECUTE)) == int(Access.EXECUTE))
    own &= space.hpas < below.top
    return Ranges(*union(space.hpas[own], (space.hpas + space.lengths)[own]))


def _ranges(pages: Int64) -> Ranges:
    return Ranges(*union(pages, pages + PAGE_SIZE))
