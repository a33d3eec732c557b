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
import zlib
from collections.abc import Collection
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


def vmem_alone(ram: HostRam, folder: Path) -> Path:
    """A ``.vmem`` whose ``.vmss`` was not brought along: below 3 GiB it is a raw image."""
    return _written(folder / "alone.vmem", ram.image())


def xen(ram: HostRam, folder: Path) -> Path:
    """What ``xl dump-core`` writes for a fully virtualized guest: pages in one section, their numbers in another.

    A live dump has fewer pages than it announced; the rest are given the number ~0.
    """
    numbers = [address // PAGE for address in sorted(ram.pages)] + [(1 << 64) - 1] * 2
    pages = b"".join(bytes(ram.pages[address]) for address in sorted(ram.pages)) + bytes(2 * PAGE)
    table = struct.pack(f"<{len(numbers)}Q", *numbers)
    names = b"\0.shstrtab\0.note.Xen\0.xen_pfn\0.xen_pages\0"
    where, body, sections = 64 + 5 * 64, b"", bytes(64)
    for name, kind, data, entry in (
        (b".shstrtab", 3, names, 0),
        (b".note.Xen", 7, b"", 0),
        (b".xen_pfn", 1, table, 8),
        (b".xen_pages", 1, pages, PAGE),
    ):
        body += bytes(-(where + len(body)) % 8)
        position = names.index(name + b"\0")
        sections += struct.pack("<IIQQQQIIQQ", position, kind, 0, 0, where + len(body), len(data), 0, 0, 8, entry)
        body += data
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 5, 1)
    return _written(folder / "host.xen", head + sections + body)


def kdump(ram: HostRam, folder: Path) -> Path:
    """makedumpfile's compressed format, with zlib; pages of zeros share one descriptor's data."""
    return _written(folder / "host.kdump", kdump_file(ram))


def kdump_flat(ram: HostRam, folder: Path) -> Path:
    """The same in the flattened form, as QEMU's ``dump-guest-memory -z`` and ``makedumpfile -F`` write it."""
    return _written(folder / "host.flat", flattened(kdump_file(ram)))


def kdump_file(
    ram: HostRam,
    excluded: Collection[int] = (),
    level: int = 1,
    status: int = 1,
    machine: bytes = b"x86_64",
    split: int = 0,
) -> bytes:
    """Return the file. ``excluded`` are addresses of pages that the machine had and the dump leaves out."""
    last = max([*ram.pages, *excluded]) // PAGE + 1
    blocks = -(-last // (PAGE * 8))
    maps = [bytearray(blocks * PAGE), bytearray(blocks * PAGE)]
    for address in {*ram.pages, *excluded}:
        for held in maps if address not in excluded else maps[:1]:
            held[address // PAGE // 8] |= 1 << address // PAGE % 8
    names = [b"Linux", b"small", b"6.6.6-test", b"#1 SMP", machine, b"(none)"]
    header = b"KDUMP   " + struct.pack("<i", 6) + b"".join(name.ljust(65, b"\0") for name in names) + bytes(22)
    header += struct.pack("<IiiIIIIIIi", status, PAGE, 1, 2 * blocks, last, 0, 0, 0, 0, 1)
    sub = struct.pack("<Qii11Q", 0, level, split, *[0] * 10, last)
    dumped = sorted(set(ram.pages) - set(excluded))
    at = (2 + 2 * blocks) * PAGE + 24 * len(dumped)
    table, data, zeros = b"", zlib.compress(bytes(PAGE)), (at, len(zlib.compress(bytes(PAGE))))
    for address in dumped:
        page = bytes(ram.pages[address])
        packed = zlib.compress(page, 1)
        where, size, flag = at + len(data), len(packed), 1
        if not any(page):
            (where, size), packed = zeros, b""
        elif len(packed) >= PAGE:
            packed, size, flag = page, PAGE, 0
        table += struct.pack("<QIIQ", where, size, flag, 0)
        data += packed
    return header.ljust(PAGE, b"\0") + sub.ljust(PAGE, b"\0") + bytes(maps[0] + maps[1]) + table + data


def flattened(data: bytes, piece: int = 0x3333, end: bool = True) -> bytes:
    """Return a file as the list of its writes, the last ones first; ``end`` marks where the list ends."""
    out = b"makedumpfile".ljust(16, b"\0") + struct.pack(">qq", 1, 1)
    out = out.ljust(PAGE, b"\0") + struct.pack(">qq", 0, PAGE) + data[:PAGE]
    for at in reversed(range(PAGE, len(data), piece)):
        out += struct.pack(">qq", at, len(data[at : at + piece])) + data[at : at + piece]
    return out + (struct.pack(">qq", -1, -1) if end else b"")


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
FORMATS = (raw, lime, gz, xz, elf, crash_dump, vmware, vmem_alone, qemu, avml, xen, kdump, kdump_flat)
