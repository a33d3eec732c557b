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
from volatility3_ept.core import identify, kinship, roots, scan, structural, unknown
from volatility3_ept.core.candidate import Candidate
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.index import Index
from volatility3_ept.core.likeness import Found
from volatility3_ept.core.machines import Discovery, Machine, View
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT, Root
from volatility3_ept.core.roots import RootScan
from volatility3_ept.core.scan import Progress
from volatility3_ept.core.slots import Slot
from volatility3_ept.core.tables import Finder
from volatility3_ept.spec import bits

#: A tree deeper than this is an attack on the analyst: no hypervisor nests so far.
MAX_DEPTH = 6
#: Control structures without a machine that are tried in the memory of each guest.
_MAX_ORPHANS = 64


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

    def structural(self, name: str, memory: HostMemory) -> tuple[Found, ...]:
        """Return the roots that page tables alone give in the memory of machine ``name`` (empty: the capture)."""
        if name in self.found:
            known = structural.rows_to_found(self.found[name], memory)
            if known is not None:
                return known
        return self.keep(name, memory, roots.search(memory, self.physical_bits))

    def keep(self, name: str, memory: HostMemory, result: RootScan) -> tuple[Found, ...]:
        """Note a search by structure for the index, and return what it found."""
        self.notes += result.notes
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
        result = scan.control_structures(memory, physical_bits, progress, finder.see)
        progress(100, "Judging the page tables found")
        found = search.keep("", memory, roots.judge(memory, finder.tops(), physical_bits))
        inferred = _infer(memory, found, result, search)
    else:
        result = scan.again(memory, known.structures, known.pages, known.notes, physical_bits)
        found = search.structural("", memory)
        inferred = dict(known.inferred)
    search.notes += result.notes
    structures = [s for s in result.structures if s.has_root]
    structures += unknown.structures(memory, inferred, physical_bits)
    progress(100, "Walking the page tables of the machines found")
    machines = _level(memory, structures, found, "", search)
    without = tuple(s for s in result.structures if not s.has_root)
    index = Index(result.examined, result.pages, search.systems, search.slots, search.found, inferred, result.notes)
    return Discovery(
        tuple(machines), result.near_misses + without, tuple(search.rejected), tuple(search.notes), result.pages, index
    )


def _infer(
    memory: HostMemory, found: Sequence[Found], result: scan.ScanResult, search: _Search
) -> dict[str, unknown.Kept]:
    """Look for VMCSs of an unknown processor, if an EPT was found that no control structure names."""
    named = {s.root_hpa for s in result.structures}
    if all(item.root.kind != EPT or item.root.address in named for item in found):
        return {}
    inferred, notes = unknown.search(memory, found, result.examined)
    search.notes += notes
    return inferred


def _level(
    below: HostMemory,
    structures: Sequence[ControlStructure],
    found: Sequence[Found],
    parent: str,
    search: _Search,
) -> list[Machine]:
    """Return the machines whose tables lie in ``below``, sorted by root; ids continue ``parent``.

    ``found`` are the roots that page tables alone gave there.
    """
    judged = _judged(below, structures, search)
    judged = _read_as_found(below, judged, found)
    search.rejected += [c for c in judged if not c.accepted]
    accepted = _with_structural(below, [c for c in judged if c.accepted], found, search)
    if search.recover:
        accepted = _recovered(below, accepted, parent, search)
    owners = kinship.owners(structures, accepted)
    tops = [
        _without_owned(c, below, owners)
        for c in accepted
        if not c.structures or any(not owners[s.hpa] for s in c.structures)
    ]
    if accepted and not tops:
        search.notes.append("machines that hold each other's control structures: shown side by side")
        tops, owners = accepted, {s.hpa: [] for s in structures}
    tops.sort(key=lambda c: c.root.address)
    mains, views, shadows = kinship.families(tops)
    machines: list[Machine] = []
    named = {s.hpa for c in accepted for s in c.structures}
    orphans = [s for s in structures if s.hpa not in named and not owners[s.hpa]][:_MAX_ORPHANS]
    for number, main in enumerate(mains):
        machine_id = f"{parent}.{number}" if parent else str(number)
        inside = [s for s in structures if main.root in owners[s.hpa]]
        children = _children(main, inside, orphans, machine_id, search) if machine_id.count(".") < MAX_DEPTH else []
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
    return machines


