"""What an image file consists of, from first byte to last: headers, stretches of memory, holes.

Sources: LiME ``doc/README.md`` and ``src/lime.h`` (range header, version 1).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple


class Format(str, Enum):
    """The kinds of image."""

    #: Offset in the file is guest-physical address; holes take no space on the disk.
    RAW = "raw"
    #: The same bytes, holes written out as zeros.
    PADDED = "padded"
    #: The present ranges only, each with a header.
    LIME = "lime"
    #: An ELF core: the present ranges, and notes with registers and VMCOREINFO.
    ELF = "elf"

    def __str__(self) -> str:
        """Return the word that ``--format`` takes."""
        return self.value

    @property
    def suffix(self) -> str:
        """How names of such files end."""
        return ".raw" if self is Format.PADDED else f".{self.value}"

    @property
    def is_sparse(self) -> bool:
        """Tell whether zero pages become holes in the file. LiME's headers push pages off the blocks of a disk."""
        return self in (Format.RAW, Format.ELF)


class Memory(NamedTuple):
    """A present stretch of guest-physical memory."""

    gpa: int
    length: int


class Hole(NamedTuple):
    """Zeros."""

    length: int


Part = bytes | Memory | Hole

_LIME_HEADER: Final = struct.Struct("<IIQQQ")
_LIME_MAGIC: Final = 0x4C694D45


@dataclass(frozen=True)
class Plan:
    """The parts of one file."""

    format: Format
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Length of the file."""
        return sum(len(part) if isinstance(part, bytes) else part.length for part in self.parts)

    @property
    def present(self) -> int:
        """Bytes of memory in it."""
        return sum(part.length for part in self.parts if isinstance(part, Memory))

    @property
    def holes(self) -> int:
        """Bytes of holes in it."""
        return sum(part.length for part in self.parts if isinstance(part, Hole))


def plain(format_: Format, present: Iterable[tuple[int, int]], start: int, stop: int) -> Plan:
    """Return a raw image of the addresses ``start`` to ``stop``."""
    return Plan(format_, tuple(_plain(present, start, stop)))


def _plain(present: Iterable[tuple[int, int]], position: int, stop: int) -> Iterator[Part]:
    for gpa, length in present:
        if gpa > position:
            yield Hole(gpa - position)
        yield Memory(gpa, length)
        position = gpa + length
    if stop > position:
        yield Hole(stop - position)


def lime(present: Iterable[tuple[int, int]]) -> Plan:
    """Return a LiME file. The last address of a range is inclusive."""
    parts: list[Part] = []
    for gpa, length in present:
        parts += [_LIME_HEADER.pack(_LIME_MAGIC, 1, gpa, gpa + length - 1, 0), Memory(gpa, length)]
    return Plan(Format.LIME, tuple(parts))


def elf(header: bytes, present: Sequence[tuple[int, int]]) -> Plan:
    """Return an ELF core: everything before the memory, and the memory."""
    return Plan(Format.ELF, (header, *(Memory(gpa, length) for gpa, length in present)))
