"""A whole host with guests: tables, a guest kernel's own page tables, a control structure for each vCPU.

Nothing of the package is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from builders import control, paging
from builders.paging import PAGE, GuestRam, HostRam, Tables

#: Where the guest's kernel runs, and what its memory says of itself.
KERNEL = 0xFFFF_FFFF_8100_0000
BANNER = b"Linux version 6.6.6-test (builder@nowhere) (gcc 12) #1 SMP\n\x00"


@dataclass
class Guest:
    """A guest of ``pages`` 4K pages from GPA 0, with a kernel mapped at :data:`KERNEL` by its own 4-level tables."""

    below: HostRam | GuestRam
    shape: paging.Shape = paging.EPT_4
    pages: int = 32
    first: int = 0
    layout: str = "haswell"
    placed: dict[int, int] = field(default_factory=dict)
    structures: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tables = Tables(self.below, self.shape)
        for page in range(self.pages):
            gpa = self.first + page * PAGE
            self.placed[gpa] = self.below.allocate()
            self.tables.map(gpa, self.placed[gpa])
        self.ram = GuestRam(self.below, self.placed)
        self.own = Tables(self.ram, paging.LONG_4)
        self.kernel_gpa = self.ram.allocate()
        self.own.map(KERNEL, self.kernel_gpa)
        self.ram.write(self.kernel_gpa, BANNER.ljust(PAGE, b"\xcc"))

    @property
    def root(self) -> int:
        """The raw EPTP or nCR3."""
        return self.tables.register

    def control_page(self, **values: int) -> bytes:
        """Return the page of a vCPU that runs the guest's kernel."""
        if self.shape in (paging.EPT_4, paging.EPT_5):
            given = {"eptp": self.root, "guest_cr3": self.own.root, "guest_rip": KERNEL, "link": (1 << 64) - 1}
            return control.vmcs(self.layout, **{**given, **values})
        given = {"ncr3": self.root, "cr3": self.own.root, "rip": KERNEL}
        return control.vmcb(**{**given, **values})

    def vcpu(self, where: HostRam | GuestRam | None = None, **values: int) -> int:
        """Write the control structure of one more vCPU into the hypervisor's memory; returns its address there."""
        number = len(self.structures)
        own_page = {"msr_bitmap": 0x50_0000 + number * PAGE} if self.shape in (paging.EPT_4, paging.EPT_5) else {
            "msrpm": 0x50_0000 + number * 2 * PAGE
        }  # fmt: skip
        home = where or self.below
        address = home.allocate()
        home.write(address, self.control_page(**{**own_page, **values}))
        self.structures.append(address)
        return address


def host(*shapes: paging.Shape, pages: int = 32) -> tuple[HostRam, list[Guest]]:
    """Return a host with one guest of each shape, each with one vCPU."""
    ram = HostRam()
    guests = [Guest(ram, shape, pages) for shape in shapes]
    for guest in guests:
        guest.vcpu()
    return ram, guests
