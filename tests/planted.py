"""A real capture, held in memory, with a second hand at its EPT or NPT. The file stays as it is."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import captures
import discovered
import numpy as np
from builders import control, hooks, paging
from builders.paging import PAGE, HostRam, Tables

from volatility3_ept.core import audit_kernel, gpamap, mask
from volatility3_ept.core.audit_host import HostKernel, Part
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource

FRAME, EXECUTE_NONE = 0x000F_FFFF_FFFF_F000, {"EPT": 4, "NPT": 1 << 63}
_LARGE, _HUGE, _PAGE_SIZE = 1 << 21, 1 << 30, 1 << 7
#: VM_FUNCTION_CONTROLS and EPTP_LIST_ADDR in the layout of the emulated processor.
_FUNCTIONS, _LIST = 0x270, 0x2A0
#: Where Linux puts its modules (Documentation/arch/x86/x86_64/mm.rst).
MODULES = (0xFFFF_C000_0000, 0xFFFF_FF00_0000)
#: An address of the hypervisor that was put under the system.
_OWN = 0xFFFF_FFFF_A000_0000


class Planted:
    """The capture, and what was written into it. ``machine`` is the first guest of the host."""

    def __init__(self, name: str) -> None:
        """Open a capture, found and searched already; skips the test where it is absent."""
        self.capture = captures.get(name)
        self.pages: dict[int, bytearray] = {}
        self.below, self.found = discovered.capture(name)
        self.machine = self.found.machines[0]
        self.kind = self.machine.root.kind
        self.kernel = audit_kernel.find(self.machine)
        self._free = self._empty_pages()
        #: Where the entries of the pages lie whose large leaf was split.
        self._split: dict[int, int] = {}
        #: That leaf.
        self.large = 0

    def take(self) -> int:
        """Return an address of empty memory of the host.

        In the midst of more of it: a single page of zeros may be a table of the host's. Not by blocks(), which leaves
        out what the file system stores as holes: there every page is one of zeros.
        """
        return next(self._free)

    def _empty_pages(self) -> Iterator[int]:
        guests = [m.recovery.guest_map if m.recovery else m.guest_map for m in self.found.machines]
        for start, length in zip(*mask.without(self.below, guests), strict=True):
            for first in range(int(start), int(start + length), 4096 * PAGE):
                pages = np.arange(first, min(first + 4096 * PAGE, int(start + length)), PAGE)
                if pages.size < 64:
                    continue
                empty = np.convolve(~self.below.words(pages)[0].any(axis=1), np.ones(64), "valid") == 64
                yield from (int(pages[row]) + 32 * PAGE for row in np.flatnonzero(empty)[::64])

    def code(self) -> list[int]:
        """Return pages of kernel code, in one large leaf that this splits, as a hook does. Not the last ones.

        Where there is no such leaf, pages behind which the frames go on and before which they do not.
        """
        if not self._split:
            guest_map = self.machine.guest_map
            large = guest_map.words >> gpamap.SIZE_SHIFT & 3 == 1
            large &= self.kernel.code.hold(guest_map.gpas) & self.kernel.code.hold(guest_map.gpas + _LARGE - PAGE)
            if not large.any():
                after = guest_map.gpas == np.roll(guest_map.gpas + guest_map.lengths, 1)
                return guest_map.gpas[after & self.kernel.code.hold(guest_map.gpas)].tolist()
            first = int(guest_map.gpas[np.flatnonzero(large)[0]])
            where, entry = self.entry(first)
            self.large = entry
            table, small = self.take(), entry & ~_PAGE_SIZE
            self.write(table, struct.pack("<512Q", *range(small, small + _LARGE, PAGE)))
            self.write_entry(where, self.parent(first) & ~FRAME | table)
            self._split = {first + number * PAGE: table + 8 * number for number in range(512)}
        return list(self._split)[8:-8]

    def parent(self, gpa: int) -> int:
        """Return the entry above the one that maps an address."""
        return self.machine.root.walk(self.below, gpa).steps[-2].entry

    def write(self, hpa: int, data: bytes) -> None:
        """Write within a page, into a copy: in the file, pages that are alike are one. Memory may be new."""
        page = hpa & ~0xFFF
        kept = self.pages.setdefault(page, bytearray(self.below.read(page, PAGE) or bytes(PAGE)))
        kept[hpa & 0xFFF : (hpa & 0xFFF) + len(data)] = data

    def write_entry(self, hpa: int, entry: int) -> None:
        """Write one entry of a table."""
        self.write(hpa, entry.to_bytes(8, "little"))

    @property
    def segments(self) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """The capture with the pages that were written: the bytes of a file, and ``(start, length, offset)``."""
        below, written = self.below, np.array(sorted(self.pages), dtype=np.int64)
        data = np.fromfile(self.capture.path, dtype=np.uint8)
        present = gpamap.union(below.starts, below.starts + below.lengths)
        kept = below.remap(*(mask.subtract(present, (written, written + PAGE))[i] for i in (0, 1, 0)))
        rows = list(zip(kept.starts.tolist(), kept.lengths.tolist(), kept.offsets.tolist(), strict=True))
        rows += [(page, PAGE, data.size + PAGE * number) for number, page in enumerate(written.tolist())]
        new = b"".join(bytes(self.pages[page]) for page in written.tolist())
        return np.concatenate((data, np.frombuffer(new, dtype=np.uint8))), sorted(rows)

    @property
    def memory(self) -> HostMemory:
        """The capture with the pages that were written."""
        data, rows = self.segments
        return HostMemory.from_segments(FileSource(data), rows)

    def entry(self, gpa: int) -> tuple[int, int]:
        """Return where the entry lies that maps an address, and what it is."""
        if gpa in self._split:
            where = self._split[gpa]
            return where, int.from_bytes(self.pages[where & ~0xFFF][where & 0xFFF :][:8], "little")
        step = self.machine.root.walk(self.below, gpa).steps[-1]
        return step.entry_address, step.entry

    def frame(self, gpa: int) -> int:
        """Return the frame of a page."""
        return int(self.machine.guest_map.to_hpa(np.array([gpa]))[0])

    def table(self, gpa: int) -> int:
        """Return the table that holds the entry of an address."""
        return self.entry(gpa)[0] & ~0xFFF

    def map_elsewhere(self, frames: list[int], cleared: int = 0) -> int:
        """Map frames where the guest has no memory, in a table of their own; return where.

        Entries are as that of some page of its memory, without the bits ``cleared``.
        """
        guest_map, walk = self.machine.guest_map, self.machine.root.walk
        small = (guest_map.words >> gpamap.SIZE_SHIFT & 3 == 0) & (guest_map.accesses & 2 != 0)
        like = int(guest_map.gpas[np.flatnonzero(small)[-1]])
        near = ((first, walk(self.below, first).steps[-1]) for first in range(like & -_HUGE, like | _HUGE - 1, _LARGE))
        first, empty = next((gpa, step) for gpa, step in near if (step.level.name, step.entry) == ("PDE", 0))
        table, template = self.take(), self.entry(like)[1] & ~FRAME & ~cleared
        self.write(table, struct.pack(f"<{len(frames)}Q", *(template | frame for frame in frames)))
        self.write_entry(empty.entry_address, self.parent(like) & ~FRAME | table)
        return first

    def patched_copy(self, gpa: int) -> int:
        """Return a frame with a patched copy of a page."""
        copy = self.take()
        self.write(copy, hooks.patched(self.below.read(self.frame(gpa), PAGE)))
        return copy

    def shadow(self, gpa: int, cleared: int = 0) -> int:
        """Put a patched copy in a page's place, without some bits of its entry. Return the address."""
        address, entry = self.entry(gpa)
        self.write_entry(address, entry & ~cleared & ~FRAME | self.patched_copy(gpa))
        return gpa

    def without_execute(self, gpa: int) -> int:
        """Take the right to execute from a page. Return the address."""
        address, entry = self.entry(gpa)
        self.write_entry(address, entry ^ EXECUTE_NONE[self.kind])
        return gpa

    def second_view(self, gpa: int) -> int:
        """List two views for VMFUNC; in the second, a page of :meth:`code` has a patched copy. Return the address."""
        steps = self.machine.root.walk(self.below, gpa).steps
        (structure,) = self.machine.vcpus
        child = self.patched_copy(gpa)
        for where, entry in [self.entry(gpa), *((step.entry_address, step.entry) for step in reversed(steps))]:
            page = where & ~0xFFF
            table = self.take()
            self.write(table, bytes(self.pages.get(page) or self.below.read(page, PAGE)))
            self.write_entry(
                table | where & 0xFFF, (self.parent(gpa) if entry & _PAGE_SIZE else entry) & ~FRAME | child
            )
            child = table
        both = self.take()
        self.write(both, struct.pack("<QQ", self.machine.root.raw, self.machine.root.raw & ~FRAME | child))
        self.write_entry(structure.hpa + _FUNCTIONS, 1)
        self.write_entry(structure.hpa + _LIST, both)
        return gpa

    def thin(self) -> int:
        """Put a hypervisor under the whole machine, in memory that it keeps to itself. Return the host's top table."""
        (symbol, cr3) = (int(self.capture.truth["host"]["kallsyms"]["_text"], 0), self.host_cr3)
        top = -(-self.below.top // (1 << 21)) << 21
        ram = HostRam(top)
        tables = Tables(ram, paging.EPT_4 if self.kind == "EPT" else paging.NPT_4)
        for address in range(0, top, 1 << 21):
            tables.map(address, address, 1 << 21)
        own, entry, where = Tables(ram, paging.LONG_4), ram.allocate(), ram.allocate()
        own.map(_OWN, entry)
        ram.write(entry, b"\x0f\x01\xc4")
        if self.kind == "EPT":
            page = control.vmcs(eptp=tables.register, guest_cr3=cr3, guest_rip=symbol, link=(1 << 64) - 1,
                                host_cr3=own.root, host_rip=_OWN + 0x100)  # fmt: skip
        else:
            page = control.vmcb(ncr3=tables.register, cr3=cr3, rip=symbol)
        ram.write(where, page)
        for address, content in ram.pages.items():
            self.write(address, bytes(content))
        return cr3

    @property
    def host_cr3(self) -> int:
        """The top table of the process that runs the guest."""
        assert self.machine.recovery is not None
        assert self.machine.recovery.root
        return self.machine.recovery.root

    def host_kernel(self) -> HostKernel:
        """Return what symbols say of the host's kernel: as little as the truth of the capture holds."""
        names = self.capture.truth["host"]["kallsyms"]
        pages = {name: int(names[name], 0) & (1 << 48) - PAGE for name in ("_text", "linux_banner", "init_task")}
        parts = [Part("kernel", at, at + PAGE) for at in pages.values()]
        return HostKernel(self.host_cr3, 4, (*parts, Part("modules", *MODULES)))
