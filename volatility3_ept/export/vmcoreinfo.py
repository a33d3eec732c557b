"""A Linux guest's own VMCOREINFO note: found in its memory, and believed only where it leads to its page tables.

The kernel writes the note when it boots: its release, where its symbols are, by how much it was moved. A memory may
hold several: one of a kernel that ran before, one in a file's cache, one of a guest's guest. The right one gives the
address of ``swapper_pg_dir``, and the page table there maps itself at that address.

Sources: Linux ``kernel/vmcore_info.c``, ``include/linux/vmcore_info.h``, ``arch/x86/kernel/vmcore_info_64.c``.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from volatility3_ept.core import walk as walks
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.export import chunks
from volatility3_ept.export.cpu import note
from volatility3_ept.spec import bits, ia32e

_NAME: Final = b"VMCOREINFO"
_HEADER: Final = struct.Struct("<III12s")
_MARK: Final = _NAME + b"\0\0"
#: The kernel's own limit is a page or two.
_LARGEST: Final = 0x10000
#: Notes that are looked at; a memory that holds more was made to.
_MOST: Final = 256
#: Where 64-bit x86 kernels are linked to be: virtual addresses of symbols count from here (__START_KERNEL_map).
_KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000


@dataclass(frozen=True)
class VmCoreInfo:
    """One note. ``proof`` says why it is believed, empty where it is not."""

    gpa: int
    text: bytes
    proof: str

    @property
    def release(self) -> str:
        """The kernel's release."""
        return self.value("OSRELEASE") or ""

    def value(self, key: str) -> str | None:
        """Return the value of a line."""
        found = re.search(rf"^{re.escape(key)}=(.*)$".encode(), self.text, re.MULTILINE)
        return found[1].decode("ascii") if found else None

    def number(self, key: str, base: int) -> int | None:
        """Return a number; None where it is missing or is none."""
        try:
            return int(self.value(key) or "", base)
        except ValueError:
            return None

    def note(self) -> bytes:
        """Return it as a note of an ELF core."""
        return note(_NAME, 0, self.text)


def find(memory: HostMemory, guest_cr3: int | None = None) -> tuple[VmCoreInfo | None, tuple[str, ...]]:
    """Return the running kernel's note, and what there was beside it. ``guest_cr3`` is a vCPU's, where known.

    Kernels since 4.13 keep theirs at a page boundary; only where none is, every byte is looked at.
    """
    doubted: set[int] = set()
    for places in (_aligned, _anywhere):
        proven = []
        for found in _notes(memory, places):
            believed = VmCoreInfo(found.gpa, found.text, _proof(memory, found))
            if not believed.proof:
                doubted.add(found.gpa)
            elif guest_cr3 is None or _is_current(memory, believed, guest_cr3):
                return believed, _said(doubted)
            else:
                proven.append(believed)
        if proven:
            return proven[0], _said(doubted)
    return None, _said(doubted)


def _said(doubted: set[int]) -> tuple[str, ...]:
    if not doubted:
        return ()
    return (f"{len(doubted)} VMCOREINFO notes were not believed: their kernel's page tables are not where they say",)


def _notes(memory: HostMemory, places: Callable[[HostMemory], Iterator[int]]) -> Iterator[VmCoreInfo]:
    """Yield every well-formed note among these places."""
    candidates = (_parse(memory, gpa) for gpa in itertools.islice(places(memory), _MOST))
    return (candidate for candidate in candidates if candidate is not None)


def _aligned(memory: HostMemory) -> Iterator[int]:
    first, kind = len(_NAME) + 1, int.from_bytes(_MARK[:4], "little")
    for address, block in memory.blocks():
        heads = np.ascontiguousarray(block[:, :2]).view(np.uint32)
        for row in np.flatnonzero((heads[:, 0] == first) & (heads[:, 2] == 0) & (heads[:, 3] == kind)).tolist():
            yield address + row * bits.PAGE_SIZE


def _anywhere(memory: HostMemory) -> Iterator[int]:
    for start, length in chunks.stretches(memory):
        before = b""
        for gpa, data, _ in chunks.chunks(memory, start, length):
            text = before + data.tobytes()
            position = text.find(_MARK)
            while position >= 0:
                yield gpa - len(before) + position - 12
                position = text.find(_MARK, position + 1)
            before = text[-len(_MARK) + 1 :]


def _parse(memory: HostMemory, gpa: int) -> VmCoreInfo | None:
    """Return the note at an address, None where there is none."""
    head = memory.read(gpa, _HEADER.size) if gpa >= 0 else None
    if head is None:
        return None
    name_size, size, kind, name = _HEADER.unpack(head)
    if (name_size, kind, name) != (len(_NAME) + 1, 0, _MARK) or not 0 < size <= _LARGEST:
        return None
    text = memory.read(gpa + _HEADER.size, size)
    if text is None or not re.fullmatch(rb"OSRELEASE=[!-~]{1,64}\n(?:[ -<>-~]+=[ -~]*\n)*\0*", text):
        return None
    return VmCoreInfo(gpa, text.rstrip(b"\0"), "")


def _proof(memory: HostMemory, found: VmCoreInfo) -> str:
    """Say why a note is believed: the kernel's top table maps itself to where phys_base says that it is."""
    table, moved = found.number("SYMBOL(swapper_pg_dir)", 16), found.number("NUMBER(phys_base)", 0)
    if table is None or moved is None or not _KERNEL_MAP <= table < 1 << 64:
        return ""
    gpa = table - _KERNEL_MAP + moved
    if not 0 <= gpa < 1 << bits.MAX_PHYSICAL_BITS or gpa % bits.PAGE_SIZE:
        return ""
    fmt = ia32e.five_level() if found.number("NUMBER(pgtable_l5_enabled)", 0) else ia32e.four_level()
    if walks.walk(memory, fmt, gpa, table).target != gpa:
        return ""
    return f"swapper_pg_dir at GPA {gpa:#x} maps itself at {table:#x} ({fmt.name})"


def _is_current(memory: HostMemory, found: VmCoreInfo, cr3: int) -> bool:
    """Tell whether a vCPU's own tables map the kernel there. Not in user mode with page-table isolation."""
    table, moved = found.number("SYMBOL(swapper_pg_dir)", 16) or 0, found.number("NUMBER(phys_base)", 0) or 0
    fmt = ia32e.five_level() if found.number("NUMBER(pgtable_l5_enabled)", 0) else ia32e.four_level()
    return walks.walk(memory, fmt, cr3, table).target == table - _KERNEL_MAP + moved
