"""Writes one and the same memory in the formats that ``vol -f`` opens, from literal numbers.

Each function takes a memory and a folder and returns the file to open. The runs of the memory become the ranges of the
format; only raw and VMware files, which have no table of ranges of their own, fill the holes with zeros.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import struct
from pathlib import Path

from builders.paging import PAGE, HostRam


def raw(ram: HostRam, folder: Path) -> Path:
    """All of memory from address 0 on."""
    return _written(folder / "host.raw", ram.image())


def lime(ram: HostRam, folder: Path) -> Path:
    """A LiME file."""
    return _written(folder / "host.lime", ram.lime())


def gz(ram: HostRam, folder: Path) -> Path:
    """A raw image, compressed with gzip: Volatility decompresses it as it reads."""
    return _written(folder / "host.raw.gz", gzip.compress(ram.image()))


def xz(ram: HostRam, folder: Path) -> Path:
    """A raw image, compressed with xz."""
    return _written(folder / "host.raw.xz", lzma.compress(ram.image()))


def elf(ram: HostRam, folder: Path) -> Path:
    """An ELF core as QEMU's ``dump-guest-memory`` and ``virsh dump --memory-only`` write it."""
    runs = ram.runs()
    where = 64 + 56 * len(runs)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(runs), 0, 0, 0)
    table, body = b"", b""
    for address, data in runs:
        table += struct.pack("<IIQQQQQQ", 1, 7, where + len(body), 0, address, len(data), len(data), 0)
        body += data
    return _written(folder / "host.elf", header + table + body)


def crash_dump(ram: HostRam, folder: Path) -> Path:
    """A complete Windows crash dump (64-bit), as some acquisition tools write it for any system."""
    runs = ram.runs()
    header = bytearray(b"PAGEDU64".ljust(0x2000, b"\0"))
    struct.pack_into("<IIQ", header, 0x88, len(runs), sum(len(data) for _, data in runs) // PAGE, 0)
    for number, (address, data) in enumerate(runs):
        struct.pack_into("<QQ", header, 0x98 + 16 * number, address // PAGE, len(data) // PAGE)
    struct.pack_into("<I", header, 0xF98, 1)  # DumpType: full
    return _written(folder / "host.dmp", bytes(header) + b"".join(data for _, data in runs))


def vmware(ram: HostRam, folder: Path) -> Path:
    """A ``.vmem`` with the ``.vmss`` beside it that says where its two halves belong."""
    image = ram.image()
    image += bytes(-len(image) % (2 * PAGE))
    half = len(image) // 2 // PAGE
    tags = _tag("regionsCount", 2)
    for number, page in enumerate((0, half)):
        for name, value in (("regionPPN", page), ("regionPageNum", page), ("regionSize", half)):
            tags += _tag(name, value, number)
    head = struct.pack("<4sII", b"\xd2\xbe\xd2\xbe", 8, 1) + struct.pack("<64sQQ", b"memory", 12 + 80, len(tags) + 2)
    _written(folder / "host.vmss", head + tags + b"\0\0")
    return _written(folder / "host.vmem", image)


def _tag(name: str, value: int, *indices: int) -> bytes:
    head = bytes([len(indices) << 6 | 4, len(name)]) + name.encode()
    return head + b"".join(struct.pack("<I", index) for index in indices) + struct.pack("<I", value)


def qemu(ram: HostRam, folder: Path) -> Path:
    """A migration stream, as ``savevm`` and ``virsh save`` write it; pages of one repeated byte are compressed."""
    machine = b"pc-i440fx-7.2"
    out = bytearray(b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", len(machine)) + machine)
    out += b"\x01" + struct.pack(">I", 2) + b"\x03ram" + struct.pack(">II", 0, 4)
    size = max(ram.pages) + PAGE
    out += struct.pack(">Q", size | 0x04) + b"\x06pc.ram" + struct.pack(">Q", size)
    name, more = b"\x06pc.ram", 0
    for address in sorted(ram.pages):
        page = bytes(ram.pages[address])
        filled = len(set(page)) == 1
        out += struct.pack(">Q", address | (0x02 if filled else 0x08) | more) + name + (page[:1] if filled else page)
        name, more = b"", 0x20
    out += struct.pack(">Q", 0x10) + b"\x7e" + struct.pack(">I", 2) + b"\x00"
    description = json.dumps({"page_size": PAGE, "devices": []}).encode()
    out += b"\x06" + struct.pack(">I", len(description)) + description
    return _written(folder / "host.qemu", bytes(out))


def avml(ram: HostRam, folder: Path) -> Path:
    """An AVML file, version 2: ranges with inclusive ends, as in LiME, each a stream of snappy frames."""
    out = bytearray()
    for address, data in ram.runs():
        frames = b"\xff\x06\0\0sNaPpY"
        for at in range(0, len(data), 0x1_0000):
            frame = bytes(4) + _snappy(data[at : at + 0x1_0000])  # Volatility does not check the CRC
            frames += b"\x00" + len(frame).to_bytes(3, "little") + frame
        out += struct.pack("<IIQQQ", 0x4C4D5641, 2, address, address + len(data) - 1, 0) + frames
        out += struct.pack("<Q", len(frames))
    return _written(folder / "host.avml", bytes(out))


def _snappy(data: bytes) -> bytes:
    """Compress with what snappy offers for runs of one byte: a literal, and copies from one byte before."""
    out, size = bytearray(), len(data)
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    for match in re.finditer(rb"(.)\1{7,}|(?:(?!(.)\2{7}).){1,60}", data, re.DOTALL):
        literal, more = (match[1], len(match[0]) - 1) if match[1] else (match[0], 0)
        out += bytes([(len(literal) - 1) << 2]) + literal
        while more:
            copied = min(more, 64)
            out += bytes([(copied - 1) << 2 | 2]) + b"\x01\0"
            more -= copied
    return bytes(out)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


#: What the wrappers are called in test ids.
FORMATS = (raw, lime, gz, xz, elf, crash_dump, vmware, qemu, avml)
