"""Everything that a traversal found, as one list ascending by guest-physical address."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge

from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.spec.paging import Access, Outcome


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of guest-physical addresses with one fate. ``hpa`` is None where no memory is mapped."""

    gpa: int
    length: int
    hpa: int | None
    access: Access
    memory_type: int
    page_size: int
    what: str


def listing(guest_map: GuestMap, below: HostMemory) -> Iterator[Range]:
    """Yield mapped runs, MMIO markers, refused entries and unreadable tables; ``below`` says what the capture holds."""
    findings = guest_map.findings
    yield from merge(
        _mapped(guest_map, below),
        _others(findings.mmio, str(Outcome.MMIO)),
        _others(findings.misconfigured, str(Outcome.MISCONFIGURED), with_entry=True),
        _others(findings.unreadable, "table unreadable"),
        key=lambda item: item.gpa,
    )


def _mapped(guest_map: GuestMap, below: HostMemory) -> Iterator[Range]:
    present = guest_map.memory(below)
    for run in guest_map.runs():
        held = _present_bytes(present, run.gpa, run.length)
        what = str(Outcome.MAPPED)
        if run.state:
            what += f" ({run.state.text})"
        if held < run.length:
            what = (
                str(Outcome.OUT_OF_RANGE) if not held else f"{what}, {run.length - held:#x} bytes outside the capture"
            )
        yield Range(run.gpa, run.length, run.hpa, run.access, run.memory_type, run.page_size, what)


def _present_bytes(memory: HostMemory, start: int, length: int) -> int:
    """Return how many bytes of a range are present."""
    first = max(int(memory.starts.searchsorted(start, side="right")) - 1, 0)
    last = int(memory.starts.searchsorted(start + length, side="left"))
    starts, lengths = memory.starts[first:last], memory.lengths[first:last]
    low, high = starts.clip(min=start), (starts + lengths).clip(max=start + length)
    return int((high - low).clip(min=0).sum())


def _others(rows: Int64, what: str, with_entry: bool = False) -> Iterator[Range]:
    """Yield findings, neighbours of equal size joined unless each entry's value is to be shown."""
    start = length = span = 0
    for gpa, size, value in rows.tolist():
        if with_entry:
            yield Range(gpa, size, None, Access.NONE, 0, size, f"{what} (entry {value & (1 << 64) - 1:#x})")
            continue
        if length and gpa == start + length and size == span:
            length += size
            continue
        if length:
            yield Range(start, length, None, Access.NONE, 0, span, what)
        start, length, span = gpa, size, size
    if length:
        yield Range(start, length, None, Access.NONE, 0, span, what)
