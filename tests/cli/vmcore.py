"""Makes the ``/proc/vmcore`` that makedumpfile reads from a capture: an ELF core with the kernel's VMCOREINFO note.

After a crash the second kernel offers the first one's memory as such a file: the note comes from the memory itself,
and the virtual addresses are those of the kernel's direct map. Everything here is from literal numbers.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

PAGE = 4096
#: What the kernel writes in front of the text: the sizes of the name and of the text, a type, the name.
_NOTE = re.compile(rb"\x0b\0\0\0(.{4})\0\0\0\0VMCOREINFO\0\0(?=OSRELEASE=)", re.DOTALL)
_FRAME = 0x000F_FFFF_FFFF_F000
#: A note that is no VMCOREINFO: ``makedumpfile -d 1`` asks the kernel nothing.
NOTHING = struct.pack("<III8s", 5, 336, 1, b"CORE") + bytes(336)


def note(text: bytes) -> bytes:
    """Return the ELF note with this text."""
    return struct.pack("<III12s", 11, len(text), 0, b"VMCOREINFO") + text.ljust(-(-len(text) // 4) * 4, b"\0")


def elf(path: Path, runs: Sequence[tuple[int, bytes]], noted: bytes, direct_map: int = 0xFFFF_8880_0000_0000) -> Path:
    """Write a vmcore; pages of zeros become holes in the file."""
    count = len(runs) + 1
    body = (64 + 56 * count + len(noted) + PAGE - 1) // PAGE * PAGE
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 4, 0, 64 + 56 * count, 0, 0, len(noted), len(noted), 0)
    at = body
    for start, data in runs:
        head += struct.pack("<IIQQQQQQ", 1, 7, at, direct_map + start, start, len(data), len(data), 0)
        at += len(data)
    with path.open("wb") as file:
        file.write(head + noted)
        at = body
        for _, data in runs:
            for offset in range(0, len(data), 1 << 16):
                piece = data[offset : offset + (1 << 16)]
                if any(piece):
                    file.seek(at + offset)
                    file.write(piece)
            at += len(data)
        file.truncate(at)
    return path


def from_capture(capture: Path, path: Path) -> Path:
    """Write the vmcore of a captured Linux host whose memory is one range."""
    data = capture.read_bytes()
    table, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    rows = (struct.unpack_from("<IIQQQQQQ", data, table + 56 * row) for row in range(count))
    loads = sorted((row[4], row[5], row[2]) for row in rows if row[0] == 1)
    memory = bytearray(loads[-1][0] + loads[-1][1])
    for start, size, offset in loads:
        memory[start : start + size] = data[offset : offset + size]
    for found in _NOTE.finditer(memory):
        text = bytes(memory[found.end() : found.end() + int.from_bytes(found[1], "little")])
        virtual = int(re.search(rb"swapper_pg_dir\)=(\w+)", text)[1], 16)
        top = virtual - 0xFFFF_FFFF_8000_0000 + int(re.search(rb"phys_base\)=(-?\d+)", text)[1])
        if _walk(memory, top, virtual) == top:  # The host's own: a guest's kernel has its tables elsewhere.
            direct = next(
                at for at in range(0xFFFF_8880 << 32, 0xFFFF_C880 << 32, 1 << 30) if _walk(memory, top, at) == 0
            )
            return elf(path, [(0, bytes(memory))], note(text), direct)
    raise LookupError(f"no VMCOREINFO of the host in {capture}")


def _walk(memory: bytearray, table: int, virtual: int) -> int | None:
    for shift in (39, 30, 21, 12):
        at = table + (virtual >> shift & 511) * 8
        if not 0 <= at <= len(memory) - 8:
            return None
        (entry,) = struct.unpack_from("<Q", memory, at)
        if not entry & 1:
            return None
        if shift in (30, 21) and entry & 0x80:
            return (entry & _FRAME) >> shift << shift | virtual & ((1 << shift) - 1)
        table = entry & _FRAME
    return table | virtual & 0xFFF


def makedumpfile(vmcore: Path, path: Path, *options: str) -> Path:
    """Dump a vmcore; skip the test where makedumpfile is not installed."""
    if shutil.which("makedumpfile") is None:
        pytest.skip("no makedumpfile (Debian: makedumpfile)")
    command = ["makedumpfile", "--message-level", "4", *options, str(vmcore)]
    if "-F" in options:
        with path.open("wb") as out:
            subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=True, timeout=120)
    else:
        subprocess.run([*command, str(path)], capture_output=True, check=True, timeout=120)
    return path
