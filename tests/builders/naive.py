"""A second walker, from the manuals alone: it shares nothing with the one under test."""

from __future__ import annotations

import struct

from builders.paging import HostRam

#: ``(outcome, target, "RWX" bits, page size)``; the outcome of a page, in the capture or not, is "page".
End = tuple[str, int | None, int, int]


def _read(ram: HostRam, address: int) -> int | None:
    page = ram.pages.get(address & ~0xFFF)
    return None if page is None else struct.unpack_from("<Q", page, address & 0xFFF)[0]


def ept(ram: HostRam, root: int, gpa: int, shifts: list[int]) -> End:
    """Walk an EPT as SDM Vol. 3C describes it."""
    table, rights = root & 0x000F_FFFF_FFFF_F000, 0b111
    for shift in shifts:
        entry = _read(ram, table + (gpa >> shift) % 512 * 8)
        if entry is None:
            return "unreadable", None, 0, 0
        own, kind = entry % 8, entry // 8 % 8
        if own == 0:
            return "not present", None, 0, 0
        if own == 0b110 and entry % (1 << 31) // 4096 == (gpa >> shift << shift) % (1 << 31) // 4096:
            return "MMIO", None, 0, 0
        if own == 0b010 and kind == 7:
            return "MMIO", None, 0, 0
        if own in (0b010, 0b110):
            return "misconfigured", None, 0, 0
        rights &= own
        pointed = entry // 4096 % (1 << 40) * 4096
        if shift == 12 or (shift in (21, 30) and entry // 128 % 2):
            if kind in (2, 3, 7) or pointed % (1 << shift):
                return "misconfigured", None, 0, 0
            return "page", pointed + gpa % (1 << shift), rights, 1 << shift
        if entry // 8 % 16 or (shift >= 39 and entry // 128 % 2):
            return "misconfigured", None, 0, 0
        table = pointed
    raise ValueError("the last shift is 12")


def npt(ram: HostRam, root: int, gpa: int, shifts: list[int]) -> End:
    """The same as AMD's APM Vol. 2 describes it, for a nested walk with MAXPHYADDR unknown."""
    table, writable, user, executable = root & 0x000F_FFFF_FFFF_F000, True, True, True
    for shift in shifts:
        entry = _read(ram, table + (gpa >> shift) % 512 * 8)
        if entry is None:
            return "unreadable", None, 0, 0
        if entry % 2 == 0:
            return "not present", None, 0, 0
        if entry >> 51 & 1 and entry % (1 << 31) // 4096 == (gpa >> shift << shift) % (1 << 31) // 4096:
            return "MMIO", None, 0, 0
        writable &= bool(entry & 2)
        user &= bool(entry & 4)
        executable &= entry >> 63 == 0
        pointed = entry // 4096 % (1 << 40) * 4096
        large = bool(entry // 128 % 2)
        if shift == 12 or (shift in (21, 30) and large):
            if shift > 12 and pointed // 8192 * 8192 % (1 << shift):
                return "misconfigured", None, 0, 0
            rights = 1 | writable << 1 | executable << 2 if user else 0
            return "page", pointed >> shift << shift | gpa % (1 << shift), rights, 1 << shift
        if shift >= 39 and large:
            return "misconfigured", None, 0, 0
        table = pointed
    raise ValueError("the last shift is 12")
