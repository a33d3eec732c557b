"""A guest-virtual address space, read through the guest's own page tables: many addresses at once, or a few bytes.

It gives the answers of :func:`volatility3_ept.core.walk.walk` to those who need no entries and no reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volatility3_ept.core.memory import Bools, HostMemory, Int64, Words
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Level


@dataclass(frozen=True)
class Space:
    """The address space of one CR3 over guest-physical memory. Addresses may be canonical or cut to their width."""

    memory: HostMemory
    fmt: Ia32Format
    cr3: int

    def plain(self, gva: int) -> int:
        """Return an address without its sign extension."""
        return gva & (1 << self.fmt.address_bits) - 1

    def canonical(self, gva: int) -> int:
        """Return an address with its sign extension, as the processor's registers hold it."""
        plain, width = self.plain(gva), self.fmt.address_bits
        return plain | (1 << 64) - (1 << width) if width > 32 and plain >> width - 1 else plain

    def is_kernel(self, gva: int) -> bool:
        """Tell whether an address is canonical and in the upper half, where kernels live."""
        return self.canonical(gva) == gva and bool(self.plain(gva) >> self.fmt.address_bits - 1)

    def translate(self, gvas: Int64) -> Int64:
        """Return where each plain address lies in guest-physical memory; -1: not mapped, or a table is missing."""
        gvas = np.asarray(gvas, dtype=np.int64)
        found = np.full(gvas.shape, -1, dtype=np.int64)
        todo = np.arange(gvas.size)
        tables = np.full(gvas.shape, self.fmt.root_hpa(self.cr3), dtype=np.int64)
        for level in self.fmt.levels:
            index = gvas[todo] >> level.shift & (level.entries - 1)
            entries, held = self._entries(level, tables, index)
            good = held & np.asarray(self.fmt.present(entries)) & ~np.asarray(self.fmt.misconfigured(entries, level))
            leaf = good & np.asarray(self.fmt.is_leaf(entries, level))
            frames = np.asarray(self.fmt.frame(entries[leaf], level)).astype(np.int64)
            found[todo[leaf]] = frames | gvas[todo[leaf]] & (level.page_size - 1)
            further = good & ~leaf
            tables = np.asarray(self.fmt.table(entries[further])).astype(np.int64)
            todo = todo[further]
        return found

    def _entries(self, level: Level, tables: Int64, index: Int64) -> tuple[Words, Bools]:
        """Return one entry of each table, and which of them could be read, or are in the processor's registers."""
        registers = self.fmt.held(level)
        if registers:
            return np.array(registers, dtype=np.uint64)[index], np.ones(index.shape, dtype=np.bool_)
        addresses = tables + self.fmt.entry_bytes * index
        pages, row = np.unique(addresses & -PAGE_SIZE, return_inverse=True)
        rows, held = self.memory.words(pages)
        width = self.fmt.entry_bytes
        entries = rows.view(np.uint32 if width == 4 else np.uint64)
        return entries[row, (addresses & PAGE_SIZE - 1) // width].astype(np.uint64), held[row]

    def read(self, gva: int, length: int) -> bytes | None:
        """Return bytes; None where one of them is not mapped, or not in the capture."""
        start = self.plain(gva)
        first = start & -PAGE_SIZE
        pages = self.translate(np.arange(first, start + length, PAGE_SIZE, dtype=np.int64))
        if (pages < 0).any():
            return None
        rows, held = self.memory.words(pages)
        if not held.all():
            return None
        return rows.view(np.uint8).reshape(-1)[start - first : start - first + length].tobytes()

    def physical(self, gva: int) -> int:
        """Return where one address lies in guest-physical memory; -1 where it is not mapped."""
        return int(self.translate(np.array([self.plain(gva)]))[0])

    def number(self, gva: int, length: int = 8) -> int:
        """Return a little-endian number; 0 where it cannot be read: no kernel address."""
        return int.from_bytes(self.read(gva, length) or b"", "little")
