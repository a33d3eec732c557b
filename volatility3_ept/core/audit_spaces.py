"""The address spaces of the hypervisor below some machines: by what a VMCS holds of the host, and by its VMM's tables.

A VMCB holds nothing of the host. But a process that has a guest's memory in its address space was found for most
machines, on AMD too, and the kernel's half of its tables is the hypervisor's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from volatility3_ept.core import gpamap, hosttables, leaves
from volatility3_ept.core import walk as walks
from volatility3_ept.core.audit_finding import Ranges, Subject
from volatility3_ept.core.audit_host import HostKernel
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.walk import Walk
from volatility3_ept.spec import dialect, ia32e
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Access, EntryKind, Level

#: Address spaces that are looked into, one per monitor; and kernels in them: all processes of one share its half.
MAX_SPACES, MAX_KERNELS = 64, 4


@dataclass(frozen=True)
class Space:
    """An address space of a hypervisor. ``cr3`` is raw; ``below`` is the memory that its tables lie in."""

    cr3: int
    format: Ia32Format
    below: HostMemory
    source: str
    #: The process was found alive, by the guest's memory in it: the lower half counts too.
    alive: bool = False

    @property
    def half(self) -> int:
        """The first address of the upper half, as the tables index it."""
        return 1 << (self.format.address_bits - 1)

    def walk(self, address: int) -> Walk:
        """Translate a virtual address."""
        return walks.walk(self.below, self.format, self.cr3, address)

    def target(self, address: int) -> int | None:
        """Return where a virtual address lies in the memory below; None where nothing is mapped."""
        return self.walk(address).target

    def kernel(self) -> GuestMap:
        """Return what the upper half maps and user mode may not reach."""
        space = leaves.traverse(self.below, self.format, self.cr3, dialect.GENERIC)
        own = (space.gpas >= self.half) & ((space.accesses & int(Access.USER)) == 0) & (space.hpas < self.below.top)
        return GuestMap(space.gpas[own], space.lengths[own], space.words[own], space.findings)

    def tables(self) -> Iterator[tuple[Level, Int64]]:
        """Yield each level's tables, every table once; of the upper half alone where the process may be gone."""
        pages = np.array([self.format.root_hpa(self.cr3)], dtype=np.int64)
        seen = pages
        for level in self.format.levels:
            if not pages.size:
                return
            yield level, pages
            found = [np.empty(0, dtype=np.int64)]
            for start in range(0, pages.size, leaves.CHUNK_TABLES):
                words, _ = self.below.words(pages[start : start + leaves.CHUNK_TABLES])
                if level is self.format.levels[0] and not self.alive:
                    words = words[:, words.shape[1] // 2 :]
                entries = words[words != 0]
                # The address is looked at by markers of EPT and NPT alone.
                kinds, restored, _ = dialect.GENERIC.kind(self.format, entries, level, np.zeros_like(entries))
                found.append(np.asarray(self.format.table(restored[kinds == int(EntryKind.TABLE)])).astype(np.int64))
            pages = np.setdiff1d(np.concatenate(found), seen)
            pages = pages[self.below.locate(pages) >= 0]
            seen = np.concatenate((seen, pages))


def of_vcpu(vcpu: ControlStructure, below: HostMemory) -> Space | None:
    """Return the address space that a control structure leads back to; None where it holds none."""
    if not vcpu.host_cr3:
        return None
    five = bool(vcpu.fields.get("HOST_CR4", 0) & ia32e.CR4_LA57)
    fmt = ia32e.five_level() if five else ia32e.four_level()
    return Space(vcpu.host_cr3, fmt, below, f"HOST_CR3 {vcpu.host_cr3:#x}")


def find(level: Sequence[Subject], host: HostKernel | None, notes: list[str]) -> list[Space]:
    """Return the address spaces of the hypervisor of some machines, each top table once, the kernel's own first."""
    found: dict[int, Space] = {}
    if host is not None:
        found[host.format.root_hpa(host.cr3)] = Space(host.cr3, host.format, level[0].below, "the kernel's own tables")
    frames = gpamap.union(*np.concatenate([s.machine.guest_map.frame_ranges() for s in level], axis=1))
    dead = 0
    for subject in level:
        for slot in subject.machine.recovery.slots if subject.machine.recovery else ():
            fmt = ia32e.five_level() if slot.levels == 5 else ia32e.four_level()
            space = Space(slot.root, fmt, subject.below, f"VMM at CR3 {slot.root:#x}", True)
            if fmt.root_hpa(slot.root) in found:
                continue
            if _is_kernel(space, frames):
                found[fmt.root_hpa(slot.root)] = space
            else:
                notes.append(f"{space.source} has no kernel's half: its tables are not taken for the hypervisor's own")
    for subject in level:
        for vcpu in subject.vcpus:
            own = of_vcpu(vcpu, subject.below)
            if own is None:
                continue
            # A structure that nobody runs any more may name a table that is something else today.
            if own.target(vcpu.host_rip or 0) is None:
                dead += 1
                continue
            found.setdefault(own.format.root_hpa(own.cr3), own)
    if dead:
        notes.append(f"{dead} control structures whose HOST_RIP their own HOST_CR3 does not map: not followed")
    if len(found) > MAX_SPACES:
        notes.append(f"{len(found)} address spaces of the hypervisor; the first {MAX_SPACES} were looked into")
    if not found:
        found.update((space.cr3, space) for space in _by_structure(level[0].below, frames))
    if not found:
        which = ", ".join(subject.machine.id for subject in level)
        notes.append(f"machine {which}: no address space of the hypervisor is known; its code was not looked for")
    return list(found.values())[:MAX_SPACES]


def _is_kernel(space: Space, frames: tuple[Int64, Int64]) -> bool:
    """Tell whether there is a kernel in the upper half: tables, and most of them not in the memory of guests.

    EPT tables read as ordinary ones map a guest as its VMM does: the bits for R and W are those for P and W. What they
    lead to is the guest.
    """
    held = hosttables.Frames(*frames)
    tables = np.concatenate([addresses for _, addresses in replace(space, alive=False).tables()])
    return tables.size > 1 and 2 * int(held.holds(tables).sum()) < tables.size


def _by_structure(below: HostMemory, frames: tuple[Int64, Int64]) -> Iterator[Space]:
    """Yield the address space whose kernel half most others share: any process's will do, its kernel's half is one."""
    held = hosttables.Frames(*frames)
    roots, _ = hosttables.find(below, lambda pages: ~held.holds(pages))
    for root in roots[:1].tolist():
        space = Space(root, ia32e.four_level(), below, f"a process with CR3 {root:#x}")
        if _is_kernel(space, frames):
            yield space


def kernels(spaces: Sequence[Space], notes: list[str]) -> list[Space]:
    """Return one address space for each kernel half that there is."""
    found: dict[bytes, Space] = {}
    for space in spaces:
        table = space.below.read(space.format.root_hpa(space.cr3), PAGE_SIZE)
        if table is not None:
            found.setdefault(table[PAGE_SIZE // 2 :], space)
    if len(found) > MAX_KERNELS:
        notes.append(
            f"{len(found)} kernels in the hypervisor's address spaces; the first {MAX_KERNELS} were looked into"
        )
    return list(found.values())[:MAX_KERNELS]


def top_tables(space: Space, subject: Subject) -> Int64:
    """Return where in the memory below a guest's own frames hold a top table of the hypervisor.

    The upper half of a process's top table is that of every other process: no guest's own has those entries.
    """
    words, held = space.below.words(np.array([space.format.root_hpa(space.cr3)], dtype=np.int64))
    half = words[0, words.shape[1] // 2 :]
    last = np.flatnonzero(half)
    found = [np.empty(0, dtype=np.int64)]
    if held[0] and last.size:
        for address, rows in subject.machine.guest_map.memory(space.below).blocks():
            likely = np.flatnonzero(rows[:, half.size + last[-1]] == half[last[-1]])
            same = likely[(rows[likely, half.size :] == half).all(axis=1)]
            found.append(address + same * PAGE_SIZE)
    return subject.machine.guest_map.to_hpa(np.concatenate(found))


def code(space: GuestMap) -> Ranges:
    """Return where in the memory below what a kernel may execute lies."""
    own = (space.accesses & int(Access.EXECUTE)) != 0
    return Ranges(*gpamap.union(space.hpas[own], (space.hpas + space.lengths)[own]))


def pages(addresses: Int64) -> Ranges:
    """Return whole pages as ranges."""
    return Ranges(*gpamap.union(addresses, addresses + PAGE_SIZE))
