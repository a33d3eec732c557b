"""Pack raw physical memory into a small ELF core that ``vol -f`` opens directly.

The result is an ordinary ``ET_CORE`` file: every ``PT_LOAD`` segment says that
``p_filesz`` bytes at ``p_offset`` are the physical memory from ``p_paddr`` on.
Three things make it smaller than the raw image, none of which a reader has to
know about:

* a run of identical pages (zeroes, or the poison of freed boot memory) points
  into one *extent* that holds the page over and over, shared by all such runs;
* a run of pages that is stored already points at the stored copy;
* what is left is stored once, in address order.

All of the memory stays readable: a zero page is a page of zeroes, not a hole.
Holes exist only where the caller asks for them (``regions``), as above the RAM
of a machine.

Every segment costs Volatility about 0.3 ms when it opens the file, so
only runs of at least ``min_run`` pages are shared. A ``min_run`` of 1 and short
extents give the smallest file.

Usage::

    python elfcore.py host.raw host.elf [--min-run 2] [--extent 256]

The output depends on the input alone: the same memory gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

PAGE_SIZE = 4096
ZERO_PAGE = bytes(PAGE_SIZE)

#: Longest extent of one repeated page: 1 MiB. A longer run becomes several segments.
DEFAULT_EXTENT = 256
DEFAULT_MIN_RUN = 2

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
E_IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)  # 64-bit, little-endian, ELF version 1
ET_CORE, EM_X86_64, PT_LOAD, PF_RWX = 4, 62, 1, 7
#: 0xFFFF is PN_XNUM, "the count is elsewhere", which Volatility does not follow.
MAX_SEGMENTS = 0xFFFE


class Region(NamedTuple):
    """A stretch of the raw file and the host-physical address it belongs to."""

    hpa: int
    raw_offset: int
    size: int


class Segment(NamedTuple):
    """One ``PT_LOAD``; ``offset`` counts from the start of the data, not of the file."""

    hpa: int
    offset: int
    size: int


class TooManySegmentsError(ValueError):
    """The memory is so fragmented that a larger ``min_run`` is needed."""


def digests(raw: BinaryIO, region: Region) -> list[bytes]:
    """Return a digest of each page of ``region``."""
    raw.seek(region.raw_offset)
    return [hashlib.blake2b(raw.read(PAGE_SIZE), digest_size=16).digest() for _ in range(region.size // PAGE_SIZE)]


def repeats(pages: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Yield ``(start, length)`` of each maximal run of identical pages, in order."""
    start = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[start]:
            yield start, index - start
            start = index


class Packer:
    """Decides which pages are stored and where each run of memory points."""

    def __init__(self, min_run: int = DEFAULT_MIN_RUN, extent: int = DEFAULT_EXTENT) -> None:
        """Share runs of at least ``min_run`` pages, repeated pages in extents of at most ``extent``."""
        self.min_run = min_run
        self.extent = extent
        self.segments: list[Segment] = []
        #: Raw offset of each stored page, in file order.
        self.stored: list[int] = []
        self._stored_digests: list[bytes] = []
        self._first: dict[bytes, int] = {}
        self._extents: dict[bytes, tuple[int, int]] = {}

    def add(self, regions: Sequence[Region], pages: Sequence[Sequence[bytes]]) -> None:
        """Lay out all ``regions``; ``pages`` holds the digests of each."""
        longest: dict[bytes, tuple[int, int]] = {}
        for region, hashes in zip(regions, pages, strict=True):
            for start, length in repeats(hashes):
                if length >= self.min_run and length > longest.get(hashes[start], (0, 0))[0]:
                    longest[hashes[start]] = (length, region.raw_offset + start * PAGE_SIZE)
        for digest, (length, raw_offset) in longest.items():
            count = min(length, self.extent)
            self._extents[digest] = (len(self.stored), count)
            for _ in range(count):
                self._store(digest, raw_offset)
        for region, hashes in zip(regions, pages, strict=True):
            self._add_region(region, hashes)

    def _store(self, digest: bytes, raw_offset: int) -> int:
        index = len(self.stored)
        self._first.setdefault(digest, index)
        self.stored.append(raw_offset)
        self._stored_digests.append(digest)
        return index

    def _add_region(self, region: Region, hashes: Sequence[bytes]) -> None:
        runs = dict(repeats(hashes))
        index = 0
        while index < len(hashes):
            digest = hashes[index]
            if digest in self._extents and runs.get(index, 0) >= self.min_run:
                file_page, capacity = self._extents[digest]
                length = min(runs[index], capacity)
                if length < runs[index]:  # the rest is a run of its own
                    runs[index + length] = runs[index] - length
            else:
                file_page, length = self._match(hashes, index)
                if length < self.min_run:
                    file_page, length = self._store(digest, region.raw_offset + index * PAGE_SIZE), 1
            self._emit(region.hpa + index * PAGE_SIZE, file_page * PAGE_SIZE, length * PAGE_SIZE)
            index += length

    def _match(self, hashes: Sequence[bytes], index: int) -> tuple[int, int]:
        """Return the stored page equal to page ``index`` and how many pages agree from there on."""
        first = self._first.get(hashes[index])
        if first is None:
            return 0, 0
        length = 0
        while (
            index + length < len(hashes)
            and first + length < len(self._stored_digests)
            and hashes[index + length] == self._stored_digests[first + length]
        ):
            length += 1
        return first, length

    def _emit(self, hpa: int, offset: int, size: int) -> None:
        if self.segments:
            last = self.segments[-1]
            if last.hpa + last.size == hpa and last.offset + last.size == offset:
                self.segments[-1] = last._replace(size=last.size + size)
                return
        self.segments.append(Segment(hpa, offset, size))


