"""Capture files that can be read where they lie: which bytes of the file are which physical memory.

LiME and ELF cores say so in their headers, a raw image needs none. Everything else is for Volatility to open.

Sources: LiME, doc/README.md ("LiME Format"); ELF-64 Object File Format, "Program header table" (a ``PT_LOAD`` gives the
physical address, and with more than 65534 of them the count is in the first section header).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from volatility3_ept.spec.bits import MAX_PHYSICAL_BITS

LIME_MAGIC = 0x4C694D45
_LIME = struct.Struct("<IIQQQ")
_ET_CORE, _PT_LOAD, _PN_XNUM = 4, 1, 0xFFFF
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
#: An image with one of these at its start, or such a file beside it, is not what it seems.
_OTHERS = (b"PAGE", b"AVML", b"QEVM", b"KDUMP", b"makedumpfile", b"Libvirt", b"HIBR", b"hibr", b"wake", b"WAKE",
           b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK", b"%PDF", b"QFI\xfb", b"KDMV", b"vhdxfile",
           b"conectix", b"7z\xbc\xaf", b"Rar!", b"MZ", b"SQLite", b"\x7fELF", b"\xd2\xbe\xd2\xbe",
           b"\xd1\xba\xd1\xba", b"\xd0\xbe\xd2\xbe")  # fmt: skip
_BESIDE = (".vmss", ".vmsn")
_TEXT = bytes(range(0x20, 0x7F)) + b"\t\n\r\f" + bytes(range(0x80, 0x100))
_TEXT_PAGES = 64


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
            loads = _loads(file, size)
            return _container("ELF core", loads, size) if loads else None

        def page(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        text = is_text(page, size)
    beside = any(path.with_suffix(suffix).exists() for suffix in _BESIDE)
    if head.startswith(_OTHERS) or beside or size < 4096 or text:
        return None
    return Container("raw", (Segment(0, size, 0),), -(-size // 4096) * 4096)


def is_text(read: Callable[[int, int], bytes | None], size: int) -> bool:
    """Tell whether a file holds nothing but text, by 64 pages from its first to its last.

    ``read(offset, length)`` gives its bytes. A page of memory may well be text, and so may some.
    """
    offsets = sorted({size * part // _TEXT_PAGES & ~0xFFF for part in range(_TEXT_PAGES)} | {max(size - 4096, 0)})
    return all(not (read(at, min(4096, size - at)) or b"\0").translate(None, _TEXT) for at in offsets)


def _container(kind: str, declared: list[Segment], size: int) -> Container | None:
    held = (Segment(s.start, min(s.length, max(size - s.offset, 0)), s.offset) for s in declared)
    segments = tuple(sorted(segment for segment in held if segment.length))
    if any(after.start < before.start + before.length for before, after in itertools.pairwise(segments)):
        return None
    if segments and (segments[-1].start + segments[-1].length) >> MAX_PHYSICAL_BITS:
        return None  # No processor has such addresses.
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


def left_out(path: Path) -> int:
    """Return how many bytes of memory an ELF core declares beyond what its segments have in the file.

    makedumpfile (``-E``) begins a segment at the memory that it keeps and lets it end after what it leaves out. 0 for
    any other file, and where segments are either whole or empty.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(18)
        if head[:7] != b"\x7fELF\x02\x01\x01" or head[16:18] != _ET_CORE.to_bytes(2, "little"):
            return 0
        rows = [row for row in _program_headers(file, size) if row[0] == _PT_LOAD]
    return sum(row[6] - row[5] for row in rows if 0 < row[5] < row[6])


def _loads(file: BinaryIO, size: int) -> list[Segment]:
    return [Segment(row[4], row[5], row[2]) for row in _program_headers(file, size) if row[0] == _PT_LOAD and row[5]]


def _program_headers(file: BinaryIO, size: int) -> Iterator[tuple[int, ...]]:
    """Yield type, flags, offset, virtual and physical address, size in the file and in memory, alignment."""
    header = _part(file, size, 0, 64)
    if len(header) < 64:
        return
    table, sections = struct.unpack_from("<QQ", header, 32)
    entry, count = struct.unpack_from("<HH", header, 54)
    if count == _PN_XNUM:
        (count,) = struct.unpack("<I", _part(file, size, sections + 44, 4).ljust(4, b"\0"))
    rows = _part(file, size, table, entry * count)
    for at in range(0, len(rows) - _PROGRAM_HEADER.size + 1, max(entry, _PROGRAM_HEADER.size)):
        yield _PROGRAM_HEADER.unpack_from(rows, at)


def _part(file: BinaryIO, size: int, offset: int, length: int) -> bytes:
    """Return what there is of a part of the file: headers may name any place, and any length."""
    if offset >= size:
        return b""
    file.seek(offset)
    return file.read(min(length, size - offset))
