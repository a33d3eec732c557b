"""What speaks for a hierarchy's being a guest's, from what it maps alone: measured facts, and how sure they make it.

An EPT entry looks like nothing else, so sound tables with code and write-back memory are nearly enough. An NPT is an
ordinary page table; what tells it from a process's or a kernel's is a guest-physical space: it begins near 0, has no
upper half, every entry allows user access, and an operating system's own page tables parse *through* it.

Sources for the limits of processes: Linux mm/mmap.c (``vm.mmap_min_addr``, 64K by default); Windows, the lowest address
of an application; Linux drivers/iommu/intel (an I/O domain's second-level tables: read and write only, type 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from volatility3_ept.core import descent, tables
from volatility3_ept.core.control import Criterion
from volatility3_ept.core.gpamap import MEMORY_TYPE_SHIFT, GuestMap
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.root import NPT, Root
from volatility3_ept.spec import bits, ia32e
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Access, MemoryType

#: Top tables that are tried in one guest, evenly chosen: one process of many is enough.
MAX_GUEST_TOPS = 1 << 13
#: A root that maps less is not worth a machine: the smallest inner guest that we have seen mapped 22 pages.
_FEW_PAGES = 16
_NEARLY_ALL = 0.95
#: Neither Linux nor Windows gives a process the first 64K; a machine's firmware lives from there on.
_PROCESS_START = 1 << 16
#: A dense space: nine tenths of it lie within so many times its size, and the hole below 4G.
_SPREAD = 1024
_HOLE = 8 << 30
#: Pages that a guest's own page tables must be seen to map through the root.
_GUEST_LEAVES = 16


class Certainty(str, Enum):
    """How sure it is that a hypervisor put these tables there for a guest."""

    CERTAIN = "certain"
    LIKELY = "likely"
    POSSIBLE = "possible"

    def __str__(self) -> str:
        """Return the word as users read it."""
        return self.value


@dataclass(frozen=True)
class Found:
    """A root found by its structure. ``raw`` of the root is the table's address alone: no register was seen.

    ``guest_cr3`` is the guest-physical address of a top table of the guest's own that parses through the root, and
    ``paging`` the mode in which it does; None where there is none.
    """

    root: Root
    certainty: Certainty
    evidence: tuple[Criterion, ...]
    guest_map: GuestMap
    guest_cr3: int | None = None
    paging: Ia32Format | None = None

    def explain(self) -> str:
        """Say in lines of text what was judged and how."""
        head = f"{self.root.kind} root at {self.root.address:#x}, {self.root.levels} levels: {self.certainty}"
        return "\n".join([head, *(f"  {item}" for item in self.evidence)])


@dataclass(frozen=True)
class NearMiss:
    """Tables that read as a hierarchy, and what speaks against their being a guest's."""

    root: Root
    reason: str
    evidence: tuple[Criterion, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What is measured on one hierarchy."""

    tables: Criterion
    memory: Criterion
    executable: Criterion
    begins: Criterion
    dense: Criterion
    lower: Criterion
    moved: Criterion
    kind: Criterion
    guest: Criterion
    #: Top table of the guest's own that parses, a guest-physical address, and the mode in which it does.
    guest_cr3: int | None
    paging: Ia32Format | None

    @property
    def all(self) -> tuple[Criterion, ...]:
        """Every criterion, the strongest first."""
        return (self.guest, self.memory, self.tables, self.kind, self.executable, self.begins, self.dense, self.lower,
                self.moved)  # fmt: skip


def _ept_certainty(facts: Facts) -> Certainty | None:
    """An EPT needs sound tables and code that may run; write-back memory or a guest's page tables make it likely.

    Without the former a boot loader's identity map looks the same, and the host's own tables parse through it.
    """
    sound = facts.tables.held and facts.memory.held and facts.executable.held
    if not sound or not (facts.kind.held or (facts.guest.held and facts.moved.held)):
        return None
    if facts.guest.held and facts.kind.held:
        return Certainty.CERTAIN
    return Certainty.LIKELY if facts.guest.held or facts.begins.held else Certainty.POSSIBLE


def _npt_certainty(facts: Facts) -> Certainty | None:
    """Sound tables are everywhere; a guest-physical space is not, and a guest inside it settles it."""
    sound = all(item.held for item in (facts.tables, facts.memory, facts.executable, facts.kind, facts.lower))
    if not sound:
        return None
    if not facts.guest.held:
        alike = facts.begins.held and facts.dense.held and facts.moved.held
        return Certainty.POSSIBLE if alike else None
    if not facts.moved.held:
        return Certainty.POSSIBLE
    return Certainty.CERTAIN if facts.begins.held and facts.dense.held else Certainty.LIKELY


def certainty(facts: Facts, kind: str) -> Certainty | None:
    """Return how sure the facts make it that the hierarchy is a guest's; None when it is not one."""
    return _npt_certainty(facts) if kind == NPT else _ept_certainty(facts)


def facts(memory: HostMemory, root: Root, guest_map: GuestMap, linear: Int64) -> Facts:
    """Measure a hierarchy. ``linear``: pages of ``memory`` that look like the top of a system's own page tables."""
    inside = guest_map.memory(memory)
    guest, cr3, mode = _guest_tables(inside, guest_map, linear)
    mapped = max(guest_map.mapped_bytes, 1)
    lowest = int(guest_map.gpas[0]) if len(guest_map) else 0
    runs = (guest_map.accesses & int(Access.EXECUTE)) != 0
    identity = int(guest_map.lengths[guest_map.gpas == guest_map.hpas].sum()) / mapped
    half = 1 << (root.format.address_bits - 1)
    return Facts(
        _sound_tables(guest_map),
        Criterion(
            "mapped memory",
            inside.size >= _FEW_PAGES * bits.PAGE_SIZE and (guest.held or inside.size >= tables.MIN_INSIDE * mapped),
            f"{bits.size_name(guest_map.mapped_bytes)} mapped, {inside.size / mapped:.0%} of it in the capture",
            2,
        ),
        Criterion("executable", bool(runs.any()), "some pages may run code, as no DMA table's", 2),
        Criterion("begins near 0", bool(len(guest_map)) and lowest < _PROCESS_START, f"first page at {lowest:#x}"),
        _density(guest_map),
        Criterion("no upper half", guest_map.top <= half, f"ends at {guest_map.top:#x}"),
        Criterion("not an identity map", identity < _NEARLY_ALL, f"{identity:.0%} of it lies at its own address"),
        _of_its_kind(root, guest_map),
        guest,
        cr3,
        mode,
    )


def _sound_tables(guest_map: GuestMap) -> Criterion:
    findings = guest_map.findings
    refused = len(findings.misconfigured)
    leaves = sum(guest_map.page_counts().values())
    # An operating system's tables name themselves, a boot loader's one table everywhere: a guest's do neither.
    detail = f"{leaves} leaves in {findings.tables} tables, {refused} entries refused, {len(findings.mmio)} for MMIO"
    if len(findings.unreadable):
        detail += f", {len(findings.unreadable)} tables not in the capture"
    held = refused <= descent.MAX_REFUSED * (leaves + refused) and not findings.notes
    return Criterion("tables", held, "; ".join((detail, *findings.notes)), 3)


def _density(guest_map: GuestMap) -> Criterion:
    if not len(guest_map):
        return Criterion("dense", False, "maps nothing")
    total = np.cumsum(guest_map.lengths)
    most = int(np.searchsorted(total, 0.9 * int(total[-1])))
    span = int(guest_map.gpas[most] + guest_map.lengths[most] - guest_map.gpas[0])
    held = span <= _SPREAD * int(total[-1]) + _HOLE
    return Criterion("dense", held, f"nine tenths of it within {bits.size_name(span)}")


def _of_its_kind(root: Root, guest_map: GuestMap) -> Criterion:
    """EPT: memory is mapped write-back, where a DMA table or stray data has type 0. NPT: users may reach everything."""
    if root.kind == NPT:
        share = _user_share(guest_map)
        return Criterion("user access", share >= _NEARLY_ALL, f"the user bit is set for {share:.0%} of it", 2)
    cached = (guest_map.words >> MEMORY_TYPE_SHIFT & 7) == int(MemoryType.WB)
    share = int(guest_map.lengths[cached].sum()) / max(guest_map.mapped_bytes, 1)
    return Criterion("write-back", share >= 0.5, f"{share:.0%} of it", 2)


def _user_share(guest_map: GuestMap) -> float:
    reachable = (guest_map.accesses & int(Access.USER)) != 0
    return int(guest_map.lengths[reachable].sum()) / max(guest_map.mapped_bytes, 1)


def _guest_tables(
    guest: HostMemory, guest_map: GuestMap, linear: Int64
) -> tuple[Criterion, int | None, Ia32Format | None]:
    """Look for a top table of the guest's own, among the pages that look like one, that parses through the root."""
    name = "guest page tables"
    hpas, lengths, gpas = guest_map.inverse()
    if not hpas.size or not linear.size:
        return Criterion(name, None, "no page of it looks like the top of any", 5), None, None
    run = np.maximum(np.searchsorted(hpas, linear, side="right") - 1, 0)
    within = linear - hpas[run]
    here = (within >= 0) & (within < lengths[run])
    tops = np.unique(gpas[run[here]] + within[here])
    tops = tops[:: -(-tops.size // MAX_GUEST_TOPS) or 1]
    # Five levels first: read as four, they parse too, with tables in place of pages. The other way round pages would
    # have to pass for tables: most hold nothing like an entry, and few of the others name the guest's memory.
    for mode, inside, empty in ((ia32e.five_level(), _NEARLY_ALL, 0.5), (ia32e.four_level(), 0.5, 1.0)):
        result = descent.descend(guest, mode, tops)
        good = (result.leaves >= _GUEST_LEAVES) & (result.inside >= inside) & (result.empty <= empty)
        if good.any():
            most = int(np.where(good, result.leaves, 0).argmax())
            cr3, leaves = int(result.roots[most]), int(result.leaves[most])
            detail = f"{mode.name} tables at {cr3:#x} parse through it, to {leaves} pages of its memory in a sample"
            return Criterion(name, True, detail, 5), cr3, mode
    return Criterion(name, False, f"none of {tops.size} pages that look like the top of one parses", 5), None, None
