"""Minimal guests in every paging mode, behind EPT and behind NPT, and what each of their virtual addresses must give.

Nothing of the package is imported. Registers and entries are literal numbers; offsets in a VMCS are those of the layout
"haswell", in a VMCB those of AMD's manual.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from . import control
from .paging import EPT_4, LEGACY, LONG_4, LONG_5, NPT_4, PAE, PAGE, GuestRam, HostRam, Shape, Tables

M4, G4 = 0x40_0000, 1 << 32
NX = 1 << 63
USER_CODE, USER_DATA, USER_TABLE = 0x65, 0x67, 0x67
#: Linux's CPU entry area, which both halves of a pair map, and its map of all memory.
ENTRY_AREA, DIRECT_MAP, KERNEL = 0xFFFF_FE00_0000_0000, 0xFFFF_8880_0000_0000, 0xFFFF_FFFF_8100_0000
#: GUEST_CS_BASE, GUEST_GDTR_BASE, GUEST_IDTR_BASE, GUEST_PDPTE0 in a VMCS; CS, GDTR and IDTR bases in a VMCB.
_VMCS_OFFSETS = {"cs_base": 0x38, "gdtr_base": 0xA8, "idtr_base": 0xB8, "pdptes": 0x220}
_VMCB_OFFSETS = {"cs_base": 0x418, "gdtr_base": 0x468, "idtr_base": 0x488}

# CR0, CR4 and EFER of a guest, and what the control structures say beside them.
_LONG = {"cr0": 0x8005_0033, "cr4": 0x26B0, "efer": 0xD01}
_PROTECTED = {"cr0": 0x8001_0033, "efer": 0}


@dataclass
class Space:
    """A host with one guest. ``pages`` is what its virtual addresses give, page by page; at ``absent`` is nothing.

    ``registers`` is what its first vCPU holds.
    """

    shape: Shape = EPT_4
    pages: dict[int, bytes] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    pdptes: tuple[int, ...] = ()
    structures: list[int] = field(default_factory=list)
    extra: tuple[int, ...] = ()
    ram: HostRam | None = None

    def __post_init__(self) -> None:
        self.ram = self.ram or HostRam()
        self.nested = Tables(self.ram, self.shape)
        self.placed: dict[int, int] = {}
        for gpa in (*range(0, 96 * PAGE, PAGE), *self.extra):
            self.placed[gpa] = self.ram.allocate()
            self.nested.map(gpa, self.placed[gpa])
        self.guest = GuestRam(self.ram, self.placed)
        self.guest.allocate()  # Page 0 heads no hierarchy.

    @property
    def is_ept(self) -> bool:
        return self.shape.name.startswith("EPT")

    @property
    def root(self) -> str:
        """The root as ``--guest`` takes it."""
        return f"{'eptp' if self.is_ept else 'ncr3'}={self.nested.register:#x}"

    def fill(self, gva: int, gpa: int) -> None:
        """Write a page that says at which virtual address it must appear."""
        self.pages[gva] = content(gva)
        self.guest.write(gpa, content(gva))

    def page(self, tables: Tables, gva: int, bits: int | None = None) -> int:
        """Map one more page at a virtual address and fill it. Returns its guest-physical address."""
        gpa = self.guest.allocate()
        tables.map(gva & (1 << 57) - 1, gpa, bits=bits)
        self.fill(gva, gpa)
        return gpa

    def vcpu(self, **changed: int) -> int:
        """Write a control structure with the guest's registers; returns its address."""
        values = {**self.registers, **changed}
        bases = {name: values.pop(name) for name in list(values) if name.endswith("_base")}
        number = len(self.structures)
        make = self._vmcs if self.is_ept else self._vmcb
        page = bytearray(make(values, number))
        places = _VMCS_OFFSETS if self.is_ept else _VMCB_OFFSETS
        for name, value in bases.items():
            struct.pack_into("<Q", page, places[name], value)
        if self.pdptes and self.is_ept:
            struct.pack_into("<4Q", page, places["pdptes"], *self.pdptes)
        address = self.ram.allocate()
        self.ram.write(address, bytes(page))
        self.structures.append(address)
        return address

    def _vmcs(self, values: dict[str, int], number: int) -> bytes:
        is_long = values["efer"] & 0x400
        more = {"entry": 0xD3FF, "guest_cs_rights": 0xA09B} if is_long else {"entry": 0xD1FF, "guest_cs_rights": 0xC09B}
        if not values["cr0"] & 1:
            more["guest_cs_rights"] = 0x9B
        # CR4.VMXE is fixed to 1 while the guest runs.
        values = {**values, "cr4": values["cr4"] | 0x2000}
        given = {f"guest_{name}": value for name, value in values.items()}
        return control.vmcs(eptp=self.nested.register, msr_bitmap=0x50_0000 + number * PAGE, **given, **more)

    def _vmcb(self, values: dict[str, int], number: int) -> bytes:
        attributes = 0xA9B if values["efer"] & 0x400 else 0xC9B if values["cr0"] & 1 else 0x9B
        values = {**values, "efer": values["efer"] | 0x1000}
        return control.vmcb(ncr3=self.nested.register, msrpm=0x50_0000 + number * 2 * PAGE, cs_attributes=attributes,
                            **values)  # fmt: skip


