"""The roots that control structures name, judged with all structures that name each: which, how, and how many.

A hostile guest can have as many structures as it has pages, each with a root of its own. Roots beyond a few dozen are
heard in the order of what speaks for them, and a bound is kept; what was not heard is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from volatility3_ept.core import candidate as candidates
from volatility3_ept.core import descent, triage
from volatility3_ept.core.candidate import Candidate
from volatility3_ept.core.control import ControlStructure, Verdict
from volatility3_ept.core.likeness import Found
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT, NPT, Root
from volatility3_ept.spec import bits, ept, npt

#: Roots up to this many are heard as they come; of more than that, the most plausible first.
_FEW: Final = 32
#: Roots that are heard, and tables that are read for those that prove to be nothing.
MAX_HEARD: Final = 256
MAX_WASTED_TABLES: Final = 1 << 15
#: Control structures without a machine that are tried in the memory of each guest.
MAX_ORPHANS: Final = 64

#: Trials of such a structure in the memory of a guest, in all.
MAX_COPIES: Final = 1 << 10
#: In a large memory, a table for so many pages if that is more.
_PAGES_PER_TABLE: Final = 64
#: Machines are looked into until they have this many times the memory that they live in. Real ones share some.
_TIMES: Final = 3
_LEAST: Final = 64 << 20

#: A root that maps less is not worth a word when its memory is missing; nor is one of which more than 1/100 is there.
_LEAST_LOST: Final = 1 << 20
_SHARE_LOST: Final = 100
_MOST_SAID: Final = 8

#: A root's readings, by number of levels, and the structures that name each.
Readings = dict[int, tuple[Root, list[ControlStructure]]]


@dataclass
class Allowance:
    """What may still be spent on the machines in one memory, or on one machine of the host and all that live in it.

    A guest can make its memory look like hundreds of machines, each as large as itself; it must not pay.
    """

    bytes: int
    roots: int
    tables: int
    copies: int
    refused: int = 0
    untried: int = 0

    @classmethod
    def of(cls, memory: HostMemory) -> Allowance:
        """Return what the machines in a memory may cost."""
        pages = memory.size // bits.PAGE_SIZE
        roots = max(MAX_HEARD, pages // triage.PAGES_PER_ROOT)
        return cls(_TIMES * memory.size + _LEAST, roots, max(MAX_WASTED_TABLES, pages // _PAGES_PER_TABLE), MAX_COPIES)

    def tries(self, copies: Sequence[ControlStructure]) -> list[ControlStructure]:
        """Return those of the structures that may still be tried in one more guest, and pay for them."""
        tried = list(copies[: self.copies])
        self.copies -= len(tried)
        self.untried += len(copies) - len(tried)
        return tried

    def covers(self, memory: HostMemory) -> bool:
        """Tell whether one more machine can be looked into, and pay for it."""
        if memory.size > self.bytes:
            self.refused += 1
            return False
        self.bytes -= memory.size
        return True

    def said(self) -> list[str]:
        """Say what was not looked into, once."""
        texts = []
        if self.refused:
            texts.append(
                f"{self.refused} machines were not looked into: together they would have more memory than there can be"
            )
        if self.untried:
            texts.append(f"{self.untried} trials of a control structure in a guest were not made: {MAX_COPIES} were")
        self.refused = self.untried = 0
        return texts


def said(parent: str, notes: Iterable[str]) -> list[str]:
    """Return notes with the machine in whose memory something was cut short, empty for the capture itself."""
    return [f"in machine {parent}: {note}" if parent else note for note in notes]


def judged(
    below: HostMemory,
    structures: Sequence[ControlStructure],
    found: Sequence[Found],
    physical_bits: int,
    notes: list[str],
    allowance: Allowance,
) -> list[Candidate]:
    """Judge each root once, with all structures that name it; of a root's readings keep the best.

    ``found`` are the roots that page tables alone gave in this memory. A forged structure may name another's root with
    another number of levels: each reading has its own structures. What is cut short goes to ``notes``.
    """
    groups: dict[tuple[str, int], Readings] = {}
    for structure in structures:
        readings = groups.setdefault((structure.kind, structure.root_hpa), {})
        for root in candidates.roots(structure, physical_bits):
            readings.setdefault(root.levels, (root, []))[1].append(structure)
    waiting = [readings for readings in groups.values() if readings]
    if len(waiting) > _FEW:
        waiting = _ordered(below, waiting, found)
    heard: list[Candidate] = []
    for number, readings in enumerate(waiting):
        if allowance.roots <= 0 or allowance.tables <= 0:
            notes.append(
                f"{len(waiting)} roots are named by control structures; {number} were walked, the most plausible first"
            )
            break
        results = [candidates.judge(below, root, named) for root, named in readings.values()]
        heard.append(max(results, key=_belief))
        allowance.roots -= 1
        allowance.tables -= sum(item.guest_map.findings.tables for item in results if not item.accepted)
    return _read_as_found(below, heard, found)


def out_of_reach(heard: Iterable[Candidate]) -> list[str]:
    """Say which roots map memory of which next to nothing is in the capture: machines, perhaps, that are not shown.

    Crash dumps are commonly made without the memory of processes, and a guest's memory is its monitor's.
    """
    said = []
    for item in heard:
        best = max(item.structures, key=lambda structure: structure.score, default=None)
        mapped, refused = item.guest_map.mapped_bytes, len(item.guest_map.findings.misconfigured)
        if item.accepted or best is None or best.verdict is not Verdict.LIKELY or refused or mapped < _LEAST_LOST:
            continue
        if item.memory.size * _SHARE_LOST < mapped:
            said.append(
                f"the {best.kind} at {best.hpa:#x} names a root that maps {bits.size_name(mapped)}, and next to none "
                f"of it is in the capture: no machine is shown for it; --guest {item.root} takes the root at its word"
            )
    more = len(said) - _MOST_SAID
    return said[:_MOST_SAID] + ([f"{more} more roots like these"] if more > 0 else [])


def _ordered(below: HostMemory, waiting: list[Readings], found: Sequence[Found]) -> list[Readings]:
    """Put those first that structures of the host name, then known roots, likely structures, tables that parse."""
    roots = [next(iter(readings.values()))[0] for readings in waiting]
    addresses = np.array([root.address for root in roots], dtype=np.int64)
    leaves = np.zeros(addresses.size, dtype=np.int64)
    kinds = np.array([root.kind == EPT for root in roots])
    for kind, formats in ((EPT, (ept.EPT_4, ept.EPT_5)), (NPT, (npt.NPT_4, npt.NPT_5))):
        chosen = np.flatnonzero(kinds == (kind == EPT))
        order = chosen[np.argsort(addresses[chosen], kind="stable")]
        for fmt in formats:
            result = descent.descend(below, fmt, addresses[order])
            where = order[np.searchsorted(addresses[order], result.roots)]
            leaves[where] = np.maximum(leaves[where], result.leaves)
    own = {item.root.address for item in found}
    known = np.array([root.address in own for root in roots])
    named = [[s for _, structures in readings.values() for s in structures] for readings in waiting]
    places = np.array([s.hpa for group in named for s in group], dtype=np.int64)
    number = np.repeat(np.arange(len(waiting)), [len(group) for group in named])
    free = np.bincount(number, triage.held(places, found)[0] == 0, len(waiting)) > 0
    likely = np.array([any(s.verdict is Verdict.LIKELY for s in group) for group in named])
    chosen_order = np.lexsort((addresses, -leaves, ~likely, leaves == 0, ~known, ~free))
    return [waiting[index] for index in chosen_order.tolist()]


def _belief(found: Candidate) -> tuple[object, ...]:
    """Order the readings of one root. Where a guest's page tables parse with fewer levels, no more are tried.

    One level too many takes the guest's own pages for tables: the guest could then map whatever it likes. One too few
    takes tables for the guest's pages, and what the hypervisor writes there parses as nothing.
    """
    parses = found.paging is not None
    return found.accepted, parses, -len(found.root.format.levels) if parses else 0, found.strength


def _read_as_found(below: HostMemory, heard: list[Candidate], found: Sequence[Found]) -> list[Candidate]:
    """Judge a rejected root again in the dialect in which its tables alone were believed.

    Where Xen asked for recalculation at the root, the author cannot be inferred from the entries.
    """
    authors = {item.root.address: item.root.dialect for item in found}
    return [
        candidates.judge(below, replace(c.root, dialect=authors[c.root.address]), c.structures)
        if not c.accepted and authors.get(c.root.address, c.root.dialect) != c.root.dialect
        else c
        for c in heard
    ]


def without_owned(found: Candidate, below: HostMemory, owners: dict[int, list[Root]], physical_bits: int) -> Candidate:
    """Return a candidate without the structures that lie in a guest: there the same number is another address.

    The root is then read as one of its own structures names it.
    """
    free = tuple(s for s in found.structures if not owners[s.hpa])
    if len(free) == len(found.structures):
        return found
    named = (root for structure in free for root in candidates.roots(structure, physical_bits))
    own = next((root for root in named if root.levels == found.root.levels), found.root)
    again = candidates.judge(below, replace(own, dialect=found.root.dialect), free)
    if found.recovery is None:
        return again
    recovered = tuple(item for item in found.evidence if item.name == "recovered")
    return replace(again, memory=found.memory, recovery=found.recovery, evidence=(*again.evidence, *recovered))


def orphans(
    structures: Sequence[ControlStructure], accepted: Sequence[Candidate], owners: dict[int, list[Root]],
    notes: list[str]
) -> list[ControlStructure]:  # fmt: skip
    """Return the structures that name no machine here and lie in no guest: copies that a hypervisor keeps, perhaps."""
    named = {s.hpa for c in accepted for s in c.structures}
    left = [s for s in structures if s.hpa not in named and not owners[s.hpa]]
    if len(left) > MAX_ORPHANS:
        notes.append(
            f"{len(left)} control structures name no machine of this memory; {MAX_ORPHANS}, the most telling, were "
            "tried as copies of a guest's own"
        )
        left.sort(key=lambda s: -s.score)
    return left[:MAX_ORPHANS]


def parses_in(memory: HostMemory, structure: ControlStructure, physical_bits: int) -> bool:
    """Tell whether the machine of a structure that lies elsewhere is proven by its page tables in this memory."""
    return any(
        found.accepted and found.paging is not None
        for root in candidates.roots(structure, physical_bits)
        for found in [candidates.judge(memory, root, [structure])]
    )
