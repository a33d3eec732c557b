"""Which pages can be paging tables: predicates over many pages at once, without knowing who points to them.

A top table betrays itself: every present entry of it names another table, so a page's first sixteen words rule out
nearly everything else, and only what survives is read whole. What lies below is for :mod:`.descent`.

Sources: Intel SDM Vol. 3C, "The Extended Page Table Mechanism (EPT)"; AMD APM Vol. 2, "Nested Paging"; the entries that
hypervisors write beside those: :mod:`volatility3_ept.spec.dialect`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from volatility3_ept.core.memory import Bools, HostMemory, Int64, Words
from volatility3_ept.core.source import WORDS_PER_PAGE
from volatility3_ept.spec import bits, dialect, ept, ia32e, paging
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.paging import Format, Level

#: Words of each page that the first look takes, and pages that the second takes at once (1 MiB: it stays in the cache).
_FIRST_WORDS = 16
BATCH_PAGES = 256
#: Pages taken together from memory whose segments are small: a guest's, or a capture with many holes.
_GATHER_PAGES = 2048
_SMALL_SEGMENT = 64
#: Share of the tables or frames that entries name that must be in the capture.
MIN_INSIDE = 0.125
#: A capture may lack the top of the host's memory: tables lie at most this many address bits above what it holds.
_MISSING_BITS = 4
#: No guest has more than 64 TiB so far; text and code hold wider numbers.
_GUEST_BITS = 46
_UPPER_HALF = WORDS_PER_PAGE // 2


def pages_of(memory: HostMemory) -> Iterator[tuple[Int64, Words]]:
    """Yield all whole pages as ``(addresses, uint64[n, 512])``; many small segments are gathered into one array.

    The holes of a sparse capture are left out.
    """
    memory = memory.written
    if not memory.starts.size:
        return
    if memory.size >= _SMALL_SEGMENT * PAGE_SIZE * memory.starts.size:
        for first, rows in memory.blocks():
            yield first + PAGE_SIZE * np.arange(len(rows), dtype=np.int64), rows
        return
    first_page = -(-memory.starts // PAGE_SIZE)
    counts = np.maximum((memory.starts + memory.lengths) // PAGE_SIZE - first_page, 0)
    last = np.cumsum(counts)
    for begin in range(0, int(last[-1]), _GATHER_PAGES):
        number = np.arange(begin, min(begin + _GATHER_PAGES, int(last[-1])), dtype=np.int64)
        segment = np.searchsorted(last, number, side="right")
        addresses = (first_page[segment] + number - (last - counts)[segment]) * PAGE_SIZE
        rows, good = memory.words(addresses)
        yield addresses[good], rows[good]


@dataclass(frozen=True)
class Entries:
    """The entries of some tables of one level that are not zero: the row each is in, and what it is."""

    rows: Int64
    columns: Int64
    targets: Int64
    table: Bools
    leaf: Bools
    refused: Bools
    #: Users may go through, where the format has a bit for that.
    user: Bools


def classify(fmt: Format, level: Level, words: Words) -> Entries:
    """Classify the entries of many tables at once, whoever wrote them.

    What KVM tracks and Xen wants recalculated counts as what it leads to; a marker for MMIO, of whatever page, as
    nothing.
    """
    rows, columns = np.nonzero(words)
    entries = words[rows, columns]
    # A marker holds the number of its own page, which is not known here: let it be its own.
    marker = np.asarray(dialect.GENERIC.marker(fmt, entries, level, entries))
    user = np.ones_like(marker) if isinstance(fmt, ept.EptFormat) else (entries & np.uint64(ia32e.USER)) != 0
    if level.shift > paging.PDPTE.shift:
        marker = np.zeros_like(marker)
    if not fmt.is_linear:
        entries = dialect.XEN.restore(fmt, dialect.KVM.restore(fmt, entries, level)[0], level)[0]
    present = np.asarray(fmt.present(entries)) & ~marker
    leaf = present & np.asarray(fmt.is_leaf(entries, level))
    frames: Int64 = np.asarray(np.where(leaf, fmt.frame(entries, level), fmt.table(entries)), dtype=np.int64)
    # No table lies at address 0: that frame is a number that happened to be small.
    refused = present & (np.asarray(fmt.misconfigured(entries, level)) | (~leaf & (frames == 0)))
    return Entries(rows, columns, frames, present & ~leaf & ~refused, leaf & ~refused, refused, user)


@dataclass(frozen=True)
class Tops:
    """Pages that can be a top table, ascending: of EPT, of NPT, and of a system's own paging."""

    ept: Int64
    npt: Int64
    linear: Int64


