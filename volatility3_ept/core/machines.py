"""The tree of machines: control structures, the roots they name, and who holds whom.

A control structure whose page lies in a guest's memory belongs to a hypervisor *in* that guest: its root is an address
of that guest, and its machine is that guest's child. Nothing that a guest writes can therefore become a machine of the
host. A root of the host that maps only frames of another guest, at other addresses, is that guest's guest too, seen
through the outer hypervisor's own tables (VMCS02, shadow NPT).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from volatility3_ept.core import candidate as candidates
from volatility3_ept.core import identify, kinship, scan
from volatility3_ept.core.backing import Recovery
from volatility3_ept.core.candidate import Candidate
from volatility3_ept.core.control import ControlStructure, Criterion
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.index import Index
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root
from volatility3_ept.core.scan import Progress
from volatility3_ept.core.slots import Slot
from volatility3_ept.spec import bits
from volatility3_ept.spec.ia32e import Ia32Format

#: A tree deeper than this is an attack on the analyst: no hypervisor nests so far.
MAX_DEPTH = 6
#: Control structures without a machine that are tried in the memory of each guest.
_MAX_ORPHANS = 64


@dataclass(frozen=True)
class View:
    """A further hierarchy that maps the same guest: a second EPT, or the outer hypervisor's tables of a nested guest.

    Its tables lie in the memory of machine ``tables_in`` (empty: in the capture itself).
    """

    root: Root
    tables_in: str

    def __str__(self) -> str:
        """Return the root, and where it is to be read."""
        return f"{self.root} in {'machine ' + self.tables_in if self.tables_in else 'the capture'}"


@dataclass(frozen=True)
class Machine:
    """One virtual machine. Plain data: whoever holds it can read the guest's memory and needs nothing else.

    ``id`` is what ``--guest`` takes. ``guest_map`` is what EPT or NPT maps; ``memory`` is the guest-physical memory
    over the capture, with the pages that ``recovery`` found beside it. The tables lie in the memory of machine
    ``tables_in`` (empty: in the capture itself).
    """

    id: str
    root: Root
    guest_map: GuestMap
    memory: HostMemory
    vcpus: tuple[ControlStructure, ...]
    evidence: tuple[Criterion, ...]
    found_by: str
    system: str
    paging: Ia32Format | None
    tables_in: str = ""
    views: tuple[View, ...] = ()
    children: tuple[Machine, ...] = ()
    recovery: Recovery | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Machine:
        """Return itself: nothing in it changes."""
        return self

    def tree(self) -> Iterator[Machine]:
        """Yield this machine and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.tree()

    @property
    def depth(self) -> int:
        """Nesting depth: 0 for a guest of the host."""
        return self.id.count(".")


@dataclass(frozen=True)
class Discovery:
    """Everything that one pass over a memory gave: the machines, and what was looked at and not believed."""

    machines: tuple[Machine, ...] = ()
    near_misses: tuple[ControlStructure, ...] = ()
    rejected: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()
    pages: int = 0
    index: Index = field(default_factory=Index)

    def all(self) -> list[Machine]:
        """Return every machine of the tree, parents before children."""
        return [machine for top in self.machines for machine in top.tree()]

    def find(self, machine_id: str) -> Machine | None:
        """Return the machine with this id, or None."""
        return next((machine for machine in self.all() if machine.id == machine_id), None)


@dataclass
class _Search:
    """What the recursion shares."""

    physical_bits: int
    recover: bool
    systems: dict[str, str]
    slots: dict[str, tuple[str, ...]]
    rejected: list[Candidate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def discover(
    memory: HostMemory,
    physical_bits: int = bits.MAX_PHYSICAL_BITS,
    progress: Progress = scan.silent,
    known: Index | None = None,
    recover: bool = True,
) -> Discovery:
    """Find every machine whose control structure is in ``memory``, nested ones too.

    ``known`` is the index of an earlier search of the same memory: its pages are judged again, no others. ``recover``:
    also find the pages that EPT or NPT lacks, in the memory of the VMM.
    """
    if known is None:
        result = scan.control_structures(memory, physical_bits, progress)
    else:
        result = scan.again(memory, known.structures, known.pages, known.notes, physical_bits)
    kept = known or Index()
    search = _Search(physical_bits, recover, dict(kept.systems), dict(kept.slots), notes=list(result.notes))
    structures = [s for s in result.structures if s.has_root]
    progress(100, "Walking the page tables of the machines found")
    machines = _level(memory, structures, "", search)
    without = tuple(s for s in result.structures if not s.has_root)
    index = Index(result.examined, result.pages, search.systems, search.slots, result.notes)
    return Discovery(
        tuple(machines), result.near_misses + without, tuple(search.rejected), tuple(search.notes), result.pages, index
    )


def _level(below: HostMemory, structures: Sequence[ControlStructure], parent: str, search: _Search) -> list[Machine]:
    """Return the machines whose tables lie in ``below``, sorted by root; ids continue ``parent``."""
    judged = _judged(below, structures, search)
    search.rejected += [c for c in judged if not c.accepted]
    accepted = [c for c in judged if c.accepted]
    if search.recover:
        accepted = _recovered(below, accepted, parent, search)
    owners = kinship.owners(structures, accepted)
    tops = [_without_owned(c, below, owners) for c in accepted if any(not owners[s.hpa] for s in c.structures)]
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
        how = ", ".join(sorted({s.kind for s in main.structures}))
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
    return _level(main.memory, moved, parent, search) if moved else []


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
            children[number] = replace(child, views=(*child.views, View(shadow.root, parent)))
        else:
            inner = (View(child.root, machine_id),)
            fuller = _machine(shadow, child.id, child.found_by, parent, search, inner, child.children)
            children[number] = replace(fuller, vcpus=child.vcpus)
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
    )
