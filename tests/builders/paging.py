"""Host memory and paging hierarchies for tests, written from literal numbers.

Nothing of the package is imported here: a mask that both sides shared could be wrong in both and no test would tell.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PAGE = 0x1000
LIME_MAGIC = 0x4C694D45


class HostRam:
    """Sparse physical memory: pages by address. What was never written is not in the capture."""

    def __init__(self, first_free: int = 0x10_0000) -> None:
        self.pages: dict[int, bytearray] = {}
        self._next = first_free

    def reserve(self, size: int) -> int:
        """Return an unused address aligned to ``size``; nothing of it is in the capture yet."""
        start = -(-self._next // size) * size
        self._next = start + size
        return start

    def allocate(self) -> int:
        """Return the address of a fresh page, full of zeros."""
        address = self.reserve(PAGE)
        self.page(address)
        return address

    def page(self, address: int) -> bytearray:
        """Return the page that holds an address; a missing one is created, full of zeros."""
        return self.pages.setdefault(address & ~0xFFF, bytearray(PAGE))

    def drop(self, address: int) -> None:
        """Take the page at an address out of the capture."""
        del self.pages[address & ~0xFFF]

    def write(self, address: int, data: bytes) -> None:
        """Write bytes; they may run over several pages."""
        while data:
            within = address & 0xFFF
            take = min(len(data), PAGE - within)
            self.page(address)[within : within + take] = data[:take]
            address, data = address + take, data[take:]

    def write_entry(self, address: int, value: int, width: int = 8) -> None:
        """Write one little-endian paging entry of 8 or 4 bytes."""
        self.write(address, value.to_bytes(width, "little"))

    def read_entry(self, address: int, width: int = 8) -> int:
        """Return one little-endian paging entry."""
        within = address & 0xFFF
        return int.from_bytes(self.page(address)[within : within + width], "little")

    def image(self) -> bytes:
        """Return the memory as a raw image from address 0 on; pages that are missing are zeros."""
        out = bytearray(max(self.pages, default=-PAGE) + PAGE)
        for address, page in self.pages.items():
            out[address : address + PAGE] = page
        return bytes(out)

    def runs(self) -> list[tuple[int, bytes]]:
        """Return the present memory as ``(address, bytes)``, neighbouring pages joined."""
        joined: list[tuple[int, bytearray]] = []
        for address in sorted(self.pages):
            if joined and joined[-1][0] + len(joined[-1][1]) == address:
                joined[-1][1].extend(self.pages[address])
            else:
                joined.append((address, bytearray(self.pages[address])))
        return [(address, bytes(data)) for address, data in joined]

    def segments(self, prefix: bytes = b"") -> tuple[bytes, list[tuple[int, int, int]]]:
        """Return a file that holds the present memory alone, and its ``(start, length, file offset)`` table.

        ``prefix`` stands before each run, as the headers of LiME do: offsets are then not multiples of 4096.
        """
        out, table = bytearray(), []
        for address, data in self.runs():
            out += prefix
            table.append((address, len(data), len(out)))
            out += data
        return bytes(out), table

    def lime(self) -> bytes:
        """Return the memory as a LiME file: 32 bytes of header before each range, end address inclusive."""
        return b"".join(
            struct.pack("<IIQQQ", LIME_MAGIC, 1, address, address + len(data) - 1, 0) + data
            for address, data in self.runs()
        )


@dataclass(frozen=True)
class Shape:
    """One kind of hierarchy. ``rungs`` are ``(entry name, shift, index bits)`` from the top.

    ``table``, ``page`` and ``large`` are the low bits of an ordinary entry of each sort; ``top`` is for a root entry.
    """

    name: str
    rungs: tuple[tuple[str, int, int], ...]
    table: int
    page: int
    large: int
    top: int
    width: int = 8
    root_offset: int = 0
    #: Low bits that the root register (EPTP, nCR3, CR3) has beside the address.
    register: int = 0


_PML5E, _PML4E = ("PML5E", 48, 9), ("PML4E", 39, 9)
_PDPTE, _PDE, _PTE = ("PDPTE", 30, 9), ("PDE", 21, 9), ("PTE", 12, 9)
_FOUR = (_PML4E, _PDPTE, _PDE, _PTE)
_FIVE = (_PML5E, *_FOUR)

# EPT: R W X; leaves write-back (6 << 3). EPTP: write-back, length - 1 in 5:3, A/D.
EPT_4 = Shape("EPT, 4 levels", _FOUR, 0x7, 0x37, 0xB7, 0x7, register=0x5E)
EPT_5 = Shape("EPT, 5 levels", _FIVE, 0x7, 0x37, 0xB7, 0x7, register=0x66)
# NPT: P RW US A, leaves with D, large ones with PS.
NPT_4 = Shape("NPT, 4 levels", _FOUR, 0x27, 0x67, 0xE7, 0x27)
NPT_5 = Shape("NPT, 5 levels", _FIVE, 0x27, 0x67, 0xE7, 0x27)
# A guest's own tables. CR3 carries a PCID or PWT and PCD below the address.
LONG_4 = Shape("4-level", _FOUR, 0x23, 0x63, 0xE3, 0x23, register=0x18)
LONG_5 = Shape("5-level", _FIVE, 0x23, 0x63, 0xE3, 0x23, register=0x18)
# PAE: four PDPTEs, in which only P (and PWT, PCD) may be set below the address.
PAE = Shape("PAE", (("PDPTE", 30, 2), _PDE, _PTE), 0x23, 0x63, 0xE3, 0x1, root_offset=0x7E0)
LEGACY = Shape("32-bit", (("PDE", 22, 10), ("PTE", 12, 10)), 0x23, 0x63, 0xE3, 0x23, width=4)

SHAPES = (EPT_4, EPT_5, NPT_4, NPT_5, LONG_4, LONG_5, PAE, LEGACY)
#: Sizes that a leaf of each shape can have.
LEAF_SIZES = {shape.name: (0x1000, 0x20_0000, 0x4000_0000) for shape in SHAPES} | {
    "PAE": (0x1000, 0x20_0000),
    "32-bit": (0x1000, 0x40_0000),
}


@dataclass
class Tables:
    """A hierarchy in some memory: a :class:`HostRam`, or the :class:`GuestRam` of a guest that has its own."""

    ram: HostRam | GuestRam
    shape: Shape = EPT_4
    root: int = -1
    table_pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.root < 0:
            self.root = self.ram.allocate() + self.shape.root_offset
        self.table_pages.append(self.root & ~0xFFF)

    @property
    def register(self) -> int:
        """Return the raw root register: EPTP, nCR3 or CR3."""
        return self.root | self.shape.register

    def entry_address(self, address: int, name: str) -> int:
        """Return where the entry of that name for ``address`` lies; tables above it are made where there are none."""
        table = self.root
        for rung, (entry_name, shift, index_bits) in enumerate(self.shape.rungs):
            at = table + self.shape.width * (address >> shift & ((1 << index_bits) - 1))
            if entry_name == name:
                return at
            entry = self.ram.read_entry(at, self.shape.width)
            if entry == 0:
                fresh = self.ram.allocate()
                self.table_pages.append(fresh)
                entry = fresh | (self.shape.top if rung == 0 else self.shape.table)
                self.ram.write_entry(at, entry, self.shape.width)
            table = entry & 0x000F_FFFF_FFFF_F000
        raise ValueError(f"{self.shape.name} has no {name}")

    def put(self, address: int, name: str, raw: int) -> int:
        """Write a raw entry and return where."""
        at = self.entry_address(address, name)
        self.ram.write_entry(at, raw, self.shape.width)
        return at

    def get(self, address: int, name: str) -> int:
        """Return the raw entry of that name for ``address``."""
        return self.ram.read_entry(self.entry_address(address, name), self.shape.width)

    def map(self, address: int, target: int, size: int = PAGE, bits: int | None = None) -> int:
        """Map one page of ``size`` bytes; ``bits`` replaces the low (and high) bits of the leaf."""
        name = next(name for name, shift, _ in self.shape.rungs if 1 << shift == size)
        if bits is None:
            bits = self.shape.page if size == PAGE else self.shape.large
        if self.shape.width == 4 and size > PAGE:
            # PSE-36: bits 39:32 of the address lie in bits 20:13 of the entry.
            target = target & 0xFFC0_0000 | (target >> 32 & 0xFF) << 13
        return self.put(address, name, target | bits)

    def back(self, addresses: list[int], bits: int | None = None) -> dict[int, int]:
        """Give each 4 KiB page memory of its own, stamped with its address; returns address -> where it lies.

        Memory is taken in descending order of address, so that nothing is contiguous by accident.
        """
        placed = {}
        for address in sorted(addresses, reverse=True):
            placed[address] = self.ram.allocate()
            self.ram.write(placed[address], stamp(address))
            self.map(address, placed[address], bits=bits)
        return placed


@dataclass
class GuestRam:
    """The memory of a guest as its own kernel sees it: written through ``placed`` (GPA -> address below)."""

    below: HostRam | GuestRam
    placed: dict[int, int]
    _used: int = 0

    def allocate(self) -> int:
        """Return a page of the guest, zeroed: the lowest that was not given away yet."""
        gpa = sorted(self.placed)[self._used]
        self._used += 1
        self.write(gpa, bytes(PAGE))
        return gpa

    def write(self, address: int, data: bytes) -> None:
        """Write bytes within one page."""
        self.below.write(self.placed[address & ~0xFFF] | address & 0xFFF, data)

    def write_entry(self, address: int, value: int, width: int = 8) -> None:
        """Write one paging entry."""
        self.write(address, value.to_bytes(width, "little"))

    def read_entry(self, address: int, width: int = 8) -> int:
        """Return one paging entry."""
        return self.below.read_entry(self.placed[address & ~0xFFF] | address & 0xFFF, width)


def stamp(address: int) -> bytes:
    """Return a page in which every word holds its own address."""
    return struct.pack("<512Q", *range(address, address + PAGE, 8))
