"""The guest kernel's VMCOREINFO: found where it is, and believed only where it leads to that kernel's page tables."""

from __future__ import annotations

import struct
import time

import pytest
from builders import paging
from builders.paging import PAGE, HostRam, Tables
from readers import memory_of

from volatility3_ept.core.memory import HostMemory
from volatility3_ept.export import vmcoreinfo

MAP, MOVED = 0xFFFF_FFFF_8000_0000, 0x120_0000
#: Above this the test kernels lie: symbols of a kernel are above MAP, however it was moved.
FIRST = 0x200_0000


def note(text: bytes) -> bytes:
    return struct.pack("<III12s", 11, len(text), 0, b"VMCOREINFO") + text


def kernel(ram: HostRam, shape: paging.Shape = paging.LONG_4, moved: int = MOVED, release: str = "6.6.6") -> tuple:
    """Write a kernel's top table, mapped where its symbol says, and return its GPA and its VMCOREINFO."""
    tables = Tables(ram, shape)
    virtual = MAP + tables.root - moved
    tables.map(virtual, tables.root)
    lines = f"OSRELEASE={release}\nPAGESIZE=4096\nSYMBOL(swapper_pg_dir)={virtual:x}\nNUMBER(phys_base)={moved}\n"
    lines += f"NUMBER(pgtable_l5_enabled)={int(shape is paging.LONG_5)}\nKERNELOFFSET=b200000\n"
    return tables.root, note(lines.encode())


@pytest.mark.parametrize("shape", [paging.LONG_4, paging.LONG_5], ids=["4-level", "5-level"])
@pytest.mark.parametrize("moved", [MOVED, -0x10_0000, 0])
@pytest.mark.parametrize("within", [0, 0x7F0, PAGE - 20], ids=["page boundary", "in a page", "across pages"])
def test_the_note_is_found_and_proven(shape, moved, within):
    ram = HostRam(FIRST)
    root, data = kernel(ram, shape, moved)
    ram.write(0x30_0000 + within, data)
    found, said = vmcoreinfo.find(memory_of(ram))
    assert (found.gpa, found.release, said) == (0x30_0000 + within, "6.6.6", ())
    assert f"{root:#x}" in found.proof
    assert found.note() == data + bytes(-len(data) % 4)


def test_a_note_of_another_kernel_is_passed_over():
    """A guest's guest has one too, and a file in the cache may hold one: their page tables are elsewhere."""
    ram, other = HostRam(FIRST), HostRam(2 * FIRST)
    _, data = kernel(ram)
    _, foreign = kernel(other, release="5.5.5")
    ram.write(0x20_0000, foreign)
    ram.write(0x30_0000, data)
    found, said = vmcoreinfo.find(memory_of(ram))
    assert found.release == "6.6.6"
    assert said == ("1 VMCOREINFO notes were not believed: their kernel's page tables are not where they say",)


def test_of_two_proven_ones_the_vcpu_s_is_taken():
    """After kexec the memory holds both kernels."""
    ram = HostRam(FIRST)
    _, old = kernel(ram, release="5.5.5")
    root, new = kernel(ram, moved=0x20_0000)
    ram.write(0x20_0000, old)
    ram.write(0x30_0000, new)
    assert vmcoreinfo.find(memory_of(ram), root)[0].release == "6.6.6"
    assert vmcoreinfo.find(memory_of(ram), 0x7777000)[0].release == "5.5.5"


GOOD = b"OSRELEASE=6.6.6\nPAGESIZE=4096\n"
BAD = {
    "unproven": note(GOOD),
    "not text": note(GOOD + b"\x80=1\n"),
    "no value": note(GOOD + b"nothing\n"),
    "other first line": note(b"PAGESIZE=4096\n" + GOOD),
    "longer than the memory": struct.pack("<III12s", 11, 0xFFFF, 0, b"VMCOREINFO") + GOOD,
    "absurd length": struct.pack("<III12s", 11, 0xFFFF_FFFF, 0, b"VMCOREINFO") + GOOD,
    "name alone": b"VMCOREINFO\0\0",
    "not a number": note(GOOD + b"SYMBOL(swapper_pg_dir)=banana\nNUMBER(phys_base)=0\n"),
    "out of range": note(GOOD + b"SYMBOL(swapper_pg_dir)=" + b"f" * 40 + b"\nNUMBER(phys_base)=-9999999999999999999\n"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_note_is_none(case):
    ram = HostRam()
    ram.write(0x30_0000, BAD[case])
    ram.write(0x30_1000, b"x")
    assert vmcoreinfo.find(memory_of(ram))[0] is None


def test_a_memory_without_one():
    assert vmcoreinfo.find(HostMemory.from_bytes(bytes(0x4000))) == (None, ())


def test_a_memory_full_of_them_takes_no_longer_than_it_should():
    ram = HostRam()
    hostile = note(b"OSRELEASE=6.6.6\n" + b"=" * 4000)
    for page in range(2000):
        ram.write(0x30_0000 + page * PAGE, hostile[:PAGE])
    start = time.monotonic()
    assert vmcoreinfo.find(memory_of(ram))[0] is None
    assert time.monotonic() - start < 5
