"""EPT paging-structure entries and the EPT pointer.

Source: Intel SDM Vol. 3C, "The Extended Page Table Mechanism (EPT)", "EPT Misconfigurations", "EPT and Memory
Typing", "Mode-Based Execute Control for EPT", "Sub-Page Write Permissions", "Guest-Physical Shadow-Stack Access".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from volatility3_ept.spec import bits, paging
from volatility3_ept.spec.paging import Entries, Level

READ: Final = bits.bit(0)
WRITE: Final = bits.bit(1)
EXECUTE: Final = bits.bit(2)
RWX: Final = READ | WRITE | EXECUTE
MEMORY_TYPE_SHIFT: Final = 3
MEMORY_TYPE: Final = bits.field(5, 3)
#: Ignore PAT: the leaf's memory type alone counts.
IPAT: Final = bits.bit(6)
ACCESSED: Final = bits.bit(8)
DIRTY: Final = bits.bit(9)
#: With mode-based execute control: execute access from user-mode linear addresses; then bit 2 is supervisor only.
USER_EXECUTE: Final = bits.bit(10)
VERIFY_GUEST_PAGING: Final = bits.bit(57)
PAGING_WRITE: Final = bits.bit(58)
SUPERVISOR_SHADOW_STACK: Final = bits.bit(60)
SUB_PAGE_WRITE: Final = bits.bit(61)
SUPPRESS_VE: Final = bits.bit(63)

_LEAF_FLAGS: Final = (
    ("IPAT", IPAT),
    ("A", ACCESSED),
    ("D", DIRTY),
    ("UX", USER_EXECUTE),
    ("VGP", VERIFY_GUEST_PAGING),
    ("PW", PAGING_WRITE),
    ("SSS", SUPERVISOR_SHADOW_STACK),
    ("SPP", SUB_PAGE_WRITE),
    ("SVE", SUPPRESS_VE),
)
_TABLE_FLAGS: Final = (("A", ACCESSED), ("UX", USER_EXECUTE))
#: Bits that only a leaf may use; the processor refuses a table entry that sets one of them (bit 7 apart).
_TABLE_RESERVED: Final = bits.field(6, 3)


@dataclass(frozen=True)
class EptFormat(paging.Format):
    """EPT of 4 or 5 levels.

    ``mode_based_execute`` is the VM-execution control of that name: only then does bit 10 make an entry present
    and give a right. ``execute_only`` is IA32_VMX_EPT_VPID_CAP bit 0: every processor since Nehalem has it, and
    without it an execute-only entry is a misconfiguration.
    """

    mode_based_execute: bool = False
    execute_only: bool = True

    @property
    def _present_bits(self) -> int:
        return RWX | (USER_EXECUTE if self.mode_based_execute else 0)

    def present(self, entry: Entries) -> Entries:
        """Any of R, W and X (and user execute, where the control is on)."""
        return (entry & self._present_bits) != 0

    def rights(self, entry: Entries, level: Level) -> Entries:
        """R, W, X from bits 2:0; the user right from bit 10 with mode-based execute control, else as X."""
        user = (entry >> 10) & 1 if self.mode_based_execute else (entry >> 2) & 1
        return (entry & RWX) | (user << 3)

    def misconfigured(self, entry: Entries, level: Level) -> Entries:
        """Rights that cannot be, reserved bits, or a reserved memory type (SDM, "EPT Misconfigurations")."""
        refused = (entry & (READ | WRITE)) == WRITE
        refused = refused | ((entry & self.reserved_address) != 0)
        if not self.execute_only:
            executes = (entry & (self._present_bits & ~(READ | WRITE))) != 0
            refused = refused | (executes & ((entry & READ) == 0))
        return refused | self._bad_layout(entry, level)

    def _bad_layout(self, entry: Entries, level: Level) -> Entries:
        """Reserved bits that depend on the level and on whether the entry maps a page."""
        leaf = self.is_leaf(entry, level)
        memory_type = (entry & MEMORY_TYPE) >> MEMORY_TYPE_SHIFT
        bad_type = (memory_type == 2) | (memory_type == 3) | (memory_type == 7)
        below_frame = bits.field(level.shift - 1, bits.PAGE_SHIFT)
        bad_leaf = bad_type | ((entry & below_frame) != 0)
        reserved = _TABLE_RESERVED if level.may_be_leaf else _TABLE_RESERVED | paging.LARGE_PAGE
        bad_table = (entry & reserved) != 0
        return (leaf & bad_leaf) | ((leaf ^ True) & bad_table)

    def memory_type(self, entry: Entries) -> Entries:
        """Bits 5:3, and IPAT as bit 3 of the answer."""
        return (entry >> MEMORY_TYPE_SHIFT) & 0xF

    def flags(self, entry: int, level: Level) -> tuple[str, ...]:
        """Name the set architectural bits of a leaf or of a table entry."""
        named = _LEAF_FLAGS if self.is_leaf(entry, level) else _TABLE_FLAGS
        return tuple(name for name, mask in named if entry & mask)


EPT_4: Final = EptFormat("EPT, 4 levels", paging.FOUR_LEVELS)
EPT_5: Final = EptFormat("EPT, 5 levels", paging.FIVE_LEVELS)


@dataclass(frozen=True, slots=True)
class Eptp:
    """The EPT pointer, VMCS field 201AH (SDM Vol. 3C, "Extended-Page-Table Pointer (EPTP)")."""

    raw: int

    @property
    def memory_type(self) -> int:
        """Memory type of the tables themselves, bits 2:0: 0 (UC) or 6 (WB)."""
        return self.raw & 7

    @property
    def levels(self) -> int:
        """Number of levels: the page-walk length of bits 5:3, plus one."""
        return (self.raw >> 3 & 7) + 1

    @property
    def access_dirty(self) -> bool:
        """Bit 6: the processor keeps accessed and dirty flags."""
        return bool(self.raw & bits.bit(6))

    @property
    def shadow_stack(self) -> bool:
        """Bit 7: supervisor shadow-stack pages are enforced."""
        return bool(self.raw & bits.bit(7))

    @property
    def root_hpa(self) -> int:
        """Host-physical address of the top table."""
        return self.raw & paging.FRAME

    def faults(self, physical_bits: int = bits.MAX_PHYSICAL_BITS) -> tuple[str, ...]:
        """Say why VM entry would refuse this pointer; empty when it would not."""
        return tuple(
            text
            for wrong, text in (
                (self.memory_type not in (0, 6), f"memory type {self.memory_type}"),
                (self.levels not in (4, 5), f"page-walk length {self.levels}"),
                (self.raw & bits.field(11, 8), "bits 11:8 not zero"),
                (self.raw >> physical_bits, f"bits above MAXPHYADDR {physical_bits}"),
                (not self.root_hpa, "no table address"),
            )
            if wrong
        )

    def format(self, physical_bits: int = bits.MAX_PHYSICAL_BITS, mode_based_execute: bool = False) -> EptFormat:
        """Return the format of the hierarchy that this pointer heads; ValueError for a length of 1 to 3 or above 5."""
        return ept_format(self.levels, physical_bits, mode_based_execute)


def ept_format(
    levels: int = 4, physical_bits: int = bits.MAX_PHYSICAL_BITS, mode_based_execute: bool = False
) -> EptFormat:
    """Return the EPT format with that many levels; ValueError when it is neither 4 nor 5."""
    if levels not in (4, 5):
        raise ValueError(f"EPT has 4 or 5 levels, not {levels}")
    rungs = paging.FOUR_LEVELS if levels == 4 else paging.FIVE_LEVELS
    return EptFormat(f"EPT, {levels} levels", rungs, physical_bits, mode_based_execute=mode_based_execute)
