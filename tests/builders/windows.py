"""Writes a Windows guest into a host: its kernel's image, page tables that map themselves, processes, modules, handles.

Everything lies above 96 MiB of guest-physical memory, where Volatility does not look for page tables, and the image at
an address that a boot could have chosen at random. Nothing of the package is imported; numbers are literal.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from . import control, paging
from .paging import PAGE, GuestRam, HostRam, Tables
from .windows_pe import Pe
from .windows_types import offset, write_isf

KERNEL = 0xFFFF_F803_5A60_0000
PCR = 0xFFFF_F803_5900_0000
IDT = PCR + 0x10_0000
POOL = 0xFFFF_C18A_7720_0000
KUSER, KUSER_USER = 0xFFFF_F780_0000_0000, 0x7FFE_0000
USER_CODE = 0x7FF6_1234_0000
PEB, PARAMETERS = 0x5C_3F2A_1000, 0x5C_3F2B_0000
#: The page of the image with the interrupt handlers: all that a user's page tables map of it under KVA shadow.
HANDLERS = 0x5000
SYMBOLS = {
    "PsActiveProcessHead": 0x8000, "PsLoadedModuleList": 0x8020, "KdDebuggerDataBlock": 0x8100,
    "KdVersionBlock": 0x8500, "KeNumberProcessors": 0x8540, "ObTypeIndexTable": 0x8600, "ObHeaderCookie": 0x8A00,
    "ObpInfoMaskToOffset": 0x8A10, "MmProtectToValue": 0x8B00, "PsInitialSystemProcess": 0x8C00,
    "MmSystemRangeStart": 0x8C08,
}  # fmt: skip
COOKIE = 0x5B
#: 2024-03-01 12:00:00 UTC in units of 100 ns since 1601.
BOOT = 133_537_680_000_000_000


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    name: str
    threads: int
    session: int | None = None
    command: str = ""


PROCESSES = (
    Process(4, 0, "System", 120),
    Process(388, 4, "smss.exe", 2),
    Process(512, 388, "csrss.exe", 11, 0),
    Process(604, 388, "wininit.exe", 3, 0),
    Process(2044, 604, "explorer.exe", 40, 1),
    Process(3120, 2044, "notepad.exe", 4, 1, "notepad.exe C:\\secret.txt"),
)
#: In memory, and in no list: what hides from ``pslist``.
HIDDEN = Process(4244, 2044, "hidden.exe", 1, 1)
MODULES = (
    ("ntoskrnl.exe", "\\SystemRoot\\system32\\ntoskrnl.exe", 0, None),
    ("hal.dll", "\\SystemRoot\\system32\\hal.dll", -0x20_0000, 0x6000),
    ("tcpip.sys", "\\SystemRoot\\System32\\drivers\\tcpip.sys", 0x4D0_0000, 0x2E_0000),
)
#: Start, end, protection index, commit charge, private, file.
VADS = (
    (0x7FF6_1234_0000, 0x7FF6_1237_FFFF, 7, 3, 0, "\\Windows\\System32\\notepad.exe"),
    (0x5C_3F20_0000, 0x5C_3F3F_FFFF, 4, 5, 1, ""),
    (0x7FFE_0000, 0x7FFE_0FFF, 1, 1, 1, ""),
)
#: Value and object type, granted access, name, in the last process.
HANDLES = ((4, "Process", 0x1F_FFFF, "System Pid 4"), (8, "Event", 0x1F_0003, "TheEvent"), (12, "Event", 0x3, None))
OBJECT_TYPES = ("", "Reserved", "Type", "Directory", "Process", "Event")
#: MmProtectToValue: PAGE_READONLY, PAGE_READWRITE, PAGE_EXECUTE_WRITECOPY where they are used.
PROTECTIONS = {1: 0x02, 4: 0x04, 7: 0x80}


@dataclass
class Windows:
    """A guest that runs Windows, behind EPT or NPT. ``truth`` holds addresses by name, as registers hold them.

    ``first`` is the lowest address that it uses, that of System's top table. ``shadow``: the vCPU was in user mode
    with the page tables of KVA shadow. ``has_version_block``: KPCR names it, as in older builds. ``identity``: each
    page lies at its own address below, as in Hyper-V's root partition.
    """

    below: HostRam | GuestRam
    shape: paging.Shape = paging.EPT_4
    pe: Pe = Pe()  # noqa: RUF009
    first: int = 0x600_0000
    pages: int = 160
    self_index: int = 0x1A7
    base: int = KERNEL
    shadow: bool = False
    has_version_block: bool = False
    identity: bool = False
    truth: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slat = Tables(self.below, self.shape)
        self.placed = {}
        for gpa in [*range(0, 16 * PAGE, PAGE), *range(self.first, self.first + self.pages * PAGE, PAGE)]:
            self.placed[gpa] = gpa if self.identity else self.below.allocate()
            self.below.write(self.placed[gpa], bytes(PAGE))
            self.slat.map(gpa, self.placed[gpa])
        self.ram = GuestRam(self.below, {gpa: at for gpa, at in self.placed.items() if gpa >= self.first})
        self.own = Tables(self.ram, paging.LONG_4)
        self.mapped: dict[int, int] = {}
        self._pool = POOL
        self._image()
        self._processor()
        self._shared_page()
        self.roots = {4: self.own, **{p.pid: Tables(self.ram, paging.LONG_4) for p in (*PROCESSES[1:], HIDDEN)}}
        self._objects()
        self._process_list()
        self._modules()
        self._user_memory()
        self.word(PCR + 0x9000, self.roots[PROCESSES[-1].pid].root | 2)
        self.share_kernel()
        self.user_root = self._shadow_tables()

    # --- memory

    def page(self, gva: int) -> int:
        """Return the guest-physical page of a kernel address, mapped by now."""
        gva &= ~0xFFF
        if gva not in self.mapped:
            self.mapped[gva] = self.ram.allocate()
            self.own.map(gva, self.mapped[gva], bits=0x163)
        return self.mapped[gva]

    def write(self, gva: int, data: bytes) -> None:
        """Write bytes at a kernel address."""
        while data:
            take = min(len(data), PAGE - gva % PAGE)
            self.ram.write(self.page(gva) | gva & 0xFFF, data[:take])
            gva, data = gva + take, data[take:]

    def word(self, gva: int, value: int, size: int = 8) -> None:
        """Write a number at a kernel address."""
        self.write(gva, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def take(self, size: int, tag: bytes = b"Test") -> int:
        """Return pool memory behind a header with a tag, within one page where it fits."""
        start = self._pool + 0x10
        if size < PAGE - 0x10 and start // PAGE != (start + size - 1) // PAGE:
            start = -(-self._pool // PAGE) * PAGE + 0x10
        self._pool = start + -(-size // 16) * 16
        # PoolType 2, nonpaged; BlockSize in units of 16 bytes with the header.
        self.write(start - 0x10, struct.pack("<HBB4sQ", 0, 1 + -(-size // 16), 2, tag, 0))
        self.write(start, bytes(size))
        return start

    def text(self, at: int, text: str) -> None:
        """Write a UNICODE_STRING, and its characters elsewhere."""
        raw = text.encode("utf-16-le")
        buffer = self.take(len(raw) + 2)
        self.write(buffer, raw)
        self.write(at, struct.pack("<HHIQ", len(raw), len(raw) + 2, 0, buffer))

    def symbol(self, name: str) -> int:
        return self.base + SYMBOLS[name]

    # --- the kernel

    def _image(self) -> None:
        for rva, data in self.pe.parts().items():
            self.write(self.base + rva, data)
        self.write(self.base + HANDLERS, b"\xcc" * PAGE)
        self.write(self.base + 0x8000, bytes(PAGE))
        self.word(self.symbol("KeNumberProcessors"), 1, 4)
        self.word(self.symbol("ObHeaderCookie"), COOKIE, 4)
        self.write(self.symbol("ObpInfoMaskToOffset"), bytes([0, 0, 0x20, 0x20]))
        for index, value in PROTECTIONS.items():
            self.word(self.symbol("MmProtectToValue") + 4 * index, value, 4)
        self.word(self.symbol("MmSystemRangeStart"), 0xFFFF_8000_0000_0000)
        block = struct.pack("<HHBBHHBBBBHQQQ", 15, 19041, 6, 2, 0x47, 0x8664, 12, 0, 0, 0, 0, self.base,
                            self.symbol("PsLoadedModuleList"), self.symbol("KdDebuggerDataBlock"))  # fmt: skip
        self.write(self.symbol("KdVersionBlock"), block)

    def _processor(self) -> None:
        for vector in range(32):
            handler = self.base + HANDLERS + 0x40 * vector
            gate = struct.pack("<HHBBHII", handler & 0xFFFF, 0x10, 0, 0x8E, handler >> 16 & 0xFFFF, handler >> 32, 0)
            self.write(IDT + 16 * vector, gate)
        self.word(PCR + 0x18, PCR)
        self.word(PCR + 0x38, IDT)
        self.word(PCR + 0x108, self.symbol("KdVersionBlock") if self.has_version_block else 0)
        self.page(PCR + 0x9000)

    def _shared_page(self) -> None:
        self.write(KUSER + 0x14, struct.pack("<Iii", BOOT & 0xFFFF_FFFF, BOOT >> 32, BOOT >> 32))
        self.write(KUSER + 0x30, "C:\\Windows\0".encode("utf-16-le"))
        self.write(KUSER + 0x260, struct.pack("<IIIII", self.pe.version[2], 1, 1, self.pe.version[0], 0))

    def _objects(self) -> None:
        table = self.symbol("ObTypeIndexTable")
        for index, name in enumerate(OBJECT_TYPES[1:], 1):
            at = self.take(0xD8, b"ObjT")
            self.text(at + 0x10, name)
            self.word(table + 8 * index, at)

    def object(self, kind: str, size: int, name: str | None = None, tag: bytes = b"Obj ") -> int:
        """Return the body of an executive object with its header, and a name before that."""
        extra = 0x20 if name else 0
        header = self.take(extra + 0x30 + size, tag) + extra
        if name:
            self.text(header - 0x20 + 8, name)
        self.word(header, 5)
        self.word(header + 8, 2)
        self.word(header + 0x18, OBJECT_TYPES.index(kind) ^ COOKIE ^ (header >> 8 & 0xFF), 1)
        self.word(header + 0x1A, 2 if name else 0, 1)
        return header + 0x30

    def _link(self, head: int, entries: list[int]) -> None:
        ring = [head, *entries]
        for here, after in zip(ring, [*entries, head], strict=True):
            self.word(here, after)
            self.word(after + 8, here)

    def _process_list(self) -> None:
        links = []
        for number, process in enumerate((*PROCESSES, HIDDEN)):
            at = self.object("Process", 0xA40, tag=b"Proc")
            self.truth[process.name] = at
            set_ = lambda name, value, size=8, at=at: self.word(at + offset("_EPROCESS", name), value, size)  # noqa: E731
            self.word(at + offset("_KPROCESS", "DirectoryTableBase"), self.roots[process.pid].root)
            set_("UniqueProcessId", process.pid)
            set_("InheritedFromUniqueProcessId", process.parent)
            set_("CreateTime", BOOT + number * 10_000_000)
            set_("ActiveThreads", process.threads, 4)
            self.write(at + offset("_EPROCESS", "ImageFileName"), process.name.encode())
            threads = at + offset("_EPROCESS", "ThreadListHead")
            self._link(threads, [])
            if process.session is not None:
                session = self.take(0x10)
                self.word(session + 8, process.session, 4)
                set_("Session", session)
            set_("ObjectTable", self._handle_table(process))
            if process is not HIDDEN:
                links.append(at + offset("_EPROCESS", "ActiveProcessLinks"))
        last = self.truth[PROCESSES[-1].name]
        self.word(last + offset("_EPROCESS", "VadRoot"), self._vads())
        self.word(last + offset("_EPROCESS", "Peb"), PEB)
        self._link(self.symbol("PsActiveProcessHead"), links)
        self.word(self.symbol("PsInitialSystemProcess"), self.truth["System"])

    def _handle_table(self, process: Process) -> int:
        at = self.take(0x80, b"Obtb")
        entries = self._pool = -(-self._pool // PAGE) * PAGE
        self._pool += PAGE
        self.write(entries, bytes(PAGE))
        self.word(at + 8, entries)
        if process is PROCESSES[-1]:
            self.word(at + 0x3C, len(HANDLES), 4)
            for value, kind, access, name in HANDLES:
                body = self.truth["System"] if kind == "Process" else self.object(kind, 0x20, name)
                self.truth[f"handle {value}"] = body
                entry = entries + 16 * (value // 4)
                self.word(entry, (body - 0x30 & 0xFFFF_FFFF_FFFF) >> 4 << 20 | 1)
                self.word(entry + 8, access, 4)
        return at

    def _vads(self) -> int:
        nodes = []
        for start, end, protection, commit, private, file in VADS:
            at = self.take(0x88 if file else 0x40, b"Vad " if file else b"VadS")
            nodes.append(at)
            self.word(at + 0x18, start >> 12, 4)
            self.word(at + 0x1C, end >> 12, 4)
            self.word(at + 0x20, start >> 44, 1)
            self.word(at + 0x21, end >> 44, 1)
            self.word(at + 0x30, protection << 7 | private << 20, 4)
            self.word(at + 0x34, commit, 4)
            if file:
                section, area, opened = self.take(0x38), self.take(0x80), self.take(0xD8)
                self.word(at + 0x48, section)
                self.word(section, area)
                self.word(area + 0x40, opened | 7)
                self.text(opened + 0x58, file)
        root, left, right = nodes
        self.word(root, left)
        self.word(root + 8, right)
        for child in (left, right):
            self.word(child + 0x10, root | 1)
        self.truth |= {"vad": root, "left": left, "right": right}
        return root

    def _modules(self) -> None:
        links = []
        for name, path, distance, size in MODULES:
            at = self.take(0xA0, b"MmLd")
            self.word(at + 0x30, self.base + distance)
            self.word(at + 0x40, size or self.pe.size, 4)
            self.text(at + 0x48, path)
            self.text(at + 0x58, name)
            self.truth[name] = at
            links.append(at)
        self._link(self.symbol("PsLoadedModuleList"), links)

    def _user_memory(self) -> None:
        """Give every process the shared page, and the last one code, a PEB, and parameters with its command line."""
        for tables in self.roots.values():
            tables.map(KUSER_USER, self.page(KUSER), bits=0x25)
        tables = self.roots[PROCESSES[-1].pid]
        self.code = self.ram.allocate()
        tables.map(USER_CODE, self.code, bits=0x25)
        peb, parameters = self.ram.allocate(), self.ram.allocate()
        tables.map(PEB, peb, bits=0x67)
        tables.map(PARAMETERS, parameters, bits=0x67)
        self.ram.write(peb + 0x20, struct.pack("<Q", PARAMETERS))
        for at, where, text in ((0x60, 0x100, "C:\\Windows\\notepad.exe"), (0x70, 0x200, PROCESSES[-1].command)):
            raw = text.encode("utf-16-le")
            self.ram.write(parameters + at, struct.pack("<HHIQ", len(raw), len(raw) + 2, 0, PARAMETERS + where))
            self.ram.write(parameters + where, raw)

    def share_kernel(self) -> None:
        """Copy the kernel's half into every top table, each of which maps itself."""
        for index in range(256, 512):
            entry = self.ram.read_entry(self.own.root + 8 * index)
            for tables in self.roots.values():
                own = tables.root | 0x8000_0000_0000_0063
                self.ram.write_entry(tables.root + 8 * index, own if index == self.self_index else entry)

    def _shadow_tables(self) -> int:
        """Return the top table of the last process in user mode: no kernel but the way into it."""
        tables = Tables(self.ram, paging.LONG_4)
        for gva in (IDT, PCR, PCR + 0x9000, self.base + HANDLERS):
            tables.map(gva, self.page(gva), bits=0x63)
        process = self.roots[PROCESSES[-1].pid].root
        for index in range(256):
            self.ram.write_entry(tables.root + 8 * index, self.ram.read_entry(process + 8 * index))
        return tables.root

    # --- the host's side

    @property
    def cr3(self) -> int:
        """CR3 of the vCPU: that of the last process, of its user half under KVA shadow; with a PCID in the low bits."""
        return (self.user_root if self.shadow else self.roots[PROCESSES[-1].pid].root) | 2

    def vcpu(self, where: HostRam | GuestRam | None = None, **changed: int) -> int:
        """Write the control structure of the vCPU; returns its address."""
        home = where or self.below
        at = home.allocate()
        home.write(at, self.control_page(**changed))
        return at

    def control_page(self, **changed: int) -> bytes:
        rip = USER_CODE if self.shadow else self.base + HANDLERS + 0x10
        if self.shape in (paging.EPT_4, paging.EPT_5):
            values = {"eptp": self.slat.register, "guest_cr3": self.cr3, "guest_rip": rip}
            page = bytearray(control.vmcs(**{**values, **changed}))
            struct.pack_into("<Q", page, 0xB8, IDT)  # measured on Haswell: GUEST_IDTR_BASE, GUEST_GS_BASE
            struct.pack_into("<Q", page, 0x98, 0 if self.shadow else PCR)
            return bytes(page)
        values = {"ncr3": self.slat.register, "cr3": self.cr3, "rip": rip, "cpl": 3 if self.shadow else 0}
        page = bytearray(control.vmcb(**{**values, **changed}))
        struct.pack_into("<Q", page, 0x458, 0 if self.shadow else PCR)  # GS.base
        struct.pack_into("<Q", page, 0x488, IDT)
        struct.pack_into("<Q", page, 0x608, self.base + HANDLERS + 0x800)  # LSTAR
        struct.pack_into("<Q", page, 0x620, PCR if self.shadow else 0)  # KernelGSBase
        return bytes(page)

    def guest_image(self, path: Path) -> Path:
        """Write the guest's memory alone, as a raw image with holes."""
        with path.open("wb") as file:
            for gpa, at in sorted(self.placed.items()):
                file.seek(gpa)
                file.write(self.below.page(at))
        return path

    def symbols(self, folder: Path, pe: Pe | None = None) -> Path:
        """Write the symbol table below a folder for ``vol -s``, or that of another image; returns the file."""
        return write_isf(folder, SYMBOLS, pe or self.pe)


def host(shape: paging.Shape = paging.EPT_4, **options: object) -> tuple[HostRam, Windows]:
    """Return a host with one Windows guest and its vCPU."""
    ram = HostRam()
    guest = Windows(ram, shape, **options)
    guest.vcpu()
    return ram, guest
