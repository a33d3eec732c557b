"""Two captures of one host: which entries of EPT or NPT changed between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import audit_bytes, audit_finding, audit_kernel, audit_mapdiff
from volatility3_ept.core.audit_entries import TYPE_NAMES
from volatility3_ept.core.audit_finding import Audit, Disassembler, Finding, Kind, Severity
from volatility3_ept.core.audit_kernel import Kernel
from volatility3_ept.core.audit_mapdiff import MapDifference
from volatility3_ept.core.machines import Discovery, Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.walk import Walk
from volatility3_ept.spec.paging import Access

#: Stretches of one machine that are compared byte by byte.
_MAX_COMPARED = 1024


def compare(
    before: tuple[Discovery, HostMemory],
    after: tuple[Discovery, HostMemory],
    disassemble: Disassembler | None = None,
) -> Audit:
    """Return what changed from one capture to another of the same host.

    Machines are the same when their tables have the same root in the same memory; what is left, when their ids and
    systems agree.
    """
    found: list[Finding] = []
    notes: list[str] = []
    pairs, gone, new = _pairs(before[0], after[0])
    for machine, word in [*((m, "gone") for m in gone), *((m, "new") for m in new)]:
        text = f"{machine.root.kind} root {machine.root.raw:#x}, {machine.system}: {word} in the second capture"
        found.append(Finding(machine.id, Kind.CHANGED_MACHINE, Severity.LOW, None, 0, machine.root.address, text))
    for one, other in pairs:
        if one.root.raw != other.root.raw:
            text = f"root {one.root} became {other.root}"
            found.append(Finding(one.id, Kind.CHANGED_MACHINE, Severity.LOW, None, 0, other.root.address, text))
        pair = _Pair(one, other, (_below(before, one), _below(after, other)))
        found += _machine(pair, audit_finding.fitted(disassemble, other), notes)
    return Audit(tuple(audit_finding.in_order(audit_finding.capped(found))), tuple(dict.fromkeys(notes)))


@dataclass(frozen=True)
class _Pair:
    """One machine in both captures, and the memories that hold its tables there."""

    before: Machine
    after: Machine
    memories: tuple[HostMemory, HostMemory]

    @property
    def id(self) -> str:
        """The machine's id in the first capture."""
        return self.before.id

    def entries(self, gpa: int) -> str:
        """Return the entries that the translation of an address ends at, before and after."""
        old, new = (
            _last(machine.root.walk(memory, gpa))
            for machine, memory in zip((self.before, self.after), self.memories, strict=True)
        )
        return f"{old} became {new}" if old != new else f"{old} as before, a higher entry changed"


def _last(walk: Walk) -> str:
    """Return the entry that a translation ends at; a hierarchy of fewer levels has none for a high address."""
    if not walk.steps:
        return "no entry"
    step = walk.steps[-1]
    return f"{step.level.name} {'unreadable' if step.entry is None else hex(step.entry)}"


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


def _machine(pair: _Pair, disassemble: Disassembler | None, notes: list[str]) -> Iterator[Finding]:
    """Yield what changed in the tables of one machine."""
    kernel = audit_kernel.find(pair.after)
    changed = audit_mapdiff.difference(pair.before.guest_map, pair.after.guest_map, types=True)
    for word, chosen in (
        ("mapped now", (changed.first < 0) & (changed.second >= 0)),
        ("not mapped any more", (changed.first >= 0) & (changed.second < 0)),
    ):
        part = changed.take(chosen)
        for index in range(min(len(part), _MAX_COMPARED)):
            hpa = int(part.second[index] if part.second[index] >= 0 else part.first[index])
            gpa = int(part.gpas[index])
            where = gpa, int(part.lengths[index]), hpa
            rights = part.letters(index)[int(part.second[index] >= 0)]
            text = f"{word}, {rights}; {pair.entries(gpa)}"
            yield Finding(pair.id, Kind.CHANGED_PRESENT, Severity.INFO, *where, text)
        if len(part) > _MAX_COMPARED:
            size = int(part.lengths[_MAX_COMPARED:].sum())
            yield Finding(pair.id, Kind.CHANGED_PRESENT, Severity.INFO, None, size, None, f"{word}: the rest")
    yield from _refused(pair)
    odd = changed.take(changed.in_both)
    for index in range(min(len(odd), _MAX_COMPARED)):
        yield _stretch(pair, kernel, odd, index, disassemble)
    if len(odd) > _MAX_COMPARED:
        size = int(odd.lengths[_MAX_COMPARED:].sum())
        text = f"{len(odd) - _MAX_COMPARED} more stretches changed"
        yield Finding(pair.id, Kind.CHANGED_FRAME, Severity.LOW, None, size, None, text)
    notes += [f"machine {pair.id}: {note}" for note in kernel.notes]


def _refused(pair: _Pair) -> Iterator[Finding]:
    """Yield how the entries changed that map nothing: markers, and those that the processor refuses."""
    old, new = pair.before.guest_map.findings, pair.after.guest_map.findings
    for what, first, second, grave in (
        ("markers", old.mmio, new.mmio, Severity.INFO),
        ("entries that the processor refuses", old.misconfigured, new.misconfigured, Severity.LOW),
    ):
        rows = [set(map(tuple, each.tolist())) for each in (first, second)]
        for word, odd in (("came", rows[1] - rows[0]), ("went", rows[0] - rows[1])):
            if odd:
                gpa, span, raw = min(odd)
                text = f"{len(odd)} {what} {word}, the first {raw & (1 << 64) - 1:#x}"
                severity = grave if word == "came" else Severity.INFO
                yield Finding(pair.id, Kind.CHANGED_PRESENT, severity, gpa, span, None, text)


def _stretch(pair: _Pair, kernel: Kernel, odd: MapDifference, index: int, disassemble: Disassembler | None) -> Finding:
    gpa, length = int(odd.gpas[index]), int(odd.lengths[index])
    first, second = int(odd.first[index]), int(odd.second[index])
    letters = odd.letters(index)
    code = bool(kernel.code.meets(odd.gpas[index : index + 1], np.array([length]))[0])
    part = "; in the guest kernel's code" if code else ""
    lost = Access(int(odd.changed_rights[index]))
    grave = Severity.INFO if not lost & (Access.READ | Access.EXECUTE) else Severity.HIGH if code else Severity.MEDIUM
    rights = f"{letters[0]} became {letters[1]}"
    entries = pair.entries(gpa)
    if first != second:
        text = f"frame {first:#x} became {second:#x}" + (f", {rights}" if lost else "") + f"; {entries}{part}"
        both = audit_bytes.first_difference(pair.memories, (first, second), length)
        if both is not None:
            at, difference = both
            text += f"; {difference.text(disassemble, kernel.gva(gpa + at) if code else None, at)}"
            if code and difference.places:
                grave = Severity.HIGH
        return Finding(pair.id, Kind.CHANGED_FRAME, grave, gpa, length, second, text)
    if lost:
        return Finding(pair.id, Kind.CHANGED_RIGHTS, grave, gpa, length, first, f"{rights}; {entries}{part}")
    old, new = (TYPE_NAMES.get(int(each[index]), str(int(each[index]))) for each in odd.types)
    text = f"{old} became {new}; {entries}{part}" if old != new else f"the user right changed; {entries}{part}"
    kind = Kind.CHANGED_TYPE if old != new else Kind.CHANGED_RIGHTS
    return Finding(pair.id, kind, Severity.INFO, gpa, length, first, text)
