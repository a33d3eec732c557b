"""Damage to an image: cut, flipped, emptied, shifted, holed and smeared, always the same for the same seed.

Nothing of the package is imported. Offsets are of the file; a function that needs to know where memory lies is told.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence

PAGE = 4096
Segment = tuple[int, int, int]


def flipped(data: bytearray, places: Iterable[tuple[int, int]], seed: int, count: int) -> list[int]:
    """Flip ``count`` bits within ``(offset, length)`` stretches; returns the offsets of the bytes."""
    rng = random.Random(seed)
    stretches = list(places)
    changed = []
    for _ in range(count):
        offset, length = rng.choice(stretches)
        at = offset + rng.randrange(length)
        data[at] ^= 1 << rng.randrange(8)
        changed.append(at)
    return changed


def emptied(data: bytearray, size: int, seed: int, pages: int, first: int = 0) -> list[tuple[int, int]]:
    """Fill ``pages`` stretches of ``size`` bytes with zeros, each from a multiple of 4096 on; returns them."""
    rng = random.Random(seed)
    gone = []
    for _ in range(pages):
        at = first + rng.randrange((len(data) - first - size) // PAGE) * PAGE
        data[at : at + size] = bytes(size)
        gone.append((at, size))
    return gone


def offset_of(segments: Sequence[Segment], hpa: int) -> int:
    """Return where in the file a physical address lies; ``segments`` are ``(start, length, offset)``."""
    return next(at + hpa - start for start, length, at in segments if start <= hpa < start + length)


def elf(segments: Sequence[Segment], data: bytes) -> bytes:
    """Write an ELF core of memory that lies in ``data`` as ``segments`` say, as QEMU writes it."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 4, 62, 1, 0, 64, 0, 0, 64, 56,
                         len(segments), 0, 0, 0)  # fmt: skip
    at = -(-(64 + 56 * len(segments)) // PAGE) * PAGE
    table, body = b"", b""
    for start, length, offset in segments:
        table += struct.pack("<IIQQQQQQ", 1, 7, at + len(body), 0, start, length, length, 0)
        body += data[offset : offset + length]
    return (header + table).ljust(at, b"\0") + body


def without(segments: Sequence[Segment], pages: Iterable[int]) -> list[Segment]:
    """Return segments that lack some pages, given by physical address."""
    gone = sorted(set(pages))
    left: list[Segment] = []
    for start, length, offset in segments:
        begin = start
        for page in [*(page for page in gone if start <= page < start + length), start + length]:
            if page > begin:
                left.append((begin, page - begin, offset + begin - start))
            begin = page + PAGE
    return left
