"""A whole hierarchy at once: level by level, every table of a level in one numpy operation.

The result is a :class:`~volatility3_ept.core.gpamap.GuestMap`. A hierarchy is data that a guest may have written, so
the work is bounded: distinct tables are at most the pages of the memory, and where a level names tables again and again
each is expanded once, and the map says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from volatility3_ept.core import gpamap, mask
from volatility3_ept.core.gpamap import Findings, GuestMap
from volatility3_ept.core.memory import Bools, HostMemory, Int64, Words, join_runs
from volatility3_ept.core.runbuffer import RunBuffer, merged
from volatility3_ept.spec import dialect as dialects
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.dialect import Dialect
from volatility3_ept.spec.ept import EptFormat
from volatility3_ept.spec.paging import Access, EntryKind, Format, Level

#: Tables that are read and classified together: 1 MiB of entries, so that the arrays made of them stay in the cache.
CHUNK_TABLES = 256
#: Chunks whose tables stay in the process's memory: 64 MiB of them.
_KEPT = 64
#: References of one level to tables that it names already. A hypervisor makes few; each costs up to 512 more below it.
MAX_REPEATS = 1 << 12
_SIZE_CODES = {size: code for code, size in enumerate(gpamap.SIZES)}


@dataclass
class _Frontier:
    """Tables still to be read: where they lie, the first address each translates, the rights above them."""

    tables: Int64
    bases: Int64
    access: Int64


@dataclass
class _Collected:
    """What the traversal gathers, in chunks."""

    runs: list[RunBuffer] = field(default_factory=list)
    mmio: list[Int64] = field(default_factory=list)
    misconfigured: list[Int64] = field(default_factory=list)
    unreadable: list[Int64] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: int = 0


def traverse(memory: HostMemory, fmt: Format, root: int, dialect: Dialect | None = None) -> GuestMap:
    """Return everything that a hierarchy maps.

    ``root`` is the raw root register. Without a dialect the author of the tables is inferred from them. Frames are
    not compared with the capture: :meth:`GuestMap.memory` does that.
    """
    if dialect is None:
        dialect = infer_dialect(memory, fmt, root)
    found = _Collected()
    seen: Int64 = np.empty(0, dtype=np.int64)
    one = np.array([fmt.root_hpa(root)], dtype=np.int64)
    frontier = _Frontier(one, np.zeros(1, dtype=np.int64), np.full(1, int(Access.ALL), dtype=np.int64))
    for level in fmt.levels:
        frontier = _bounded(frontier, seen, level, found)
        seen = mask.distinct(np.concatenate((seen, frontier.tables)))
        found.tables += frontier.tables.size
        parts = list(_level(memory, fmt, dialect, level, frontier, found))
        if not parts:
            break
        frontier = _Frontier(
            np.concatenate([p.tables for p in parts]),
            np.concatenate([p.bases for p in parts]),
            np.concatenate([p.access for p in parts]),
        )
    return _assemble(found)


def read_tables(memory: HostMemory, fmt: Format, level: Level, tables: Int64) -> tuple[Words, Bools]:
    """Return the entries of many tables of one level as ``uint64[n, entries]``, and which tables were readable."""
    if fmt.entry_bytes == 8 and level.entries * 8 == PAGE_SIZE:
        return memory.words(tables)
    held = fmt.held(level)
    if held:
        return np.tile(np.array(held, dtype=np.uint64), (tables.size, 1)), np.ones(tables.size, dtype=np.bool_)
    # 32-bit paging (4-byte entries) and PAE's directory (32 bytes, not page-aligned): small, so one by one.
    out = np.zeros((tables.size, level.entries), dtype=np.uint64)
    good = np.zeros(tables.size, dtype=np.bool_)
    for row, table in enumerate(tables.tolist()):
        data = memory.read(table, fmt.entry_bytes * level.entries)
        if data is not None:
            out[row] = np.frombuffer(data, dtype=f"<u{fmt.entry_bytes}")
            good[row] = True
    return out, good


def infer_dialect(memory: HostMemory, fmt: Format, root: int, sample: int = 64) -> Dialect:
    """Name the author of a hierarchy from up to ``sample`` tables of each level.

    Only entries that hardware follows are counted: markers for MMIO carry no author's mark. A guest's own tables are
    generic: Windows, too, sets bit 11 in most of its entries.
    """
    if fmt.is_linear:
        return dialects.GENERIC
    tables = np.array([fmt.root_hpa(root)], dtype=np.int64)
    total = bit11 = xen = emulated = 0
    for level in fmt.levels:
        words, _ = read_tables(memory, fmt, level, tables[:sample])
        entries = words[words != 0]
        marker = (entries & np.uint64(7)) == 6 if isinstance(fmt, EptFormat) else (entries >> np.uint64(51)) & 1 != 0
        entries = entries[fmt.present(entries) & ~marker]
        entries = entries[~np.asarray(fmt.misconfigured(entries, level))] if entries.size else entries
        has_bit11 = (entries & np.uint64(1 << 11)) != 0
        total += entries.size
        bit11 += int(has_bit11.sum())
        xen += int((~has_bit11 & ((entries >> np.uint64(58)) & np.uint64(0xF) != 0)).sum())
        emulated += int(((entries >> np.uint64(52)) & np.uint64(1)).sum())
        leaf = np.asarray(fmt.is_leaf(entries, level))
        tables = mask.distinct(np.asarray(fmt.table(entries[~leaf])).astype(np.int64))
        if not tables.size:
            break
    return dialects.infer(isinstance(fmt, EptFormat), total, bit11, xen, emulated)


def _bounded(frontier: _Frontier, seen: Int64, level: Level, found: _Collected) -> _Frontier:
    """Keep hostile hierarchies finite: no table below itself, and with too many repeats each table once."""
    keep = np.ones(frontier.tables.size, dtype=np.bool_)
    cyclic = np.isin(frontier.tables, seen)
    if cyclic.any():
        keep &= ~cyclic
        found.notes.append(
            f"{int(cyclic.sum())} {level.table} references to tables of a higher level were not followed (a cycle)"
        )
    first = np.zeros(keep.size, dtype=np.bool_)
    first[np.unique(frontier.tables, return_index=True)[1]] = True
    repeats = int((keep & ~first).sum())
    if repeats > MAX_REPEATS:
        keep &= first
        found.notes.append(
            f"{repeats} repeated references to {int(keep.sum())} {level.table} tables were not expanded "
            f"(more than {MAX_REPEATS})"
        )
    if keep.all():
        return frontier
    return _Frontier(frontier.tables[keep], frontier.bases[keep], frontier.access[keep])


def _level(
    memory: HostMemory, fmt: Format, dialect: Dialect, level: Level, frontier: _Frontier, found: _Collected
) -> Iterator[_Frontier]:
    """Read all tables of a level in chunks; yield what is below each."""
    count = frontier.tables.size
    found.runs.append(RunBuffer(count * level.entries if level.may_be_leaf or level is fmt.levels[-1] else 0))
    for start in range(0, count, CHUNK_TABLES):
        yield _chunk(memory, fmt, dialect, level, frontier, slice(start, start + CHUNK_TABLES), found)
        end = start + CHUNK_TABLES
        if end % (_KEPT * CHUNK_TABLES) == 0:
            memory.release(frontier.tables[end - _KEPT * CHUNK_TABLES : end])


def _chunk(
    memory: HostMemory,
    fmt: Format,
    dialect: Dialect,
    level: Level,
    frontier: _Frontier,
    part: slice,
    found: _Collected,
) -> _Frontier:
    """Read and classify some tables of a level; collect leaves and findings, return the tables below."""
    words, good = read_tables(memory, fmt, level, frontier.tables[part])
    bases, above = frontier.bases[part], frontier.access[part]
    if not good.all():
        span = level.page_size * level.entries
        missing = np.flatnonzero(~good)
        found.unreadable.append(_rows(bases[missing], span, frontier.tables[part][missing]))
    entries, rows, gpas = _used(words, bases, level)
    kinds, restored, states = dialect.kind(fmt, entries, level, gpas.astype(np.uint64))
    access = above[rows] & np.asarray(fmt.rights(restored, level)).astype(np.int64)
    for wanted, target in ((EntryKind.MMIO, found.mmio), (EntryKind.MISCONFIGURED, found.misconfigured)):
        odd = kinds == int(wanted)
        if odd.any():
            target.append(_rows(gpas[odd], level.page_size, entries[odd].astype(np.int64)))
    is_leaf = kinds == int(EntryKind.LEAF)
    if is_leaf.any():
        leaf = slice(None) if is_leaf.all() else is_leaf
        attributes = (
            access[leaf]
            | np.asarray(fmt.memory_type(restored[leaf]) & np.uint64(7)).astype(np.int64) << gpamap.MEMORY_TYPE_SHIFT
            | np.asarray(states)[leaf].astype(np.int64) << gpamap.STATE_SHIFT
            | _SIZE_CODES[level.page_size] << gpamap.SIZE_SHIFT
        )
        frames = np.asarray(fmt.frame(restored[leaf], level)).astype(np.int64)
        found.runs[-1].add(*join_runs(gpas[leaf], np.full(frames.size, level.page_size), frames | attributes))
    table = kinds == int(EntryKind.TABLE)
    return _Frontier(np.asarray(fmt.table(restored[table])).astype(np.int64), gpas[table], access[table])


def _used(words: Words, bases: Int64, level: Level) -> tuple[Words, Int64, Int64]:
    """Return the entries of some tables that are not zero, the row of each, and the address that it translates."""
    flat = words.reshape(-1)
    where = np.flatnonzero(flat)
    entries = flat if where.size == flat.size else flat[where]
    rows = where >> level.index_bits
    return entries, rows, bases[rows] + ((where & (level.entries - 1)) << level.shift)


def _rows(gpas: Int64, span: int, values: Int64) -> Int64:
    return np.stack([gpas, np.full(gpas.size, span, dtype=np.int64), values], axis=1)


def _assemble(found: _Collected) -> GuestMap:
    """Bring the runs of all levels and chunks into one ascending map."""

    def joined(parts: list[Int64]) -> Int64:
        rows = np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.int64)
        return rows[np.argsort(rows[:, 0], kind="stable")]

    findings = Findings(
        joined(found.mmio), joined(found.misconfigured), joined(found.unreadable), found.tables, tuple(found.notes)
    )
    return GuestMap(*merged(found.runs), findings)
