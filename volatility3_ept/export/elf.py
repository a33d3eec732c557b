"""The front of an ELF core of a machine: header, program headers, notes, in the order in which QEMU writes them.

``crash`` takes the first program header for the notes, the second for memory, and everything before the latter's
offset for the header; p_align 0 tells it that this is a dump of a kernel. gdb reads addresses from p_vaddr, which is
the guest-physical one as in QEMU's dumps without paging; drgn, crash and Volatility take p_paddr.

Sources: ELF-64 Object File Format; QEMU ``dump/dump.c``; crash ``netdump.c``; drgn ``libdrgn/program.c``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from volatility3_ept.spec.bits import PAGE_SIZE

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_CORE, _X86_64, _LOAD, _NOTE = 4, 62, 1, 4
#: e_phnum of a file with more program headers than that field can hold: their number is in the first section header.
_MANY: Final = 0xFFFF


def front(notes: bytes, present: Sequence[tuple[int, int]]) -> bytes:
    """Return everything before the memory, which then follows stretch by stretch, from a page boundary on."""
    count = len(present) + bool(notes)
    many = count >= _MANY
    table = _HEADER.size + count * _PROGRAM.size
    notes_at = table + many * _SECTION.size
    memory_at = -(-(notes_at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    programs = [_PROGRAM.pack(_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 0)] if notes else []
    offset = memory_at
    for gpa, length in present:
        programs.append(_PROGRAM.pack(_LOAD, 0, offset, gpa, gpa, length, length, 0))
        offset += length
    head = _HEADER.pack(
        b"\x7fELF\x02\x01\x01", _CORE, _X86_64, 1, 0, _HEADER.size, table if many else 0, 0, _HEADER.size,
        _PROGRAM.size, min(count, _MANY), _SECTION.size if many else 0, int(many), 0,
    )  # fmt: skip
    section = _SECTION.pack(0, 0, 0, 0, 0, 0, 0, count, 0, 0) if many else b""
    return (head + b"".join(programs) + section + notes).ljust(memory_at, b"\0")


def is_beyond_old_readers(present: Sequence[tuple[int, int]]) -> bool:
    """Tell whether a reader must know the section header that counts more than 65,534 program headers."""
    return len(present) + 1 >= _MANY