def headers(segments: Sequence[Segment]) -> bytes:
    """Return the ELF header and program headers, padded to a page."""
    if len(segments) > MAX_SEGMENTS:
        raise TooManySegmentsError(f"{len(segments)} segments, at most {MAX_SEGMENTS} fit an ELF header")
    used = EHDR.size + PHDR.size * len(segments)
    data_offset = -(-used // PAGE_SIZE) * PAGE_SIZE
    ehdr = EHDR.pack(E_IDENT, ET_CORE, EM_X86_64, 1, 0, EHDR.size, 0, 0, EHDR.size, PHDR.size, len(segments), 0, 0, 0)
    phdrs = b"".join(
        PHDR.pack(PT_LOAD, PF_RWX, data_offset + s.offset, 0, s.hpa, s.size, s.size, PAGE_SIZE) for s in segments
    )
    return (ehdr + phdrs).ljust(data_offset, b"\0")


def write(
    raw: BinaryIO,
    out: BinaryIO,
    regions: Iterable[Region],
    min_run: int = DEFAULT_MIN_RUN,
    extent: int = DEFAULT_EXTENT,
) -> list[Segment]:
    """Write the memory of ``regions`` (sorted by ``hpa``, whole pages) as an ELF core.

    Returns the segments, offsets counting from the end of the padded headers.
    """
    regions = list(regions)
    for region in regions:
        if region.hpa % PAGE_SIZE or region.size % PAGE_SIZE or region.size <= 0:
            raise ValueError(f"region at {region.hpa:#x} of {region.size:#x} bytes is not made of whole pages")
    packer = Packer(min_run, extent)
    packer.add(regions, [digests(raw, region) for region in regions])
    out.write(headers(packer.segments))
    for raw_offset in packer.stored:
        raw.seek(raw_offset)
        out.write(raw.read(PAGE_SIZE))
    return packer.segments


def read_segments(elf: BinaryIO) -> list[Segment]:
    """Return the segments of an ELF core, offsets counting from the start of the file."""
    elf.seek(0)
    ident, e_type, machine, _, _, phoff, _, _, _, phentsize, phnum, _, _, _ = EHDR.unpack(elf.read(EHDR.size))
    if (ident, e_type, machine, phentsize) != (E_IDENT, ET_CORE, EM_X86_64, PHDR.size):
        raise ValueError("not an ELF core for x86-64 as written here")
    elf.seek(phoff)
    rows = PHDR.iter_unpack(elf.read(PHDR.size * phnum))
    return [Segment(paddr, offset, filesz) for _, _, offset, _, paddr, filesz, _, _ in rows]


def raw_sha256(elf: BinaryIO) -> str:
    """Return the SHA-256 of the raw image an ELF core stands for, holes read as zeroes."""
    digest, position = hashlib.sha256(), 0
    for segment in read_segments(elf):
        for _ in range((segment.hpa - position) // PAGE_SIZE):
            digest.update(ZERO_PAGE)
        elf.seek(segment.offset)
        remaining = segment.size
        while remaining:
            chunk = elf.read(min(remaining, 1 << 20))
            if not chunk:
                raise EOFError(f"segment at {segment.hpa:#x} reaches beyond the file")
            digest.update(chunk)
            remaining -= len(chunk)
        position = segment.hpa + segment.size
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: raw file in, ELF core out, read back and compared."""
    parser = argparse.ArgumentParser(description="Pack raw physical memory into an ELF core.")
    parser.add_argument("raw", type=Path, help="raw image, address 0 first")
    parser.add_argument("elf", type=Path, help="ELF core to write")
    parser.add_argument(
        "--min-run",
        type=int,
        default=DEFAULT_MIN_RUN,
        help="shortest run of pages worth a segment of its own",
    )
    parser.add_argument(
        "--extent",
        type=int,
        default=DEFAULT_EXTENT,
        help="pages that the longest stored run of one repeated page has",
    )
    args = parser.parse_args(argv)
    with args.raw.open("rb") as raw:
        size = args.raw.stat().st_size
        with args.elf.open("wb") as out:
            segments = write(raw, out, [Region(0, 0, size)], args.min_run, args.extent)
        raw.seek(0)
        expected = _sha256(raw)
    with args.elf.open("rb") as elf:
        actual = raw_sha256(elf)
    size = args.elf.stat().st_size
    print(f"{args.elf}: {size} bytes, {len(segments)} segments, memory sha256 {actual}")
    return 0 if actual == expected else 1


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
