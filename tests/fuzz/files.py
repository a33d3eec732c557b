"""Targets: capture files and their headers, the kernel's note in a guest, and the cores that are written."""

from __future__ import annotations

import functools
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
from builders import control, paging
from builders.paging import PAGE, HostRam
from builders.windows_pe import Pe
from cli import containers as writers
from fuzz.draw import Draw
from readers import memory_of

from volatility3_ept import api
from volatility3_ept.core import containers, kdump, kdumppages, pe, walk
from volatility3_ept.export import cpu, elf, vmcoreinfo
from volatility3_ept.spec import ia32e

_NEAR = (0, 1, 64, 56, 120, 0x1000, 0x2000, 0xFFFF, 1 << 31, 1 << 52, 1 << 63, (1 << 64) - 1, 0x100000)
_LIME = struct.Struct("<IIQQQ")
_PROGRAM = struct.Struct("<IIQQQQQQ")


def _path() -> Path:
    """Return a file of this process's own, in memory where there is such a place."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    return Path(folder) / f"ept-fuzz-{os.getpid()}"


def container(data: bytes) -> None:
    """A file with headers of any sort: segments within the file that do not overlap, or one clear error."""
    draw = Draw(data)
    body = draw.choice((_lime, _elf, Draw.rest))(draw)
    path = _path()
    path.write_bytes(body)
    try:
        _assert_container(path, len(body))
    finally:
        path.unlink()


def _assert_container(path: Path, size: int) -> None:
    found = containers.read(path)
    if found is None:
        return
    assert found.missing >= 0
    assert len(found.segments) <= size // 32 + 1
    for segment in found.segments:
        assert 0 <= segment.offset < segment.offset + segment.length <= size
    try:
        with api.open_capture(path, allow_truncated=True) as capture:
            for segment in found.segments[:8]:
                length = min(segment.length, 64)
                expected = path.read_bytes()[segment.offset : segment.offset + length]
                assert capture.memory.read(segment.start, length) == expected
            assert capture.memory.size == found.declared - found.missing
    except api.CaptureError as error:
        assert str(error).startswith(str(path))


def _lime(draw: Draw) -> bytes:
    out = bytearray()
    start = 0
    for _ in range(draw.below(6) + 1):
        start = draw.word(start, *_NEAR)
        length = draw.choice((0x1000, 1, 0, 0x2000))
        last = draw.word(start + length - 1, *_NEAR) if draw.flag(4) else (start + length - 1) & (1 << 64) - 1
        magic, version = (draw.word(containers.LIME_MAGIC) & 0xFFFF_FFFF, 2) if draw.flag(8) else (0x4C694D45, 1)
        out += _LIME.pack(magic, version, start, last, 0) + bytes(draw.below(256) if draw.flag(4) else length)
        start = last + 1
    return bytes(out)


def _elf(draw: Draw) -> bytes:
    rows = []
    for _ in range(draw.below(6)):
        kind = draw.choice((1, 1, 4, 0))
        fields = [draw.word(*_NEAR) for _ in range(6)]
        if not draw.flag(4):
            fields[0], fields[3] = 0x1000 * (len(rows) + 1), 0x1000
            fields[2] = 0x1_0000 * len(rows)
        rows.append(_PROGRAM.pack(kind, 0, *fields))
    table, sections = (draw.word(*_NEAR), draw.word(*_NEAR)) if draw.flag(4) else (64, 0)
    entry, count = (draw.word(56) & 0xFFFF, draw.word(0xFFFF) & 0xFFFF) if draw.flag(4) else (56, len(rows))
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, table, sections, 0, 64, entry, count,
                       64, 0, 0)  # fmt: skip
    body = head + b"".join(rows)
    return body.ljust(draw.choice((0x8000, 64, 0x1001, len(body))), b"\0")[: draw.choice((None, 63, 0x2345))]


@functools.cache
def _dumps() -> tuple[tuple[bytes, dict[int, bytes]], ...]:
    """Return small dumps, plain and flattened, with the pages that are in them."""
    ram = HostRam()
    for page in (1, 2, 4, 5, 0x40):
        ram.write(page * PAGE, bytes([page]) * 100)
    whole = writers.kdump_file(ram, [0x3000], level=31)
    pages = {address: bytes(page) for address, page in ram.pages.items()}
    return (whole, pages), (writers.flattened(whole), pages)


#: Where the headers, the bitmaps and the descriptors of such a dump are.
_PLACES = ((0, 464), (PAGE, 96), (2 * PAGE, 16), (3 * PAGE, 16), (4 * PAGE, 144))


def dump(data: bytes) -> None:
    """A compressed dump, plain or flattened, with changes: its pages as they were written, or absent, or one error."""
    draw = Draw(data)
    whole, pages = draw.choice(_dumps())
    body = bytearray(whole)
    moved = PAGE + 16 if body.startswith(b"makedumpfile") else 0
    for _ in range(16):
        if not draw.left:
            break
        start, length = draw.choice(_PLACES) if draw.flag() else (0, len(body) - moved)
        at = min(start + draw.below(length) + moved * draw.flag(), len(body) - 8)
        size = draw.choice((1, 4, 8))
        old = int.from_bytes(body[at : at + size], "little")
        body[at : at + size] = (draw.word(old, *_NEAR) & (1 << 8 * size) - 1).to_bytes(size, "little")
    body = body[: draw.below(len(body))] if draw.flag(8) else body
    path = _path()
    path.write_bytes(body)
    try:
        try:
            found = kdump.read(path)
        except kdump.KdumpError as error:
            assert str(error).isprintable()
            return
        assert found.describe().isprintable()
        assert found.dumped <= found.memory
        memory = kdumppages.memory(found)
        assert memory.size <= found.dumped * PAGE
        for address in pages:
            page = memory.read(address, PAGE)
            assert page is None or len(page) == PAGE
            rows, good = memory.words(np.array([address]))
            assert (rows.tobytes() if good[0] else None) == page
        if bytes(body) == whole:
            assert {address: memory.read(address, PAGE) for address in pages} == pages
    finally:
        path.unlink()


_FIELDS = (0x3C, 0x114, 0x116, 0x128, 0x150, 0x184, 0x188, 0x198, 0x19C, 0x1A0, 0x1A4, 0x1B8, 0x1BC)


def image(data: bytes) -> None:
    """A Windows image in memory with changes: identified in plain words, what is outside or absent named, or none."""
    draw = Draw(data)
    written = Pe()
    parts = {rva: bytearray(part) for rva, part in written.parts().items()}
    for _ in range(16):
        if not draw.left:
            break
        rva = draw.choice(sorted(parts))
        part = parts[rva]
        at = min(draw.choice(_FIELDS) if draw.flag() else draw.below(min(len(part), 0x400)), len(part) - 8)
        size = draw.choice((1, 2, 4))
        old = int.from_bytes(part[at : at + size], "little")
        part[at : at + size] = (draw.word(old, *_NEAR) & (1 << 8 * size) - 1).to_bytes(size, "little")
    absent = draw.choice((None, *parts))
    asked: list[int] = []

    def read(rva: int, length: int) -> bytes | None:
        asked.append(length)
        held = next((start for start in parts if start <= rva < start + PAGE and start != absent), None)
        if held is None or rva + length > held + PAGE:
            return None
        return bytes(parts[held].ljust(PAGE, b"\0")[rva - held : rva - held + length])

    found = pe.identify(read)
    assert sum(asked) <= 64 * PAGE, "no more is read than is named"
    if found is None:
        return
    assert (found.file_version + found.product_version + "".join(found.missing)).isprintable()
    assert PAGE <= found.size <= pe.MAX_SIZE
    if found.pdb is not None:
        assert (str(found.pdb) + found.pdb.stem + found.pdb.isf).isprintable()
        assert not {"/", "\\", ".."} & {found.pdb.stem, *found.pdb.stem}


_LINES = (b"OSRELEASE=6.1.0-test\n", b"BUILD-ID=0123\n", b"SYMBOL(swapper_pg_dir)=", b"ffffffff82610000", b"\n",
          b"NUMBER(phys_base)=", b"-1", b"0", b"33554432", b"0x2000000", b"NUMBER(pgtable_l5_enabled)=1\n", b"=", b"\0",
          b"\x1b[31m", b"ffffffff80000000", b"9" * 5000, b"-0x", b"PAGESIZE=4096\n", b"1_0")  # fmt: skip
_SWAPPER = 0xFFFF_FFFF_8261_0000


def note(data: bytes) -> None:
    """Notes of a kernel, true and forged: believed only where a second walk finds the named table at itself."""
    draw = Draw(data)
    ram = HostRam(0x1000)
    kernel = paging.Tables(ram, paging.LONG_4)
    pages = [ram.allocate() for _ in range(4)]
    kernel.map(_SWAPPER, kernel.root)
    for _ in range(draw.below(4)):
        kernel.map(
            draw.word(_SWAPPER, 0xFFFF_FFFF_8000_0000) & 0xFFFF_FFFF_FFFF_F000, draw.choice((*pages, kernel.root))
        )
    moved = kernel.root - (_SWAPPER - 0xFFFF_FFFF_8000_0000)
    for page in pages:
        lines = [_LINES[0], b"SYMBOL(swapper_pg_dir)=%x\nNUMBER(phys_base)=%d\n" % (_SWAPPER, moved)]
        lines = lines if draw.flag() else lines[:1]
        while draw.left and draw.flag() and len(lines) < 12:
            lines.append(draw.choice(_LINES) if not draw.flag(8) else draw.take(draw.below(16)))
        text = b"".join(lines)
        size = draw.word(len(text)) & 0xFFFF_FFFF if draw.flag(8) else len(text)
        raw = struct.pack("<III12s", 11, size, 0, b"VMCOREINFO\0\0") + text
        at = 0 if draw.flag() else 4 * draw.below(64)
        ram.write(page + at, raw[: PAGE - at])
    memory = memory_of(ram)
    found, notes = vmcoreinfo.find(memory, draw.choice((None, kernel.root, pages[0])))
    assert all(text.isprintable() for text in notes)
    if found is None:
        return
    assert found.proof.isprintable()
    assert found.release.isprintable()
    assert 0 < len(found.release) <= 64
    assert memory.read(found.gpa + 24, len(found.text)) == found.text
    gpa = (found.number("SYMBOL(swapper_pg_dir)", 16) or 0) - 0xFFFF_FFFF_8000_0000
    gpa += found.number("NUMBER(phys_base)", 0) or 0
    fmt = ia32e.five_level() if found.number("NUMBER(pgtable_l5_enabled)", 0) else ia32e.four_level()
    assert walk.walk(memory, fmt, gpa, found.number("SYMBOL(swapper_pg_dir)", 16) or 0).target == gpa
    assert len(found.note()) % 4 == 0


def core(data: bytes) -> None:
    """The front of a core from any registers and ranges: read back, it gives the same ranges and registers."""
    draw = Draw(data)
    present, gpa = [], 0
    for _ in range(draw.below(12) + 1):
        gpa += draw.word(0, PAGE, 1 << 32) % (1 << 40) & -PAGE
        length = PAGE * (1 + draw.below(4))
        present.append((gpa, length))
        gpa += length
    notes = b""
    count = draw.below(3)
    for number in range(count):
        page = bytearray(control.vmcs("haswell") if draw.flag() else control.vmcb())
        for _ in range(8):
            at = draw.below(PAGE - 8)
            page[at : at + 8] = draw.word(int.from_bytes(page[at : at + 8], "little")).to_bytes(8, "little")
        notes += _registers(bytes(page), number)
    front = elf.front(notes, present)
    assert len(front) % PAGE == 0
    path = _path()
    path.write_bytes(front + b"".join(bytes([n + 1]) * length for n, (_, length) in enumerate(present)))
    try:
        found = containers.read(path)
        assert found is not None
        assert found.missing == 0
        assert [(s.start, s.length) for s in found.segments] == present
        with api.open_capture(path) as capture:
            for number, (start, length) in enumerate(present):
                assert capture.memory.read(start, length) == bytes([number + 1]) * length
    finally:
        path.unlink()


def _registers(page: bytes, number: int) -> bytes:
    """Return both notes of a vCPU, after a look at what is in them."""
    from volatility3_ept.core import vmcb, vmcs

    found = vmcs.examine(page, 0x1000) or vmcb.examine(page, 0x1000)
    if found is None:
        return b""
    registers = cpu.read(found)
    status, state = cpu.prstatus(registers, number + 1), cpu.qemu_state(registers)
    assert struct.unpack_from("<III", status) == (5, 336, 1)
    place = 12 + 8 + 112 + 8 * 16
    assert struct.unpack_from("<Q", status, place)[0] == registers.values.get("rip", 0)
    assert set(registers.unknown).isdisjoint(registers.values)
    return status + state
