"""What the second level of paging gives away: hooks, split views, aliases, exposure, hypervisors that do not belong.

One pass over each machine's map, and no opinion that is not stated with its evidence: a finding says what was seen,
how grave it is by itself, and what benign software does the same. What was cut short is in the notes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from volatility3_ept.core import (
    audit_entries,
    audit_entry,
    audit_exposure,
    audit_extras,
    audit_finding,
    audit_frames,
    audit_kernel,
    audit_rights,
    audit_substitution,
    audit_thin,
    audit_views,
    hyperv,
    scan,
)
from volatility3_ept.core.audit_finding import Audit, Disassembler, Finding, Kind, Subject
from volatility3_ept.core.audit_host import HostKernel
from volatility3_ept.core.audit_kernel import Kernel
from volatility3_ept.core.machines import Discovery
from volatility3_ept.core.memory import HostMemory


def audit(
    found: Discovery,
    memory: HostMemory,
    chosen: Collection[str] | None = None,
    disassemble: Disassembler | None = None,
    hosts: Mapping[str, HostKernel] | None = None,
    progress: scan.Progress = scan.silent,
) -> Audit:
    """Audit the machines of a capture. ``memory`` is the capture's; ``chosen`` are the ids to report on (all).

    Machines that are not chosen are looked at too: a guest may reach another one's tables, or share its frames.
    ``hosts`` are the kernels below the machines, where their symbols are known: by the id of the machine that each
    runs in, empty for the host's own.
    """
    subjects = []
    for machine in found.all():
        parent = found.find(machine.tables_in) if machine.tables_in else None
        role = hyperv.role(machine, found, memory)
        fitted = audit_finding.fitted(disassemble, machine)
        subjects.append(Subject(machine, parent.memory if parent else memory, fitted, role))
    notes: list[str] = []
    rows: list[Finding] = []
    kernels = []
    for number, subject in enumerate(subjects):
        progress(100 * number / len(subjects), f"Auditing machine {subject.machine.id}")
        kernels.append(audit_kernel.find(subject.machine))
        notes += [f"machine {subject.machine.id}: {note}" for note in kernels[-1].notes]
        rows += _of_one(subject, kernels[-1], notes)
    progress(100, "Comparing machines and their hypervisors")
    rows += _of_all(subjects, kernels, hosts or {}, notes)
    if chosen is not None:
        rows = [row for row in rows if row.machine in chosen]
    order = {subject.machine.id: number for number, subject in enumerate(subjects)}
    rows.sort(key=lambda row: order[row.machine])
    return Audit(tuple(audit_finding.in_order(audit_finding.capped(rows))), tuple(dict.fromkeys(notes)))


def _of_one(subject: Subject, kernel: Kernel, notes: list[str]) -> list[Finding]:
    """Return what a machine's own tables give away."""
    own = [*audit_rights.findings(subject, kernel), *audit_extras.findings(subject), *audit_entries.findings(subject)]
    own += audit_views.findings(subject, kernel, notes)
    own += audit_frames.aliases(subject, kernel)
    return own + list(_unless_known(audit_substitution.findings(subject, kernel, notes), own))


def _of_all(
    subjects: Sequence[Subject], kernels: Sequence[Kernel], hosts: Mapping[str, HostKernel], notes: list[str]
) -> Iterator[Finding]:
    """Yield what machines give away of each other and of what runs below them."""
    yield from audit_frames.shared(list(zip(subjects, kernels, strict=True)))
    yield from audit_exposure.findings(subjects, hosts, notes)
    yield from audit_entry.findings(subjects, hosts, notes)
    for space in dict.fromkeys(subject.machine.tables_in for subject in subjects):
        level = [number for number, each in enumerate(subjects) if each.machine.tables_in == space]
        yield from audit_thin.findings([subjects[n] for n in level], [kernels[n] for n in level])


def _unless_known(more: Iterable[Finding], known: list[Finding]) -> Iterator[Finding]:
    """Drop frames put in another's place that an execute-only page has told of already."""
    told = {row.gpa for row in known if row.kind is Kind.UNREADABLE_PAGE}
    return (row for row in more if row.gpa not in told or row.kind is not Kind.SUBSTITUTED)
