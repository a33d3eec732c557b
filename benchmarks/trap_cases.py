"""One small host for each trick that makes tools miss a virtual machine, or see one where there is none.

Hosts are written by the builders of the tests, which import nothing of the package that is measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import images  # noqa: F401  (makes the builders importable)
from builders import control, paging
from builders import roots as built
from builders.paging import EPT_4, EPT_5, LONG_4, LONG_5, NPT_4, PAGE, GuestRam, HostRam, Shape, Tables
from builders.roots import G1, KERNEL, M2

REVISION = control.REVISIONS["haswell"]
#: What KVM's CR4 has for a guest, without and with the bits that some tools call reserved.
CR4 = 0x0037_26B0
CR4_LA57, CR4_CET = 1 << 12, 1 << 23


@dataclass(frozen=True)
class Case:
    """A host, the roots in it, and why a tool could fail.

    ``roots``: address of each machine's top table, as its control structure names it; ``inner``: of a nested machine,
    where that table lies in the host.
    """

    name: str
    trap: str
    ram: HostRam
    roots: tuple[int, ...]
    inner: dict[int, int]
    expected: str
    revision: int = REVISION


@dataclass
class Guest:
    """A guest of six stretches of 32 pages, 2 MiB apart: six page tables, as many as any tool here asks for."""

    below: HostRam | GuestRam
    shape: Shape = EPT_4
    kernel: Shape = LONG_4
    leaves: Iterable[tuple[int, int]] = ()
    empty: int = 0
    pages: int = 32

    def __post_init__(self) -> None:
        self.tables = Tables(self.below, self.shape)
        placed = {}
        leaves = list(self.leaves) or [(M2 * part + PAGE * n, PAGE) for part in range(6) for n in range(self.pages)]
        for gpa, size in leaves:
            frame = self.below.allocate() if size == PAGE else self.below.reserve(size)  # type: ignore[union-attr]
            self.tables.map(gpa, frame, size)
            for offset in range(0, min(size, 8 * PAGE), PAGE):
                placed[gpa + offset] = frame + offset
                self.below.write(frame + offset, paging.stamp(gpa + offset))
        # The first page stays free: a CR3 of 0 is one that some tools rightly doubt.
        self.ram = GuestRam(self.below, placed, 1)
        self.own = built.plant_kernel(self.ram, self.kernel)
        built.fill_empties(self.below, self.tables, self.empty)  # type: ignore[arg-type]

    @property
    def root(self) -> int:
        return self.tables.root

    def vmcs(self, layout: str = "haswell", where: HostRam | GuestRam | None = None, **values: int) -> int:
        """Write a VMCS for a vCPU that runs the guest's kernel; return where."""
        home = where or self.below
        address = home.allocate()
        given = {"eptp": self.tables.register, "guest_cr3": self.own.root, "guest_rip": KERNEL, "guest_cr4": CR4}
        home.write(address, control.vmcs(layout, **{**given, **values}))
        return address

    def vmcb(self) -> int:
        """Write a VMCB; return where."""
        address = self.below.allocate()
        self.below.write(address, control.vmcb(ncr3=self.root, cr3=self.own.root, rip=KERNEL))
        return address


def _host(first: int = 0x10_0000) -> HostRam:
    ram = HostRam(first)
    ram.page(0x1000)
    return ram


def _one(name: str, trap: str, guest: Guest, expected: str = "1 machine, by its VMCS and its tables") -> Case:
    assert isinstance(guest.below, HostRam)
    return Case(name, trap, guest.below, (guest.root,), {}, expected)


def plain() -> Case:
    """Nothing special: the tools must agree here."""
    guest = Guest(_host())
    guest.vmcs()
    return _one("plain guest", "none: every tool should find it", guest)


def cet() -> Case:
    guest = Guest(_host())
    guest.vmcs(guest_cr4=CR4 | CR4_CET)
    return _one("guest with CR4.CET", "CR4 bit 23, reserved before 2020", guest)


def la57() -> Case:
    guest = Guest(_host(), kernel=LONG_5)
    guest.vmcs(guest_cr4=CR4 | CR4_LA57, guest_cr3=guest.own.root)
    return _one("guest with LA57", "CR4 bit 12; the guest's own tables have 5 levels", guest)


def accessed_dirty() -> Case:
    ram = _host()
    guest = Guest(ram)
    guest.vmcs(eptp=guest.root | 0x5E)
    return _one("EPTP with A/D", "EPTP bit 6: what KVM sets on every processor since Haswell", guest)


def without_accessed_dirty() -> Case:
    guest = Guest(_host())
    guest.vmcs(eptp=guest.root | 0x1E)
    return _one("EPTP without A/D", "EPTP bit 6 clear", guest)


def five_levels() -> Case:
    guest = Guest(_host(), EPT_5)
    guest.vmcs()
    return _one("5-level EPT", "page-walk length 5", guest)


def execute_only() -> Case:
    guest = Guest(_host(), replace(EPT_4, page=0x34))
    guest.vmcs()
    return _one("execute-only leaves", "bit 0 is read, not present", guest)


