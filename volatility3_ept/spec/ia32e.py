"""Ordinary x86 paging in every mode: 32-bit, PAE, 4-level and 5-level (LA57).

A guest's own page tables, and (through :mod:`.npt`) AMD's nested paging, which uses the host's paging mode.

Source: Intel SDM Vol. 3A, "Paging", with "Paging-Mode Modifiers", "32-Bit Paging", "PAE Paging", "4-Level Paging and
5-Level Paging"; AMD APM Vol. 2, "Page Translation and Protection".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from volatility3_ept.spec import bits, paging
from volatility3_ept.spec.paging import Entries, Level

PRESENT: Final = bits.bit(0)
WRITE: Final = bits.bit(1)
USER: Final = bits.bit(2)
WRITE_THROUGH: Final = bits.bit(3)
CACHE_DISABLE: Final = bits.bit(4)
ACCESSED: Final = bits.bit(5)
DIRTY: Final = bits.bit(6)
GLOBAL: Final = bits.bit(8)
NO_EXECUTE: Final = bits.bit(63)

CR0_PE: Final = bits.bit(0)
CR0_ET: Final = bits.bit(4)
CR0_PG: Final = bits.bit(31)
CR4_PSE: Final = bits.bit(4)
CR4_PAE: Final = bits.bit(5)
CR4_LA57: Final = bits.bit(12)
CR4_PCIDE: Final = bits.bit(17)
EFER_LME: Final = bits.bit(8)
EFER_LMA: Final = bits.bit(10)

#: PAE has no protection keys and no bits for software there.
_PAE_RESERVED: Final = bits.field(62, 52)
#: Bit 21 of a 4M page: PSE-36 gives it no address bit.
_PSE36_RESERVED: Final = bits.bit(21)

_FLAGS: Final = (("US", USER), ("PWT", WRITE_THROUGH), ("PCD", CACHE_DISABLE), ("A", ACCESSED))


@dataclass(frozen=True)
class Ia32Format(paging.Format):
    """One mode of ordinary paging. ``pae_directory``: the top table is PAE's four PDPTEs, which carry no rights.

    ``pdptes`` are the PDPTEs as the processor holds them; empty where they are to be read at CR3. They belong to one
    value of CR3 and to no other.
    """

    is_linear: ClassVar[bool] = True

    pae_directory: bool = False
    pdptes: tuple[int, ...] = ()

    def held(self, level: Level) -> tuple[int, ...]:
        """The four PDPTEs of PAE, where they are known (SDM Vol. 3A, "PAE Paging", "PDPTE Registers")."""
        return self.pdptes if level is self.levels[0] else ()

    @property
    def from_memory(self) -> Ia32Format:
        """The same mode with every table in memory, as it is for any other value of CR3."""
        return replace(self, pdptes=()) if self.pdptes else self

    def present(self, entry: Entries) -> Entries:
        """Bit 0."""
        return (entry & PRESENT) != 0

    def rights(self, entry: Entries, level: Level) -> Entries:
        """Readable when present; W and US from bits 1 and 2; executable unless bit 63 (8-byte entries only)."""
        present = entry & PRESENT
        if self.pae_directory and level is self.levels[0]:
            return present * int(paging.Access.ALL)
        execute = ((entry >> 63) & 1) ^ 1 if self.entry_bytes == 8 else present | 1
        return present | (entry & WRITE) | (execute << 2) | ((entry & USER) << 1)

    def misconfigured(self, entry: Entries, level: Level) -> Entries:
        """Reserved bits in a present entry: address bits above MAXPHYADDR, bit 7 where no page can be mapped."""
        if self.entry_bytes == 4:
            if not level.may_be_leaf:
                return entry != entry
            return self.is_leaf(entry, level) & ((entry & _PSE36_RESERVED) != 0)
        refused = (entry & (self.reserved_address | (_PAE_RESERVED if self.pae_directory else 0))) != 0
        if self.pae_directory and level is self.levels[0]:
            return refused | ((entry & (WRITE | USER | bits.field(8, 5) | NO_EXECUTE)) != 0)
        if level.may_be_leaf:
            # Bit 12 of a large page is PAT; the other bits below the frame are reserved.
            low = bits.field(level.shift - 1, bits.PAGE_SHIFT + 1)
            return refused | (self.is_leaf(entry, level) & ((entry & low) != 0))
        if level is self.levels[-1]:
            return refused
        return refused | ((entry & paging.LARGE_PAGE) != 0)

    def frame(self, entry: Entries, level: Level) -> Entries:
        """Address of the mapped page. A 4M page of 32-bit paging takes bits 39:32 from entry bits 20:13 (PSE-36)."""
        if self.entry_bytes == 4:
            base = entry & (0xFFFFFFFF & ~(level.page_size - 1))
            return base | (((entry >> 13) & 0xFF) << 32) if level.shift == 22 else base
        return super().frame(entry, level)

    def table(self, entry: Entries) -> Entries:
        """Address of the next table."""
        return entry & 0xFFFFF000 if self.entry_bytes == 4 else super().table(entry)

    def memory_type(self, entry: Entries) -> Entries:
        """Zero: PAT, MTRRs and the entry's PWT and PCD together decide, and the first two are not in the entry."""
        return entry & 0

    def flags(self, entry: int, level: Level) -> tuple[str, ...]:
        """Name the set architectural bits beside rights and address."""
        leaf = self.is_leaf(entry, level)
        named = (*_FLAGS, ("D", DIRTY), ("G", GLOBAL)) if leaf else _FLAGS
        extra = ("NX",) if self.entry_bytes == 8 and entry & NO_EXECUTE else ()
        return tuple(name for name, mask in named if entry & mask) + extra


