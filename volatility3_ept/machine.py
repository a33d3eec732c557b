"""A machine as scripts and notebooks see it: its memory, guest-physical and guest-virtual, and where that lies.

:mod:`volatility3_ept.api` makes these.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from volatility3_ept.core import coverage as coverages
from volatility3_ept.core import guestcpu, guestvirtual, nested
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.coverage import Coverage
from volatility3_ept.core.guestvirtual import AddressSpace, Decision
from volatility3_ept.core.lineage import HostRuns, Line
from volatility3_ept.core.machines import Machine as Found
from volatility3_ept.core.memory import Bools, HostMemory, Int64
from volatility3_ept.core.root import Root
from volatility3_ept.core.walk import Walk
from volatility3_ept.export import carve as carving
from volatility3_ept.export.carve import Carved, Image
from volatility3_ept.export.plan import Format
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.paging import Access

if TYPE_CHECKING:
    from volatility3_ept.api import Capture

Pages = npt.NDArray[np.uint8]


class MissingMemoryError(LookupError):
    """A read met memory that the guest does not have, or that the capture lacks. ``address`` is the first such page."""

    def __init__(self, address: int, reason: str) -> None:
        """Take the address and why nothing is there."""
        super().__init__(f"{address:#x}: {reason}")
        self.address = address


class Run(NamedTuple):
    """A stretch of a guest's memory that lies in one piece in the host. ``hpa`` is an address of the host itself."""

    gpa: int
    length: int
    hpa: int
    access: Access
    recovered: bool


@dataclass(frozen=True)
class Translation:
    """Where an address leads. An address is None where the way ends before it, and ``reason`` says why it ends."""

    gva: int | None
    gpa: int | None
    hpa: int | None
    access: Access
    reason: str


