"""A Windows image as it lies in memory, identified: what machine it is for, its size, its version, and its PDB.

The bytes may be hostile: no more is read than what is named here, some pages at most, and pefile is handed no more than
that. What is paged out is said to be missing; it is never zeros.

Source: Microsoft, "PE Format" and "VS_VERSIONINFO structure".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

from volatility3_ept.core import rsds
from volatility3_ept.core.rsds import Pdb
from volatility3_ept.spec.bits import PAGE_SIZE

if TYPE_CHECKING:
    import pefile

#: ``read(rva, length)`` returns bytes of the image, or None where one of them is not in memory.
Read = Callable[[int, int], bytes | None]

AMD64: Final = 0x8664
MACHINES: Final = {AMD64: "x64", 0x14C: "x86", 0xAA64: "ARM64"}

#: A kernel has some 16 MiB, and Windows loads no image with more than 96 sections.
MAX_SIZE: Final = 64 << 20
_MAX_SECTIONS: Final = 96
_MAX_DEBUG_ENTRIES: Final = 16
_MAX_CODEVIEW: Final = 24 + 260
_DEBUG_ENTRY: Final = 28
_CODEVIEW: Final = 2
_RESOURCE, _DEBUG = 2, 6
_RT_VERSION: Final = 16
_MAX_RESOURCES: Final = 256
#: VS_VERSIONINFO up to the end of its VS_FIXEDFILEINFO. The strings behind it say the same, and take long to parse.
_FIXED: Final = 92


@dataclass(frozen=True, slots=True)
class Image:
    """What an image says of itself. ``missing`` names what is not in memory; a version that is unknown is empty."""

    machine: int
    size: int
    file_version: str = ""
    product_version: str = ""
    pdb: Pdb | None = None
    missing: tuple[str, ...] = ()


def identify(read: Read) -> Image | None:
    """Return the identity of the image whose bytes ``read`` gives by RVA; None where no image begins there."""
    head = read(0, PAGE_SIZE)
    if head is None or not plausible(head):
        return None
    image = _parsed(head)
    if image is None:
        return None
    size = image.OPTIONAL_HEADER.SizeOfImage
    parts = _Parts(read, size)
    directories = image.OPTIONAL_HEADER.DATA_DIRECTORY
    pdb = _pdb(parts, head, directories[_DEBUG]) if len(directories) > _DEBUG else None
    version = _version(parts, head, directories[_RESOURCE]) if len(directories) > _RESOURCE else ("", "")
    return Image(image.FILE_HEADER.Machine, size, *version, pdb, tuple(dict.fromkeys(parts.missing)))


def plausible(head: bytes) -> bool:
    """Tell whether a page begins an image that Windows could have loaded; 0x108 bytes hold all of its NT headers."""
    (start,) = struct.unpack_from("<I", head, 0x3C)
    if head[:2] != b"MZ" or not 0x40 <= start <= PAGE_SIZE - 0x108 or head[start : start + 4] != b"PE\0\0":
        return False
    machine, sections = struct.unpack_from("<HH", head, start + 4)
    (magic,) = struct.unpack_from("<H", head, start + 24)
    (size,) = struct.unpack_from("<I", head, start + 24 + 56)
    return (
        machine in MACHINES
        and 0 < sections <= _MAX_SECTIONS
        and magic in (0x10B, 0x20B)
        and PAGE_SIZE <= size <= MAX_SIZE
    )


def _parsed(head: bytes, more: bytes = b"") -> pefile.PE | None:
    """Return pefile's view of a header page and of what was put behind it.

    The image is said to have no sections: then pefile takes an RVA for an offset into the bytes that it has.
    """
    import pefile

    count = struct.unpack_from("<I", head, 0x3C)[0] + 6
    try:
        return pefile.PE(data=head[:count] + b"\0\0" + head[count + 2 :] + more, fast_load=True)
    except pefile.PEFormatError:
        return None


class _Parts:
    """Reads parts of an image, and notes which are not there."""

    def __init__(self, read: Read, size: int) -> None:
        self.missing: list[str] = []
        self._read, self._size = read, size

    def get(self, rva: int, length: int, what: str) -> bytes | None:
        """Return a part; None, and a note, where it is paged out or outside the image."""
        inside = rva > 0 and length > 0 and rva + length <= self._size
        data = self._read(rva, length) if inside else None
        if data is None:
            self.missing.append(f"{what} {'not in memory' if inside else 'outside the image'}")
        return data


def _pdb(parts: _Parts, head: bytes, directory: pefile.Structure) -> Pdb | None:
    """Return what the first RSDS record names that the debug directory leads to."""
    count = min(directory.Size // _DEBUG_ENTRY, _MAX_DEBUG_ENTRIES)
    entries = parts.get(directory.VirtualAddress, count * _DEBUG_ENTRY, "debug directory") if count else None
    image = _parsed(head, entries) if entries else None
    if image is None:
        return None
    for entry in image.parse_debug_directory(len(head), count * _DEBUG_ENTRY) or ():
        found = entry.struct
        if found.Type == _CODEVIEW:
            record = parts.get(found.AddressOfRawData, min(found.SizeOfData, _MAX_CODEVIEW), "RSDS record")
            pdb = rsds.parse(record) if record else None
            if pdb is not None:
                return pdb
    return None


def _version(parts: _Parts, head: bytes, directory: pefile.Structure) -> tuple[str, str]:
    """Return the file's and the product's version from the version resource, empty where it is not there."""
    if not directory.VirtualAddress:
        return "", ""
    leaf = _resource(parts, directory.VirtualAddress)
    block = parts.get(leaf, _FIXED, "version resource") if leaf else None
    image = _parsed(head, block) if block else None
    if image is None:
        return "", ""
    image.parse_version_information(SimpleNamespace(OffsetToData=len(head), Size=_FIXED))
    fixed = next(iter(getattr(image, "VS_FIXEDFILEINFO", [])), None)
    if fixed is None or fixed.Signature != 0xFEEF04BD:
        return "", ""
    return (
        _dotted(fixed.FileVersionMS, fixed.FileVersionLS),
        _dotted(fixed.ProductVersionMS, fixed.ProductVersionLS),
    )


def _resource(parts: _Parts, root: int) -> int:
    """Return the RVA of the version block, 0 where there is none: type, first name, first language; three tables.

    pefile would follow every entry of the tree, and a hostile one has as many as it likes.
    """
    offset = 0
    for wanted in (_RT_VERSION, None, None):
        table = parts.get(root + offset, 16, "resource directory")
        if table is None:
            return 0
        count = min(sum(struct.unpack_from("<HH", table, 12)), _MAX_RESOURCES)
        entries = parts.get(root + offset + 16, 8 * count, "resource directory") if count else None
        rows = struct.iter_unpack("<II", entries) if entries else iter(())
        offset = next((data & 0x7FFF_FFFF for name, data in rows if wanted in (None, name)), 0)
        if not offset:
            return 0
    leaf = parts.get(root + offset, 16, "resource directory")
    return int(struct.unpack_from("<I", leaf)[0]) if leaf else 0


def _dotted(high: int, low: int) -> str:
    return f"{high >> 16}.{high & 0xFFFF}.{low >> 16}.{low & 0xFFFF}"
