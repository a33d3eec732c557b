"""Kind 6: entries that the processor refuses and nobody's marker explains, and memory types that contradict RAM."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from volatility3_ept.core import gpamap
from volatility3_ept.core.audit_finding import Finding, Kind, Ranges, Severity, Subject
from volatility3_ept.core.gpamap import union
from volatility3_ept.core.root import EPT
from volatility3_ept.spec import ept, ia32e
from volatility3_ept.spec.paging import Format, Level, MemoryType

#: Memory types that are not reserved.
TYPE_NAMES = {int(item): item.name for item in MemoryType}
#: RAM of one unusual type that is less than this share of the guest's was singled out.
_SINGLED_OUT = 0.01
#: Refused entries, and stretches of one memory type, that are looked into one by one.
_MOST = 1024


def findings(subject: Subject) -> Iterator[Finding]:
    """Yield what the entries of a machine's tables give away."""
    yield from _misconfigured(subject)
    if subject.machine.root.kind == EPT:
        yield from _memory_types(subject)


def _misconfigured(subject: Subject) -> Iterator[Finding]:
    fmt = subject.machine.root.format
    rows = subject.machine.guest_map.findings.misconfigured
    if len(rows) > _MOST:
        text = f"{len(rows)} entries that the processor refuses; the first {_MOST} were looked into"
        yield Finding(subject.machine.id, Kind.MISCONFIGURED, Severity.MEDIUM, None, 0, None, text)
    for gpa, span, raw in rows[:_MOST].tolist():
        entry = raw & (1 << 64) - 1
        level = next((item for item in fmt.levels if item.page_size == span), fmt.levels[-1])
        text = f"{level.name} {entry:#x}: {_why(fmt, level, entry)}; no known hypervisor's marker"
        yield Finding(subject.machine.id, Kind.MISCONFIGURED, Severity.MEDIUM, gpa, span, None, text)


def _why(fmt: Format, level: Level, entry: int) -> str:
    """Say which rule an entry breaks."""
    if entry & fmt.reserved_address:
        return "address bits above MAXPHYADDR"
    if not isinstance(fmt, ept.EptFormat):
        large = entry & ia32e.PRESENT and not level.may_be_leaf
        return "bit 7 where no page can be mapped" if large else "reserved bits"
    if entry & ept.RWX & (ept.READ | ept.WRITE) == ept.WRITE:
        return "W without R"
    leaf = bool(fmt.is_leaf(entry, level))
    memory_type = (entry & ept.MEMORY_TYPE) >> ept.MEMORY_TYPE_SHIFT
    return f"reserved memory type {memory_type}" if leaf and memory_type not in TYPE_NAMES else "reserved bits"


def _memory_types(subject: Subject) -> Iterator[Finding]:
    """Yield RAM that is not write-back. The capture holds RAM, and what it lacks may be a device's."""
    guest_map, below = subject.machine.guest_map, subject.below
    ram = Ranges(*union(below.starts, below.starts + below.lengths))
    kinds = guest_map.words >> gpamap.MEMORY_TYPE_SHIFT & 7
    total = guest_map.mapped_bytes
    for memory_type in np.unique(kinds).tolist():
        if memory_type == int(MemoryType.WB):
            continue
        chosen = np.flatnonzero((kinds == memory_type) & ram.meets(guest_map.hpas, guest_map.lengths))
        size = int(guest_map.lengths[chosen].sum())
        grave = Severity.LOW if size <= max(_SINGLED_OUT * total, 16 << 12) else Severity.INFO
        if grave and chosen.size > _MOST:
            text = f"{chosen.size} stretches of RAM of one unusual type; the first {_MOST} are shown"
            yield Finding(subject.machine.id, Kind.MEMORY_TYPE, grave, None, size, None, text)
        for index in chosen[: _MOST if grave else 1].tolist():
            run = guest_map.run(index)
            name = TYPE_NAMES.get(memory_type, str(memory_type))
            text = f"RAM mapped {name}; {size:#x} bytes of {total:#x} are"
            yield Finding(subject.machine.id, Kind.MEMORY_TYPE, grave, run.gpa, run.length, run.hpa, text)
