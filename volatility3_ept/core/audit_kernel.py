"""The kernel of a guest, found through the guest's own page tables: what of its memory is code, and what is mapped."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from volatility3_ept.core import gpamap, leaves
from volatility3_ept.core.audit_finding import Ranges
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.machines import Machine
from volatility3_ept.core.memory import Int64
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec import dialect
from volatility3_ept.spec.paging import Access

#: Address spaces of one guest that are looked into: kernels share their half, and page table isolation hides it.
MAX_SPACES = 4
#: Runs of a kernel's address space that are worked on. A kernel has some ten thousand; more were written to cost time.
MAX_RUNS = 1 << 20


@dataclass(frozen=True)
class Kernel:
    """The kernel half of a guest's address space: runs ascending by guest-virtual address.

    ``accesses`` are the guest's own rights. ``code`` holds the guest-physical ranges that the kernel may execute.
    """

    gvas: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    lengths: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    gpas: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    accesses: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    code: Ranges = field(default_factory=Ranges)
    notes: tuple[str, ...] = ()
    #: Bits of a guest-virtual address that the guest's tables translate.
    width: int = 48

    def chosen(self, is_code: bool) -> tuple[Int64, Int64, Int64]:
        """Return ``(gvas, lengths, gpas)`` of what may be executed, or of what may not."""
        wanted = ((self.accesses & int(Access.EXECUTE)) != 0) == is_code
        return self.gvas[wanted], self.lengths[wanted], self.gpas[wanted]

    def gva(self, gpa: int) -> int | None:
        """Return a guest-virtual address at which the kernel executes a guest-physical one, sign-extended."""
        gvas, lengths, gpas = self.chosen(is_code=True)
        held = np.flatnonzero((gpas <= gpa) & (gpa < gpas + lengths))
        if not held.size:
            return None
        return self.canonical(int(gvas[held[0]]) + gpa - int(gpas[held[0]]))

    def canonical(self, gva: int) -> int:
        """Return a guest-virtual address as the guest writes it: in 64-bit modes sign-extended."""
        return gva | (1 << 64) - (1 << self.width) if self.width > 32 and gva >> (self.width - 1) == 1 else gva


def find(machine: Machine) -> Kernel:
    """Return the kernel of a machine; an empty one where its page tables are not known or do not parse."""
    fmt = machine.paging
    if fmt is None:
        return Kernel(notes=("the guest's page tables are not known: nothing is said of its kernel",))
    known = [vcpu.guest_cr3 for vcpu in machine.vcpus] + [machine.guest_cr3]
    spaces = list(dict.fromkeys(cr3 for cr3 in known if cr3))
    best: GuestMap | None = None
    notes: list[str] = []
    if len(spaces) > MAX_SPACES:
        notes.append(f"{len(spaces)} address spaces are known: the first {MAX_SPACES} were looked into")
    for cr3 in spaces[:MAX_SPACES]:
        space = leaves.traverse(machine.memory, fmt, cr3, dialect.GENERIC)
        notes += space.findings.notes
        half = _upper(space, 1 << (fmt.address_bits - 1))
        if best is None or half.mapped_bytes > best.mapped_bytes:
            best = half
    if best is None:
        return Kernel(notes=("no CR3 of the guest is known: nothing is said of its kernel",))
    if len(best) > MAX_RUNS:
        notes.append(f"the kernel's address space has {len(best)} runs: the first {MAX_RUNS} were looked into")
        best = GuestMap(best.gpas[:MAX_RUNS], best.lengths[:MAX_RUNS], best.words[:MAX_RUNS])
    runs = (best.gpas, best.lengths, best.hpas, best.accesses)
    code = (runs[3] & int(Access.EXECUTE)) != 0
    ranges = Ranges(*gpamap.union(runs[2][code], (runs[2] + runs[1])[code]))
    if not ranges.starts.size:
        notes.append("nothing in the kernel's half of its address space may be executed: nothing is said of its code")
    return Kernel(*runs, ranges, tuple(notes), fmt.address_bits)


def _upper(space: GuestMap, half: int) -> GuestMap:
    """Return what of an address space is the kernel's: the upper half, closed to user mode."""
    own = (space.gpas >= half) & ((space.accesses & int(Access.USER)) == 0)
    return GuestMap(space.gpas[own], space.lengths[own], space.words[own])


def through(kernel: Kernel, guest_map: GuestMap, is_code: bool) -> tuple[Int64, Int64, Int64, Int64, Int64]:
    """Follow the kernel's addresses through EPT or NPT: ``(gvas, lengths, gpas, hpas, rights)`` by ascending GVA.

    ``rights`` are those of EPT or NPT alone. What it does not map is left out.
    """
    gvas, lengths, gpas = kernel.chosen(is_code)
    order = np.argsort(gpas, kind="stable")
    gvas, lengths, gpas = gvas[order], lengths[order], gpas[order]
    index, run, low, high = overlaps(gpas, gpas + lengths, guest_map.gpas, guest_map.gpas + guest_map.lengths)
    at = gvas[index] + low - gpas[index]
    hpas = guest_map.hpas[run] + low - guest_map.gpas[run]
    back = np.argsort(at, kind="stable")
    return at[back], (high - low)[back], low[back], hpas[back], guest_map.accesses[run][back]
