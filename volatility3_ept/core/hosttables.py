"""The address spaces of a host's processes, found in its memory and flattened, without any symbol.

A root is found by what every operating system for x86-64 does: the upper half of each process's top table is the
kernel's, and all processes share it. Of a process only the lower half matters here: the kernel's own map of all
memory would match anything. The tables are data that a guest may have forged: none is taken from the guest's own
frames, and each is read once per level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from volatility3_ept.core import mask
from volatility3_ept.core.memory import Bools, HostMemory, Int64, Words
from volatility3_ept.spec import ia32e, linux_pte, paging
from volatility3_ept.spec.bits import PAGE_SHIFT, PAGE_SIZE
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.linux_pte import HostEntry
from volatility3_ept.spec.paging import Level

#: More processes than this are not looked into; those whose kernel half most others share come first.
MAX_ROOTS = 1 << 15
#: Tables of one level that a group of processes may have (1 GiB of them); a group that has more is halved. One process
#: alone may have more (16 GiB: they map 8 TiB).
MAX_TABLES, MAX_TABLES_ALONE = 1 << 18, 1 << 22
#: Tables that are read to weigh all processes, or as many as the memory has pages.
MAX_TABLES_READ = 1 << 20
#: Pages that may be top tables, before they are compared with each other.
MAX_CANDIDATES = 1 << 16
#: Roots that are weighed together, and tables that are read together.
GROUP, CHUNK_TABLES = 256, 2048
_HALF = 256
_LAST = 511

#: Tells for page addresses whether a process's tables may lie there.
Usable = Callable[[Int64], Bools]


@dataclass(frozen=True)
class Frames:
    """A set of physical ranges, disjoint and ascending."""

    starts: Int64
    ends: Int64

    def holds(self, addresses: Int64) -> Bools:
        """Tell which addresses lie in the set."""
        if not self.starts.size:
            return np.zeros(addresses.shape, dtype=np.bool_)
        index = np.searchsorted(self.starts, addresses, side="right") - 1
        return (index >= 0) & (addresses < self.ends[np.maximum(index, 0)])

    def bytes_in(self, starts: Int64, size: int) -> Int64:
        """Return how many bytes of each range ``[start, start + size)`` are in the set."""
        if size == PAGE_SIZE:
            return self.holds(starts).astype(np.int64) * size
        total = np.concatenate(([0], np.cumsum(self.ends - self.starts)))

        def below(points: Int64) -> Int64:
            index = np.searchsorted(self.starts, points, side="right")
            if not self.starts.size:
                return np.zeros(points.shape, dtype=np.int64)
            beyond = np.maximum(self.ends[np.maximum(index - 1, 0)] - points, 0)
            counted: Int64 = total[index] - np.where(index > 0, beyond, 0)
            return counted

        return below(starts + size) - below(starts)


@dataclass(frozen=True)
class Leaves:
    """Entries of one process that map pages of one size, or hold something else in a page's place.

    ``hvas`` ascend. ``kinds`` are :class:`HostEntry`; ``hpas`` is the page's address where the kind has one.
    ``no_execute`` tells mappings of data from mappings of code; a ``read_only`` page is present, and a write to it
    would fault.
    """

    size: int
    hvas: Int64
    hpas: Int64
    kinds: npt.NDArray[np.uint8]
    no_execute: Bools
    read_only: Bools


def find(memory: HostMemory, usable: Usable, key_bits: int = 0) -> tuple[Int64, tuple[str, ...]]:
    """Return the roots of the host's processes, each address space once, and notes on what was left out.

    4-level and 5-level roots look alike: what follows decides.
    """
    pages: list[Int64] = []
    kernels: list[Words] = []
    for address, rows in memory.blocks():
        hits = np.flatnonzero(_may_be_root(rows, memory, key_bits))
        if hits.size:
            hits = hits[usable(address + hits * PAGE_SIZE)]
            pages.append(address + hits.astype(np.int64) * PAGE_SIZE)
            kernels.append(_address(rows[hits, _LAST], key_bits))
    if not pages:
        return np.empty(0, dtype=np.int64), ()
    roots, kernel = np.concatenate(pages), np.concatenate(kernels)
    # The entry that maps the kernel itself leads to one and the same table in every process.
    _, group, counts = np.unique(kernel, return_inverse=True, return_counts=True)
    notes = []
    if roots.size > MAX_CANDIDATES:
        notes.append(f"{roots.size} pages look like top tables; {MAX_CANDIDATES} were compared")
        # Whoever forges them by the thousand gives them one kernel or many: a real host's come in time either way.
        chosen = np.argsort(mask.turns(group), kind="stable")[:MAX_CANDIDATES]
        roots, group = roots[chosen], group[chosen]
    tables, _ = memory.words(roots)
    shared = (counts[group] > 1) & (tables[:, :_HALF] != 0).any(axis=1)
    roots, tables, count = roots[shared], tables[shared], counts[group][shared]
    # Page table isolation keeps two top tables for each process; their lower halves lead to the same tables.
    lower = np.ascontiguousarray(_address(tables[:, :_HALF], key_bits))
    _, first = np.unique(lower.view(f"V{8 * _HALF}").ravel(), return_index=True)
    first.sort()
    order = first[np.argsort(-count[first], kind="stable")]
    if order.size > MAX_ROOTS:
        notes.append(f"{order.size} address spaces; {MAX_ROOTS} were looked into")
    return roots[order[:MAX_ROOTS]], tuple(notes)


def _may_be_root(rows: Words, memory: HostMemory, key_bits: int) -> Bools:
    """Tell which pages could be a process's top table. The cheap test of one entry leaves few for the others."""
    good = _leads_on(rows[:, _LAST], key_bits, memory.top)
    some = np.flatnonzero(good)
    if some.size:
        entries = rows[some]
        fine = (entries == 0) | _leads_on(entries, key_bits, memory.top)
        lower = entries[:, :_HALF]
        user = ((lower == 0) | ((lower & np.uint64(ia32e.USER)) != 0)).all(axis=1)
        good[some] = fine.all(axis=1) & user
    return good


