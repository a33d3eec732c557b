"""Bits and fields, numbered as the manuals number them (bit 0 is the least significant)."""

from __future__ import annotations

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
#: The widest physical address that any x86 paging-structure entry can hold (SDM Vol. 3A, "Paging").
MAX_PHYSICAL_BITS = 52


def bit(number: int) -> int:
    """Return the mask of one bit."""
    return 1 << number


def field(high: int, low: int) -> int:
    """Return the mask of the bits ``high:low``, both included; 0 when ``high < low``."""
    return ((1 << (high + 1)) - 1) & ~((1 << low) - 1) if high >= low else 0


def is_canonical(address: int, width: int = 48) -> bool:
    """Tell whether a 64-bit linear address is canonical for ``width`` implemented bits (48, or 57 with LA57)."""
    top = address >> (width - 1)
    return top == 0 or top == (1 << (65 - width)) - 1


def size_name(size_bytes: int) -> str:
    """Return a page or range size as the field writes it: ``4K``, ``2M``, ``1G``, ``80.5M``."""
    for unit, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if size_bytes >= 1 << shift:
            whole, rest = divmod(size_bytes, 1 << shift)
            return f"{whole}{unit}" if not rest else f"{size_bytes / (1 << shift):.1f}{unit}"
    return f"{size_bytes}B"
