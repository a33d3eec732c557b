"""What an audit says: one finding per manipulation, or per thing that looks like one."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol

import numpy as np

from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.hyperv import Role
from volatility3_ept.core.machines import Machine
from volatility3_ept.core.memory import Bools, HostMemory, Int64

#: Findings of one kind that are shown for one machine; the rest are counted in one more row.
MAX_ROWS = 64


class Disassembler(Protocol):
    """Turns code bytes at an address into lines of assembly."""

    def __call__(self, code: bytes, address: int, bits: int = 64) -> list[str]:
        """Return the instructions of code for a processor in a mode of that many bits."""


def fitted(disassemble: Disassembler | None, machine: Machine) -> Disassembler | None:
    """Return a disassembler in the mode that a machine's kernel runs in."""
    if disassemble is None or machine.paging is None or machine.paging.address_bits > 32:
        return disassemble
    return functools.partial(disassemble, bits=32)


class Severity(IntEnum):
    """How much a finding matters. ``INFO``: benign by all that is known, shown because it is worth knowing."""

    INFO = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3

    def __str__(self) -> str:
        """Return the severity in the word that the plugin prints."""
        return self.name.lower()


class Kind(str, Enum):
    """The kinds of findings. Each has a page of its own under docs/audit."""

    UNREADABLE_PAGE = "execute-only page"
    ODD_RIGHTS = "rights unlike its neighbours"
    EXTRA_RIGHTS = "rights beyond R, W and X"
    VIEW_FRAME = "views differ in frame"
    VIEW_RIGHTS = "views differ in rights"
    VIEWS = "several views"
    ALIAS = "frame at two addresses"
    SHARED = "frame of two guests"
    EXPOSURE = "hypervisor's page exposed"
    THIN = "thin hypervisor"
    ENTRY = "hypervisor's entry point"
    MISCONFIGURED = "misconfigured entry"
    MEMORY_TYPE = "memory type contradicts RAM"
    SUBSTITUTED = "substituted frame"
    GUEST_REMAP = "substituted by the guest's tables"
    WRITABLE_CODE = "kernel code writable elsewhere"
    CHANGED_FRAME = "changed: frame"
    CHANGED_RIGHTS = "changed: rights"
    CHANGED_TYPE = "changed: memory type"
    CHANGED_PRESENT = "changed: mapped or not"
    CHANGED_MACHINE = "changed: machine"

    def __str__(self) -> str:
        """Return the kind in the words that the plugin prints."""
        return self.value

    @property
    def page(self) -> str:
        """The name of the page on this kind in docs/audit."""
        return "-".join(re.findall(r"[a-z0-9]+", self.value.lower().replace("'s", "s"))) + ".md"


#: What benign software causes it, in a few words; docs/audit says more.
BENIGN = {
    Kind.UNREADABLE_PAGE: "introspection (DRAKVUF, HVI), XPTI-like code hiding; no hypervisor's default",
    Kind.ODD_RIGHTS: "introspection; write protection: dirty logging, KSM; without X: large pages (iTLB multihit)",
    Kind.EXTRA_RIGHTS: "Windows HVCI (mode-based execute control), Xen's altp2m with #VE, introspection",
    Kind.VIEW_FRAME: "introspection with altp2m; SMRAM below 1M",
    Kind.VIEW_RIGHTS: "VBS: VTL0 and VTL1; introspection with altp2m; SMM",
    Kind.VIEWS: "altp2m, VBS, SMM, one view per vCPU; KVM's separate roots",
    Kind.ALIAS: "KSM, zero page, ROM shadow, video memory, a device's memory mapped twice",
    Kind.SHARED: "KSM, guests of one file, ivshmem, virtio-fs, vhost-user",
    Kind.EXPOSURE: "a hypervisor that protects itself by rights alone, or not at all; reused pages (stale copy)",
    Kind.THIN: "Windows VBS or Hyper-V root, Xen PVH dom0, security products, research hypervisors",
    Kind.ENTRY: "KVM in its own module; VirtualBox, VMware: monitors outside the modules; an earlier hypervisor",
    Kind.MISCONFIGURED: "markers of an unknown hypervisor; a capture taken while tables changed",
    Kind.MEMORY_TYPE: "passed-through devices that do not snoop; guest MTRRs honoured",
    Kind.SUBSTITUTED: "copy on write of a restored snapshot, KSM, page migration",
    Kind.GUEST_REMAP: "kernel live patching by remapping; introspection inside the guest",
    Kind.WRITABLE_CODE: "a kernel that patches itself through a second mapping, kernels without W^X",
    Kind.CHANGED_FRAME: "migration of pages, KSM, copy on write, swap",
    Kind.CHANGED_RIGHTS: "dirty logging, KSM, copy on write (W only)",
    Kind.CHANGED_TYPE: "guest MTRRs changed, a device passed through",
    Kind.CHANGED_PRESENT: "tables filled as the guest runs, ballooning, swap",
    Kind.CHANGED_MACHINE: "a guest was started, stopped, or got a new root",
}