def _judged(below: HostMemory, structures: Sequence[ControlStructure], search: _Search) -> list[Candidate]:
    """Judge each root once, with all structures that name it; of a root's readings keep the best."""
    groups: dict[tuple[str, int], list[ControlStructure]] = {}
    for structure in structures:
        groups.setdefault((structure.kind, structure.root_hpa), []).append(structure)
    best = []
    for group in groups.values():
        readings = [candidates.judge(below, root, group) for root in candidates.roots(group[0], search.physical_bits)]
        if readings:
            best.append(max(readings, key=lambda c: c.strength))
    return best


def _read_as_found(below: HostMemory, judged: list[Candidate], found: Sequence[Found]) -> list[Candidate]:
    """Judge a rejected root again in the dialect in which its tables alone were believed.

    Where Xen asked for recalculation at the root, the author cannot be inferred from the entries.
    """
    authors = {item.root.address: item.root.dialect for item in found}
    return [
        candidates.judge(below, replace(c.root, dialect=authors[c.root.address]), c.structures)
        if not c.accepted and authors.get(c.root.address, c.root.dialect) != c.root.dialect
        else c
        for c in judged
    ]


def _with_structural(
    below: HostMemory, accepted: list[Candidate], found: Sequence[Found], search: _Search
) -> list[Candidate]:
    """Add the roots that page tables alone gave; one that is only possible can be a view of another, nothing more."""
    named = {c.root.address: number for number, c in enumerate(accepted)}
    merged = list(accepted)
    doubtful = []
    for item in found:
        new = structural.candidate(item, below)
        if item.root.address in named:
            number = named[item.root.address]
            merged[number] = replace(merged[number], evidence=(*merged[number].evidence, new.evidence[0]))
        elif new.accepted:
            merged.append(new)
        else:
            doubtful.append(new)
    mains = {id(c) for c in kinship.families([*merged, *doubtful])[0]}
    search.rejected += [c for c in doubtful if id(c) in mains]
    return merged + [c for c in doubtful if id(c) not in mains]


def _recovered(below: HostMemory, accepted: list[Candidate], parent: str, search: _Search) -> list[Candidate]:
    """Add what the VMMs hold beside EPT and NPT. Views and outer tables of nested guests are not recovered."""
    mains, _, _ = kinship.families(accepted)
    chosen = {id(main) for main in mains}
    whole = []
    for found in accepted:
        if id(found) not in chosen:
            whole.append(found)
            continue
        name = f"{parent}/{found.root}"
        kept = search.slots.get(name)
        known = None if kept is None else [Slot.parse(text) for text in kept]
        others = [main.guest_map for main in mains if main is not found]
        whole.append(candidates.recovered(below, found, known, others))
        recovery = whole[-1].recovery
        search.slots[name] = tuple(str(slot) for slot in recovery.slots) if recovery else ()
    return whole


def _without_owned(found: Candidate, below: HostMemory, owners: dict[int, list[Root]]) -> Candidate:
    """Return a candidate without the structures that lie in a guest: there the same number is another address."""
    free = tuple(s for s in found.structures if not owners[s.hpa])
    if len(free) == len(found.structures):
        return found
    again = candidates.judge(below, found.root, free)
    if found.recovery is None:
        return again
    recovered = tuple(item for item in found.evidence if item.name == "recovered")
    return replace(again, memory=found.memory, recovery=found.recovery, evidence=(*again.evidence, *recovered))


def _children(
    main: Candidate, inside: list[ControlStructure], orphans: list[ControlStructure], parent: str, search: _Search
) -> list[Machine]:
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
    moved += [structure for structure in orphans if _parses_in(main.memory, structure, search)]
    found = search.structural(parent, main.memory)
    return _level(main.memory, moved, found, parent, search) if moved or found else []


def _parses_in(memory: HostMemory, structure: ControlStructure, search: _Search) -> bool:
    """Tell whether the machine of a structure that lies elsewhere is proven by its page tables in this memory."""
    return any(
        found.accepted and found.paging is not None
        for root in candidates.roots(structure, search.physical_bits)
        for found in [candidates.judge(memory, root, [structure])]
    )


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
    if name not in search.systems:
        search.systems[name] = identify.system(found.memory)
    return Machine(
        machine_id,
        found.root,
        found.guest_map,
        found.memory,
        candidates.distinct(found.structures),
        found.evidence,
        found_by,
        search.systems[name],
        found.paging,
        tables_in,
        views,
        children,
        found.recovery,
        found.guest_cr3,
    )
