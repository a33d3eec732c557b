"""Capture files that can be read where they lie: which bytes of the file are which physical memory.

LiME and ELF cores say so in their headers, a raw image needs none. Everything else is for Volatility to open.

Sources: LiME, doc/README.md ("LiME Format"); ELF-64 Object File Format, "Program header table" (a ``PT_LOAD`` gives the
physical address, and with more than 65534 of them the count is in the first section header).
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

LIME_MAGIC = 0x4C694D45
_LIME = struct.Struct("<IIQQQ")
_ET_CORE, _PT_LOAD, _PN_XNUM = 4, 1, 0xFFFF
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
#: An image with one of these at its start, or such a file beside it, is not what it seems.
_OTHERS = (b"PAGE", b"AVML", b"QEVM", b"KDUMP", b"Libvirt", b"HIBR", b"hibr", b"wake", b"WAKE", b"\x1f\x8b", b"BZh",
           b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK", b"%PDF", b"QFI\xfb", b"KDMV", b"vhdxfile", b"conectix",
           b"7z\xbc\xaf", b"Rar!", b"MZ", b"SQLite", b"\x7fELF", b"\xd2\xbe\xd2\xbe", b"\xd1\xba\xd1\xba",
           b"\xd0\xbe\xd2\xbe")  # fmt: skip
_BESIDE = (".vmss", ".vmsn")
_TEXT = bytes(range(0x20, 0x7F)) + b"\t\n\r\f" + bytes(range(0x80, 0x100))


class Segment(NamedTuple):
    """A stretch of physical memory: its address, its length, and where in the file it begins."""

    start: int
    length: int
    offset: int


class Container(NamedTuple):
    """What a file holds. ``declared`` bytes are in its headers; a file that was cut holds fewer."""

    kind: str
    segments: tuple[Segment, ...]
    declared: int

    @property
    def missing(self) -> int:
        """Bytes that the headers declare and the file does not hold."""
        return self.declared - sum(segment.length for segment in self.segments)


def read(path: Path) -> Container | None:
    """Return what a file holds; None where it is, or may be, in a format that Volatility knows better."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        if head[:4] == LIME_MAGIC.to_bytes(4, "little"):
            ranges = _lime(file, size)
            return _container("LiME", ranges, size) if ranges else None
        if head[:7] == b"\x7fELF\x02\x01\x01" and head[16:18] == _ET_CORE.to_bytes(2, "little"):
            loads = _loads(file)
            return _container("ELF core", loads, size) if loads else None
        file.seek(size // 2 & ~0xFFF)
        sample = head + file.read(4096)
    beside = any(path.with_suffix(suffix).exists() for suffix in _BESIDE)
    if head.startswith(_OTHERS) or beside or size < 4096 or not sample.translate(None, _TEXT):
        return None
    return Container("raw", (Segment(0, size, 0),), -(-size // 4096) * 4096)


def _container(kind: str, declared: list[Segment], size: int) -> Container | None:
    held = (Segment(s.start, min(s.length, max(size - s.offset, 0)), s.offset) for s in declared)
    segments = tuple(sorted(segment for segment in held if segment.length))
    if any(after.start < before.start + before.length for before, after in itertools.pairwise(segments)):
        return None
    return Container(kind, segments, sum(segment.length for segment in declared))


def _lime(file: BinaryIO, size: int) -> list[Segment]:
    """Follow the headers, each in front of its range, which ends at its last byte; nothing where one is damaged."""
    found: list[Segment] = []
    offset = 0
    while offset + _LIME.size <= size:
        file.seek(offset)
        magic, version, start, last, _ = _LIME.unpack(file.read(_LIME.size))
        if magic != LIME_MAGIC or version != 1 or last < start:
            return []
        found.append(Segment(start, last - start + 1, offset + _LIME.size))
        offset += _LIME.size + last - start + 1
    return found if offset >= size else []


def _loads(file: BinaryIO) -> list[Segment]:
    file.seek(0)
    header = file.read(64)
    table, sections = struct.unpack_from("<QQ", header, 32)
    entry, count = struct.unpack_from("<HH", header, 54)
    if count == _PN_XNUM:
        file.seek(sections + 44)
        (count,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
    file.seek(table)
    rows = file.read(entry * count)
    found = []
    for at in range(0, len(rows) - _PROGRAM_HEADER.size + 1, max(entry, _PROGRAM_HEADER.size)):
        kind, _, offset, _, physical, length, _, _ = _PROGRAM_HEADER.unpack_from(rows, at)
        if kind == _PT_LOAD and length:
            found.append(Segment(physical, length, offset))
    return found
