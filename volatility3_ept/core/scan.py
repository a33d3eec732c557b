"""One pass over the host's pages: every page predicate at once, then a full account of the few that remain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import triage, vmcb, vmcs
from volatility3_ept.core.control import ControlStructure, Verdict
from volatility3_ept.core.likeness import Found
from volatility3_ept.core.memory import HostMemory, Int64, Words
from volatility3_ept.core.triage import VMCB, VMCS, Sightings
from volatility3_ept.spec import bits

#: Called now and then with a percentage and what is being done.
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class ScanResult:
    """Control structures found in one memory, ascending by address, and what the pass covered."""

    structures: tuple[ControlStructure, ...]
    near_misses: tuple[ControlStructure, ...]
    pages: int
    notes: tuple[str, ...] = ()

    @property
    def examined(self) -> tuple[int, ...]:
        """Addresses of all pages that were examined, believed or not."""
        return tuple(sorted(s.hpa for s in (*self.structures, *self.near_misses)))


def silent(percentage: float, what: str) -> None:
    """Report no progress."""


def control_structures(
    memory: HostMemory, physical_bits: int = bits.MAX_PHYSICAL_BITS, progress: Progress = silent
) -> ScanResult:
    """Return every page that is, or may be, a VMCS or VMCB; ``physical_bits`` is MAXPHYADDR."""
    return examine(memory, sight(memory, progress), (), physical_bits)


def sight(
    memory: HostMemory, progress: Progress = silent, also: Callable[[Int64, Words], None] | None = None
) -> Sightings:
    """Return the pages that may be a VMCS or VMCB as the cheap predicates tell.

    ``also`` sees the same pages, with their addresses: the memory is read once.
    """
    pages = 0
    total = max(memory.size // bits.PAGE_SIZE, 1)
    found: dict[int, list[Int64]] = {VMCS: [], VMCB: []}
    for address, rows in memory.blocks():
        for kind, candidates in ((VMCS, vmcs.candidates), (VMCB, vmcb.candidates)):
            hits = np.flatnonzero(candidates(rows))
            if hits.size:
                found[kind].append(address + bits.PAGE_SIZE * hits.astype(np.int64))
        if also is not None:
            also(address + bits.PAGE_SIZE * np.arange(len(rows), dtype=np.int64), rows)
        pages += len(rows)
        progress(100 * pages / total, "Looking for control structures and page tables")
    return Sightings.of(found, pages)


def examine(memory: HostMemory, seen: Sightings, found: Sequence[Found], physical_bits: int) -> ScanResult:
    """Give the full account of the pages that were sighted; of very many, those that :mod:`.triage` puts first.

    ``found`` are the roots that page tables alone gave in this memory: they tell whose memory a page is.
    """
    chosen, notes = triage.chosen(memory, seen, found)
    pairs = zip(chosen.addresses.tolist(), chosen.kinds.tolist(), strict=True)
    examiners = {VMCS: vmcs.examine, VMCB: vmcb.examine}
    accounts = _examined(memory, ((address, examiners[kind]) for address, kind in pairs), physical_bits)
    return _sorted(accounts, seen.pages, notes)


def again(
    memory: HostMemory, addresses: Iterable[int], pages: int, notes: tuple[str, ...], physical_bits: int
) -> ScanResult:
    """Return what an earlier pass over the same memory found: its pages are examined anew, the others not looked at."""
    found = [(address, examine) for address in addresses for examine in (vmcs.examine, vmcb.examine)]
    return _sorted(_examined(memory, found, physical_bits), pages, notes)


def _sorted(accounts: Iterable[ControlStructure], pages: int, notes: tuple[str, ...]) -> ScanResult:
    examined = list(accounts)
    return ScanResult(
        tuple(s for s in examined if s.verdict is not Verdict.REJECTED),
        tuple(s for s in examined if s.verdict is Verdict.REJECTED),
        pages,
        notes,
    )


def _examined(
    memory: HostMemory, found: Iterable[tuple[int, object]], physical_bits: int
) -> Iterable[ControlStructure]:
    """Yield the best account of each candidate page; a page that two finders claim goes to the better one."""
    best: dict[int, ControlStructure] = {}
    for address, examine in found:
        page = memory.read(address, bits.PAGE_SIZE)
        if page is None:
            continue
        account = examine(page, address, physical_bits, memory.top, memory.__contains__)  # type: ignore[operator]
        if account is not None and (address not in best or account.score > best[address].score):
            best[address] = account
    return (best[address] for address in sorted(best))