_PAE_LEVELS: Final = (
    Level("PDPTE", "PDPT", 30, False, 2),
    paging.PDE,
    paging.PTE,
)
_LEGACY_PTE: Final = Level("PTE", "PT", 12, False, 10)
_LEGACY_LEVELS: Final = (Level("PDE", "PD", 22, True, 10), _LEGACY_PTE)
_LEGACY_NO_PSE: Final = (Level("PDE", "PD", 22, False, 10), _LEGACY_PTE)
_PAE_ROOT: Final = bits.field(31, 5)
_LEGACY_ROOT: Final = bits.field(31, 12)


def four_level(physical_bits: int = bits.MAX_PHYSICAL_BITS, key_bits: int = 0) -> Ia32Format:
    """Return 4-level paging (48-bit linear addresses)."""
    return Ia32Format("4-level", paging.FOUR_LEVELS, physical_bits, key_bits)


def five_level(physical_bits: int = bits.MAX_PHYSICAL_BITS, key_bits: int = 0) -> Ia32Format:
    """Return 5-level paging, LA57 (57-bit linear addresses)."""
    return Ia32Format("5-level", paging.FIVE_LEVELS, physical_bits, key_bits)


def pae(physical_bits: int = bits.MAX_PHYSICAL_BITS, pdptes: tuple[int, ...] = ()) -> Ia32Format:
    """Return PAE paging: four PDPTEs at the 32-byte aligned address in CR3, then PD and PT.

    ``pdptes`` are the four as the processor holds them: it loads them when CR3 is written, and looks at memory no more.
    """
    if len(pdptes) not in (0, 4):
        raise ValueError(f"PAE has four PDPTEs, not {len(pdptes)}")
    return Ia32Format("PAE", _PAE_LEVELS, physical_bits, root_mask=_PAE_ROOT, pae_directory=True, pdptes=pdptes)


def legacy(large_pages: bool = True) -> Ia32Format:
    """Return 32-bit paging with 4-byte entries; ``large_pages`` is CR4.PSE."""
    levels = _LEGACY_LEVELS if large_pages else _LEGACY_NO_PSE
    return Ia32Format("32-bit", levels, 40, entry_bytes=4, root_mask=_LEGACY_ROOT)


def guest_format(cr0: int, cr4: int, efer: int, physical_bits: int = bits.MAX_PHYSICAL_BITS) -> Ia32Format | None:
    """Return the paging mode that these registers select; None when paging is off.

    Long mode is taken from EFER.LMA, or from EFER.LME where a hypervisor left LMA stale. A control structure whose
    EFER was never saved reads 0 there: with PAE on, the caller must then decide by what parses.
    Source: SDM Vol. 3A, "Four Paging Modes".
    """
    if not cr0 & CR0_PG:
        return None
    if not cr4 & CR4_PAE:
        return legacy(bool(cr4 & CR4_PSE))
    if efer & (EFER_LMA | EFER_LME):
        return five_level(physical_bits) if cr4 & CR4_LA57 else four_level(physical_bits)
    return pae(physical_bits)
