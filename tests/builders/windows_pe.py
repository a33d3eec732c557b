"""Writes a Windows image as a loader leaves it in memory: headers, debug directory with RSDS record, version resource.

From literal offsets of the PE format; nothing of the package is imported.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

PAGE = 0x1000
GUID = bytes.fromhex("d1c2b3a4 f6e5 0807 1122334455667788")
GUID_TEXT = "A4B3C2D1E5F607081122334455667788"

NT = 0x110
RDATA, DATA, RESOURCES = 0x6000, 0x8000, 0x10000


@dataclass(frozen=True)
class Pe:
    """What is written into an image. ``size`` is SizeOfImage; nothing lies between the sections."""

    pdb: str = "ntkrnlmp.pdb"
    guid: bytes = GUID
    age: int = 1
    version: tuple[int, int, int, int] = (10, 0, 19041, 1234)
    size: int = 0x12000
    #: Where the debug directory and its record lie.
    rdata: int = RDATA
    machine: int = 0x8664

    @property
    def guid_text(self) -> str:
        """The GUID as symbol servers and Volatility write it."""
        first, second, third, rest = struct.unpack("<IHH8s", self.guid)
        return f"{first:08X}{second:04X}{third:04X}{rest.hex().upper()}"

    @property
    def optional_size(self) -> int:
        """Bytes of the optional header: PE32+ or PE32."""
        return 240 if self.machine == 0x8664 else 224

    def parts(self) -> dict[int, bytes]:
        """Return the parts of the image by RVA, each within one page."""
        return {0: self.headers(), self.rdata: self.debug(), RESOURCES: self.resources()}

    def headers(self) -> bytes:
        """Return DOS and NT headers and the section table."""
        page = bytearray(PAGE)
        page[0:2] = b"MZ"
        struct.pack_into("<I", page, 0x3C, NT)
        sections = (
            (b".text", 0x1000, 0x5000, 0x60000020),
            (b".rdata", self.rdata, 0x1000, 0x40000040),
            (b".data", DATA, 0x8000, 0xC0000040),
            (b".rsrc", RESOURCES, 0x1000, 0x40000040),
        )
        size = self.optional_size
        struct.pack_into("<4sHHIIIHH", page, NT, b"PE\0\0", self.machine, len(sections), 0x5EC0FFEE, 0, 0, size, 0x22)
        optional, directories = NT + 24, NT + 24 + size - 128
        magic = 0x20B if size == 240 else 0x10B
        struct.pack_into("<HBBIIIII", page, optional, magic, 14, 20, 0x5000, 0x9000, 0, 0x1000, 0x1000)
        base = struct.pack("<Q", 0x1_4000_0000) if size == 240 else struct.pack("<II", 0x9000, 0x40_0000)
        page[optional + 24 : optional + 32] = base
        struct.pack_into("<II", page, optional + 32, 0x1000, 0x200)
        struct.pack_into("<HHHHHHI", page, optional + 40, 10, 0, 10, 0, 10, 0, 0)
        struct.pack_into("<IIIHH", page, optional + 56, self.size, 0x400, 0, 1, 0x4160)
        struct.pack_into("<II", page, directories - 8, 0, 16)
        struct.pack_into("<II", page, directories + 8 * 2, RESOURCES, 0x1000)
        struct.pack_into("<II", page, directories + 8 * 6, self.rdata, 2 * 28)
        for number, (name, rva, length, flags) in enumerate(sections):
            at = optional + size + 40 * number
            struct.pack_into("<8sIIIIIIHHI", page, at, name, length, rva, length, rva, 0, 0, 0, 0, flags)
        return bytes(page)

    def debug(self) -> bytes:
        """Return the debug directory, its CodeView entry second, and the RSDS record behind it."""
        record = b"RSDS" + self.guid + struct.pack("<I", self.age) + self.pdb.encode() + b"\0"
        other = struct.pack("<IIHHIIII", 0, 0, 0, 0, 13, 0, 0, 0)
        # PointerToRawData is an offset in the file: in memory it leads nowhere.
        entry = struct.pack("<IIHHIIII", 0, 0, 0, 0, 2, len(record), self.rdata + 0x40, 0x7777)
        return (other + entry).ljust(0x40, b"\0") + record

    def resources(self) -> bytes:
        """Return a resource tree with a message table and a version, each with one name and one language."""

        def table(*entries: tuple[int, int]) -> bytes:
            head = struct.pack("<IIHHHH", 0, 0, 0, 0, 0, len(entries))
            return head + b"".join(struct.pack("<II", *entry) for entry in entries)

        down = 1 << 31
        out = bytearray(0x400)
        out[0x00:0x20] = table((11, 0x40 | down), (16, 0x60 | down))
        out[0x40:0x58] = table((1, 0x80 | down))
        out[0x60:0x78] = table((1, 0xA0 | down))
        out[0x80:0x98] = table((0x409, 0xC0))
        out[0xA0:0xB8] = table((0x409, 0xD0))
        out[0xC0:0xD0] = struct.pack("<IIII", RESOURCES + 0x300, 0x20, 0, 0)
        block = self.version_block()
        out[0xD0:0xE0] = struct.pack("<IIII", RESOURCES + 0x100, len(block), 0, 0)
        out[0x100 : 0x100 + len(block)] = block
        return bytes(out)

    def version_block(self) -> bytes:
        """Return VS_VERSIONINFO with its fixed part; the product's version ends in 9."""
        first, second, third, fourth = self.version
        fixed = struct.pack("<13I", 0xFEEF04BD, 0x10000, first << 16 | second, third << 16 | fourth,
                            first << 16 | second, third << 16 | 9, 0x3F, 0, 0x40004, 3, 7, 0, 0)  # fmt: skip
        key = "VS_VERSION_INFO\0".encode("utf-16-le")
        body = struct.pack("<HHH", 0, len(fixed), 0) + key + b"\0\0" + fixed
        return struct.pack("<H", len(body)) + body[2:]
