"""Which of several roots stand: a page that lies in a guest's memory was written by the guest.

Nothing that a guest writes may become a machine of the host, and no forged root may make a real one disappear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import descent
from volatility3_ept.core.likeness import Found, NearMiss
from volatility3_ept.core.memory import Bools, HostMemory, Int64


@dataclass(frozen=True)
class Claim:
    """A root that was accepted, and the frames that its guest uses: whatever lies there is the guest's."""

    found: Found
    starts: Int64
    ends: Int64

    @classmethod
    def of(cls, found: Found) -> Claim:
        """Return the claim that a root makes."""
        return cls(found, *found.guest_map.frame_ranges())

    @property
    def address(self) -> int:
        """Address of the top table."""
        return self.found.root.address

    @property
    def maps_itself(self) -> bool:
        """Tell whether the guest could write the tables that made it: no hypervisor grants that."""
        return self.holds(self.address)

    def holds(self, address: int) -> bool:
        """Tell whether a page is one of the guest's."""
        index = int(self.starts.searchsorted(address, side="right")) - 1
        return index >= 0 and address < int(self.ends[index])

    def holding(self, addresses: Int64) -> Bools:
        """Tell which pages are the guest's."""
        if not self.starts.size:
            return np.zeros(addresses.shape, dtype=np.bool_)
        index = np.searchsorted(self.starts, addresses, side="right") - 1
        return (index >= 0) & (addresses < self.ends[np.maximum(index, 0)])

    def claims(self, other: Claim) -> bool:
        """Tell whether another root's tables lie in this one's guest, and not, by a better right, the other way."""
        if other is self or not self.holds(other.address):
            return False
        return not other.holds(self.address) or (other.maps_itself and not self.maps_itself)


def inside(owner: Found) -> str:
    """Say why a root is none of this memory."""
    return f"lies in the memory of the guest of {owner.root}"


def lie_inside(owner: Found) -> str:
    """Say the same of many."""
    return f"lie in the memory of the guest of {owner.root}: none of this memory's, and not judged here"


def settled(memory: HostMemory, claims: list[Claim]) -> tuple[list[Found], list[NearMiss]]:
    """Drop the roots that a guest wrote into its own memory, and the tables that a root names below itself.

    A forged root can map all of the host and so claim the real ones: a root that maps its own tables claims last, and
    of two that claim each other the one that maps itself loses. What was dropped claims nothing.
    """
    dropped: dict[int, NearMiss] = {}
    for owner in sorted(claims, key=lambda c: c.maps_itself):
        for other in claims:
            if owner.claims(other) and owner.address not in dropped and other.address not in dropped:
                dropped[other.address] = NearMiss(other.found.root, inside(owner.found), other.found.evidence)
    kept = [c.found for c in claims if c.address not in dropped]
    for parent in kept:
        below = set(descent.upper(memory, parent.root.format, parent.root.address).tolist())
        for child in kept:
            if child is not parent and child.root.address in below:
                reason = f"a table below {parent.root}"
                dropped[child.root.address] = NearMiss(child.root, reason, child.evidence)
    return [f for f in kept if f.root.address not in dropped], list(dropped.values())
