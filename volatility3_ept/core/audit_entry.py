"""Kind 5: is the code that takes over at an exit part of the kernel below, or of one of its modules?

A VMCS says where: HOST_RIP, in the address space of HOST_CR3. With the kernel's symbols the place has a name or has
none. Without them two things remain: the page must be executable there, and all control structures of one hypervisor
must agree. A VMCB does not say it; there the instruction itself is looked for, VMRUN, in what the kernel may execute.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from volatility3_ept.core import audit_spaces
from volatility3_ept.core.audit_finding import Finding, Kind, Severity, Subject
from volatility3_ept.core.audit_host import HostKernel
from volatility3_ept.core.audit_spaces import Space
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.paging import Access

#: Entry points of one hypervisor lie this close together: in one module.
_ONE_MODULE = 1 << 20
#: VMRUN, VMLOAD and VMSAVE (AMD APM Vol. 3). VMRUN alone is three bytes that other code has by chance; nobody enters a
#: guest and leaves the registers that these load and save alone.
_VMRUN = re.compile(rb"\x0f\x01\xd8")
_VMLOAD_VMSAVE = re.compile(rb"\x0f\x01[\xda\xdb]")
#: Bytes around VMRUN in which one of the others stands.
_AROUND = 0x200
#: Code that is read for VMRUN.
MAX_CODE = 1 << 28


class _Entry(NamedTuple):
    """One place at which a hypervisor is entered."""

    machine: str
    vcpu: ControlStructure
    space: Space
    target: int


def findings(subjects: Sequence[Subject], hosts: Mapping[str, HostKernel], notes: list[str]) -> Iterator[Finding]:
    """Yield where the hypervisors of some machines are entered, those of each memory apart."""
    for memory in dict.fromkeys(subject.machine.tables_in for subject in subjects):
        level = [subject for subject in subjects if subject.machine.tables_in == memory]
        host = hosts.get(memory)
        whose = f"in machine {memory}" if memory else "of the host"
        if host is None:
            notes.append(f"no symbols of the kernel {whose}: that its hypervisor is a known module was not checked")
        entries, odd = _entries(level)
        yield from odd
        yield from _judged(entries, host) if host else _agreed(entries)
        if not entries and any(vcpu.kind == "VMCB" for subject in level for vcpu in subject.machine.vcpus):
            yield from _by_vmrun(level, host, notes) if host else ()


def _entries(level: Sequence[Subject]) -> tuple[list[_Entry], list[Finding]]:
    """Return the distinct entry points, and findings on those that cannot be: mapped, and not to be executed."""
    found: dict[tuple[int, int], _Entry] = {}
    odd = []
    for subject in level:
        machine = subject.machine
        for vcpu in subject.vcpus:
            space = audit_spaces.of_vcpu(vcpu, subject.below)
            if space is None or not vcpu.host_rip:
                continue
            walk = space.walk(vcpu.host_rip)
            if walk.target is None or (vcpu.host_rip, walk.target) in found:
                continue
            if not walk.access & Access.EXECUTE:
                text = f"{vcpu.kind} at {vcpu.hpa:#x}: HOST_RIP {vcpu.host_rip:#x} lies on a page without X"
                odd.append(Finding(machine.id, Kind.ENTRY, Severity.LOW, None, PAGE_SIZE, walk.target, text))
            found[vcpu.host_rip, walk.target] = _Entry(machine.id, vcpu, space, walk.target)
    return list(found.values()), odd


def _judged(entries: Sequence[_Entry], host: HostKernel) -> Iterator[Finding]:
    """Yield for each entry point whose code it is."""
    for entry in entries:
        rip = entry.vcpu.host_rip or 0
        owner = host.owner(rip)
        same = host.target(entry.space.below, rip) == entry.target
        if owner and same:
            grave, what = Severity.INFO, f"in {owner}"
        elif same:
            grave, what = Severity.MEDIUM, f"in no known module: none of the {host.modules} that the kernel lists"
        else:
            grave, what = Severity.MEDIUM, "in an address space that is not the kernel's"
        text = f"entered at HOST_RIP {rip:#x}, {what} ({entry.vcpu.kind} at {entry.vcpu.hpa:#x}, {entry.space.source})"
        yield Finding(entry.machine, Kind.ENTRY, grave, None, PAGE_SIZE, entry.target, text)


def _agreed(entries: Sequence[_Entry]) -> Iterator[Finding]:
    """Yield those entry points that are not where the first one is."""
    for entry in entries[1:]:
        first = entries[0].vcpu.host_rip or 0
        rip = entry.vcpu.host_rip or 0
        if abs(rip - first) >= _ONE_MODULE:
            text = (
                f"entered at HOST_RIP {rip:#x} ({entry.vcpu.kind} at {entry.vcpu.hpa:#x}), machine "
                f"{entries[0].machine} at {first:#x}: two hypervisors in one memory"
            )
            yield Finding(entry.machine, Kind.ENTRY, Severity.LOW, None, PAGE_SIZE, entry.target, text)


def _by_vmrun(level: Sequence[Subject], host: HostKernel, notes: list[str]) -> Iterator[Finding]:
    """Yield where the kernel has code that enters a guest of an AMD processor, each owner once."""
    below, machine = level[0].below, level[0].machine.id
    space = host.space(below)
    chosen = np.flatnonzero((space.accesses & int(Access.EXECUTE | Access.USER)) == int(Access.EXECUTE))
    told: set[str | None] = set()
    left = MAX_CODE
    for index in chosen.tolist():
        run = space.run(index)
        if run.length > left:
            notes.append(f"the kernel may execute more than {MAX_CODE:#x} bytes: the rest was not searched for VMRUN")
            return
        left -= run.length
        for at in _vmruns(below, run.hpa, run.length):
            gva = run.gpa + at
            owner = host.owner(gva)
            if owner in told:
                continue
            told.add(owner)
            grave = Severity.INFO if owner else Severity.MEDIUM
            what = f"in {owner}" if owner else f"in no known module: none of the {host.modules} that the kernel lists"
            text = f"VMRUN at {_canonical(gva, space_bits=host.format.address_bits):#x}, {what}"
            yield Finding(machine, Kind.ENTRY, grave, None, PAGE_SIZE, run.hpa + at, text)


def _vmruns(below: HostMemory, hpa: int, length: int) -> Iterator[int]:
    """Yield offsets of VMRUN in a stretch of memory, where VMLOAD or VMSAVE stands near it."""
    data = below.read(hpa, length) or b""
    for match in _VMRUN.finditer(data):
        if _VMLOAD_VMSAVE.search(data, max(match.start() - _AROUND, 0), match.end() + _AROUND):
            yield match.start()


def _canonical(gva: int, space_bits: int) -> int:
    return gva | (1 << 64) - (1 << space_bits) if gva >> (space_bits - 1) else gva
