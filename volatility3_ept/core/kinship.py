"""How candidates are related: who holds whose control structure, who is another view of whom."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from volatility3_ept.core import gpamap
from volatility3_ept.core.candidate import Candidate
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import Bools, HostMemory, Int64
from volatility3_ept.core.root import Root

#: Two maps agree when this share of the smaller one's bytes lies at the same address in the same frame.
SAME = 0.9


def owners(
    structures: Iterable[ControlStructure], accepted: list[Candidate]
) -> tuple[dict[int, list[Root]], list[Candidate]]:
    """Return for each structure (by address) the roots of the candidates whose frames hold its page.

    Also returns the candidates that hold each other's structures: who lives in whom cannot be told of them.

    A structure in the frames of its own root belongs to a hypervisor in that guest, which happens to use the same
    number for a root of its own; unless all of the root's structures lie there: then the hypervisor hides nothing.

    A forged root can map all of the host, control structures included. It then also maps its own tables, which no
    hypervisor hands to a guest: in a mutual claim the one that maps itself loses. And who lives in a guest owns nothing
    of the host: there its root is another address. Only candidates that nobody holds have a say. A guest whose page
    tables do not parse may have been read wrongly: it does not hold all of a machine whose do.
    """
    given = list(structures)
    own = {s.hpa: c for c in accepted for s in c.structures}
    # A hostile guest has thousands of structures and hundreds of roots: each pair of the two is looked up at once.
    places = np.array([s.hpa for s in given], dtype=np.int64)
    held = {id(c): _holding(c.whole, places) for c in accepted}
    maps_itself = {id(c): _holds(c.whole, c.root.address) for c in accepted}

    @functools.cache
    def holds_all(owner: int, other: int) -> bool:
        addresses = np.array([s.hpa for s in by_id[other].structures], dtype=np.int64)
        return bool(_holding(by_id[owner].whole, addresses).all())

    def claims(owner: Candidate, structure: ControlStructure) -> bool:
        """Tell whether a candidate owns a structure that lies in its frames."""
        mine = own.get(structure.hpa)
        if mine is None:
            return True
        if owner is mine or (owner.paging is None and mine.paging is not None):
            return not holds_all(id(owner), id(mine))
        loses = maps_itself[id(owner)] and not maps_itself[id(mine)]
        return not (loses and holds_all(id(mine), id(owner)))

    by_id = {id(c): c for c in accepted}
    claimed: dict[int, list[Candidate]] = {s.hpa: [] for s in given}
    for candidate in accepted:
        for number in np.flatnonzero(held[id(candidate)]).tolist():
            if claims(candidate, given[number]):
                claimed[given[number].hpa].append(candidate)
    free, undecided = _settled(accepted, claimed)
    return {hpa: [c.root for c in holders if id(c) in free] for hpa, holders in claimed.items()}, undecided


def _settled(accepted: list[Candidate], claimed: dict[int, list[Candidate]]) -> tuple[set[int], list[Candidate]]:
    """Return the candidates (by identity) that nobody holds, and those of which that cannot be told.

    ``claimed`` names the holders of each structure. What a candidate claims counts once nobody holds it itself.
    """
    free: set[int] = set()
    held: set[int] = set()
    while True:
        before = len(free) + len(held)
        for candidate in accepted:
            if id(candidate) in free | held:
                continue
            holders = [{id(c) for c in claimed[s.hpa]} - held for s in candidate.structures]
            if not holders or not all(holders):
                free.add(id(candidate))
            elif all(by & free for by in holders):
                held.add(id(candidate))
        if len(free) + len(held) == before:
            return free, [c for c in accepted if id(c) not in free | held]


def families(
    tops: list[Candidate],
) -> tuple[list[Candidate], dict[int, list[Candidate]], dict[int, list[Candidate]]]:
    """Sort candidates into machines, further views of one machine, and outer tables of a guest's guest.

    The larger map comes first: a second view or a nested guest's tables map no more than the machine itself. No
    hypervisor hands a table of its own to a guest: a map that holds the other's root is forged, or read wrongly.
    """
    mains: list[Candidate] = []
    views: dict[int, list[Candidate]] = {}
    shadows: dict[int, list[Candidate]] = {}
    for top in sorted(tops, key=lambda c: (-c.guest_map.mapped_bytes, c.root.address)):
        for main in mains:
            if _holds(main.guest_map, top.root.address):
                continue
            if _agreement(main.guest_map, top.guest_map) >= SAME:
                views.setdefault(id(main), []).append(top)
                break
            if _overlap(main.whole, top.guest_map) >= SAME:
                shadows.setdefault(id(main), []).append(top)
                break
        else:
            mains.append(top)
    return sorted(mains, key=lambda c: c.root.address), views, shadows


def _holds(guest_map: GuestMap, address: int) -> bool:
    """Tell whether an address lies in the frames of a guest."""
    return bool(_holding(guest_map, np.array([address], dtype=np.int64))[0])


def _holding(guest_map: GuestMap, addresses: Int64) -> Bools:
    """Tell which addresses lie in the frames of a guest."""
    starts, ends = guest_map.frame_ranges()
    if not starts.size:
        return np.zeros(addresses.shape, dtype=np.bool_)
    index = np.searchsorted(starts, addresses, side="right") - 1
    return (index >= 0) & (addresses < ends[np.maximum(index, 0)])


def same_memory(first: HostMemory, second: HostMemory) -> float:
    """Return the share of the smaller memory's bytes that are the same bytes of the capture in the other."""
    small, large = sorted((first, second), key=lambda memory: memory.size)
    starts, last = small.starts, small.starts + small.lengths - 1
    same = (large.locate(starts, 1) == small.offsets) & (large.locate(last, 1) == small.offsets + small.lengths - 1)
    return float(small.lengths[same].sum()) / max(small.size, 1)


def _agreement(main: GuestMap, other: GuestMap) -> float:
    """Return the share of ``other``'s bytes that ``main`` maps at the same address to the same frame."""
    # Runs may be cut differently in the two maps: compare page by page through their starts and ends.
    first = main.to_hpa(other.gpas) == other.hpas
    last = main.to_hpa(other.gpas + other.lengths - 1) == other.hpas + other.lengths - 1
    return float(other.lengths[first & last].sum()) / max(other.mapped_bytes, 1)


def _overlap(main: GuestMap, other: GuestMap) -> float:
    """Return the share of ``other``'s frames that are frames of ``main`` too."""
    frames = other.frame_ranges()
    return gpamap.overlap_bytes(frames, main.frame_ranges()) / max(int((frames[1] - frames[0]).sum()), 1)
