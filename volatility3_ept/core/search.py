"""The tree of machines: control structures, the roots they name, and who holds whom.

A control structure whose page lies in a guest's memory belongs to a hypervisor *in* that guest: its root is an address
of that guest, and its machine is that guest's child. Nothing that a guest writes can therefore become a machine of the
host. A root of the host that maps only frames of another guest, at other addresses, is that guest's guest too, seen
through the outer hypervisor's own tables (VMCS02, shadow NPT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from volatility3_ept.core import candidate as candidates
from volatility3_ept.core import (
    confidential,
    guestcpu,
    hearing,
    identify,
    keybits,
    kinship,
    roots,
    scan,
    structural,
    unknown,
)
from volatility3_ept.core.candidate import Candidate
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.hearing import Allowance, said
from volatility3_ept.core.index import Index
from volatility3_ept.core.likeness import Found
from volatility3_ept.core.machines import Discovery, Machine, View
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root
from volatility3_ept.core.roots import RootScan
from volatility3_ept.core.scan import Progress
from volatility3_ept.core.slots import Slot
from volatility3_ept.core.tables import Finder
from volatility3_ept.spec import bits

#: A tree deeper than this is an attack on the analyst: no hypervisor nests so far.
MAX_DEPTH = 6


@dataclass
class _Search:
    """What the recursion shares."""

    physical_bits: int
    recover: bool
    systems: dict[str, str]
    slots: dict[str, tuple[str, ...]]
    found: dict[str, tuple[str, ...]]
    rejected: list[Candidate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: What searches by structure cut short: an index keeps it, because they are not made again.
    cuts: list[str] = field(default_factory=list)

    def structural(self, name: str, memory: HostMemory) -> tuple[Found, ...]:
        """Return the roots that page tables alone give in the memory of machine ``name`` (empty: the capture)."""
        if name in self.found:
            known = structural.rows_to_found(self.found[name], memory)
            if known is not None:
                return known
        return self.keep(name, memory, roots.search(memory, self.physical_bits))

    def keep(self, name: str, memory: HostMemory, result: RootScan) -> tuple[Found, ...]:
        """Note a search by structure for the index, and return what it found."""
        self.cuts += said(name, result.notes)
        self.notes += said(name, result.notes)
        self.found[name] = tuple(structural.row(item, memory) for item in result.found)
        return result.found


def discover(
    memory: HostMemory,
    physical_bits: int = bits.MAX_PHYSICAL_BITS,
    progress: Progress = scan.silent,
    known: Index | None = None,
    recover: bool = True,
) -> Discovery:
    """Find every machine in ``memory``, by its control structures and by its page tables, nested ones too.

    ``known`` is the index of an earlier search of the same memory: its pages are judged again, no others. ``recover``:
    also find the pages that EPT or NPT lacks, in the memory of the VMM.
    """
    kept = known or Index()
    search = _Search(physical_bits, recover, dict(kept.systems), dict(kept.slots), dict(kept.found))
    if known is None:
        finder = Finder(memory, physical_bits)
        seen = scan.sight(memory, progress, finder.see)
        progress(100, "Judging the page tables found")
        plain = roots.judge(memory, finder.tops(), physical_bits)
        result = scan.examine(memory, seen, plain.found, physical_bits)
        key_bit = keybits.of_structures(memory, result.structures)
        found = search.keep("", memory, roots.with_key(memory, plain, physical_bits, key_bit))
        inferred, notes = unknown.unnamed(memory, found, result.structures, result.examined)
        search.notes += notes
    else:
        result = scan.again(memory, known.structures, known.pages, known.notes, physical_bits)
        found = search.structural("", memory)
        inferred = dict(known.inferred)
    search.notes += result.notes
    structures = [s for s in result.structures if s.has_root]
    structures += unknown.structures(memory, inferred, physical_bits)
    progress(100, "Walking the page tables of the machines found")
    machines = _level(memory, structures, found, "", search, Allowance.of(memory))
    without = tuple(s for s in result.structures if not s.has_root)
    cuts = tuple(dict.fromkeys((*result.notes, *search.cuts)))
    index = Index(result.examined, result.pages, search.systems, search.slots, search.found, inferred, cuts)
    return Discovery(
        tuple(machines), result.near_misses + without, tuple(search.rejected), tuple(search.notes), result.pages, index
    )


def _level(
    below: HostMemory,
    structures: Sequence[ControlStructure],
    found: Sequence[Found],
    parent: str,
    search: _Search,
    allowance: Allowance,
) -> list[Machine]:
    """Return the machines whose tables lie in ``below``, sorted by root; ids continue ``parent``.

    ``found`` are the roots that page tables alone gave there. ``allowance`` bounds what is spent on them and below.
    """
    cuts: list[str] = []
    judged = hearing.judged(below, structures, found, search.physical_bits, cuts, allowance)
    search.rejected += [c for c in judged if not c.accepted]
    cuts += hearing.out_of_reach(judged)
    accepted, doubtful = structural.merged(below, [c for c in judged if c.accepted], found)
    search.rejected += doubtful
    if search.recover:
        tops = _tops(accepted, kinship.owners(structures, accepted)[0])
        accepted = _recovered(below, accepted, tops, parent, search)
    owners, undecided = kinship.owners(structures, accepted)
    if undecided:
        cuts.append("machines that hold each other's control structures: shown side by side")
    tops = [hearing.without_owned(c, below, owners, search.physical_bits) for c in _tops(accepted, owners)]
    tops.sort(key=lambda c: c.root.address)
    mains, views, shadows = kinship.families(tops)
    machines: list[Machine] = []
    orphans = hearing.orphans(structures, accepted, owners, cuts)
    for number, main in enumerate(mains):
        machine_id = f"{parent}.{number}" if parent else str(number)
        looked_into = allowance.covers(main.memory)
        children: list[Machine] = []
        if looked_into and machine_id.count(".") < MAX_DEPTH:
            inside = [s for s in structures if main.root in owners[s.hpa]]
            below_it = allowance if parent else Allowance.of(main.memory)
            children = _children(main, inside, allowance.tries(orphans), machine_id, search, below_it)
        elif not looked_into:
            search.systems[f"{parent}/{main.root}"] = identify.UNKNOWN
        for shadow in shadows.get(id(main), []):
            _add_shadow(children, shadow, machine_id, parent, search)
        how = ", ".join([*sorted({s.kind for s in main.structures}), *(["page tables"] if main.by_structure else [])])
        machines.append(
            _machine(
                main,
                machine_id,
                how,
                parent,
                search,
                tuple(View(v.root, parent) for v in views.get(id(main), [])),
                tuple(children),
            )
        )
    search.notes += said(parent, [*cuts, *allowance.said()])
    return machines


def _tops(accepted: Sequence[Candidate], owners: dict[int, list[Root]]) -> list[Candidate]:
    """Return the candidates of which no guest holds every control structure."""
    return [c for c in accepted if not c.structures or any(not owners[s.hpa] for s in c.structures)]


def _recovered(
    below: HostMemory, accepted: list[Candidate], tops: list[Candidate], parent: str, search: _Search
) -> list[Candidate]:
    """Add what the VMMs hold beside EPT and NPT. Views and outer tables of nested guests are not recovered.

    ``tops`` are those of the candidates that no guest holds: the others' maps say nothing of this memory.
    """
    mains, _, _ = kinship.families(tops)
    chosen = {id(main) for main in mains}
    whole = []
    for found in accepted:
        if id(found) not in chosen:
            whole.append(found)
            continue
        name = f"{parent}/{found.root}"
        known = _slots(search.slots.get(name))
        others = [main.guest_map for main in mains if main is not found]
        whole.append(candidates.recovered(below, found, known, others))
        recovery = whole[-1].recovery
        search.slots[name] = tuple(str(slot) for slot in recovery.slots) if recovery else ()
    return whole


def _slots(kept: Sequence[str] | None) -> list[Slot] | None:
    """Return the slots that an index names; None where it names none, or what it holds is damaged."""
    try:
        return None if kept is None else [Slot.parse(text) for text in kept]
    except ValueError:
        return None


def _children(
    main: Candidate, inside: list[ControlStructure], orphans: list[ControlStructure], parent: str, search: _Search,
    allowance: Allowance
) -> list[Machine]:  # fmt: skip
    """Return the machines of a hypervisor that runs in ``main``: the same search in its guest-physical memory.

    ``orphans`` name no root of their own space. KVM keeps a copy of each vmcs12 in the host's memory, and the page in
    the guest may never be written: such a copy is the guest's if its machine's page tables parse in the guest.
    """
    own = {s.hpa for s in main.structures}
    whole = main.whole
    moved = [
        candidates.rebased(structure, gpa, parent)
        for structure in inside
        if structure.hpa not in own
        for gpa in whole.to_gpas(structure.hpa)[:1]
    ]
    moved += [structure for structure in orphans if hearing.parses_in(main.memory, structure, search.physical_bits)]
    found = search.structural(parent, main.memory)
    return _level(main.memory, moved, found, parent, search, allowance) if moved or found else []


def _add_shadow(children: list[Machine], shadow: Candidate, machine_id: str, parent: str, search: _Search) -> None:
    """Add the outer hypervisor's tables of a nested guest: as a view of the child they map, or as a child of its own.

    The child's own tables (VMCS12, VMCB12) and the outer ones must lead to the same bytes. The fuller of the two
    becomes the machine's memory: outer tables are filled as the guest runs, and the inner ones may lie in pages that
    the outer hypervisor has taken away.
    """
    for number, child in enumerate(children):
        if child.tables_in != machine_id or kinship.same_memory(child.memory, shadow.memory) < kinship.SAME:
            continue
        if child.memory.size >= shadow.memory.size:
            vcpus = child.vcpus or candidates.distinct(shadow.structures)
            children[number] = replace(child, views=(*child.views, View(shadow.root, parent)), vcpus=vcpus)
        else:
            inner = (View(child.root, machine_id),)
            fuller = _machine(shadow, child.id, child.found_by, parent, search, inner, child.children)
            children[number] = replace(fuller, vcpus=child.vcpus or fuller.vcpus)
        return
    if not shadow.structures and not shadow.accepted:
        search.rejected.append(shadow)
        return
    child_id = f"{machine_id}.{len(children)}"
    children.append(_machine(shadow, child_id, "the outer hypervisor's tables", parent, search))


def _machine(
    found: Candidate,
    machine_id: str,
    found_by: str,
    tables_in: str,
    search: _Search,
    views: tuple[View, ...] = (),
    children: tuple[Machine, ...] = (),
) -> Machine:
    name = f"{tables_in}/{found.root}"
    vcpus = candidates.distinct(found.structures)
    if name not in search.systems:
        spaces = [cr3 for cr3 in (*(vcpu.guest_cr3 for vcpu in vcpus), found.guest_cr3) if cr3 is not None]
        search.systems[name] = identify.identify(found.memory, found.paging, spaces, map(guestcpu.registers, vcpus)).row
    system, evidence = identify.from_row(search.systems[name])
    encrypted = confidential.named(found.evidence)
    if encrypted and system == identify.UNKNOWN:
        system = f"{system} ({encrypted})"
    return Machine(
        machine_id,
        found.root,
        found.guest_map,
        found.memory,
        vcpus,
        (*found.evidence, *confidential.pages(found.memory, found.root, found.guest_map, found.evidence), evidence),
        found_by,
        system,
        found.paging,
        tables_in,
        views,
        children,
        found.recovery,
        found.guest_cr3,
    )