def large_2m() -> Case:
    guest = Guest(_host(), leaves=[(M2 * n, M2) for n in range(24)])
    guest.vmcs()
    return _one("2M pages only", "no page table at all", guest)


def large_1g() -> Case:
    guest = Guest(_host(), leaves=[(G1 * n, G1) for n in range(6)])
    guest.vmcs()
    return _one("1G pages only", "neither page table nor page directory", guest)


def bit_63() -> Case:
    guest = Guest(_host(), built.KVM_EPT, empty=built.SUPPRESS_VE)
    guest.vmcs()
    return _one("empty entries carry bit 63", "suppress #VE: KVM since Linux 6.10, Xen", guest)


def link_pointer() -> Case:
    """VMCS shadowing in use: the VMCS names a shadow VMCS, and that one carries bit 31."""
    ram = _host()
    guest = Guest(ram)
    shadow = ram.allocate()
    ram.write(shadow, control.vmcs("haswell", revision=REVISION | 1 << 31, eptp=0, guest_cr3=0))
    guest.vmcs(link=shadow)
    return _one("VMCS with a link pointer", "not all ones: it names a shadow VMCS", guest)


def shadow() -> Case:
    guest = Guest(_host())
    guest.vmcs(revision=REVISION | 1 << 31)
    return _one("shadow VMCS", "bit 31 of the revision identifier", guest)


def unknown_revision() -> Case:
    guest = Guest(_host())
    guest.vmcs(revision=0x1234)
    return replace(_one("unknown revision identifier", "a processor that no table knows", guest), revision=0x1234)


def _nested(name: str, trap: str, announced: bool) -> Case:
    ram = _host()
    outer = Guest(ram, pages=128)
    if announced:
        outer.vmcs()
    inner = Guest(outer.ram)
    if announced:
        inner.vmcs("kvm")
    where = {inner.root: outer.ram.placed[inner.root]}
    how = "1 machine and 1 inside it" + ("" if announced else ", by tables alone")
    return Case(name, trap, ram, (outer.root, inner.root), where, how)


def vmcs12() -> Case:
    return _nested("vmcs12, EPTP at 0x78", "KVM in KVM: a software VMCS in the guest, addresses are the guest's", True)


def nested() -> Case:
    return _nested("nested, no control structure", "inner tables hold addresses of the outer guest", False)


def above_one_tebibyte() -> Case:
    guest = Guest(_host(5 << 40))
    guest.vmcs()
    return _one("host memory above 1 TiB", "MAXPHYADDR > 40", guest)


def npt() -> Case:
    guest = Guest(_host(), NPT_4)
    guest.vmcb()
    return _one("NPT guest", "AMD: VMCB, and tables that look like ordinary paging", guest, "1 machine, by its VMCB")


def unannounced_npt() -> Case:
    guest = Guest(_host(), NPT_4)
    built.process(guest.below)  # type: ignore[arg-type]
    return _one("NPT, no VMCB", "beside a process's page tables, of the same form", guest, "1 machine, by its tables")


def unannounced() -> Case:
    return _one(
        "no control structure", "the current VMCS can be on the chip", Guest(_host()), "1 machine, by its tables"
    )


def xen() -> Case:
    guest = Guest(_host(), built.XEN_EPT, empty=built.SUPPRESS_VE)
    for name, gpas in (("PML4E", [0]), ("PTE", [M2 * part + PAGE * n for part in range(6) for n in range(1, 32, 3)])):
        for gpa in gpas:
            guest.tables.put(gpa, name, guest.tables.get(gpa, name) | 0x38)
    guest.vmcs()
    return _one("Xen, recalculation pending", "memory type 7 at the root and in leaves: hardware refuses it", guest)


def tracked() -> Case:
    guest = Guest(_host(), replace(built.KVM_EPT, page=built.TRACKED))
    guest.vmcs(eptp=guest.root | 0x1E)
    return _one("KVM, access-tracked", "every leaf has its R, W and X cleared", guest)


def nothing() -> Case:
    """What must not become a machine: a VMXON region, a VMCS whose guest is gone, random data."""
    ram = _host()
    ram.write(ram.allocate(), control.vmxon(REVISION))
    noise = random.Random(1)
    for _ in range(8192):
        ram.write(ram.allocate(), noise.randbytes(PAGE))
    built.process(ram)
    return Case("VMXON region, random data", "32 MiB of noise, a process's page tables", ram, (), {}, "nothing")


def stale() -> Case:
    ram = _host()
    page = ram.allocate()
    ram.write(page, control.vmcs("haswell", eptp=0x70_005E))
    return Case("VMCS without its tables", "a copy in a file cache, or a guest that is gone", ram, (), {}, "nothing")


CASES: tuple[Callable[[], Case], ...] = (
    plain, cet, la57, accessed_dirty, without_accessed_dirty, five_levels, execute_only, large_2m, large_1g, bit_63,
    link_pointer, shadow, unknown_revision, vmcs12, nested, above_one_tebibyte, npt, unannounced_npt, unannounced, xen,
    tracked, nothing, stale,
)  # fmt: skip