class Machine:
    """A guest. Its memory is read through EPT or NPT, and where these lack a page, through its VMM's page tables."""

    def __init__(self, capture: Capture, line: Line, root: Root | None = None) -> None:
        """Take a machine of the capture; :meth:`Capture.machine` makes one."""
        self.id = line.id
        self._capture = capture
        self._line = line
        self._root = root

    def __repr__(self) -> str:
        """Return the id, the root and the system."""
        return f"<Machine {self.id}: {self.root.kind} root {self.root.raw:#x}, {self.system}>"

    @property
    def found(self) -> Found | None:
        """What the search knows of it (evidence, views, slots); None for a root that was given."""
        return self._line.machine

    @property
    def root(self) -> Root:
        """The EPT or NPT root."""
        root = self._root or (self.found.root if self.found else None)
        if root is None:
            raise LookupError(f"machine {self.id} has no root")
        return root

    @property
    def system(self) -> str:
        """What runs in it, in a few words."""
        return self.found.system if self.found else "unknown"

    @property
    def vcpus(self) -> tuple[ControlStructure, ...]:
        """The control structure of each vCPU."""
        return self.found.vcpus if self.found else ()

    @property
    def children(self) -> list[Machine]:
        """The machines that run in it."""
        return [self._capture.machine(child.id) for child in (self.found.children if self.found else ())]

    @property
    def memory(self) -> HostMemory:
        """Guest-physical memory as the algorithms of the package take it."""
        return self.found.memory if self.found else self._line.maps[0].memory(self._line.below)

    @property
    def size(self) -> int:
        """Bytes of guest memory that the capture holds."""
        return self.memory.size

    def read(self, gpa: int, length: int, fill: bytes | None = None) -> bytes:
        """Return guest-physical memory.

        Raises:
            MissingMemoryError: a page is not there. With ``fill``, one byte, its place is filled with that instead.
        """
        return read(self.memory, gpa, length, fill, "the guest has no memory there that the capture holds")

    def pages(self, gpas: Sequence[int] | Int64) -> tuple[Pages, Bools]:
        """Return the 4K pages at many addresses as ``uint8[n, 4096]``, and which of them there are."""
        rows, held = self.memory.words(np.asarray(gpas, dtype=np.int64))
        return rows.view(np.uint8).reshape(-1, PAGE_SIZE), held

    @functools.cached_property
    def host_runs(self) -> HostRuns:
        """Where its memory lies in the host, as numpy arrays."""
        return self._line.host_runs()

    def runs(self) -> Iterator[Run]:
        """Yield where its memory lies in the host, ascending by guest-physical address."""
        runs = self.host_runs
        columns = (runs.gpas, runs.lengths, runs.hpas, runs.accesses, runs.recovered)
        for gpa, length, hpa, access, recovered in zip(*(column.tolist() for column in columns), strict=True):
            yield Run(gpa, length, hpa, Access(access), recovered)

    def coverage(self) -> Coverage:
        """Return what became of every page below the top of its memory."""
        found = self.found
        guest_map = found.guest_map if found else self._line.maps[0]
        return coverages.account(guest_map, self._line.below, found.recovery if found else None)

    def carve(self, folder: str | Path, format: str = "elf", overwrite: bool = False) -> Carved:  # noqa: A002
        """Write the guest as an image of its own, with a manifest beside it, and return where and what was written.

        ``format`` is ``raw`` (a sparse file), ``padded``, ``lime`` or ``elf``. The files appear when they are whole.

        Raises:
            OutputError: nothing was written; the message says why.
        """
        image = Image(f"guest-{self.root.kind.lower()}-{self.root.raw:x}", self.memory, self.coverage(),
                      about={"root": str(self.root)})  # fmt: skip
        if self.found:
            image = Image.of(self.found, self._line.below)
        path = self._capture.path
        source = {"file": path.name, "bytes": path.stat().st_size}
        return carving.carve(image, Path(folder), Format(format), overwrite, source=source)

    def walk(self, gpa: int) -> Walk:
        """Return the walk of one guest-physical address with every entry that was read."""
        return self.root.walk(self._line.below, gpa)

    def translate(
        self, gpa: int | None = None, *, gva: int | None = None, cr3: int | None = None, vcpu: int | None = None
    ) -> Translation:
        """Return where a guest-physical or a guest-virtual address leads.

        ``cr3`` and ``vcpu`` say whose virtual address it is; without them it is that of :attr:`address_space`.
        """
        if (gpa is None) == (gva is None):
            raise TypeError("translate: give either gpa or gva")
        access, reason = Access.ALL, ""
        if gva is not None:
            gpa, access, reason = self._to_gpa(self._space(cr3, vcpu), gva)
        if gpa is None:
            return Translation(gva, None, None, Access.NONE, f"guest: {reason}")
        index = np.array([gpa], dtype=np.int64)
        hpa = int(self.host_runs.to_hpa(index)[0])
        if hpa < 0:
            return Translation(
                gva, gpa, None, Access.NONE, str(self.coverage().find(gpa) or "above the guest's memory")
            )
        outer = self._access(gpa)
        present = "" if hpa in self._capture.memory else "outside the capture"
        return Translation(gva, gpa, hpa, access & outer, present or "mapped" if outer else "recovered")

    def read_virtual(
        self, gva: int, length: int, *, cr3: int | None = None, vcpu: int | None = None, fill: bytes | None = None
    ) -> bytes:
        """Return guest-virtual memory, through the page tables at ``cr3``, those of a vCPU, or :attr:`address_space`.

        Raises:
            MissingMemoryError: a page is not there. With ``fill``, one byte, its place is filled with that instead.
        """
        space = self._space(cr3, vcpu)
        parts: list[bytes] = []
        while length > 0:
            take = min(length, PAGE_SIZE - gva % PAGE_SIZE)
            gpa, _, reason = self._to_gpa(space, gva)
            data = None if gpa is None else self.memory.read(gpa, take)
            if data is None and fill is None:
                raise MissingMemoryError(gva, reason)
            parts.append(data if data is not None else (fill or b"\0") * take)
            gva, length = gva + take, length - take
        return b"".join(parts)

    def walk_virtual(self, gva: int, *, cr3: int | None = None, vcpu: int | None = None) -> nested.TwoDimensional:
        """Return the two-dimensional walk of one guest-virtual address with every entry that was read.

        Raises:
            LookupError: paging is off; :meth:`walk` walks the guest-physical address, which is the same.
        """
        space = self._space(cr3, vcpu)
        if space.mode is None:
            raise LookupError(f"machine {self.id}: paging is off, a virtual address is the guest-physical one")
        mode, root = space.at(gva)
        return nested.walk(self._line.below, self.root, self.memory, mode, root, gva)

    @functools.cached_property
    def address_space(self) -> Decision:
        """The virtual address space that stands for the guest, and on what evidence; of a pair the kernel's half."""
        return guestvirtual.of_machine(self.found) if self.found else Decision(None)

    def _access(self, gpa: int) -> Access:
        runs = self.host_runs
        return Access(int(runs.accesses[max(int(np.searchsorted(runs.gpas, gpa, side="right")) - 1, 0)]))

    def _to_gpa(self, space: AddressSpace, gva: int) -> tuple[int | None, Access, str]:
        """Return where a guest-virtual address leads in the guest, the rights on the way, and why it ends there."""
        if space.mode is None:
            if gva >> 32:
                return None, Access.NONE, "paging is off: addresses have 32 bits"
            return gva, Access.ALL, "paging is off; the guest has no memory there that the capture holds"
        own = guestvirtual.walk(self.memory, space, gva)
        return own.target, own.access, own.reason

    def _space(self, cr3: int | None, vcpu: int | None) -> AddressSpace:
        """Return a vCPU's address space, or the one that stands for the guest; with ``cr3`` in that one's mode."""
        if vcpu is not None and not 0 <= vcpu < len(self.vcpus):
            raise LookupError(f"machine {self.id} has {len(self.vcpus)} vCPUs, numbered from 0")
        state = None if vcpu is None else guestcpu.registers(self.vcpus[vcpu])
        known = self.address_space if state is None else guestvirtual.of_vcpu(self.memory, state)
        first = [state] if state else [guestcpu.registers(each) for each in self.vcpus[:1]]
        space = known.space or (guestvirtual.nominal(first[0]) if first else None)
        if cr3 is None:
            if space is None:
                raise LookupError(f"machine {self.id}: no vCPU's page tables are known ({known}); give cr3")
            return space
        mode = space.mode if space and space.mode else ia32e.four_level()
        return AddressSpace(mode.from_memory, cr3)


def read(memory: HostMemory, address: int, length: int, fill: bytes | None, reason: str) -> bytes:
    """Return bytes of a memory; MissingMemoryError at the first page that is missing, unless ``fill`` stands in."""
    data = memory.read(address, length)
    if data is not None:
        return data
    out: list[bytes] = []
    while length > 0:
        take = min(length, PAGE_SIZE - address % PAGE_SIZE)
        part = memory.read(address, take)
        if part is None and fill is None:
            raise MissingMemoryError(address, reason)
        out.append(part if part is not None else (fill or b"\0") * take)
        address, length = address + take, length - take
    return b"".join(out)
