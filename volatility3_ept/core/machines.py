"""The machines of a capture: the tree that a search gives and everything else passes along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from volatility3_ept.core import confidential
from volatility3_ept.core.backing import Recovery
from volatility3_ept.core.candidate import Candidate
from volatility3_ept.core.control import ControlStructure, Criterion
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.index import Index
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root
from volatility3_ept.spec.ia32e import Ia32Format


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
    guest_cr3: int | None = None

    @property
    def spaces(self) -> tuple[int, ...]:
        """Values of CR3 of the guest: those of its vCPUs, then the one that its page tables gave away."""
        known = [vcpu.guest_cr3 for vcpu in self.vcpus] + [self.guest_cr3]
        return tuple(dict.fromkeys(cr3 for cr3 in known if cr3 is not None))

    @property
    def confidential(self) -> tuple[str, ...]:
        """What says that the host cannot read all of the guest, in sentences; empty for an ordinary machine."""
        return confidential.notes(self.evidence)

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
