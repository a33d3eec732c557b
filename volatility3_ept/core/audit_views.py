"""Kind 2: two views of one machine, by a second root or by a list for VMFUNC, and what they show differently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import audit_bytes, audit_mapdiff
from volatility3_ept.core.audit_finding import Finding, Kind, Severity, Subject
from volatility3_ept.core.audit_kernel import Kernel
from volatility3_ept.core.audit_mapdiff import MapDifference
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.root import EPT, Root, RootError
from volatility3_ept.spec import bits
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.ept import Eptp
from volatility3_ept.spec.paging import Access

#: Views of one machine that are walked. A list for VMFUNC has room for 512, each of which may be a whole hierarchy.
MAX_VIEWS = 32
#: Stretches of one view that are compared byte by byte.
_MAX_COMPARED = 256
#: Secondary control "enable VM functions", and function 0, EPTP switching (SDM Vol. 3C, "VM Functions").
_ENABLE_VMFUNC, _EPTP_SWITCHING = bits.bit(13), bits.bit(0)
_LIST_ENTRIES = 512
#: Video memory; and in system management mode, SMRAM.
_SMRAM = (0xA_0000, 0xC_0000)


@dataclass(frozen=True)
class OtherView:
    """A further root of a machine, and where it was found."""

    root: Root
    source: str


def others(subject: Subject) -> tuple[list[OtherView], list[str]]:
    """Return the further roots of a machine whose tables lie in the same memory, each once, and notes."""
    machine, below = subject.machine, subject.below
    found = {machine.root.address: OtherView(machine.root, "")}
    for view in machine.views:
        if view.tables_in == machine.tables_in:
            found.setdefault(view.root.address, OtherView(view.root, "a root of its own"))
    notes: list[str] = []
    for page, pointers in _lists(subject, notes):
        for slot, raw in enumerate(pointers):
            root = _root(raw, machine.root) if raw else None
            if root is not None and root.address in below:
                found.setdefault(root.address, OtherView(root, f"entry {slot} of the EPTP list at {page:#x}"))
    views = [view for view in found.values() if view.source]
    if len(views) > MAX_VIEWS:
        notes.append(f"machine {machine.id}: {len(views)} views; the first {MAX_VIEWS} were compared")
    return views[:MAX_VIEWS], notes


def _lists(subject: Subject, notes: list[str]) -> Iterator[tuple[int, list[int]]]:
    """Yield the EPTP lists that a machine's vCPUs may switch by, each page once."""
    seen: set[int] = set()
    for vcpu in subject.vcpus:
        fields = vcpu.fields
        wanted = fields.get("SECONDARY_PROC_EXEC_CONTROLS", 0) & _ENABLE_VMFUNC
        page = fields.get("EPTP_LIST_ADDR", 0)
        if not wanted or not page or page % PAGE_SIZE or page in seen:
            continue
        if fields.get("VM_FUNCTION_CONTROLS", 0) & _EPTP_SWITCHING:
            seen.add(page)
            raw = subject.below.read(page, 8 * _LIST_ENTRIES)
            if raw is None:
                notes.append(f"machine {subject.machine.id}: the EPTP list at {page:#x} is not in the capture")
            else:
                yield page, np.frombuffer(raw, dtype=np.uint64).tolist()


def _root(raw: int, like: Root) -> Root | None:
    """Return the root that an entry of a list names; None where the processor would refuse it."""
    if Eptp(raw).faults():
        return None
    try:
        return Root(EPT, raw, 0, like.physical_bits, like.key_bit, like.mode_based_execute, like.dialect)
    except RootError:
        return None


def findings(subject: Subject, kernel: Kernel, notes: list[str]) -> Iterator[Finding]:
    """Yield what the views of a machine show differently."""
    views, own = others(subject)
    notes += own
    for view in views:
        guest_map = view.root.traverse(subject.below)
        notes += guest_map.findings.notes
        yield from _compared(subject, kernel, view, guest_map)


def _compared(subject: Subject, kernel: Kernel, view: OtherView, guest_map: GuestMap) -> Iterator[Finding]:
    machine = subject.machine
    all_of_it = audit_mapdiff.difference(machine.guest_map, guest_map)
    odd = all_of_it.take(all_of_it.in_both)
    alone = int(all_of_it.lengths[~all_of_it.in_both].sum())
    text = f"{view.root} ({view.source}); {len(odd)} stretches differ, {alone:#x} bytes are mapped in one view only"
    if len(odd) > _MAX_COMPARED:
        text += f"; the first {_MAX_COMPARED} were compared"
    yield Finding(machine.id, Kind.VIEWS, Severity.INFO, None, guest_map.mapped_bytes, view.root.address, text)
    for index in range(min(len(odd), _MAX_COMPARED)):
        yield _stretch(subject, kernel, odd, index)
    if len(odd) > _MAX_COMPARED:
        size = int(odd.lengths[_MAX_COMPARED:].sum())
        text = f"{size:#x} more bytes differ between the views"
        yield Finding(machine.id, Kind.VIEW_RIGHTS, Severity.LOW, None, size, None, text)


def _stretch(subject: Subject, kernel: Kernel, odd: MapDifference, index: int) -> Finding:
    """Return the finding for one stretch of guest-physical memory that both views map, differently."""
    gpa, length = int(odd.gpas[index]), int(odd.lengths[index])
    first, second = int(odd.first[index]), int(odd.second[index])
    letters = odd.letters(index)
    code = bool(kernel.code.meets(odd.gpas[index : index + 1], odd.lengths[index : index + 1])[0])
    part = "; in the guest kernel's code" if code else ""
    if first != second:
        text = f"frame {first:#x} {letters[0]} and {second:#x} {letters[1]}{part}"
        both = audit_bytes.first_difference((subject.below, subject.below), (first, second), length)
        grave = Severity.MEDIUM
        if both is not None:
            at, difference = both
            where = kernel.gva(gpa + at) if code else None
            text += f"; {difference.text(subject.disassemble, where, at)}"
            grave = Severity.HIGH if difference.places and (code or difference.is_copy) else Severity.MEDIUM
        if _SMRAM[0] <= gpa < _SMRAM[1]:
            grave, text = Severity.INFO, f"{text}; where SMRAM lies"
        return Finding(subject.machine.id, Kind.VIEW_FRAME, grave, gpa, length, second, text)
    lost = Access(int(odd.changed_rights[index]))
    grave = Severity.INFO if lost == Access.WRITE else Severity.HIGH if code else Severity.MEDIUM
    text = f"{letters[0]} and {letters[1]}, one frame{part}"
    if subject.role and "VTL1" in subject.role.name:
        grave, text = Severity.INFO, f"{text}; {subject.role.name}: {'; '.join(subject.role.evidence)}"
    return Finding(subject.machine.id, Kind.VIEW_RIGHTS, grave, gpa, length, first, text)
