"""Manipulations of a guest, as hooks, split views, aliases, leaks and thin hypervisors leave them in a host's memory.

Nothing of the package is imported. Entries are literal numbers: EPT R 1, W 2, X 4, write-back 6 << 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from . import control, kernels
from .machine import BANNER, KERNEL, Guest
from .paging import EPT_4, LONG_4, NPT_4, PAGE, GuestRam, HostRam, Shape, Tables

#: JMP rel32 at the beginning of a function, in place of PUSH RBP; MOV RBP, RSP; NOP.
AT, OLD, NEW = 0x40, b"\x55\x48\x89\xe5\x90", b"\xe9\xfb\x0f\x00\x00"
EXECUTE_ONLY, NO_EXECUTE, READ_ONLY, UNCACHED = 0x34, 0x33, 0x35, 0x07
NX_DATA, READ_EXECUTE = 1 << 63 | 0x63, 0x61
#: VM_FUNCTION_CONTROLS and EPTP_LIST_ADDR in the layout "haswell"; secondary control "enable VM functions".
_HASWELL_FUNCTIONS, _HASWELL_LIST, _ENABLE_VMFUNC = 0x380, 0x388, 1 << 13
#: 64-bit control fields in the layout "bochs_3_0", at 0x210 + 4 * (encoding & 0x3FF).
BOCHS = {"VE_AREA": 0x2B8, "SPPTP": 0x2D0, "TERTIARY": 0x2E0, "HLATP": 0x310}
#: Controls that every vCPU has here, and the one that switches the tertiary ones on.
PROC, PROC2, USE_TERTIARY = 0xB5A0_6DFA, 0x0012_14EF, 1 << 17
#: VMCALL; RET and VMMCALL; RET, as the hypercall page of Hyper-V begins.
VMCALL_PAGE, VMMCALL_PAGE = b"\x0f\x01\xc1\xc3", b"\x0f\x01\xd9\xc3"


def code(number: int) -> bytes:
    """Return a page that looks like code: functions that differ from page to page."""
    body = bytearray()
    while len(body) < PAGE:
        body += OLD + struct.pack("<BI", 0xB8, number * 0x1_0000 + len(body)) + b"\x5d\xc3" + b"\x0f\x1f\x40\x00"
    return bytes(body[:AT]) + OLD + bytes(body[AT + len(OLD) : PAGE])


def patched(page: bytes) -> bytes:
    """Return the page with a jump in place of a function's beginning."""
    return page[:AT] + NEW + page[AT + len(NEW) :]


@dataclass
class Victim:
    """A guest whose kernel has ``code_pages`` pages of code and as many of data, each at an address of its own."""

    ram: HostRam
    shape: Shape = EPT_4
    pages: int = 64
    code_pages: int = 8
    layout: str = "haswell"
    code: list[int] = field(default_factory=list)
    data: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.guest = Guest(self.ram, self.shape, self.pages, first=PAGE, layout=self.layout)
        self.code = [self.guest.kernel_gpa, *(self.guest.ram.allocate() for _ in range(self.code_pages - 1))]
        self.data = [self.guest.ram.allocate() for _ in range(self.code_pages)]
        for number, (gpa, other) in enumerate(zip(self.code, self.data, strict=True)):
            self.guest.own.map(KERNEL + number * PAGE, gpa)
            self.guest.own.map(KERNEL + (0x100 + number) * PAGE, other, bits=NX_DATA)
            self.guest.ram.write(gpa, code(number))
            self.guest.ram.write(other, struct.pack("<512Q", *range(other, other + PAGE, 8)))
        self.guest.ram.write(self.code[0], BANNER)
        self.structure = self.guest.vcpu()

    @property
    def tables(self) -> Tables:
        """The guest's EPT or NPT."""
        return self.guest.tables

    def frame(self, gpa: int) -> int:
        """Return where a page of the guest lay before anything was done to it."""
        return self.guest.placed[gpa]

    def shadow(self, gpa: int) -> int:
        """Return a frame of the hypervisor's with a patched copy of a page of code."""
        copy = self.ram.allocate()
        self.ram.write(copy, patched(bytes(self.ram.page(self.frame(gpa)))))
        return copy


def execute_only_hook(victim: Victim, page: int = 3) -> int:
    """Hide a patched copy behind an execute-only entry. Return the guest-physical address."""
    gpa = victim.code[page]
    victim.tables.map(gpa, victim.shadow(gpa), bits=EXECUTE_ONLY)
    return gpa


def rights(victim: Victim, gpa: int, bits: int) -> int:
    """Give one page other rights, or another memory type."""
    victim.tables.map(gpa, victim.frame(gpa), bits=bits)
    return gpa


