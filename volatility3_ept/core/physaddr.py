"""How wide the host's physical addresses are, as far as its tables give it away (MAXPHYADDR)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT, Root
from volatility3_ept.spec import bits


@dataclass(frozen=True, slots=True)
class Width:
    """MAXPHYADDR lies between ``low`` and ``high``, both included."""

    low: int
    high: int
    why: str

    def __str__(self) -> str:
        """Return the width, or the bounds, with the reason."""
        return f"{self.low}: {self.why}" if self.low == self.high else f"{self.low} to {self.high}: {self.why}"


def derive(memory: HostMemory, guest_map: GuestMap, root: Root) -> Width:
    """Return the bounds. What was given counts; else memory needs so many bits, and markers use reserved ones.

    VirtualBox sets every address bit at and above MAXPHYADDR in its EPT markers (src/VBox/VMM/VMMAll/PGMAllPool.cpp);
    KVM sets bit 51 in its NPT markers only where that bit is reserved (arch/x86/kvm/mmu/spte.c,
    kvm_mmu_reset_all_pte_masks).
    """
    if root.physical_bits:
        return Width(root.physical_bits, root.physical_bits, "given")
    frames = int(guest_map.hpas.max()) if len(guest_map) else 0
    low = max(max(memory.top - 1, frames).bit_length(), 32)
    markers = guest_map.findings.mmio[:, 2].astype(np.uint64)
    if root.kind == EPT:
        virtualbox = markers[(markers & np.uint64(0x3F)) == 0x3A] & np.uint64(bits.field(51, 12))
        if virtualbox.size:
            width = _lowest_of_top_ones(int(virtualbox[0]))
            return Width(width, width, "VirtualBox's markers set all bits above it")
    elif root.key_bit:
        return Width(low, max(root.key_bit, low), f"memory needs the first, and bit {root.key_bit} is the C-bit")
    elif (markers >> np.uint64(51) & np.uint64(1)).any():
        return Width(low, 51, "memory needs the first, a marker uses reserved bit 51")
    return Width(low, bits.MAX_PHYSICAL_BITS, "memory needs the first")


def _lowest_of_top_ones(address: int) -> int:
    width = bits.MAX_PHYSICAL_BITS
    while width > 32 and address >> (width - 1) & 1:
        width -= 1
    return width
