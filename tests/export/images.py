"""Readers of the written formats, from the formats' own descriptions: nothing of the package is imported here."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

PAGE = 4096


def lime(path: Path) -> dict[int, bytes]:
    """Return the ranges of a LiME file by first address."""
    data, position, found = path.read_bytes(), 0, {}
    while position < len(data):
        magic, version, first, last, reserved = struct.unpack_from("<4sIQQQ", data, position)
        assert (magic, version, reserved) == (b"EMiL", 1, 0)
        found[first] = data[position + 32 : position + 32 + last - first + 1]
        position += 32 + last - first + 1
    assert position == len(data)
    return found


def elf(path: Path) -> tuple[dict[int, bytes], list[tuple[bytes, int, bytes]]]:
    """Return the memory of an ELF core by physical address, and its notes as ``(name, type, body)``."""
    data = path.read_bytes()
    assert data[:7] == b"\x7fELF\x02\x01\x01"
    assert struct.unpack_from("<HHI", data, 16) == (4, 62, 1)
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    if count == 0xFFFF:
        (section,) = struct.unpack_from("<Q", data, 40)
        (count,) = struct.unpack_from("<I", data, section + 44)
    memory, notes = {}, []
    for number in range(count):
        kind, _, offset, virtual, physical, in_file, in_memory, align = struct.unpack_from(
            "<IIQQQQQQ", data, table + number * size
        )
        assert in_file == in_memory
        if kind == 1:
            assert (virtual, align) == (physical, 0)
            memory[physical] = data[offset : offset + in_file]
        elif kind == 4:
            notes += _notes(data[offset : offset + in_file])
    return memory, notes


def _notes(data: bytes) -> list[tuple[bytes, int, bytes]]:
    found = []
    while data:
        name, body, kind = struct.unpack_from("<III", data)
        start = 12 + -(-name // 4) * 4
        found.append((data[12 : 12 + name - 1], kind, data[start : start + body]))
        assert len(data[start : start + body]) == body
        data = data[start + -(-body // 4) * 4 :]
    return found


def pages(ranges: dict[int, bytes]) -> dict[int, str]:
    """Return the SHA-256 of each page by address."""
    return {
        start + at: hashlib.sha256(data[at : at + PAGE]).hexdigest()
        for start, data in ranges.items()
        for at in range(0, len(data), PAGE)
    }


def extents(path: Path) -> list[tuple[int, int]]:
    """Return the stretches ``(start, end)`` of a file that take space on the disk."""
    found, position, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, position))
    return found
