"""How candidates are related: who holds whose control structure, who is another view of whom."""

from __future__ import annotations

from collections.abc import Iterable

from volatility3_ept.core import gpamap
from volatility3_ept.core.candidate import Candidate
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root

#: Two maps agree when this share of the smaller one's bytes lies at the same address in the same frame.
SAME = 0.9


def owners(structures: Iterable[ControlStructure], accepted: list[Candidate]) -> dict[int, list[Root]]:
    """Return for each structure (by address) the roots of the candidates whose frames hold its page.

    A structure in the frames of its own root belongs to a hypervisor in that guest, which happens to use the same
    number for a root of its own; unless all of the root's structures lie there: then the hypervisor hides nothing.

    A forged root can map all of the host, control structures included. It then also maps its own tables, which no
    hypervisor hands to a guest: in a mutual claim the one that maps itself loses.
    """
    own = {s.hpa: c for c in accepted for s in c.structures}
    frames = {id(c): c.whole.frame_ranges() for c in accepted}

    def holds(owner: Candidate, address: int) -> bool:
        starts, ends = frames[id(owner)]
        index = int(starts.searchsorted(address, side="right")) - 1
        return index >= 0 and address < int(ends[index])

    def claims(owner: Candidate, structure: ControlStructure) -> bool:
        mine = own.get(structure.hpa)
        if not holds(owner, structure.hpa):
            return False
        if owner is mine:
            return not all(holds(owner, s.hpa) for s in owner.structures)
        mutual = mine is not None and all(holds(mine, s.hpa) for s in owner.structures)
        return not (mutual and mine is not None and holds(owner, owner.root.address)
                    and not holds(mine, mine.root.address))  # fmt: skip

    return {s.hpa: [c.root for c in accepted if claims(c, s)] for s in structures}


def families(
    tops: list[Candidate],
) -> tuple[list[Candidate], dict[int, list[Candidate]], dict[int, list[Candidate]]]:
    """Sort candidates into machines, further views of one machine, and outer tables of a guest's guest.

    The larger map comes first: a second view or a nested guest's tables map no more than the machine itself.
    """
    mains: list[Candidate] = []
    views: dict[int, list[Candidate]] = {}
    shadows: dict[int, list[Candidate]] = {}
    for top in sorted(tops, key=lambda c: (-c.guest_map.mapped_bytes, c.root.address)):
        for main in mains:
            if _agreement(main.guest_map, top.guest_map) >= SAME:
                views.setdefault(id(main), []).append(top)
                break
            if _overlap(main.whole, top.guest_map) >= SAME:
                shadows.setdefault(id(main), []).append(top)
                break
        else:
            mains.append(top)
    return sorted(mains, key=lambda c: c.root.address), views, shadows


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
