"""A root and the control structures that name it, judged together with the page tables it heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from volatility3_ept.core import backing, confidential, guestcpu, keybits, physaddr
from volatility3_ept.core.backing import Recovery
from volatility3_ept.core.control import ControlStructure, Criterion, Verdict
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT, NPT, Root, RootError
from volatility3_ept.core.slots import Slot
from volatility3_ept.spec import bits
from volatility3_ept.spec.ia32e import Ia32Format

#: Secondary processor-based control "mode-based execute control for EPT" (SDM Vol. 3C, "VM-Execution Control Fields").
_MODE_BASED_EXECUTE = bits.bit(22)
#: With no guest page tables to check, this many resident pages must speak for the root.
_FEW_PAGES = 16
#: Share of entries that may be refused by hardware: damage and smear, not another kind of page.
_MAX_REFUSED = 0.05


@dataclass(frozen=True)
class Candidate:
    """A possible machine: its root, what the root maps, and the evidence. ``memory`` is guest-physical."""

    root: Root
    structures: tuple[ControlStructure, ...]
    guest_map: GuestMap
    memory: HostMemory
    paging: Ia32Format | None
    evidence: tuple[Criterion, ...]
    accepted: bool
    recovery: Recovery | None = None
    #: CR3 of some address space of the guest, where it is known without a control structure.
    guest_cr3: int | None = None

    @property
    def whole(self) -> GuestMap:
        """What EPT or NPT maps, and what was recovered beside it."""
        return self.recovery.guest_map if self.recovery else self.guest_map

    @property
    def by_structure(self) -> bool:
        """Tell whether the page tables alone would have given this root away."""
        return any(item.name == "page tables alone" for item in self.evidence)

    @property
    def strength(self) -> tuple[bool, int, int]:
        """Order candidates that read the same structures differently: the one whose guest parses, then the larger."""
        held = sum(item.weight for item in self.evidence if item.held)
        return self.accepted, held, self.memory.size


def roots(structure: ControlStructure, physical_bits: int) -> list[Root]:
    """Return the roots that a structure may name: a VMCB does not say whether the host uses 4 or 5 levels."""
    width = physical_bits if physical_bits < bits.MAX_PHYSICAL_BITS else 0
    kind = EPT if structure.kind == "VMCS" else NPT
    mbec = bool(structure.fields.get("SECONDARY_PROC_EXEC_CONTROLS", 0) & _MODE_BASED_EXECUTE)
    choices = (structure.levels,) if structure.levels else (4, 5)
    found = []
    for levels in choices:
        try:
            found.append(Root(kind, structure.root_raw, levels, width, mode_based_execute=mbec and kind == EPT))
        except RootError:
            continue  # Not a root at all: the structure's own evidence says so already.
    return found


def judge(below: HostMemory, root: Root, structures: Sequence[ControlStructure]) -> Candidate:
    """Walk a root and weigh what is found. ``below`` holds the tables and the frames."""
    resolved = keybits.resolved(below, root).resolved(below)
    guest_map = resolved.traverse(below)
    memory = guest_map.memory(below)
    paging, parses = _guest_tables(memory, structures)
    tables = _tables(below, resolved, guest_map, memory)
    best = max(structures, key=lambda s: s.score, default=None)
    encrypted = confidential.technology(below, structures)
    evidence = (
        *((_control(best, len(structures)),) if best else ()),
        parses,
        *tables,
        *((encrypted,) if encrypted else ()),
        *keybits.evidence(resolved),
        Criterion("dialect", None, f"entries as {resolved.dialect} writes them"),
        Criterion("MAXPHYADDR", None, str(physaddr.derive(below, guest_map, resolved))),
    )
    sound = all(item.held is not False for item in tables)
    likely = best is not None and best.verdict is Verdict.LIKELY
    many = memory.size >= _FEW_PAGES * bits.PAGE_SIZE
    accepted = sound and memory.size > 0 and bool(parses.held or (likely and (parses.held is None or many)))
    return Candidate(resolved, tuple(structures), guest_map, memory, paging, evidence, accepted)


def _control(best: ControlStructure, count: int) -> Criterion:
    plural = f"{count} {best.kind}s" if count > 1 else best.kind
    where = f"{plural}, best at {best.hpa:#x} ({best.layout}), score {best.score:.2f}"
    return Criterion("control structure", best.verdict is Verdict.LIKELY, where, 3)


def _guest_tables(memory: HostMemory, structures: Sequence[ControlStructure]) -> tuple[Ia32Format | None, Criterion]:
    """Return the first proof that a vCPU's page tables parse through the root, or the best failure."""
    failure = Criterion("guest page tables", None, "no control structure names them", 5)
    for structure in structures:
        paging, criterion = guestcpu.paging(memory, guestcpu.registers(structure))
        if criterion.held:
            return paging, criterion
        if (failure.held is None and criterion.held is False) or len(structures) == 1:
            failure = criterion
    return None, failure