def content(gva: int) -> bytes:
    """Return a page that names an address."""
    line = f"<page at {gva:#x} ".encode()
    return (line + bytes(range(256)) * 16)[:PAGE]


def protected(shape: Shape = EPT_4, ram: HostRam | None = None) -> Space:
    """Return a guest in protected mode with paging off."""
    space = Space(
        shape, ram=ram, registers={"cr0": 0x33, "cr3": 0, "cr4": 0x50, "efer": 0, "rip": 0x5000, "rsp": 0x9000}
    )
    for _ in range(8):
        gpa = space.guest.allocate()
        space.fill(gpa, gpa)
    space.absent = [96 * PAGE, 0xFFFF_F000]
    space.vcpu()
    return space


def real_mode(shape: Shape = EPT_4, ram: HostRam | None = None) -> Space:
    """Return a guest in real mode, whose code segment begins at 0x7000."""
    space = Space(shape, ram=ram, registers={"cr0": 0x30, "cr3": 0, "cr4": 0, "efer": 0, "rip": 0x123, "rsp": 0x900,
                                    "cs_base": 0x7000})  # fmt: skip
    for _ in range(8):
        gpa = space.guest.allocate()
        space.fill(gpa, gpa)
    space.absent = [96 * PAGE]
    space.vcpu()
    return space


def pse(shape: Shape = EPT_4, ram: HostRam | None = None) -> Space:
    """Return a guest in 32-bit paging with 4K pages, a 4M page, and a 4M page above 4 GiB (PSE-36)."""
    near = [M4 + PAGE * number for number in (0, 1, 1023)]
    far = [G4 + 3 * M4 + PAGE * number for number in (0, 512)]
    space = Space(shape, extra=(*near, *far), ram=ram)
    tables = Tables(space.guest, LEGACY)
    for number in range(4):
        space.page(tables, 0xC010_0000 + number * PAGE)
    space.page(tables, 0x0804_8000, bits=USER_DATA)
    tables.map(0x8000_0000, M4, M4)
    tables.map(0x9000_0000, G4 + 3 * M4, M4)
    for gpa in near:
        space.fill(0x8000_0000 + gpa - M4, gpa)
    for gpa in far:
        space.fill(0x9000_0000 + gpa - G4 - 3 * M4, gpa)
    space.absent = [0, 0x8000_0000 + 2 * PAGE, 0xC010_4000, 0xFFFF_F000]
    space.registers = {**_PROTECTED, "cr3": tables.root | 0x18, "cr4": 0x90, "rip": 0xC010_0040, "rsp": 0xC010_1800}
    space.vcpu()
    return space