@dataclass(frozen=True)
class Finding:
    """One row of an audit. ``gpa`` and ``hpa`` are None where there is no such address; ``length`` in bytes.

    ``hpa`` is an address of the memory that holds the machine's tables: the host's, unless the machine is nested.
    """

    machine: str
    kind: Kind
    severity: Severity
    gpa: int | None
    length: int
    hpa: int | None
    evidence: str

    @property
    def benign(self) -> str:
        """What benign software causes such a finding."""
        return BENIGN[self.kind]


@dataclass(frozen=True)
class Audit:
    """The findings of a capture, by machine, the gravest first; and what was cut short or could not be judged."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """One machine under audit, with the memory that holds its tables and its frames."""

    machine: Machine
    below: HostMemory
    disassemble: Disassembler | None = None
    #: What the machine is to Hyper-V, where its images say so.
    role: Role | None = None

    @property
    def vcpus(self) -> list[ControlStructure]:
        """The control structures whose addresses are those of the memory below.

        Of a nested machine, KVM keeps a copy in its own memory; it holds what the hypervisor in the guest wrote, as the
        root of that hypervisor tells. The one with the outer hypervisor's root speaks of another memory.
        """
        machine = self.machine
        here, root = machine.tables_in, machine.root.address
        return [vcpu for vcpu in machine.vcpus if vcpu.held_in == here or vcpu.root_hpa == root]


@dataclass(frozen=True)
class Ranges:
    """Disjoint ascending ranges of addresses."""

    starts: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    ends: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def hold(self, addresses: Int64) -> Bools:
        """Tell which addresses lie in the ranges."""
        if not self.starts.size:
            return np.zeros(np.shape(addresses), dtype=np.bool_)
        index = np.searchsorted(self.starts, addresses, side="right") - 1
        held: Bools = (index >= 0) & (addresses < self.ends[np.maximum(index, 0)])
        return held

    def meets(self, starts: Int64, lengths: Int64) -> Bools:
        """Tell which ranges ``[start, start + length)`` have a byte in common with these."""
        if not self.starts.size:
            return np.zeros(np.shape(starts), dtype=np.bool_)
        after = np.searchsorted(self.starts, starts + lengths, side="left")
        met: Bools = np.searchsorted(self.ends, starts, side="right") < after
        return met


def capped(found: Iterable[Finding], limit: int = MAX_ROWS) -> list[Finding]:
    """Keep the gravest findings of each kind and severity, and say in one row how many were left out."""
    groups: dict[tuple[str, Kind, Severity], list[Finding]] = {}
    for item in found:
        groups.setdefault((item.machine, item.kind, item.severity), []).append(item)
    kept: list[Finding] = []
    for (machine, kind, severity), group in groups.items():
        kept += group[:limit]
        rest = group[limit:]
        if rest:
            size = sum(item.length for item in rest)
            text = f"{len(rest)} more such findings of {size:#x} bytes are not shown (limit {limit})"
            kept.append(Finding(machine, kind, severity, None, size, None, text))
    return kept


def in_order(found: Sequence[Finding]) -> list[Finding]:
    """Return findings by machine (in the order of the tree), the gravest first, then by address."""
    order = {name: number for number, name in enumerate(dict.fromkeys(item.machine for item in found))}
    return sorted(found, key=lambda f: (order[f.machine], -f.severity, f.kind.value, -1 if f.gpa is None else f.gpa))
