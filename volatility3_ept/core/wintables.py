"""Top tables of Windows by what is in them: an entry that maps the table itself, and the page that all processes share.

Windows reaches its page tables through that entry; since Windows 10 its index is random. Volatility looks for the same
in a few ranges of physical memory, which fit the machines of its test images; a guest's may be anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from volatility3_ept.core.gva import Space
from volatility3_ept.core.memory import HostMemory, Words
from volatility3_ept.spec import bits
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.ia32e import PRESENT, Ia32Format

#: KUSER_SHARED_DATA: one page at a fixed address of every address space (``ntddk.h``), and fields that never moved.
KUSER: Final = 0xFFFF_F780_0000_0000
_MAJOR, _MINOR, _BUILD = 0x26C, 0x270, 0x260
_MAJORS: Final = (5, 6, 10)
#: Top tables that are tried: each process has one, and any of them shows the kernel.
_MAX_TRIED: Final = 64
#: Pages that are looked at together.
_BLOCK: Final = 512
_FRAME: Final = np.uint64(bits.field(51, 12))
_LARGE: Final = np.uint64(1 << 7)


def version(space: Space) -> str:
    """Return the version that the shared page names, ``10.0.19041``; empty where it is not mapped or says nonsense.

    The build number is there since Windows 10; before, the field was reserved.
    """
    major, minor = space.number(KUSER + _MAJOR, 4), space.number(KUSER + _MINOR, 4)
    if major not in _MAJORS or minor > 9:
        return ""
    build = space.number(KUSER + _BUILD, 4) & 0xFFFF
    return f"{major}.{minor}.{build}" if build and major >= 10 else f"{major}.{minor}"


def spaces(memory: HostMemory, fmt: Ia32Format, ranges: Sequence[tuple[int, int]] | None = None) -> Iterator[Space]:
    """Yield the address spaces whose top table maps itself and leads to the shared page, ascending by address.

    ``ranges`` are starts and lengths, guest-physical, to look in, one after the other; without them all memory. 4-level
    paging only: 32-bit tables have their self-reference in a table below the top one.
    """
    if len(fmt.levels) != 4:
        return
    for address in itertools.islice(_self_mapped(memory, ranges), _MAX_TRIED):
        space = Space(memory, fmt, address)
        if version(space):
            yield space


def _self_mapped(memory: HostMemory, ranges: Sequence[tuple[int, int]] | None) -> Iterator[int]:
    for start, length in [(0, memory.top)] if ranges is None else ranges:
        low = np.clip(memory.starts, start, start + length)
        high = np.clip(memory.starts + memory.lengths, start, start + length)
        held = high > low
        part = memory if ranges is None else memory.remap(low[held], (high - low)[held], low[held])
        for address, rows in part.blocks(_BLOCK):
            pages = np.arange(address, address + len(rows) * PAGE_SIZE, PAGE_SIZE, dtype=np.uint64)
            # Few pages hold their own address at all; only these are looked at further.
            named = np.flatnonzero((((rows ^ pages[:, None]) & _FRAME) == 0).any(axis=1))
            yield from pages[named[_maps_itself(rows[named], pages[named])]].tolist()


def _maps_itself(rows: Words, pages: Words) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Tell which pages have exactly one present entry for their own address, in the upper half, and no large page."""
    present = (rows & np.uint64(PRESENT)) != 0
    own = present & ((rows & _FRAME) == pages[:, None])
    large = (present & ((rows & _LARGE) != 0)).any(axis=1)
    found: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = (
        (own.sum(axis=1) == 1) & own[:, 256:].any(axis=1) & ~large & (pages != 0)
    )
    return found
