"""Kind 1: what EPT can do beyond R, W and X, where a control structure switches it on: who uses it, and where.

Each is benign where the hypervisor is known to use it. But a page whose write permission is split into 128-byte pieces,
or that user mode alone may execute, is a hook's place too, and the three letters do not show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import leaves, places
from volatility3_ept.core.audit_finding import Finding, Kind, Severity, Subject
from volatility3_ept.core.memory import Int64
from volatility3_ept.core.root import EPT
from volatility3_ept.spec import bits, ept
from volatility3_ept.spec.paging import EntryKind
from volatility3_ept.spec.vmcs import Proc, Proc2

#: Tertiary controls (SDM Vol. 3C, "Tertiary Processor-Based VM-Execution Controls").
_HLAT, _PAGING_WRITE, _VERIFY_PAGING = bits.bit(1), bits.bit(2), bits.bit(3)
_SHADOW_STACK = bits.bit(7)  # of EPTP
#: Pages that are named.
_NAMED = 4


@dataclass(frozen=True)
class _Feature:
    """One extra right: the bit of a leaf that uses it, and what else the control structure says."""

    name: str
    mask: int
    detail: str = ""


def findings(subject: Subject) -> Iterator[Finding]:
    """Yield each extra that is switched on for a machine, with the pages that make use of it."""
    machine = subject.machine
    if machine.root.kind != EPT:
        return
    features = _enabled(subject)
    used: dict[str, list[Int64]] = {feature.name: [] for feature in features}
    if any(feature.mask for feature in features):
        for gpas, entries in _entries(subject):
            for feature in features:
                used[feature.name].append(gpas[(entries & np.uint64(feature.mask)) != 0])
    for feature in features:
        gpas = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *used[feature.name]]))
        text = f"{feature.name} is on{feature.detail}"
        if feature.mask:
            named = ", ".join(f"{gpa:#x}" for gpa in gpas[:_NAMED].tolist()) + (" ..." if gpas.size > _NAMED else "")
            text += f"; {gpas.size} leaves use it" + (f": GPA {named}" if gpas.size else "")
        yield Finding(machine.id, Kind.EXTRA_RIGHTS, Severity.INFO, int(gpas[0]) if gpas.size else None, 0, None, text)


def _enabled(subject: Subject) -> list[_Feature]:
    """Return the extras that the control structures of a machine switch on, each once."""
    found: dict[str, _Feature] = {}
    for vcpu in subject.vcpus:
        fields = vcpu.fields
        primary = fields.get("PROC_BASED_EXEC_CONTROLS", 0)
        second = fields.get("SECONDARY_PROC_EXEC_CONTROLS", 0) if primary & Proc.SECONDARY_CONTROLS else 0
        third = fields.get("TERTIARY_PROC_EXEC_CONTROLS", 0) if primary & Proc.TERTIARY_CONTROLS else 0
        for on, feature in (
            (second & Proc2.MODE_BASED_EXECUTE, _Feature("mode-based execute control", ept.USER_EXECUTE)),
            (second & Proc2.SUB_PAGE_WRITE,
             _Feature("sub-page write permission", ept.SUB_PAGE_WRITE, f" (SPPTP {fields.get('SPPTP', 0):#x})")),
            (second & Proc2.EPT_VIOLATION_VE,
             _Feature("EPT violations as #VE", 0, f" (area at {fields.get('VIRT_EXCEPTION_INFO_ADDR', 0):#x})")),
            (third & _HLAT, _Feature("hypervisor-managed translation", 0, f" (HLATP {fields.get('HLATP', 0):#x})")),
            (third & _PAGING_WRITE, _Feature("paging-write", ept.PAGING_WRITE)),
            (third & _VERIFY_PAGING, _Feature("guest-paging verification", ept.VERIFY_GUEST_PAGING)),
            (vcpu.root_raw & _SHADOW_STACK, _Feature("supervisor shadow-stack control", ept.SUPERVISOR_SHADOW_STACK)),
        ):  # fmt: skip
            if on:
                found.setdefault(feature.name, feature)
    return list(found.values())


def _entries(subject: Subject) -> Iterator[tuple[Int64, Int64]]:
    """Yield the leaves of a machine's tables in chunks: the first address of each, and the entry as it stands."""
    root, below = subject.machine.root, subject.below
    reader = root.reader(below)
    for level, pages, bases in places.tables(below, root.format, root.raw, reader):
        for start in range(0, pages.size, leaves.CHUNK_TABLES):
            words, _ = below.words(pages[start : start + leaves.CHUNK_TABLES])
            rows, columns = np.nonzero(words)
            entries = words[rows, columns]
            gpas = bases[start + rows] + (columns.astype(np.int64) << level.shift)
            kinds, _, _ = reader.kind(root.format, entries, level, gpas.astype(np.uint64))
            leaf = np.asarray(kinds) == int(EntryKind.LEAF)
            yield gpas[leaf], entries[leaf]
