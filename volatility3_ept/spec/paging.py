"""The common shape of every x86 paging hierarchy: levels, entries, outcomes.

A :class:`Format` says how one kind of hierarchy (EPT, NPT, a guest's own paging) reads an entry. One walker and one
traversal serve them all; what differs is in the formats (:mod:`.ept`, :mod:`.ia32e`, :mod:`.npt`).

Every predicate takes an entry as a Python ``int`` or as a numpy ``uint64`` array and answers in kind.
Source: Intel SDM Vol. 3A, "Paging", and Vol. 3C, "The Extended Page Table Mechanism (EPT)"; AMD APM Vol. 2,
"Page Translation and Protection" and "Nested Paging".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag
from typing import Any, ClassVar, Final

from volatility3_ept.spec import bits

#: An entry, or a numpy array of entries. The predicates below use operators only, so both work.
Entries = Any


class Outcome(str, Enum):
    """How a walk ends. A walk that cannot finish is a result, not an exception."""

    MAPPED = "mapped"
    NOT_PRESENT = "not present"
    MISCONFIGURED = "misconfigured"
    MMIO = "MMIO"
    UNREADABLE = "unreadable"
    OUT_OF_RANGE = "outside the capture"

    def __str__(self) -> str:
        """Return the outcome in the words that the plugins print."""
        return self.value


class Access(IntFlag):
    """Rights of an entry, or of a whole walk (then the AND over all levels)."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE = 4
    #: EPT with mode-based execute control: user-mode execution. Elsewhere: the user/supervisor bit.
    USER = 8
    ALL = 15

    def letters(self) -> str:
        """Return ``RWX`` with a dash for each right that is missing; the user bit is left out."""
        return "".join(
            letter if right & self else "-"
            for letter, right in (("R", Access.READ), ("W", Access.WRITE), ("X", Access.EXECUTE))
        )


class MemoryType(IntEnum):
    """EPT memory types, bits 5:3 of a leaf. 2, 3 and 7 are reserved (SDM Vol. 3C, "EPT and Memory Typing")."""

    UC = 0
    WC = 1
    WT = 4
    WP = 5
    WB = 6


class EntryKind(IntEnum):
    """What an entry is, before its address is followed."""

    ABSENT = 0
    TABLE = 1
    LEAF = 2
    MISCONFIGURED = 3
    MMIO = 4


#: Entry bits that are never an address in any format with 8-byte entries: 11:0 and 63:52.
FRAME: Final = bits.field(51, 12)


@dataclass(frozen=True, slots=True)
class Level:
    """One rung of a walk.

    ``shift`` is the number of address bits that an entry at this level leaves open (12 for a PTE); ``index_bits``
    says how many bits select the entry. ``may_be_leaf``: an entry here can map a page (by bit 7; a PTE always does).
    """

    name: str
    table: str
    shift: int
    may_be_leaf: bool
    index_bits: int = 9

    @property
    def page_size(self) -> int:
        """Bytes that one entry of this level covers."""
        return 1 << self.shift

    @property
    def entries(self) -> int:
        """Number of entries in a table of this level."""
        return 1 << self.index_bits

    def index(self, address: int) -> int:
        """Return the index of the entry that translates ``address``."""
        return address >> self.shift & (self.entries - 1)


@dataclass(frozen=True)
class Format(ABC):
    """How to read the entries of one kind of hierarchy.

    ``physical_bits`` is MAXPHYADDR: address bits at and above it are reserved (52 when it is not known, and then no
    address bit is called reserved). ``key_bits`` are address bits that carry an encryption key or the C-bit: they
    are stripped, never followed.
    """

    #: The addresses that it translates are linear: the upper half of them is sign-extended to 64 bits.
    is_linear: ClassVar[bool] = False

    name: str
    levels: tuple[Level, ...]
    physical_bits: int = bits.MAX_PHYSICAL_BITS
    key_bits: int = 0
    entry_bytes: int = 8
    root_mask: int = field(default=FRAME)

    @property
    def address_bits(self) -> int:
        """Width of the addresses that this hierarchy translates."""
        return self.levels[0].shift + self.levels[0].index_bits

    @property
    def table_bytes(self) -> int:
        """Size of the largest table of the hierarchy, in bytes."""
        return self.entry_bytes << max(level.index_bits for level in self.levels)

    @property
    def reserved_address(self) -> int:
        """Mask of the address bits that this processor reserves: MAXPHYADDR and above, without the key bits."""
        return bits.field(51, self.physical_bits) & ~self.key_bits

    def root_hpa(self, root: int) -> int:
        """Return the address of the top table from the raw root register (EPTP, nCR3, CR3)."""
        return root & self.root_mask & ~self.key_bits & ~self.reserved_address

    @abstractmethod
    def present(self, entry: Entries) -> Entries:
        """Tell whether the hardware takes the entry as present."""

    @abstractmethod
    def rights(self, entry: Entries, level: Level) -> Entries:
        """Return the entry's own rights as :class:`Access` bits."""

    @abstractmethod
    def misconfigured(self, entry: Entries, level: Level) -> Entries:
        """Tell whether the hardware refuses a present entry (EPT misconfiguration, reserved-bit fault)."""

    @abstractmethod
    def memory_type(self, entry: Entries) -> Entries:
        """Return bits 5:3 and IPAT as ``type | ipat << 3`` for a leaf; 0 where the format has no such bits."""

    @abstractmethod
    def flags(self, entry: int, level: Level) -> tuple[str, ...]:
        """Name the architectural bits that are set, beside the rights and the address."""

    def held(self, level: Level) -> tuple[int, ...]:
        """Return the entries of this level that the processor holds in registers; empty where it reads memory."""
        return ()

    def is_leaf(self, entry: Entries, level: Level) -> Entries:
        """Tell whether a present entry maps a page at this level."""
        if level is self.levels[-1]:
            return entry == entry
        if not level.may_be_leaf:
            return entry != entry
        return (entry & LARGE_PAGE) != 0

    def frame(self, entry: Entries, level: Level) -> Entries:
        """Return the address of the page that a leaf maps, aligned to the level's page size."""
        return entry & (FRAME & ~self.key_bits & ~(level.page_size - 1))

    def table(self, entry: Entries) -> Entries:
        """Return the address of the table that a non-leaf entry points to."""
        return entry & (FRAME & ~self.key_bits)


#: Page size bit of a PDPTE or PDE: the entry maps a page.
LARGE_PAGE: Final = bits.bit(7)

PML5E: Final = Level("PML5E", "PML5", 48, False)
PML4E: Final = Level("PML4E", "PML4", 39, False)
PDPTE: Final = Level("PDPTE", "PDPT", 30, True)
PDE: Final = Level("PDE", "PD", 21, True)
PTE: Final = Level("PTE", "PT", 12, False)

FOUR_LEVELS: Final = (PML4E, PDPTE, PDE, PTE)
FIVE_LEVELS: Final = (PML5E, *FOUR_LEVELS)
