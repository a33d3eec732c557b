"""What Linux writes into the entries of a process that the processor does not follow: pages that are there all the
same, and pages that are not.

Every function takes an entry as an ``int`` or as a numpy ``uint64`` array and answers in kind.

Sources, Linux: arch/x86/include/asm/pgtable_types.h (``_PAGE_PROTNONE`` is the global bit of an entry without P,
``PAGE_NONE``), pgtable.h (``pte_present``, ``pmd_present``: P, PROTNONE, or for a PMD the page-size bit;
``pmd_mkinvalid``), pgtable-invert.h (frame bits of a non-present entry are inverted against L1TF, since v4.18),
pgtable_64.h (``__swp_type``, ``__swp_offset``: type in bits 63:59, the inverse of the offset in 58:9; before v4.18 type
in 13:9 and the plain offset above); include/linux/swap.h (the topmost of the 32 swap types stand for poisoned,
migrating and device pages and for markers, in an order that depends on version and configuration) and swapops.h
(``SWP_PFN_BITS``: of those types the offset holds a frame number in its low 40 bits).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

from volatility3_ept.spec import bits, ia32e, paging

Entries = Any

#: Only where P is clear: the page is mapped, and no access to it is allowed (NUMA balancing, mprotect).
PROT_NONE: Final = ia32e.GLOBAL
#: Set in the frame of an entry that is stored inverted. No host has memory at 1 PiB.
INVERTED: Final = bits.bit(50)
#: The lowest type that a kernel gives away for anything but a swap file: 22 of 32 (v6.1 with every option).
FIRST_SPECIAL_TYPE: Final = 22
#: Special entries with so small an offset are markers (include/linux/swapops.h, ``PTE_MARKER_*``), not frames.
_MARKERS: Final = 16
_NEW_FORMAT: Final = bits.field(58, 51)
_FRAME_NUMBER: Final = bits.field(39, 0)


class HostEntry(IntEnum):
    """What an entry of a process's page tables says of the page."""

    NONE = 0
    PRESENT = 1
    #: Resident, its frame known, though the processor would fault on it.
    PROT_NONE = 2
    SWAPPED = 3
    #: Holds a frame number: the page is being moved, or its memory is poisoned.
    MIGRATING = 4
    #: In a device's memory, or a marker without a page.
    ELSEWHERE = 5

    @property
    def text(self) -> str:
        """Return the kind in words."""
        return ("no page", "present", "PROT_NONE", "swapped out", "migrating", "device page or marker")[int(self)]


def kind(entry: Entries, shift: int) -> Entries:
    """Return the :class:`HostEntry` of an entry that maps, or could map, ``1 << shift`` bytes; it is no table."""
    absent = (entry & ia32e.PRESENT) == 0
    # PAGE_NONE takes the rights away: an entry that has them was not written by mprotect or NUMA balancing.
    guarded = ((entry & PROT_NONE) != 0) & ((entry & (ia32e.WRITE | ia32e.USER)) == 0)
    if shift > bits.PAGE_SHIFT:
        # A huge page that is about to be split has neither P nor PROT_NONE for a moment; its size bit remains.
        guarded = guarded | ((entry & paging.LARGE_PAGE) != 0)
    special = (swap_type(entry) >= FIRST_SPECIAL_TYPE) & ((entry & _NEW_FORMAT) == _NEW_FORMAT)
    marker = (swap_offset(entry) & _FRAME_NUMBER) < _MARKERS
    swap_like = absent & (guarded ^ True) & (entry != 0)
    return (
        (absent ^ True) * int(HostEntry.PRESENT)
        + (absent & guarded) * int(HostEntry.PROT_NONE)
        + (swap_like & (special ^ True)) * int(HostEntry.SWAPPED)
        + (swap_like & special & (marker ^ True)) * int(HostEntry.MIGRATING)
        + (swap_like & special & marker) * int(HostEntry.ELSEWHERE)
    )


def frame(entry: Entries, shift: int, key_bits: int = 0) -> Entries:
    """Return the address of the page of a PRESENT or PROT_NONE entry."""
    inverted = ((entry & ia32e.PRESENT) == 0) & ((entry & INVERTED) != 0)
    plain = entry ^ ((entry & 0) | inverted) * paging.FRAME
    return plain & (paging.FRAME & ~key_bits & ~((1 << shift) - 1))


def migration_frame(entry: Entries) -> Entries:
    """Return the address of the page that a MIGRATING entry names."""
    return (swap_offset(entry) & _FRAME_NUMBER) << bits.PAGE_SHIFT


def swap_type(entry: Entries) -> Entries:
    """Return the swap type, as kernels since v4.18 store it."""
    return entry >> 59


def swap_offset(entry: Entries) -> Entries:
    """Return the offset within the swap file, or the frame number, as kernels since v4.18 store it."""
    return (entry ^ bits.field(58, 9)) >> 9 & bits.field(49, 0)