def no_pse(shape: Shape = EPT_4, ram: HostRam | None = None) -> Space:
    """Return a guest in 32-bit paging with CR4.PSE off, and bit 7 set in an entry that leads to a page table."""
    space = Space(shape, ram=ram)
    tables = Tables(space.guest, LEGACY)
    for number in range(4):
        space.page(tables, 0xC010_0000 + number * PAGE)
    tables.put(0xC010_0000, "PDE", tables.get(0xC010_0000, "PDE") | 0x80)
    space.absent = [0, 0xC010_4000]
    space.registers = {**_PROTECTED, "cr3": tables.root, "cr4": 0, "rip": 0xC010_0040, "rsp": 0xC010_1800}
    space.vcpu()
    return space


def pae(shape: Shape = EPT_4, ram: HostRam | None = None) -> Space:
    """Return a guest in PAE paging. Behind EPT its PDPTEs are in the VMCS alone: memory at CR3 holds others by now."""
    large = [0x60_0000 + PAGE * number for number in (0, 511)]
    space = Space(shape, extra=tuple(large), ram=ram)
    tables = Tables(space.guest, PAE)
    for number in range(4):
        space.page(tables, 0xC010_0000 + number * PAGE)
    space.page(tables, 0x0804_8000, bits=USER_DATA)
    tables.map(0x8000_0000, 0x60_0000, 0x20_0000)
    for gpa in large:
        space.fill(0x8000_0000 + gpa - 0x60_0000, gpa)
    space.absent = [0, 0x4000_0000, 0x8000_0000 + 2 * PAGE, 0xC010_4000]
    space.registers = {**_PROTECTED, "cr3": tables.root, "cr4": 0xB0, "rip": 0xC010_0040, "rsp": 0xC010_1800}
    if space.is_ept:
        space.pdptes = tuple(tables.ram.read_entry(tables.root + 8 * number) for number in range(4))
        other = space.guest.allocate()  # A table without entries: read from memory, nothing would be mapped.
        space.guest.write(tables.root, struct.pack("<4Q", *[other | 1] * 4))
    space.vcpu()
    return space


def four_level(shape: Shape = EPT_4, ram: HostRam | None = None) -> Space:
    """Return a guest in 4-level paging with a PCID in CR3."""
    space = Space(shape, ram=ram, registers={**_LONG})
    tables = Tables(space.guest, LONG_4)
    for number in range(4):
        space.page(tables, KERNEL + number * PAGE)
    space.page(tables, DIRECT_MAP + 7 * PAGE)
    space.page(tables, 0x40_0000, bits=USER_CODE)
    space.absent = [0, KERNEL + 4 * PAGE, 0x7FFF_FFFF_F000]
    space.registers |= {"cr3": tables.root | 0x7A5, "cr4": 0x2_26B0, "rip": KERNEL + 0x40, "rsp": KERNEL + PAGE + 0x800}
    space.vcpu()
    return space


def la57(shape: Shape = EPT_4, ram: HostRam | None = None) -> Space:
    """Return a guest in 5-level paging, with a page that 48 bits do not reach."""
    space = Space(shape, ram=ram, registers={**_LONG})
    tables = Tables(space.guest, LONG_5)
    for number in range(4):
        space.page(tables, KERNEL + number * PAGE)
    space.page(tables, 0xFF11_0000_0000_7000)
    space.page(tables, 0x00AB_CDEF_0123_4000, bits=USER_DATA)
    space.absent = [0, KERNEL + 4 * PAGE, 0xFF12_0000_0000_0000]
    space.registers |= {"cr3": tables.root, "cr4": 0x36B0, "rip": KERNEL + 0x40, "rsp": KERNEL + PAGE + 0x800}
    space.vcpu()
    return space


@dataclass
class Pair:
    """A guest in user mode: CR3 names the user half of two top tables. ``shadow`` are its pages of the kernel."""

    space: Space
    kernel: Tables
    user: Tables
    shadow: list[int]


def kpti(shape: Shape = EPT_4, levels: Shape = LONG_4, ram: HostRam | None = None) -> Pair:
    """Return a guest of Linux with page table isolation: the user half lies in the page above the kernel's."""
    space = Space(shape, ram=ram, registers={**_LONG})
    first = space.guest.allocate()
    while first & PAGE:
        first = space.guest.allocate()
    user_root = space.guest.allocate()
    pair = _pair(space, levels, first, user_root)
    # PCID 5 for the kernel, and bit 11 for the user's.
    space.registers |= {"cr3": user_root | 0x805, "cr4": 0x2_26B0 | (0x1000 if levels is LONG_5 else 0)}
    space.vcpu()
    return pair


