"""makedumpfile's compressed dump (kdump-compressed, ``KDUMP``): which pages it holds, and where.

Behind two headers stand two bitmaps, one bit per page frame: the first says which frames are memory, the second which
of these were dumped. The dumped pages follow as a table of descriptors in the order of their frames. Pages of zeros
are dumped, whatever the dump level: they share one descriptor's data. What the dump level left out is in neither: such
a page is absent, and what was in it cannot be known.

Nothing that is not written counts as there. A dump that was cut, or that did not fit on its disk, has descriptors
without data.

Source: makedumpfile, ``IMPLEMENTATION``, ``diskdump_mod.h`` (``disk_dump_header``, ``kdump_sub_header``,
``page_desc_t``) and ``makedumpfile.c`` (``write_kdump_pages``). QEMU's ``dump-guest-memory -z`` writes the same
(``dump/dump.c``), with two equal bitmaps.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from volatility3_ept.core import flattened
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.spec import bits

SIGNATURE: Final = b"KDUMP   "
#: Bytes of a file that tell the format: in a flattened one the signature follows a block and the head of a write.
HEAD: Final = 4096 + 16 + len(SIGNATURE)
#: Signature, version, five names of utsname, the machine's name, a domain, time, status, block size, blocks of the
#: second header and of the bitmaps, max_mapnr (32 bits), three counts, the current CPU, CPUs.
_HEADER: Final = struct.Struct("<8si260x65s65x6x16xIiiIIIIIIi")
#: phys_base, dump level, split, start and end frame, VMCOREINFO, notes, erased data, the same frames and max_mapnr.
_SUB_HEADER: Final = struct.Struct("<Qii2Q6Q3Q")
#: In both the header's status and a descriptor's flags: how data is compressed.
ZLIB: Final = 0x1
METHODS: Final = {ZLIB: "zlib", 0x2: "lzo", 0x4: "snappy", 0x20: "zstd"}
_INCOMPLETE: Final = 0x8
#: The bit of a dump level that leaves out what processes have mapped (``DL_EXCLUDE_USER_DATA``).
_USER_DATA: Final = 0x8
DESCRIPTOR: Final = np.dtype([("offset", "<i8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])
#: Bytes of a bitmap that are worked on together: 2 Mi pages.
_BLOCK: Final = 1 << 18


class KdumpError(ValueError):
    """The file is in the format, and cannot be read. The message ends a sentence that begins with the file."""


@dataclass(frozen=True)
class Kdump:
    """A dump. ``file`` is the dump's file, rearranged where it was flattened.

    ``starts`` (physical addresses), ``lengths`` (bytes) and ``ranks`` (of the first page of each among all dumped
    pages) are parallel and say what can be read. Counts are of pages: ``memory`` that the machine had, ``dumped`` of
    it, ``unwritten`` pages that are dumped by the bitmap while their data is not in the file. ``methods`` are the
    compressions in use.
    """

    file: HostMemory
    descriptors: int
    level: int
    starts: Int64
    lengths: Int64
    ranks: Int64
    memory: int
    dumped: int
    unwritten: int
    methods: frozenset[str]
    incomplete: bool

    @property
    def excluded(self) -> int:
        """Pages of memory that were left out."""
        return self.memory - self.dumped

    def describe(self) -> str:
        """Return what the dump lacks, for a person; empty when it lacks nothing."""
        parts = []
        if self.excluded:
            size = bits.size_name(self.excluded * bits.PAGE_SIZE)
            parts.append(
                f"{self.excluded:,} of {self.memory:,} pages of memory ({size}) were left out when it was made "
                f"(dump level {self.level}): outside the capture"
            )
        if self.excluded and self.level & _USER_DATA:
            parts.append("the level leaves out the memory of processes, and that of guests with it")
        if self.unwritten:
            parts.append(f"the data of {self.unwritten:,} pages that it should hold is not in the file")
        return "; ".join(parts)


def recognised(head: bytes) -> bool:
    """Tell from its first :data:`HEAD` bytes whether a file is in this format, flattened or not."""
    flat = head.startswith(flattened.SIGNATURE) and head[HEAD - len(SIGNATURE) : HEAD] == SIGNATURE
    return flat or head.startswith(SIGNATURE)


def read(path: Path) -> Kdump:
    """Return what a dump holds.

    Raises:
        OSError: the file cannot be read.
        KdumpError: it is in the format, and of a kind that is not read, or damaged.
    """
    try:
        file, whole = flattened.view(path)
    except flattened.FlattenedError as error:
        raise KdumpError(str(error)) from None
    head = file.read(0, _HEADER.size)
    if head is None or not head.startswith(SIGNATURE):
        raise KdumpError("its header is not in the file")
    _, version, machine, status, block, sub_blocks, map_blocks, small_max, *_ = _HEADER.unpack(head)
    # Without VMCOREINFO makedumpfile leaves the name empty.
    if machine.rstrip(b"\0") not in (b"x86_64", b""):
        raise KdumpError(f"it is not of an x86-64 machine but of {machine.rstrip(bytes(1)).decode('latin-1')!a}")
    if block != bits.PAGE_SIZE or sub_blocks < 1:
        raise KdumpError(f"its pages are of {block} bytes")
    sub = file.read(block, _SUB_HEADER.size)
    if sub is None:
        raise KdumpError("its second header is not in the file")
    _, level, split, *_, large_max = _SUB_HEADER.unpack(sub)
    if version >= 2 and split:
        raise KdumpError("it is one part of a split dump; join the parts with makedumpfile --reassemble")
    half, first = map_blocks * block // 2, (1 + sub_blocks) * block
    pages = min(large_max if version >= 6 else small_max, half * 8, 1 << bits.MAX_PHYSICAL_BITS - bits.PAGE_SHIFT)
    if pages <= 0 or not flattened.coverage(file).holds(first, 2 * half):
        raise KdumpError("its bitmaps are not in the file")
    found = _Pages(file, first + half, pages, first + 2 * half)
    found.look()
    incomplete = bool(status & _INCOMPLETE) or not whole or found.unwritten > 0
    memory = max(_population(file, first, pages), found.dumped)
    return Kdump(
        file, first + 2 * half, level, found.starts, found.lengths, found.ranks, memory, found.dumped, found.unwritten,
        frozenset(METHODS.get(flag, f"method {flag:#x}") for flag in found.flags), incomplete,
    )  # fmt: skip


def _blocks(file: HostMemory, offset: int, pages: int) -> Iterator[tuple[int, Int64]]:
    """Yield the frames whose bits are set in a bitmap, block by block, each with the block's first frame."""
    for begin in range(0, -(-pages // 8), _BLOCK):
        take = min(_BLOCK, -(-pages // 8) - begin)
        data = np.frombuffer(file.read(offset + begin, take) or bytes(take), dtype=np.uint8)
        frames = np.flatnonzero(np.unpackbits(data, bitorder="little")) + begin * 8
        yield begin * 8, frames[frames < pages]


def _population(file: HostMemory, offset: int, pages: int) -> int:
    return sum(int(frames.size) for _, frames in _blocks(file, offset, pages))


class _Pages:
    """Goes through the second bitmap and the descriptors, side by side, in bounded memory."""

    def __init__(self, file: HostMemory, bitmap: int, pages: int, descriptors: int) -> None:
        self._file, self._bitmap, self._count, self._descriptors = file, bitmap, pages, descriptors
        self._written = flattened.coverage(file)
        self.dumped = self.unwritten = 0
        self.flags: set[int] = set()
        self.starts = self.lengths = self.ranks = np.zeros(0, dtype=np.int64)

    def look(self) -> None:
        """Fill in the ranges and the counts."""
        pieces = []
        for _, frames in _blocks(self._file, self._bitmap, self._count):
            good = self._held(self.dumped, frames.size)
            ranks = np.flatnonzero(good) + self.dumped
            pieces.append(_runs(frames[good], ranks))
            self.dumped += frames.size
            self.unwritten += int(frames.size - ranks.size)
        first, count, rank = (np.concatenate(column) for column in zip(*pieces, strict=True))
        self.starts, self.lengths, self.ranks = first << bits.PAGE_SHIFT, count << bits.PAGE_SHIFT, rank

    def _held(self, first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Tell of each of these dumped pages whether its data is in the file."""
        table = descriptors(self._file, self._descriptors, first, count)
        offsets, sizes = table["offset"].astype(np.int64), table["size"].astype(np.int64)
        good = (offsets > 0) & (offsets < 1 << 62) & (sizes > 0) & (sizes <= bits.PAGE_SIZE)
        good &= self._written.locate(offsets, np.maximum(sizes, 1)) >= 0
        self.flags |= {int(flag) for flag in np.unique(table["flags"][good]) if flag}
        return good


def descriptors(file: HostMemory, table: int, first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Return descriptors of dumped pages by their rank; those that are not in the file are zeros.

    ``table`` is the offset of the table in the file.
    """
    offset, size = table + first * DESCRIPTOR.itemsize, count * DESCRIPTOR.itemsize
    data = file.read(offset, size)
    if data is not None:
        return np.frombuffer(data, dtype=DESCRIPTOR)
    out = np.zeros(count, dtype=DESCRIPTOR)
    places = offset + np.arange(count, dtype=np.int64) * DESCRIPTOR.itemsize
    held = np.flatnonzero(flattened.coverage(file).locate(places, DESCRIPTOR.itemsize) >= 0)
    for stretch in np.split(held, np.flatnonzero(np.diff(held) != 1) + 1) if held.size else []:
        data = file.read(int(places[stretch[0]]), stretch.size * DESCRIPTOR.itemsize)
        out[stretch] = np.frombuffer(data or bytes(stretch.size * DESCRIPTOR.itemsize), dtype=DESCRIPTOR)
    return out


def _runs(frames: Int64, ranks: Int64) -> tuple[Int64, Int64, Int64]:
    """Return the first frame, the number of frames and the first rank of each run."""
    if not frames.size:
        return frames, frames, frames
    new = np.ones(frames.size, dtype=np.bool_)
    new[1:] = (np.diff(frames) != 1) | (np.diff(ranks) != 1)
    at = np.flatnonzero(new)
    return frames[at], np.diff(np.append(at, frames.size)), ranks[at]
