"""Descriptor tables as proof: a GDT whose TSS descriptor holds the very TR base that the page holds.

A VMCS holds GDTR base, TR selector and TR base, and memory holds the GDT: what agrees in all three is no accident.
Source: Intel SDM Vol. 3A, "Segment Descriptors", "TSS Descriptor in 64-bit mode", "64-Bit Mode IDT".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from volatility3_ept.core.infer_view import Paging
from volatility3_ept.spec import bits

#: Descriptors of a GDT that are looked at. Windows and Linux use 16.
_GDT_BYTES: Final = 0x100
_PAGE_FAULT: Final = 14


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One descriptor of a GDT: its access byte and flags as the access rights of a VMCS have them, and its base."""

    rights: int
    base: int

    @property
    def is_code(self) -> bool:
        """A code segment that is present."""
        return self.rights & 0x98 == 0x98

    @property
    def is_data(self) -> bool:
        """A data segment that is present."""
        return self.rights & 0x98 == 0x90

    @property
    def is_task(self) -> bool:
        """A TSS that is present, available or busy."""
        return self.rights & 0x9D == 0x89


@dataclass(frozen=True)
class Gdt:
    """The first descriptors at an address that may be a GDT."""

    address: int
    raw: bytes

    @classmethod
    def at(cls, paging: Paging, address: int) -> Gdt | None:
        """Read a GDT; None where it does not translate or its first descriptor is not null."""
        raw = paging.read(address, _GDT_BYTES) if address % 8 == 0 else None
        return cls(address, raw) if raw is not None and not any(raw[:8]) else None

    def descriptor(self, selector: int) -> Descriptor | None:
        """Return the descriptor that a selector names; None for a null one, an LDT's, or one beyond the table."""
        at = selector & ~7
        if not at or selector & 4 or at + 16 > len(self.raw):
            return None
        low, high = (int.from_bytes(self.raw[at + 8 * i : at + 8 * i + 8], "little") for i in range(2))
        rights = low >> 40 & 0xF0FF
        base = low >> 16 & 0xFF_FFFF | (low >> 56) << 24
        found = Descriptor(rights, base)
        return Descriptor(rights, base | (high & 0xFFFF_FFFF) << 32) if found.is_task else found

    def tasks(self) -> dict[int, int]:
        """Return the TSS descriptors, selector to base."""
        found = {}
        for selector in range(8, len(self.raw) - 8, 8):
            item = self.descriptor(selector)
            if item is not None and item.is_task and item.base:
                found[selector] = item.base
        return found


def is_idt(paging: Paging, address: int) -> bool:
    """Tell whether a 64-bit interrupt descriptor table lies at an address: its page-fault handler must be code."""
    raw = paging.read(address + 16 * _PAGE_FAULT, 16) if address % 8 == 0 else None
    if raw is None:
        return False
    low, high = (int.from_bytes(raw[i : i + 8], "little") for i in (0, 8))
    handler = low & 0xFFFF | (low >> 48) << 16 | (high & bits.field(31, 0)) << 32
    present = low >> 40 & 0x9E == 0x8E  # an interrupt or trap gate
    return bool(present) and paging.executes(handler)