def kva_shadow(shape: Shape = EPT_4, ram: HostRam | None = None) -> Pair:
    """Return a guest of Windows with KVA shadow: two tables, anywhere, and the kernel's names itself."""
    space = Space(shape, ram=ram, registers={**_LONG})
    user_root = space.guest.allocate()
    space.guest.allocate()
    pair = _pair(space, LONG_4, space.guest.allocate(), user_root)
    space.guest.write_entry(pair.kernel.root + 8 * 0x1ED, pair.kernel.root | NX | 0x63)
    space.registers |= {"cr3": user_root}
    space.vcpu()
    return pair


def _pair(space: Space, levels: Shape, kernel_root: int, user_root: int) -> Pair:
    levels = replace(levels, table=USER_TABLE, top=USER_TABLE)
    kernel = Tables(space.guest, levels, kernel_root)
    user = Tables(space.guest, levels, user_root)
    code = 0x40_0000
    space.page(kernel, code, bits=USER_CODE)
    space.page(kernel, 0x7F00_0000_0000, bits=NX | USER_DATA)
    inside = replace(levels, table=0x63, top=0x67)  # Linux sets the user bit in the kernel's upper tables too.
    own = Tables(space.guest, inside, kernel_root)
    space.page(own, ENTRY_AREA, bits=0x61)
    for number in range(4):
        space.page(own, KERNEL + number * PAGE)
        space.page(own, DIRECT_MAP + number * (1 << 39), bits=NX | 0x63)
    if levels.rungs[0][0] == "PML5E":
        space.page(own, 0xFF11_0000_0000_7000, bits=NX | 0x63)
    entries = [space.guest.read_entry(kernel_root + 8 * number) for number in range(512)]
    index = ENTRY_AREA >> levels.rungs[0][1] & 0x1FF
    for number in range(256):
        if entries[number]:
            space.guest.write_entry(user_root + 8 * number, entries[number] & ~0x20)
            space.guest.write_entry(kernel_root + 8 * number, entries[number] | NX)
    if levels.rungs[0][0] == "PML4E":
        space.guest.write_entry(user_root + 8 * index, entries[index])
    else:
        Tables(space.guest, inside, user_root).map(ENTRY_AREA & (1 << 57) - 1, _target(own, ENTRY_AREA), bits=0x61)
    space.absent = [0, KERNEL + 4 * PAGE]
    space.registers |= {"rip": code + 0x40, "rsp": 0x7F00_0000_0800, "idtr_base": ENTRY_AREA}
    return Pair(space, kernel, user, [ENTRY_AREA])


def _target(tables: Tables, gva: int) -> int:
    return tables.get(gva & (1 << 57) - 1, "PTE") & 0x000F_FFFF_FFFF_F000


#: Every guest by name; of the pairs, the space alone.
GUESTS: dict[str, Callable[..., Space]] = {
    "protected": protected,
    "real mode": real_mode,
    "32-bit": pse,
    "32-bit without PSE": no_pse,
    "PAE": pae,
    "4-level": four_level,
    "5-level": la57,
    "KPTI": lambda shape, ram=None: kpti(shape, LONG_4, ram).space,
    "KPTI in 5 levels": lambda shape, ram=None: kpti(shape, LONG_5, ram).space,
    "KVA shadow": lambda shape, ram=None: kva_shadow(shape, ram).space,
}
SHAPES = (EPT_4, NPT_4)


def host(names: Iterable[tuple[str, str]] = ()) -> tuple[HostRam, dict[tuple[str, str], Space]]:
    """Return one host with guests by name and kind (``EPT``, ``NPT``), every one by default, in the order of roots."""
    ram = HostRam()
    shapes = {shape.name[:3]: shape for shape in SHAPES}
    wanted = list(names) or [(name, kind) for name in GUESTS for kind in shapes]
    return ram, {(name, kind): GUESTS[name](shapes[kind], ram) for name, kind in wanted}
