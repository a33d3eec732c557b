"""What the symbols of a hypervisor's kernel say of its address space: plain data, that a caller hands to the audit.

The audit works without it. With it, the kernel's own data is known, and whether the place at which a hypervisor is
entered belongs to the kernel or to one of its modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import leaves
from volatility3_ept.core import walk as walks
from volatility3_ept.core.audit_finding import Ranges
from volatility3_ept.core.gpamap import GuestMap, union
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec import dialect, ia32e
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Access


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a kernel's address space that the kernel or a module of it owns: virtual addresses, end exclusive.

    Addresses are as the page tables index them: without the copies of the top bit above it.
    """

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class HostKernel:
    """A kernel that hypervisors run in: its page tables, and the parts of it that nobody frees while it runs."""

    cr3: int
    levels: int
    parts: tuple[Part, ...]

    @property
    def format(self) -> Ia32Format:
        """The format of the kernel's page tables."""
        return ia32e.five_level() if self.levels == 5 else ia32e.four_level()

    @property
    def modules(self) -> int:
        """How many names the parts have."""
        return len({part.name for part in self.parts})

    def owner(self, address: int) -> str | None:
        """Return the name of the part that a virtual address lies in, canonical or not; None where it is in none."""
        at = address & (1 << self.format.address_bits) - 1
        return next((part.name for part in self.parts if part.start <= at < part.end), None)

    def target(self, below: HostMemory, address: int) -> int | None:
        """Return where a virtual address lies in the memory below, by the kernel's own tables."""
        return walks.walk(below, self.format, self.cr3, address).target

    def space(self, below: HostMemory) -> GuestMap:
        """Return what the kernel's own page tables map."""
        return leaves.traverse(below, self.format, self.cr3, dialect.GENERIC)

    def data(self, below: HostMemory) -> Iterator[tuple[str, Ranges]]:
        """Yield ``(name, ranges in the memory below)`` of what the parts hold and may not be executed."""
        space = self.space(below)
        still = (space.accesses & int(Access.EXECUTE)) == 0
        gvas, lengths, hpas = space.gpas[still], space.lengths[still], space.hpas[still]
        for name in sorted({part.name for part in self.parts}):
            own = sorted((part.start, part.end) for part in self.parts if part.name == name)
            starts, ends = union(*np.array(own, dtype=np.int64).T)
            run, _, low, high = overlaps(gvas, gvas + lengths, starts, ends)
            first = hpas[run] + low - gvas[run]
            if first.size:
                yield name, Ranges(*union(first, first + high - low))