def substitute(victim: Victim, page: int = 3) -> int:
    """Put a patched copy in the place of a page of code, all rights as before."""
    gpa = victim.code[page]
    victim.tables.map(gpa, victim.shadow(gpa))
    return gpa


def guest_remap(victim: Victim, page: int = 3) -> int:
    """Let the guest's own tables lead to a patched copy in the guest. Return where the copy is."""
    copy = victim.guest.ram.allocate()
    victim.guest.ram.write(copy, patched(bytes(victim.ram.page(victim.frame(victim.code[page])))))
    victim.guest.own.map(KERNEL + page * PAGE, copy)
    return copy


def writable_alias(victim: Victim, page: int = 3) -> int:
    """Let the guest's own kernel write a page of code at another of its addresses. Return where the page is."""
    victim.guest.own.map(KERNEL, victim.code[0], bits=READ_EXECUTE)
    for number, gpa in enumerate(victim.code):
        victim.guest.own.map(KERNEL + number * PAGE, gpa, bits=READ_EXECUTE)
    victim.guest.own.map(KERNEL + 0x180 * PAGE, victim.code[page], bits=NX_DATA)
    return victim.code[page]


def switch_on(victim: Victim, proc: int = 0, proc2: int = 0, eptp: int = 0, **fields: int) -> None:
    """Set controls in a victim's VMCS, and fields that :data:`BOCHS` names."""
    raw = bytearray(
        victim.guest.control_page(
            proc=PROC | proc, proc2=PROC2 | proc2, eptp=victim.guest.root | eptp, msr_bitmap=0x50_0000
        )
    )
    for name, value in fields.items():
        struct.pack_into("<Q", raw, BOCHS[name], value)
    victim.ram.write(victim.structure, bytes(raw))


def second_view(victim: Victim, change: dict[int, tuple[int, int | None]], vmfunc: bool = True) -> Tables:
    """Build a second EPT in which some pages have another frame and rights, and list both for VMFUNC."""
    other = Tables(victim.ram, victim.shape)
    for gpa, frame in victim.guest.placed.items():
        target, bits = change.get(gpa, (frame, None))
        other.map(gpa, target, bits=bits)
    if vmfunc:
        page = victim.ram.allocate()
        for slot, tables in enumerate((victim.tables, other)):
            victim.ram.write_entry(page + 8 * slot, tables.register)
        raw = bytearray(victim.guest.control_page(proc2=PROC2 | _ENABLE_VMFUNC, msr_bitmap=0x50_0000))
        struct.pack_into("<QQ", raw, _HASWELL_FUNCTIONS, 1, page)
        victim.ram.write(victim.structure, bytes(raw))
    return other


def alias(victim: Victim, frame: int, gpa: int = 0x80_0000, bits: int | None = None) -> int:
    """Map a frame at one more address of the guest."""
    victim.tables.map(gpa, frame, bits=bits)
    return gpa


@dataclass
class Thin:
    """A hypervisor under a running system: one guest, every page of the computer at its own address.

    ``hidden``: its own pages are kept from the guest. ``image`` is what stands at its entry point.
    """

    megabytes: int = 1
    hidden: bool = True
    shape: Shape = EPT_4
    image: bytes = b""

    def __post_init__(self) -> None:
        self.ram = HostRam(0x1000)
        system = [self.ram.allocate() for _ in range(self.megabytes * 256)]
        for address in system:
            self.ram.write(address, struct.pack("<Q", address))
        self.guest_ram = GuestRam(self.ram, {address: address for address in system})
        self.own = own = Tables(self.guest_ram, LONG_4)
        kernel = self.guest_ram.allocate()
        own.map(KERNEL, kernel)
        self.ram.write(kernel, BANNER)
        first = self.ram.allocate()
        self.tables = Tables(self.ram, self.shape)
        for address in system:
            self.tables.map(address, address)
        host = Tables(self.ram, LONG_4)
        entry = self.ram.allocate()
        host.map(kernels.HOST_KERNEL, entry)
        self.ram.write(entry, self.image or b"\x0f\x01\xc4")
        where = self.ram.allocate()
        if self.shape is NPT_4:
            page = control.vmcb(ncr3=self.tables.register, cr3=own.root, rip=KERNEL)
        else:
            page = control.vmcs(eptp=self.tables.register, guest_cr3=own.root, guest_rip=KERNEL, link=(1 << 64) - 1,
                                host_cr3=host.root, host_rip=kernels.HOST_KERNEL + 0x100)  # fmt: skip
        self.ram.write(where, page)
        if not self.hidden:
            for address in range(first, max(self.ram.pages) + PAGE, PAGE):
                self.tables.map(address, address)


def pdb_record(name: bytes, age: int = 1) -> bytes:
    """Return the record of a program's debug directory that names its symbols."""
    return b"RSDS" + bytes(range(16)) + age.to_bytes(4, "little") + name + b".pdb\x00"