def _tables(below: HostMemory, root: Root, guest_map: GuestMap, memory: HostMemory) -> tuple[Criterion, ...]:
    """Judge the hierarchy itself: readable, mapping something, and not full of entries that hardware refuses."""
    findings = guest_map.findings
    if root.address not in below:
        return (Criterion("root table", False, f"{root.address:#x} is not in the capture", 3),)
    mapped = guest_map.mapped_bytes
    present = memory.size / mapped if mapped else 0.0
    refused = len(findings.misconfigured)
    entries = sum(guest_map.page_counts().values()) + len(findings.mmio)
    held = refused <= _MAX_REFUSED * (entries + refused)
    return (
        Criterion(
            "mapped memory",
            mapped > 0 and memory.size > 0,
            f"{bits.size_name(mapped)} mapped, {present:.0%} of it in the capture",
            2,
        ),
        Criterion(
            "entries",
            held,
            f"{entries} leaves and markers in {findings.tables} tables, {refused} refused by hardware, "
            f"{len(findings.unreadable)} tables unreadable",
            2,
        ),
    )


def recovered(
    below: HostMemory, found: Candidate, known: Sequence[Slot] | None, others: Sequence[GuestMap]
) -> Candidate:
    """Return a candidate with the pages that its EPT or NPT lacks, from the VMM's own page tables.

    ``known`` are the slots of an earlier search (empty: it found no VMM). ``others`` are maps of the other guests.
    """
    if known is None:
        roots = [structure.host_cr3 for structure in found.structures if structure.host_cr3]
        recovery = backing.recover(below, found.guest_map, roots, found.root.format.key_bits, others=others)
    else:
        recovery = backing.again(below, found.guest_map, known, found.root.format.key_bits, others)
    if recovery.slots:
        sure = sum(slot.confirmed for slot in recovery.slots)
        held, text = (
            True,
            (
                f"{bits.size_name(recovery.recovered_bytes)} that {found.root.kind} lacks, through the VMM at CR3 "
                f"{recovery.root:#x}; {len(recovery.slots)} slots, {sure} of them by KVM's own record"
            ),
        )
    else:
        held, text = None, "no VMM was found whose page tables map this guest"
    evidence = (*found.evidence, Criterion("recovered", held, text, 0))
    memory = recovery.guest_map.memory(below)
    return replace(found, memory=memory, evidence=evidence, recovery=recovery)


def distinct(structures: Sequence[ControlStructure]) -> tuple[ControlStructure, ...]:
    """Return one structure per vCPU, the best first: copies of a page, in a file cache or a crash buffer, are dropped.

    Two structures are the same vCPU when they name the same per-vCPU pages (MSR bitmap, virtual APIC page, MSR
    permission map), or, where they name none, when every decoded field is equal.
    """
    kept: dict[object, ControlStructure] = {}
    for structure in sorted(structures, key=lambda s: (-s.score, s.hpa)):
        fields = structure.fields
        own = tuple(fields.get(name, 0) for name in _OWN_PAGES[structure.kind])
        key: object = own if any(own) else tuple(sorted(fields.items()))
        kept.setdefault((structure.kind, key), structure)
    return tuple(sorted(kept.values(), key=lambda s: s.hpa))


_OWN_PAGES = {
    "VMCS": ("MSR_BITMAP", "VIRTUAL_APIC_ADDR", "POSTED_INTERRUPT_DESC_ADDR"),
    "VMCB": ("MSRPM_BASE_PA", "AVIC_BACKING_PAGE", "VMSA_POINTER"),
}


def rebased(structure: ControlStructure, address: int, held_in: str) -> ControlStructure:
    """Return the structure as it appears at another address, in the memory of machine ``held_in``."""
    return replace(structure, hpa=address, held_in=held_in)
