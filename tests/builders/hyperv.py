"""Writes a computer that runs Hyper-V: the hypervisor's image, a root partition with two trust levels, a child.

Nothing of the package is imported.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from . import control, paging
from .paging import PAGE, GuestRam, HostRam, Tables
from .windows import Windows
from .windows_pe import Pe

IMAGE = 0xFFFF_F850_0000_0000
SECURE = 0xFFFF_F807_1000_0000
ENTRY = 0x1040
#: Where the secure kernel's pages lie, guest-physical.
SECURE_GPA = 0x80_0000


@dataclass
class HyperV:
    """The hypervisor in the host's memory, mapped by page tables of its own; its partitions are made by methods."""

    ram: HostRam = field(default_factory=lambda: HostRam(0x200_0000))
    pdb: str = "hvix64.pdb"

    def __post_init__(self) -> None:
        self.tables = Tables(self.ram, paging.LONG_4)
        write_image(self.tables, IMAGE, Pe(pdb=self.pdb, guid=bytes(range(16)), age=2))

    @property
    def host(self) -> dict[str, int]:
        """What a VMCS says of the host."""
        return {"host_cr3": self.tables.root, "host_rip": IMAGE + ENTRY}

    def root(self, shape: paging.Shape = paging.EPT_4) -> Windows:
        """Return the root partition, which has VTL0 alone, with its vCPU."""
        guest = Windows(self.ram, shape, first=0x40_0000, identity=True)
        guest.vcpu(**(self.host if shape is paging.EPT_4 else {}))
        return guest

    def child(self, shape: paging.Shape = paging.EPT_4) -> Windows:
        """Return a child partition with its vCPU."""
        guest = Windows(self.ram, shape, pages=160)
        guest.vcpu(**(self.host if shape is paging.EPT_4 else {}))
        return guest


def write_image(tables: Tables, base: int, pe: Pe) -> None:
    """Write an image at an address of some page tables, with a page of code."""
    for rva, data in {**pe.parts(), ENTRY & ~0xFFF: b"\xcc" * PAGE}.items():
        page = tables.ram.allocate()
        tables.map(base + (rva & ~0xFFF), page)
        tables.ram.write(page | rva & 0xFFF, data)


def secure_level(guest: Windows, **host: int) -> Tables:
    """Give a partition a VTL1: tables that map all of its memory and the secure kernel's, and a vCPU in that kernel."""
    shape = guest.shape
    tables = Tables(guest.below, shape)
    for gpa, at in guest.placed.items():
        tables.map(gpa, at)
    placed = {}
    for gpa in range(SECURE_GPA, SECURE_GPA + 12 * PAGE, PAGE):
        placed[gpa] = gpa if guest.identity else guest.below.allocate()
        guest.below.write(placed[gpa], bytes(PAGE))
        tables.map(gpa, placed[gpa])
    own = Tables(GuestRam(guest.below, placed), paging.LONG_4)
    write_image(own, SECURE, Pe(pdb="securekernel.pdb", guid=bytes(range(16, 32))))
    if shape is paging.EPT_4:
        values = {"eptp": tables.register, "guest_cr3": own.root, "guest_rip": SECURE + ENTRY, **host}
        page = bytearray(control.vmcs(msr_bitmap=0x51_0000, **values))
    else:
        page = bytearray(control.vmcb(msrpm=0x51_0000, ncr3=tables.register, cr3=own.root, rip=SECURE + ENTRY))
        struct.pack_into("<Q", page, 0x608, SECURE + ENTRY)
    at = guest.below.allocate()
    guest.below.write(at, bytes(page))
    return tables
