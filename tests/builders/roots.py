"""Guests for the search of roots: hierarchies with the bits that each hypervisor writes, and a kernel inside them.

Nothing of the package is imported here. The kernel inside is a set of ordinary page tables in the guest's own memory:
with an upper half, as every 64-bit system has, and through the nested tables it parses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .paging import EPT_4, LONG_4, PAGE, GuestRam, HostRam, Shape, Tables, stamp

M2, G1 = 0x20_0000, 0x4000_0000
KERNEL = 0xFFFF_FFFF_8100_0000
DIRECT_MAP = 0xFFFF_8880_0000_0000

# What hypervisors write, from captures of running hosts: table entries, 4K leaves, large leaves.
KVM_EPT = replace(EPT_4, name="KVM", table=0x907, top=0x907, page=0x0600_0000_0000_0B77, large=0x0600_0000_0000_0BF7)
XEN_EPT = replace(
    EPT_4,
    name="Xen",
    table=0x9C00_0000_0000_0107,
    top=0x9C00_0000_0000_0107,
    page=0x9C00_0000_0000_0377,
    large=0x9C00_0000_0000_03F3,
)
#: KVM on a processor without A/D flags: RWX cleared, bit 52 set, R and X kept in bits 54 and 56.
TRACKED = 0x0750_0000_0000_0870
SUPPRESS_VE = 0x8000_0000_0000_0000


@dataclass
class Planted:
    """A guest: its nested tables, and where its 4 KiB pages lie that the host has written."""

    tables: Tables
    placed: dict[int, int]

    @property
    def root(self) -> int:
        return self.tables.root


def plant(
    ram: HostRam,
    shape: Shape = EPT_4,
    leaves: Iterable[tuple[int, int]] = (),
    empty: int = 0,
    kernel: Shape | None = LONG_4,
    resident: int = 8,
) -> Planted:
    """Build a guest whose ``leaves`` are ``(gpa, size)``; of a large one the first ``resident`` pages are written.

    ``empty`` fills every entry that is otherwise zero, at every level.
    """
    leaves = list(leaves) or small_guest()
    tables = Tables(ram, shape)
    placed = {}
    for gpa, size in leaves:
        frame = ram.reserve(size)
        tables.map(gpa, frame, size)
        for offset in range(0, min(size, resident * PAGE), PAGE):
            placed[gpa + offset] = frame + offset
            ram.write(frame + offset, stamp(gpa + offset))
    if kernel:
        plant_kernel(GuestRam(ram, placed), kernel)
    fill_empties(ram, tables, empty)
    return Planted(tables, placed)


def small_guest(base: int = 0, pages: int = 64) -> list[tuple[int, int]]:
    """Return the 4 KiB pages of a small guest."""
    return [(base + PAGE * number, PAGE) for number in range(pages)]


def plant_kernel(guest: GuestRam, shape: Shape = LONG_4) -> Tables:
    """Give a guest page tables of its own: its code, and a direct map of all its written pages."""
    tables = Tables(guest, shape)
    for number, gpa in enumerate(sorted(guest.placed)):
        tables.map(DIRECT_MAP + gpa & (1 << 57) - 1, gpa)
        if number < 8:
            tables.map(KERNEL + PAGE * number & (1 << 57) - 1, gpa)
    return tables


def fill_empties(ram: HostRam, tables: Tables, value: int) -> None:
    """Write ``value`` into every entry of the tables that is zero."""
    for table in tables.table_pages if value else ():
        for offset in range(0, PAGE, 8):
            if not ram.read_entry(table + offset):
                ram.write_entry(table + offset, value)


def process(ram: HostRam, shape: Shape = LONG_4, base: int = 0x40_0000, pages: int = 200) -> Tables:
    """Build an ordinary process: code, heap, libraries and stack for users, and the kernel's upper half."""
    tables = Tables(ram, replace(shape, table=0x67, top=0x67))
    user = [base, 0x5555_5555_4000, 0x7F12_3456_7000, 0x7FFD_0000_0000]
    for number in range(pages):
        tables.map(user[number % len(user)] + PAGE * number, _filled(ram), bits=0x67 if number % 3 else 1 << 63 | 0x67)
    for number in range(64):
        tables.map((KERNEL + PAGE * number) & (1 << 57) - 1, _filled(ram), bits=0x163)
        tables.map((DIRECT_MAP + PAGE * number) & (1 << 57) - 1, PAGE * number, bits=1 << 63 | 0x163)
    return tables


def identity_map(ram: HostRam, top: int, table: int = 0x63, leaf: int = 0x1E3, size: int = M2) -> Tables:
    """Build the map that firmware, kexec or a boot loader leaves: every address to itself."""
    tables = Tables(ram, replace(LONG_4, table=table, top=table))
    for address in range(0, top, size):
        tables.map(address, address, size, bits=leaf)
    return tables


def dma_tables(ram: HostRam, pages: int = 512) -> Tables:
    """Build an I/O domain of Intel VT-d: read and write, never execute, no memory type."""
    tables = Tables(ram, replace(EPT_4, table=0x3, top=0x3))
    for number in range(pages):
        tables.map(PAGE * number, _filled(ram), bits=0x3)
    return tables


def forged(ram: HostRam, owner: Planted, targets: Iterable[int], low: int = 7) -> Iterator[int]:
    """Write fake top tables into a guest's memory, one on each of its pages beyond the first 32, naming ``targets``."""
    wanted = list(targets)
    for gpa in sorted(owner.placed)[32:]:
        page = b"".join((target | low).to_bytes(8, "little") for target in wanted)
        ram.write(owner.placed[gpa], page + bytes(PAGE - len(page)))
        yield owner.placed[gpa]


def _filled(ram: HostRam) -> int:
    page = ram.allocate()
    ram.write(page, stamp(page))
    return page
