"""Kind 4: pages of the hypervisor, or of its other guests' tables, that a guest's own map leads to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import audit_spaces, audit_views, gpamap, places
from volatility3_ept.core.audit_finding import Finding, Kind, Ranges, Severity, Subject
from volatility3_ept.core.audit_host import HostKernel
from volatility3_ept.core.memory import Int64
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec import bits
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.paging import Access

#: Stretches of one kind of pages that are told one by one.
_MOST = 1024
#: A hypervisor whose code is said to be more than this share of all memory, and more than any kernel's, keeps no code
#: apart from data.
_NO_CODE, _ANY_KERNEL = 0.125, 1 << 26
#: What the host's registers point to in a VMCS: the pages that it cannot run without.
_LANDMARKS = ("HOST_RIP", "HOST_RSP", "HOST_GDTR_BASE", "HOST_IDTR_BASE", "HOST_TR_BASE", "HOST_GS_BASE")


@dataclass(frozen=True)
class Protected:
    """Pages that no guest should reach: what they are, whose, and where (ranges disjoint and ascending)."""

    what: str
    machine: str
    ranges: Ranges


def findings(subjects: Sequence[Subject], hosts: Mapping[str, HostKernel], notes: list[str]) -> Iterator[Finding]:
    """Yield what each machine's map leads to and should not. Only machines over the same memory can meet."""
    for space in dict.fromkeys(subject.machine.tables_in for subject in subjects):
        level = [subject for subject in subjects if subject.machine.tables_in == space]
        pages = list(_protected(level, hosts.get(space), notes))
        for subject in level:
            for item in pages:
                yield from _exposed(subject, item)


def _exposed(subject: Subject, item: Protected) -> Iterator[Finding]:
    """Yield the stretches of one kind of pages that a machine's map leads to."""
    guest_map = subject.machine.guest_map
    # Nearly always nothing: what a guest has in all is known, and to look up each run of it is slow.
    if not gpamap.overlap_bytes(guest_map.frame_ranges(), (item.ranges.starts, item.ranges.ends)):
        return
    run, _, low, high = overlaps(
        guest_map.hpas, guest_map.hpas + guest_map.lengths, item.ranges.starts, item.ranges.ends
    )
    whose = "its own" if item.machine == subject.machine.id else f"machine {item.machine}'s" if item.machine else "the"
    for index in range(min(run.size, _MOST)):
        gpa = int(guest_map.gpas[run[index]] + low[index] - guest_map.hpas[run[index]])
        access = Access(int(guest_map.accesses[run[index]]))
        grave = Severity.HIGH if access & Access.WRITE else Severity.MEDIUM
        text = f"{whose} {item.what}, {access.letters()}"
        size = int(high[index] - low[index])
        yield Finding(subject.machine.id, Kind.EXPOSURE, grave, gpa, size, int(low[index]), text)
    if run.size > _MOST:
        text = f"{run.size} stretches of {whose} {item.what}; the first {_MOST} were looked into"
        yield Finding(subject.machine.id, Kind.EXPOSURE, Severity.HIGH, None, 0, None, text)


def _protected(level: Sequence[Subject], host: HostKernel | None, notes: list[str]) -> Iterator[Protected]:
    """Yield the pages of the hypervisor of some machines, in the memory that holds their tables."""
    for subject in level:
        machine, below = subject.machine, subject.below
        views, _ = audit_views.others(subject)
        roots = [machine.root, *(v.root for v in machine.views if v.tables_in == machine.tables_in)]
        roots += [view.root for view in views]
        for root in {each.address: each for each in roots}.values():
            tables = places.tables(below, root.format, root.raw, root.reader(below))
            for table, pages, _ in tables:
                yield Protected(
                    f"{table.table} of {root.kind} root {root.raw:#x}", machine.id, audit_spaces.pages(pages)
                )
        own = [vcpu for vcpu in machine.vcpus if vcpu.held_in == machine.tables_in]
        for kind in sorted({vcpu.kind for vcpu in own}):
            where = np.array([vcpu.hpa for vcpu in own if vcpu.kind == kind], dtype=np.int64)
            yield Protected(kind, machine.id, audit_spaces.pages(where))
    yield from _hypervisor(level, host, notes)


def _hypervisor(level: Sequence[Subject], host: HostKernel | None, notes: list[str]) -> Iterator[Protected]:
    """Yield the hypervisor's page tables, code and data, and the pages that its registers point to."""
    for name, targets in _landmarks(level).items():
        yield Protected(f"hypervisor's page that {name} points to", "", audit_spaces.pages(np.array(targets)))
    spaces = audit_spaces.find(level, host, notes)
    kernels = audit_spaces.kernels(spaces, notes)
    tables: dict[str, list[Int64]] = {}
    for space in spaces:
        for table, pages in space.tables():
            tables.setdefault(table.table, []).append(pages)
    for table_name, parts in tables.items():
        yield Protected(f"{table_name} of the hypervisor's own paging", "", audit_spaces.pages(np.concatenate(parts)))
    for space in kernels:
        code = audit_spaces.code(space.kernel())
        size = int((code.ends - code.starts).sum())
        if size > max(_NO_CODE * space.below.size, min(_ANY_KERNEL, space.below.size // 2)):
            notes.append(f"the hypervisor ({space.source}) may execute {bits.size_name(size)}: not taken as its code")
        else:
            yield Protected("hypervisor's code", "", code)
    tops = [audit_spaces.top_tables(space, subject) for space in kernels for subject in level]
    if any(each.size for each in tops):
        yield Protected("top table of a process of the hypervisor", "", audit_spaces.pages(np.concatenate(tops)))
    for name, data in host.data(level[0].below) if host else ():
        yield Protected(f"hypervisor's data ({name})", "", data)


def _landmarks(level: Sequence[Subject]) -> dict[str, list[int]]:
    """Return by the name of a register the pages that the control structures of some machines name."""
    found: dict[str, list[int]] = {}
    for subject in level:
        for vcpu in subject.vcpus:
            own = audit_spaces.of_vcpu(vcpu, subject.below)
            for name in _LANDMARKS if own else ():
                address = vcpu.fields.get(name, 0)
                target = own.target(address) if own and address else None
                if target is not None:
                    found.setdefault(name, []).append(target & -PAGE_SIZE)
    return found