def _leads_on(entries: Words, key_bits: int, top: int) -> Bools:
    flags = (entries & np.uint64(ia32e.PRESENT | paging.LARGE_PAGE)) == np.uint64(ia32e.PRESENT)
    leads: Bools = flags & (_address(entries, key_bits) < np.uint64(top))
    return leads


def _address(entries: Words, key_bits: int) -> Words:
    addresses: Words = entries & np.uint64(paging.FRAME & ~key_bits)
    return addresses


def weigh(memory: HostMemory, fmt: Ia32Format, roots: Int64, frames: Frames, usable: Usable) -> Int64:
    """Return for each root how many bytes of ``frames`` its process maps; each table is read once.

    A page that the process maps twice counts twice. -1: more tables than any process has, or than all together may
    have (:data:`MAX_TABLES_READ`), not weighed.
    """
    weights = np.zeros(roots.size, dtype=np.int64)
    pending = [slice(i, min(i + GROUP, roots.size)) for i in range(0, roots.size, GROUP)][::-1]
    left = max(MAX_TABLES_READ, memory.size // PAGE_SIZE)
    while pending:
        part = pending.pop()
        alone = part.stop - part.start == 1
        limit = MAX_TABLES_ALONE if alone else MAX_TABLES
        found, read = _weigh(memory, fmt, roots[part], frames, usable, limit) if left > 0 else (None, 0)
        left -= read
        if found is not None:
            weights[part] = found
        elif alone or left <= 0:
            weights[part] = -1
        else:
            middle = (part.start + part.stop) // 2
            pending += [slice(middle, part.stop), slice(part.start, middle)]
    return weights


def _weigh(
    memory: HostMemory, fmt: Ia32Format, roots: Int64, frames: Frames, usable: Usable, limit: int
) -> tuple[Int64 | None, int]:
    """Read the tables of some roots level by level, then carry the weights up again; None when there are too many.

    Also returns how many were read.
    """
    read = 0
    tables, top = np.unique(roots, return_inverse=True)
    own: list[Int64] = []
    edges: list[tuple[Int64, Int64]] = []
    for level in fmt.levels:
        weight = np.zeros(tables.size, dtype=np.int64)
        read += tables.size
        parents, children = [], []
        for index, _, entries, where, _ in _entries(memory, fmt, level, tables):
            parent, child = where, _address(entries, fmt.key_bits).astype(np.int64)
            below = _is_table(entries, level, fmt)
            if level.may_be_leaf or level is fmt.levels[-1]:
                kinds = np.asarray(linux_pte.kind(entries, level.shift))
                present = (kinds == HostEntry.PRESENT) & _is_own(entries, level, fmt)
                there = ~below & (present | (kinds == HostEntry.PROT_NONE))
                hpas = np.asarray(linux_pte.frame(entries[there], level.shift, fmt.key_bits)).astype(np.int64)
                np.add.at(weight, index + parent[there], frames.bytes_in(hpas, level.page_size))
            parents.append(index + parent[below])
            children.append(child[below])
        own.append(weight)
        found = np.concatenate([np.empty(0, dtype=np.int64), *children])
        source = np.concatenate([np.empty(0, dtype=np.int64), *parents])
        good = usable(found)
        tables, target = np.unique(found[good], return_inverse=True)
        edges.append((source[good], target))
        if tables.size > limit:
            return None, read
    for depth in range(len(own) - 1, 0, -1):
        source, target = edges[depth - 1]
        np.add.at(own[depth - 1], source, own[depth][target])
    return own[0][top], read


def _entries(
    memory: HostMemory, fmt: Ia32Format, level: Level, tables: Int64
) -> Iterator[tuple[int, Int64, Words, Int64, Int64]]:
    """Yield ``(number of the chunk's first table, columns, entries, rows, unreadable rows)``, non-zero entries only.

    Of a top table only the lower half counts.
    """
    for start in range(0, tables.size, CHUNK_TABLES):
        words, good = memory.words(tables[start : start + CHUNK_TABLES])
        if level is fmt.levels[0]:
            words = words[:, :_HALF]
        rows, columns = np.nonzero(words)
        yield start, columns, words[rows, columns], rows, np.flatnonzero(~good)


def _is_table(entries: Words, level: Level, fmt: Ia32Format) -> Bools:
    """Tell which entries lead to a table that user mode may reach."""
    if level is fmt.levels[-1]:
        return np.zeros(entries.shape, dtype=np.bool_)
    wanted = np.uint64(ia32e.PRESENT | ia32e.USER)
    large = np.uint64(paging.LARGE_PAGE) if level.may_be_leaf else np.uint64(0)
    leads: Bools = (entries & (wanted | large)) == wanted
    return leads


def _is_own(entries: Words, level: Level, fmt: Ia32Format) -> Bools:
    """Tell which present entries map a page that user mode may reach."""
    wanted = ia32e.USER | (0 if level is fmt.levels[-1] else paging.LARGE_PAGE)
    own: Bools = (entries & np.uint64(wanted)) == np.uint64(wanted)
    return own


def flatten(memory: HostMemory, fmt: Ia32Format, root: int, usable: Usable) -> Iterator[Leaves]:
    """Yield the lower half of one address space in chunks, large pages first.

    A table that is named twice is followed once: no process has reason to. One that the capture lacks is yielded like a
    page of its span, with the kind NONE.
    """
    tables, bases = np.array([root], dtype=np.int64), np.zeros(1, dtype=np.int64)
    for level in fmt.levels:
        below: list[tuple[Int64, Int64]] = []
        for start, columns, entries, rows, missing in _entries(memory, fmt, level, tables):
            if missing.size:
                yield _unknown(bases[start + missing], level)
            hvas = bases[start + rows] + (columns.astype(np.int64) << level.shift)
            leads = _is_table(entries, level, fmt)
            below.append((_address(entries[leads], fmt.key_bits).astype(np.int64), hvas[leads]))
            if level.may_be_leaf or level is fmt.levels[-1]:
                yield _leaves(entries[~leads], hvas[~leads], level, fmt.key_bits, memory.top)
        if not below:
            return
        tables, bases = (np.concatenate([part[i] for part in below]) for i in range(2))
        keep = np.zeros(tables.size, dtype=np.bool_)
        keep[np.unique(tables, return_index=True)[1]] = True
        keep &= usable(tables)
        tables, bases = tables[keep], bases[keep]


def _unknown(hvas: Int64, level: Level) -> Leaves:
    kinds = np.full(hvas.size, HostEntry.NONE, dtype=np.uint8)
    no = np.zeros(hvas.size, dtype=np.bool_)
    return Leaves(level.page_size * level.entries, hvas, np.zeros_like(hvas), kinds, no, no)


def _leaves(entries: Words, hvas: Int64, level: Level, key_bits: int, top: int) -> Leaves:
    kinds = np.asarray(linux_pte.kind(entries, level.shift)).astype(np.uint8)
    # What is present and closed to user mode is the kernel's, or no page table at all.
    own = (kinds != HostEntry.PRESENT) | ((entries & np.uint64(ia32e.USER)) != 0)
    entries, hvas, kinds = entries[own], hvas[own], kinds[own]
    hpas = np.asarray(linux_pte.frame(entries, level.shift, key_bits)).astype(np.int64)
    moving = kinds == HostEntry.MIGRATING
    hpas[moving] = np.asarray(linux_pte.migration_frame(entries[moving])).astype(np.int64)
    # A device's memory has frame numbers too, above all of the host's.
    kinds[moving & (hpas >= top)] = HostEntry.ELSEWHERE
    read_only = (kinds == HostEntry.PRESENT) & ((entries & np.uint64(ia32e.WRITE)) == 0)
    return Leaves(level.page_size, hvas, hpas, kinds, (entries >> np.uint64(63)) != 0, read_only)


def seeds(host_roots: Sequence[int]) -> Int64:
    """Return the table addresses of CR3 values: PCID and flags are not part of them."""
    found = {root & paging.FRAME for root in host_roots if root & paging.FRAME}
    return np.array(sorted(found), dtype=np.int64) >> PAGE_SHIFT << PAGE_SHIFT
