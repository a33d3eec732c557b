"""What the second level of paging gives away: hooks, split views, aliases, exposure, hypervisors that do not belong.

One pass over each machine's map, and no opinion that is not stated with its evidence: a finding says what was seen,
how grave it is by itself, and what benign software does the same. What was cut short is in the notes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from volatility3_ept.core import (
    audit_entries,
    audit_exposure,
    audit_finding,
    audit_frames,
    audit_kernel,
    audit_rights,
    audit_thin,
    audit_views,
)
from volatility3_ept.core.audit_finding import Disassembler, Finding, Kind, Subject
from volatility3_ept.core.machines import Discovery
from volatility3_ept.core.memory import HostMemory


@dataclass(frozen=True)
class Audit:
    """The findings of a capture, by machine, the gravest first; and what was cut short or could not be judged."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


def audit(
    found: Discovery,
    memory: HostMemory,
    chosen: Collection[str] | None = None,
    disassemble: Disassembler | None = None,
) -> Audit:
    """Audit the machines of a capture. ``memory`` is the capture's; ``chosen`` are the ids to report on (all).

    Machines that are not chosen are looked at too: a guest may reach another one's tables, or share its frames.
    """
    subjects = []
    for machine in found.all():
        parent = found.find(machine.tables_in) if machine.tables_in else None
        subjects.append(Subject(machine, parent.memory if parent else memory, disassemble))
    kernels = [audit_kernel.find(subject.machine) for subject in subjects]
    notes: list[str] = []
    rows: list[Finding] = []
    for subject, kernel in zip(subjects, kernels, strict=True):
        notes += [f"machine {subject.machine.id}: {note}" for note in kernel.notes]
        own = [*audit_rights.findings(subject, kernel), *audit_entries.findings(subject)]
        own += audit_views.findings(subject, kernel, notes)
        own += audit_frames.aliases(subject, kernel)
        own += _unless_known(audit_frames.substituted(subject, kernel), own)
        rows += own
    rows += audit_frames.shared(list(zip(subjects, kernels, strict=True)))
    rows += audit_exposure.findings(subjects, notes)
    for space in dict.fromkeys(subject.machine.tables_in for subject in subjects):
        rows += audit_thin.findings([each for each in subjects if each.machine.tables_in == space])
    if chosen is not None:
        rows = [row for row in rows if row.machine in chosen]
    order = {subject.machine.id: number for number, subject in enumerate(subjects)}
    rows.sort(key=lambda row: order[row.machine])
    return Audit(tuple(audit_finding.in_order(audit_finding.capped(rows))), tuple(dict.fromkeys(notes)))


def _unless_known(more: Iterable[Finding], known: list[Finding]) -> list[Finding]:
    """Drop frames put in another's place that an execute-only page has told of already."""
    told = {row.gpa for row in known if row.kind is Kind.UNREADABLE_PAGE}
    return [row for row in more if row.gpa not in told or row.kind is not Kind.SUBSTITUTED]