@dataclass
class Finder:
    """Looks at every page of a memory once; :meth:`tops` gives what it kept."""

    memory: HostMemory
    physical_bits: int = bits.MAX_PHYSICAL_BITS
    key_bit: int = 0
    _ept: list[Int64] = field(default_factory=list)
    _npt: list[Int64] = field(default_factory=list)
    _linear: list[Int64] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Derive the formats of a top table: where the tables of this memory lie bounds their addresses."""
        width = min(self.physical_bits, max(self.memory.top.bit_length() + _MISSING_BITS, 40))
        # A guest's own tables name guest-physical addresses, which this memory does not bound.
        guest = min(self.physical_bits, max(width, _GUEST_BITS))
        key, c_bit = (bits.field(51, self.key_bit), bits.bit(self.key_bit)) if self.key_bit else (0, 0)
        self._formats = (replace(ept.EPT_4, physical_bits=width, key_bits=key), ia32e.four_level(guest, c_bit))

    def see(self, addresses: Int64, rows: Words) -> None:
        """Take in some pages."""
        rows = np.asarray(rows)  # A memmap's views cost more than they give.
        first = self._plausible(np.ascontiguousarray(rows[:, :_FIRST_WORDS]))
        chosen = np.flatnonzero(first[0] | first[1])
        for begin in range(0, chosen.size, BATCH_PAGES):
            part = chosen[begin : begin + BATCH_PAGES]
            # A slice of the mapped file is read in place; picking rows copies them.
            whole = rows[part[0] : part[-1] + 1] if part[-1] - part[0] + 1 == part.size else rows[part]
            kept = np.flatnonzero(np.bitwise_or.reduce(whole, axis=1) != 0)
            whole, where = whole[kept], addresses[part[kept]]
            can_be = self._plausible(whole)
            leads_on = (np.bitwise_or.reduce(whole, axis=1) & np.uint64(ept.READ)) != 0
            for fmt, plausible in zip(self._formats, can_be, strict=True):
                chosen_rows = plausible & leads_on
                if chosen_rows.any():
                    self._examine(fmt, where[chosen_rows], whole[chosen_rows])

    def _plausible(self, words: Words) -> tuple[Bools, Bools]:
        """Tell which rows hold no present entry that a top table cannot hold: one of EPT, one of ordinary paging.

        Every zero page passes.
        """
        never = [np.uint64(fmt.reserved_address | paging.LARGE_PAGE) for fmt in self._formats]
        nowhere = (words & np.uint64(paging.FRAME)) == 0
        nested = ((words & (never[0] | np.uint64(ept.IPAT))) != 0) | nowhere
        nested &= (words & np.uint64(ept.RWX)) != 0
        ordinary = ((words & never[1]) != 0) | nowhere
        ordinary &= (words & np.uint64(ia32e.PRESENT)) != 0
        return ~nested.any(axis=1), ~ordinary.any(axis=1)

    def _examine(self, fmt: Format, addresses: Int64, words: Words) -> None:
        """Judge whole pages as top tables of one kind."""
        count = len(words)
        found = classify(fmt, paging.PML4E, words)
        inside = found.table & (self.memory.locate(found.targets) >= 0)
        tables, good = (np.bincount(found.rows, chosen, count) for chosen in (found.table, inside))
        sound = (np.bincount(found.rows, found.refused, count) == 0) & (tables > 0)
        # The first page is nobody's table: address 0 means none.
        reachable = sound & (good > 0) & (good >= MIN_INSIDE * tables) & (addresses > 0)
        if not fmt.is_linear:
            self._ept.append(addresses[reachable])
            return
        upper = np.bincount(found.rows, found.table & (found.columns >= _UPPER_HALF), count) > 0
        # A guest-physical space has no upper half; an operating system's kernel lives there.
        self._npt.append(addresses[reachable & ~upper])
        self._linear.append(addresses[sound & upper])

    def tops(self) -> Tops:
        """Return the pages that were kept."""
        empty = [np.empty(0, dtype=np.int64)]
        return Tops(*(np.sort(np.concatenate(part or empty)) for part in (self._ept, self._npt, self._linear)))
