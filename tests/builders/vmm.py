"""A host with processes, one of which is the VMM of a guest: page tables as Linux keeps them, from literal numbers."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from builders.paging import EPT_4, LONG_4, LONG_5, PAGE, HostRam, Shape, Tables, stamp

NX = 1 << 63
#: P RW US A D, no execute: a process's data. Tables are open to user mode.
DATA, CODE = NX | 0x67, 0x65
_LARGE = {PAGE: 0, 0x20_0000: 0x80, 0x4000_0000: 0x80}
USER_4 = Shape("user, 4 levels", LONG_4.rungs, 0x67, DATA, DATA | 0x80, 0x67)
USER_5 = Shape("user, 5 levels", LONG_5.rungs, 0x67, DATA, DATA | 0x80, 0x67)

FRAME = 0x000F_FFFF_FFFF_F000
#: The kernel's image in the last entry of a top table, its map of all memory in another.
KERNEL, DIRECT_MAP = 511, 273


def protnone(hpa: int, size: int = PAGE, inverted: bool = True) -> int:
    """Return an entry of a page that NUMA balancing has hidden: G and A, no P; frame bits inverted since v4.18."""
    return ((hpa ^ FRAME) & -size & FRAME if inverted else hpa) | 0x120 | _LARGE[size]


def splitting(hpa: int) -> int:
    """Return the entry of a huge page just before it is split: size bit, rights, frame inverted, neither P nor G."""
    return (hpa ^ FRAME) & -0x20_0000 & FRAME | 0xE6


def swap(kind: int, offset: int, low: int = 0) -> int:
    """Return a swap entry: type in bits 63:59, the inverted offset in 58:9, flags of its own in the low bits."""
    return kind << 59 | (~offset & (1 << 50) - 1) << 9 | low


def migrating(hpa: int, kind: int = 25) -> int:
    """Return a migration entry as v6.1 writes it, with the young and dirty bits above the frame number."""
    return swap(kind, hpa >> 12 | 3 << 40)


@dataclass
class Host:
    """A host. Every process's top table has the kernel's upper half, as all top tables of Linux do."""

    shape: Shape = USER_4
    ram: HostRam = field(default_factory=HostRam)

    def __post_init__(self) -> None:
        self._kernel = [(KERNEL, self.ram.allocate()), (DIRECT_MAP, self.ram.allocate())]
        self.init_mm = self.process()

    def process(self, root: int = -1) -> Tables:
        """Return the page tables of a new process."""
        tables = Tables(self.ram, self.shape, root)
        for index, table in self._kernel:
            self.ram.write_entry(tables.root + 8 * index, table | 0x63)
        return tables

    def map_everything(self) -> None:
        """Fill the kernel's map of all memory: 2M pages, closed to user mode."""
        top = max(self.ram.pages) + PAGE
        direct = dict(self._kernel)[DIRECT_MAP]
        if self.shape is USER_5:
            table = self.ram.allocate()
            self.ram.write_entry(direct, table | 0x63)
            direct = table
        directory = self.ram.allocate()
        self.ram.write_entry(direct, directory | 0x63)
        for number in range(-(-top // 0x20_0000)):
            self.ram.write_entry(directory + 8 * number, number << 21 | 0x80_0000_0000_0001E3 & 0xFFF | NX)

    def encrypt(self, process: Tables, key_bit: int) -> None:
        """Set the encryption bit in every entry of a process, as SME does."""
        for table in process.table_pages:
            for at in range(table, table + PAGE, 8):
                entry = self.ram.read_entry(at)
                self.ram.write_entry(at, entry | key_bit if entry else 0)

    def record(self, gpa: int, size: int, hva: int, words: int = 9, flags: int = 0, number: int = 1) -> int:
        """Write a ``kvm_memory_slot`` from ``base_gfn`` on; ``userspace_addr`` is its word ``words``. Return where."""
        at = self.ram.allocate() + 0x1C8
        pointers = [0, 0, 0, *[0xFFFF_8880_0123_4000 + 64 * n for n in range(words - 5)]]
        record = [gpa >> 12, size >> 12, *pointers, hva, flags | number << 32]
        self.ram.write(at, struct.pack(f"<{len(record)}Q", *record))
        return at

    def twin(self, process: Tables) -> int:
        """Return a second top table of a process, as page table isolation makes one: no kernel but its entry."""
        root = self.ram.allocate()
        half = bytes(self.ram.page(process.root)[:2048])
        entries = [entry & ~NX for entry in struct.unpack("<256Q", half)]
        self.ram.write(root, struct.pack("<256Q", *entries))
        self.ram.write_entry(root + 8 * KERNEL, self.ram.allocate() | 0x63)
        return root


@dataclass
class Guest:
    """A guest: its EPT or NPT, and the process that runs it. ``pages`` is the truth: GPA -> HPA, hidden or not."""

    host: Host
    vmm: Tables
    slat: Tables = None  # type: ignore[assignment]
    pages: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slat = self.slat or Tables(self.host.ram, EPT_4)

    def back(self, gpa: int, hva: int, count: int = 1, lost: tuple[int, ...] = ()) -> None:
        """Give ``count`` 4K pages memory of their own, stamped; those numbered in ``lost`` are not in EPT.

        Memory is taken in descending order, so that nothing is contiguous by accident.
        """
        for number in reversed(range(count)):
            self.page(gpa + number * PAGE, hva + number * PAGE, self.host.ram.allocate(), number not in lost)

    def page(self, gpa: int, hva: int, hpa: int, in_slat: bool = True, entry: int | None = None) -> None:
        """Place one 4K page; ``entry`` replaces the host's."""
        self.host.ram.write(hpa, stamp(gpa))
        self.pages[gpa] = hpa
        self.vmm.put(hva, "PTE", hpa | DATA if entry is None else entry)
        self.slat.map(gpa, hpa) if in_slat else self.slat.put(gpa, "PTE", 0)

    def large(self, gpa: int, hva: int, size: int, in_slat: range, entry: int | None = None) -> int:
        """Place one large page of the host, of which EPT has the 4K pages numbered in ``in_slat``; return where."""
        hpa = self.host.ram.reserve(size)
        self.vmm.put(hva, "PDE" if size == 0x20_0000 else "PDPTE", hpa | DATA | 0x80 if entry is None else entry)
        for number in in_slat:
            self.slat.map(gpa + number * PAGE, hpa + number * PAGE)
        return hpa
