"""Which of very many possible control structures and roots are examined, and in what order.

A guest can write as many fakes as it has pages, and they may lie below everything of the host's. Each costs
milliseconds to examine, so of a flood only some are, and the order must not be the attacker's to choose: first come
pages that no guest holds, then those that name a root which page tables alone gave away, or at least tables that
parse, and each root once before any root twice. What a guest holds can only be a machine of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from volatility3_ept.core import descent, mask, vmcb, vmcs
from volatility3_ept.core.likeness import Found
from volatility3_ept.core.memory import Bools, HostMemory, Int64
from volatility3_ept.core.tables import BATCH_PAGES
from volatility3_ept.spec import bits, ept, npt

VMCS: Final = 0
VMCB: Final = 1
#: Control structures that are examined in full; in a large memory, one for so many pages if that is more.
MAX_EXAMINED: Final = 1 << 12
PAGES_PER_ROOT: Final = 1 << 13
#: Of those, the share that pages in the memory of guests may take while others wait.
_GUESTS_SHARE: Final = 4


@dataclass(frozen=True)
class Sightings:
    """Pages that may be control structures: addresses, ascending, and for each :data:`VMCS` or :data:`VMCB`."""

    addresses: Int64
    kinds: Int64
    #: Pages that were looked at to find them.
    pages: int

    @classmethod
    def of(cls, found: Mapping[int, Sequence[Int64]], pages: int) -> Sightings:
        """Bring the hits of each kind together. A page may be of both kinds."""
        none = np.empty(0, dtype=np.int64)
        addresses = np.concatenate([none, *(part for parts in found.values() for part in parts)])
        sizes = [sum(part.size for part in parts) for parts in found.values()]
        kinds = np.repeat(np.array(list(found), dtype=np.int64), sizes)
        order = np.lexsort((kinds, addresses))
        return cls(addresses[order], kinds[order], pages)


def chosen(memory: HostMemory, seen: Sightings, found: Sequence[Found]) -> tuple[Sightings, tuple[str, ...]]:
    """Return the sightings to examine, the first ones first, and a note where that is not all of them.

    ``found`` are the roots that page tables alone gave in this memory.
    """
    most = max(MAX_EXAMINED, memory.size // bits.PAGE_SIZE // PAGES_PER_ROOT)
    if seen.addresses.size <= most:
        return seen, ()
    holders, holder = held(seen.addresses, found)
    order = _order(memory, seen, found, holders > 0)
    turn = np.empty_like(order)
    turn[order] = mask.turns(holder[order])
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    # In the host's memory: as ordered. In guests': each guest in turn, and its own guests' memory after its own.
    free = order[holders[order] == 0]
    inside = np.flatnonzero(holders > 0)
    inside = inside[np.lexsort((place[inside], turn[inside], holders[inside]))]
    room = min(inside.size, most // _GUESTS_SHARE)
    free = free[: most - room]
    kept = np.concatenate((free, inside[: most - free.size]))
    note = (
        f"{seen.addresses.size} pages look like control structures, {inside.size} of them in the memory of guests; "
        f"{kept.size} were examined, those first that no guest holds and that name page tables"
    )
    return Sightings(seen.addresses[kept], seen.kinds[kept], seen.pages), (note,)


def held(addresses: Int64, found: Sequence[Found]) -> tuple[Int64, Int64]:
    """Return for each address how many guests of ``found`` use its page, and the number of the first that does.

    The number is -1 where none does. A root whose guest could write its own table proves nothing and does not count.
    """
    count = np.zeros(addresses.size, dtype=np.int64)
    first = np.full(addresses.size, -1, dtype=np.int64)
    for number, item in enumerate(found):
        ranges = item.guest_map.frame_ranges()
        if not _inside(np.array([item.root.address], dtype=np.int64), ranges)[0]:
            here = _inside(addresses, ranges)
            count += here
            first[here & (first < 0)] = number
    return count, first


def _inside(addresses: Int64, ranges: tuple[Int64, Int64]) -> Bools:
    starts, ends = ranges
    if not starts.size:
        return np.zeros(addresses.shape, dtype=np.bool_)
    index = np.searchsorted(starts, addresses, side="right") - 1
    return (index >= 0) & (addresses < ends[np.maximum(index, 0)])


def _order(memory: HostMemory, seen: Sightings, found: Sequence[Found], inside: Bools) -> Int64:
    """Return the numbers of the sightings, the most telling first."""
    roots = _named(memory, seen)
    known = np.isin(roots, np.array([item.root.address for item in found], dtype=np.int64))
    parse = np.zeros(roots.size, dtype=np.bool_)
    for kind, formats in ((VMCS, (ept.EPT_4, ept.EPT_5)), (VMCB, (npt.NPT_4, npt.NPT_5))):
        # The root that a structure in a guest names is an address of that guest: nothing can be said of it here.
        tried = mask.distinct(roots[(seen.kinds == kind) & ~inside & (roots > 0)])
        heads = [descent.descend(memory, fmt, tried).roots for fmt in formats]
        parse |= (seen.kinds == kind) & np.isin(roots, np.concatenate(heads))
    free = held(roots, found)[0] == 0
    place = np.arange(roots.size)
    first = np.lexsort((place, ~parse, ~free, ~known))
    turn = np.empty_like(first)
    turn[first] = mask.turns(roots[first])
    order: Int64 = np.lexsort((place, turn, ~parse, ~free, ~known))
    return order


def _named(memory: HostMemory, seen: Sightings) -> Int64:
    """Return the address of the table that each page names, 0 where it names none."""
    named = np.zeros(seen.addresses.size, dtype=np.int64)
    for kind, reader in ((VMCS, vmcs.named_roots), (VMCB, vmcb.named_roots)):
        where = np.flatnonzero(seen.kinds == kind)
        for begin in range(0, where.size, BATCH_PAGES):
            part = where[begin : begin + BATCH_PAGES]
            named[part] = reader(memory.words(seen.addresses[part])[0])
    roots: Int64 = named & ~np.int64(bits.PAGE_SIZE - 1)
    return roots
