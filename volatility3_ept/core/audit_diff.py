"""Two captures of one host: which entries of EPT or NPT changed between them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from volatility3_ept.core import audit_bytes, audit_finding, audit_kernel, audit_mapdiff
from volatility3_ept.core.audit_finding import Disassembler, Finding, Kind, Severity
from volatility3_ept.core.audit_kernel import Kernel
from volatility3_ept.core.audit_mapdiff import MapDifference
from volatility3_ept.core.machines import Discovery, Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec.paging import Access

#: Stretches of one machine that are compared byte by byte.
_MAX_COMPARED = 1024


def compare(
    before: tuple[Discovery, HostMemory],
    after: tuple[Discovery, HostMemory],
    disassemble: Disassembler | None = None,
) -> list[Finding]:
    """Return what changed from one capture to another of the same host.

    Machines are the same when their tables have the same root in the same memory; what is left, when their ids and
    systems agree.
    """
    found: list[Finding] = []
    pairs, gone, new = _pairs(before[0], after[0])
    for machine, word in [*((m, "gone") for m in gone), *((m, "new") for m in new)]:
        text = f"{machine.root.kind} root {machine.root.raw:#x}, {machine.system}: {word} in the second capture"
        found.append(Finding(machine.id, Kind.CHANGED_MACHINE, Severity.LOW, None, 0, machine.root.address, text))
    for one, other in pairs:
        if one.root.raw != other.root.raw:
            text = f"root {one.root} became {other.root}"
            found.append(Finding(one.id, Kind.CHANGED_MACHINE, Severity.LOW, None, 0, other.root.address, text))
        memories = [_below(each, machine) for each, machine in ((before, one), (after, other))]
        found += _machine(one, other, (memories[0], memories[1]), disassemble)
    return audit_finding.in_order(audit_finding.capped(found))


def _pairs(before: Discovery, after: Discovery) -> tuple[list[tuple[Machine, Machine]], list[Machine], list[Machine]]:
    first, second = before.all(), after.all()
    pairs: list[tuple[Machine, Machine]] = []
    for key in (_by_root, _by_name):
        for one in list(first):
            match = next((other for other in second if key(one) == key(other)), None)
            if match is not None:
                pairs.append((one, match))
                first.remove(one)
                second.remove(match)
    return pairs, first, second


def _by_root(machine: Machine) -> tuple[str, str, int]:
    return machine.tables_in, machine.root.kind, machine.root.address


def _by_name(machine: Machine) -> tuple[str, str, str]:
    return machine.id, machine.root.kind, machine.system


def _below(capture: tuple[Discovery, HostMemory], machine: Machine) -> HostMemory:
    parent = capture[0].find(machine.tables_in) if machine.tables_in else None
    return parent.memory if parent else capture[1]


def _machine(
    one: Machine, other: Machine, memories: tuple[HostMemory, HostMemory], disassemble: Disassembler | None
) -> Iterator[Finding]:
    kernel = audit_kernel.find(other)
    changed = audit_mapdiff.difference(one.guest_map, other.guest_map)
    for word, chosen in (
        ("mapped now", (changed.first < 0) & (changed.second >= 0)),
        ("not mapped any more", (changed.first >= 0) & (changed.second < 0)),
    ):
        part = changed.take(chosen)
        for index in range(min(len(part), _MAX_COMPARED)):
            hpa = int(part.second[index] if part.second[index] >= 0 else part.first[index])
            where = int(part.gpas[index]), int(part.lengths[index]), hpa
            yield Finding(one.id, Kind.CHANGED_PRESENT, Severity.INFO, *where, word)
        if len(part) > _MAX_COMPARED:
            size = int(part.lengths[_MAX_COMPARED:].sum())
            yield Finding(one.id, Kind.CHANGED_PRESENT, Severity.INFO, None, size, None, f"{word}: the rest")
    odd = changed.take(changed.in_both)
    for index in range(min(len(odd), _MAX_COMPARED)):
        yield _stretch(one, kernel, odd, index, memories, disassemble)
    if len(odd) > _MAX_COMPARED:
        size = int(odd.lengths[_MAX_COMPARED:].sum())
        text = f"{len(odd) - _MAX_COMPARED} more stretches changed"
        yield Finding(one.id, Kind.CHANGED_FRAME, Severity.LOW, None, size, None, text)


def _stretch(
    machine: Machine,
    kernel: Kernel,
    odd: MapDifference,
    index: int,
    memories: tuple[HostMemory, HostMemory],
    disassemble: Disassembler | None,
) -> Finding:
    gpa, length = int(odd.gpas[index]), int(odd.lengths[index])
    first, second = int(odd.first[index]), int(odd.second[index])
    letters = [Access(int(column[index])).letters() for column in (odd.first_rights, odd.second_rights)]
    code = bool(kernel.code.meets(odd.gpas[index : index + 1], np.array([length]))[0])
    part = "; in the guest kernel's code" if code else ""
    lost = Access(int(odd.changed_rights[index]))
    grave = Severity.INFO if not lost & (Access.READ | Access.EXECUTE) else Severity.HIGH if code else Severity.MEDIUM
    rights = f", {letters[0]} became {letters[1]}" if lost else ""
    if first == second:
        return Finding(machine.id, Kind.CHANGED_RIGHTS, grave, gpa, length, first, f"{rights[2:]}{part}")
    text = f"frame {first:#x} became {second:#x}{rights}{part}"
    both = audit_bytes.first_difference(memories, (first, second), length)
    if both is not None:
        at, difference = both
        text += f"; {difference.text(disassemble, kernel.gva(gpa + at) if code else None, at)}"
        if code and difference.places:
            grave = Severity.HIGH
    return Finding(machine.id, Kind.CHANGED_FRAME, grave, gpa, length, second, text)
