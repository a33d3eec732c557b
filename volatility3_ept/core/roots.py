"""EPT and NPT roots by structure: no control structure is needed, so no layout of one and no luck.

One pass keeps the pages that can be a top table (:mod:`.tables`), a descent those whose levels all read as levels, and
what remains is traversed whole and judged by what it maps (:mod:`.likeness`). Given a guest's memory, the same search
finds the roots of the hypervisor in that guest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from volatility3_ept.core import claims, descent, leaves, likeness, tables
from volatility3_ept.core.claims import Claim
from volatility3_ept.core.descent import Descent
from volatility3_ept.core.likeness import Certainty, Found, NearMiss
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.root import EPT, NPT, Root
from volatility3_ept.core.tables import Finder, Tops
from volatility3_ept.spec import bits, dialect

__all__ = ["Certainty", "Found", "NearMiss", "Progress", "RootScan", "find", "judge", "search"]

#: Called now and then with a percentage and what is being done.
Progress = Callable[[float, str], None]

#: A hostile guest can write as many fakes as it has pages. Bounds for a small memory: pages of one kind that are
#: followed down; hierarchies that are judged; tables read for them all, and for those that prove to be nothing.
MAX_TOPS = 1 << 17
MAX_JUDGED = 256
MAX_TABLES = 1 << 20
MAX_WASTED_TABLES = 1 << 15
#: In a large one, a page in so many if that is more. An ordinary host has a possible top table among 600 pages, and a
#: hierarchy to judge among 20,000.
_PAGES_PER_TABLE = 64
_PAGES_PER_JUDGED = 1 << 13
#: While no more candidates than this wait, those inside a guest already found are judged too, and reported as such;
#: of more, so many are reported.
_FEW_WAITING = 16
_FEW_REPORTED = 256
#: Candidates within this many bytes of each other count as one crowd.
_AROUND = 1 << 20


@dataclass(frozen=True)
class RootScan:
    """The roots of one memory, ascending by address, the near misses, and what was cut short."""

    found: tuple[Found, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    notes: tuple[str, ...] = ()
    pages: int = 0


def silent(percentage: float, what: str) -> None:
    """Report no progress."""


def find(
    memory: HostMemory,
    physical_bits: int = bits.MAX_PHYSICAL_BITS,
    progress: Progress = silent,
    key_bit: int = 0,
) -> tuple[Found, ...]:
    """Return the EPT and NPT roots in a memory, ascending by address.

    ``physical_bits`` is MAXPHYADDR; ``key_bit`` the lowest address bit that carries a key (the C-bit, or the first
    MKTME KeyID bit), 0 when none does. PAE and 32-bit nested paging, which only 32-bit hosts use, are not looked for.
    """
    return search(memory, physical_bits, progress, key_bit).found


def search(
    memory: HostMemory,
    physical_bits: int = bits.MAX_PHYSICAL_BITS,
    progress: Progress = silent,
    key_bit: int = 0,
) -> RootScan:
    """Find the roots as :func:`find` does, and say what was looked at and not believed."""
    finder = Finder(memory, physical_bits, key_bit)
    pages, total = 0, max(memory.size // bits.PAGE_SIZE, 1)
    for addresses, rows in tables.pages_of(memory):
        finder.see(addresses, rows)
        pages += len(rows)
        progress(100 * pages / total, "Looking for EPT and NPT roots")
    return replace(judge(memory, finder.tops(), physical_bits, key_bit), pages=pages)


def judge(memory: HostMemory, tops: Tops, physical_bits: int = bits.MAX_PHYSICAL_BITS, key_bit: int = 0) -> RootScan:
    """Follow the pages that a pass kept, and decide. For a caller that makes the pass together with another one."""
    court = _Court(memory, tops.linear)
    followed = _followed(memory, tops, physical_bits, key_bit, court.notes)
    waiting = _waiting(memory, followed)
    left = np.ones(waiting.size, dtype=np.bool_)
    for number, address in enumerate(waiting.tolist()):
        if not left[number]:
            continue
        if court.exhausted:
            court.notes.append(f"{int(left[number:].sum())} more tables read as hierarchies and were not judged")
            break
        owner = court.hear([item.root(address) for item in followed if item.has(address)])
        if owner is not None and not owner.maps_itself and int(left[number:].sum()) > _FEW_WAITING:
            inside = np.flatnonzero(left & owner.holding(waiting))
            left[inside] = False
            court.dismiss(waiting[inside[inside > number]], followed, owner)
    kept, dropped = claims.settled(memory, court.accepted)
    return RootScan(tuple(sorted(kept, key=lambda f: f.root.address)), (*court.rejected, *dropped), tuple(court.notes))


def with_key(memory: HostMemory, plain: RootScan, physical_bits: int, key_bit: int) -> RootScan:
    """Add to the roots without a key those with one in address bit ``key_bit`` (0: there is none to look for)."""
    if not key_bit:
        return plain
    keyed = search(memory, physical_bits, key_bit=key_bit)
    both = {item.root.address: item for item in (*plain.found, *keyed.found)}
    ordered = tuple(both[address] for address in sorted(both))
    return replace(plain, found=ordered, notes=tuple(dict.fromkeys((*plain.notes, *keyed.notes))))


class _Reading(NamedTuple):
    """One way to read top tables, and the tables that can be read so: addresses, ascending."""

    pattern: Root
    found: Descent

    def has(self, address: int) -> bool:
        """Tell whether a table can be read so."""
        index = int(np.searchsorted(self.found.roots, address))
        return index < self.found.roots.size and int(self.found.roots[index]) == address

    def root(self, address: int) -> Root:
        """Return a table read so."""
        return replace(self.pattern, raw=address)


def _followed(
    memory: HostMemory, tops: Tops, physical_bits: int, key_bit: int, notes: list[str]
) -> tuple[_Reading, ...]:
    """Return the tables whose every level reads as its level, for each way to read them, EPT first."""
    width = physical_bits if physical_bits < bits.MAX_PHYSICAL_BITS else 0
    most = max(MAX_TOPS, memory.size // bits.PAGE_SIZE // _PAGES_PER_TABLE)
    followed = []
    for kind, pages in ((EPT, tops.ept), (NPT, tops.npt)):
        if pages.size > most:
            notes.append(
                f"{pages.size} pages can be {kind} top tables; {most} were followed, first those that lie alone"
            )
            pages = np.sort(pages[np.argsort(_crowd(pages), kind="stable")[:most]])
        for levels in (4, 5):
            pattern = Root(kind, bits.PAGE_SIZE, levels, width, key_bit)
            followed.append(_Reading(pattern, descent.descend(memory, pattern.format, pages)))
    return tuple(followed)


def _waiting(memory: HostMemory, followed: Sequence[_Reading]) -> Int64:
    """Return the candidates in the order in which to judge them.

    A table that many others name comes first: copies and fakes refer to it, and fall with it. Where many wait, those
    that lie alone take turns with them: in either order a guest could put its fakes before everything else.
    """
    every = np.unique(np.concatenate([item.found.roots for item in followed]))
    named, sizes = np.zeros_like(every), np.zeros_like(every)
    for pattern, found in followed:
        named += descent.references(memory, pattern.format, found.roots, every)
        where = np.searchsorted(every, found.roots)
        sizes[where] = np.maximum(sizes[where], found.leaves)
    order = np.lexsort((every, -sizes, -named))
    if every.size > _FEW_WAITING:
        alone = np.lexsort((every, -sizes, -named, _crowd(every)))
        both = np.stack((alone, order), axis=1).reshape(-1)
        order = both[np.sort(np.unique(both, return_index=True)[1])]
    return every[order]


def _crowd(addresses: Int64) -> Int64:
    """Return how many candidates lie around each. ``addresses`` ascend.

    A hypervisor allocates a root now and then, in memory of its own; a guest's fakes lie thick, in the guest's memory.
    """
    first = np.searchsorted(addresses, addresses - _AROUND, side="left")
    return np.searchsorted(addresses, addresses + _AROUND, side="right") - first


@dataclass
class _Court:
    """Judges candidates one by one and keeps the account of what that cost."""

    memory: HostMemory
    linear: Int64
    accepted: list[Claim] = field(default_factory=list)
    rejected: list[NearMiss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    judged: int = 0
    tables: int = 0
    wasted: int = 0

    @property
    def exhausted(self) -> bool:
        """Tell whether enough was tried."""
        pages = self.memory.size // bits.PAGE_SIZE
        share = pages // _PAGES_PER_TABLE
        return (
            self.judged >= max(MAX_JUDGED, pages // _PAGES_PER_JUDGED)
            or self.tables >= max(MAX_TABLES, share)
            or self.wasted >= max(MAX_WASTED_TABLES, share)
        )

    def dismiss(self, addresses: Int64, followed: Sequence[_Reading], owner: Claim) -> None:
        """Reject candidates without a hearing: they lie in the memory of a guest that was found.

        Not of one that maps its own tables: such a claim proves nothing (see :func:`.claims.settled`).
        """
        for address in addresses[:_FEW_REPORTED].tolist():
            root = next(item.root(address) for item in followed if item.has(address))
            self.rejected.append(NearMiss(root, claims.inside(owner.found)))
        if addresses.size > _FEW_REPORTED:
            self.notes.append(f"{addresses.size} tables that read as hierarchies {claims.lie_inside(owner.found)}")

    def hear(self, readings: list[Root]) -> Claim | None:
        """Judge one table under each of its readings and keep the best; returns what it claims if it is believed."""
        before = self.tables
        results: list[Found | NearMiss] = []
        for root in readings:
            # EPT's rule is the stricter one: what satisfies it need not be tried as NPT, which many EPTs would pass.
            if root.kind == NPT and any(r.root.kind == EPT and _strength(r)[0] == _CERTAIN for r in results):
                break
            results.append(self._judged(root))
        best = max(results, key=_strength)
        self.judged += 1
        if isinstance(best, Found):
            self.accepted.append(Claim.of(best))
            return self.accepted[-1]
        self.rejected.append(best)
        self.wasted += self.tables - before
        return None

    def _judged(self, root: Root) -> Found | NearMiss:
        """Traverse one hierarchy and weigh what it maps.

        Xen may have asked for recalculation at the root, in entries that hardware refuses, or that, in NPT, take the
        user bit away: the author cannot be inferred from them then. Read as Xen's, a kernel's own map would do as
        well, so there a guest inside must settle it.
        """
        repeats, read = descent.repeats(self.memory, root.format, root.address, leaves.MAX_REPEATS)
        self.tables += read
        if repeats > leaves.MAX_REPEATS:
            return NearMiss(root, f"names its tables again and again ({repeats} times)")
        resolved = root.resolved(self.memory)
        result, pending = self._weighed(resolved)
        if pending and resolved.dialect != dialect.XEN.name:
            again, _ = self._weighed(replace(resolved, dialect=dialect.XEN.name))
            if isinstance(again, Found) and again.guest_cr3 is not None and again.certainty is not Certainty.POSSIBLE:
                return again
        return result

    def _weighed(self, root: Root) -> tuple[Found | NearMiss, bool]:
        """Return the verdict, and whether entries that Xen left pending could have spoilt it."""
        guest_map = root.traverse(self.memory)
        self.tables += guest_map.findings.tables
        facts = likeness.facts(self.memory, root, guest_map, self.linear)
        certainty = likeness.certainty(facts, root.kind)
        if certainty is not None:
            return Found(root, certainty, facts.all, guest_map, facts.guest_cr3, facts.paging), False
        against = ", ".join(item.name for item in facts.all if item.held is False)
        pending = len(guest_map.findings.misconfigured) > 0 if root.kind == EPT else not facts.kind.held
        return NearMiss(root, f"not a guest's: {against}", facts.all), pending


_SURE = {Certainty.POSSIBLE: 0, Certainty.LIKELY: 1, Certainty.CERTAIN: 2}
_CERTAIN = _SURE[Certainty.CERTAIN]


def _strength(result: Found | NearMiss) -> tuple[int, int, int]:
    """Order readings of one table: the surer, then EPT before NPT (its rule is the stricter), then the larger."""
    if isinstance(result, NearMiss):
        return -1, int(result.root.kind == EPT), sum(item.held is True for item in result.evidence)
    return _SURE[result.certainty], int(result.root.kind == EPT), result.guest_map.mapped_bytes
