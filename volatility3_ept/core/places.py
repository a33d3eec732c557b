"""Pages of the host that belong to a machine and are not its memory: tables, control structures, its VMM's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from volatility3_ept.core import gpamap, leaves
from volatility3_ept.core.hosttables import Frames
from volatility3_ept.core.lineage import HostRuns, Line
from volatility3_ept.core.machines import Machine
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.root import Root
from volatility3_ept.spec import dialect as dialects
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.dialect import Dialect
from volatility3_ept.spec.paging import EntryKind, Format, Level


class Use(str, Enum):
    """What a page is to a machine."""

    TABLE = "table"
    CONTROL = "control structure"
    VMM_TABLE = "VMM's page table"

    def __str__(self) -> str:
        """Return the use in the words that the plugins print."""
        return self.value


@dataclass(frozen=True)
class Place:
    """Pages with one use: ``hpas`` in the host, and for tables the first address that each translates."""

    machine: str
    use: Use
    what: str
    hpas: Int64
    bases: Int64

    def text(self, index: int) -> str:
        """Say what one of the pages is."""
        kind = {Use.TABLE: "GPA", Use.VMM_TABLE: "HVA"}.get(self.use)
        return f"{self.what}, from {kind} {int(self.bases[index]):#x}" if kind else self.what


def places(lines: Sequence[Line], runs: Mapping[str, HostRuns], memory: HostMemory) -> Iterator[Place]:
    """Yield the places of all machines. ``runs`` holds each line's host runs; ``memory`` is the capture's."""
    spaces = {line.id: line.machine.memory for line in lines if line.machine} | {"": memory}

    def host(addresses: Int64, space: str) -> Int64:
        return runs[space].to_hpa(addresses) if space else addresses

    for line in lines:
        machine = line.machine
        if machine is None:
            continue
        for number, vcpu in enumerate(machine.vcpus):
            if vcpu.held_in and vcpu.held_in not in runs:
                continue
            one = np.array([vcpu.hpa], dtype=np.int64)
            yield Place(machine.id, Use.CONTROL, f"{vcpu.kind} of vCPU {number}", host(one, vcpu.held_in), one)
        for root, space in ((machine.root, machine.tables_in), *((v.root, v.tables_in) for v in machine.views)):
            where = spaces[space]
            for level, pages, bases in tables(where, root.format, root.raw, root.reader(where)):
                yield Place(machine.id, Use.TABLE, f"{level.table} of {_name(root)}", host(pages, space), bases)
        guests = _frames([each for each in lines if each.machine and each.machine.tables_in == machine.tables_in])
        for cr3, levels in _vmms(machine):
            fmt = ia32e.four_level() if levels == 4 else ia32e.five_level()
            for level, pages, bases in tables(spaces[machine.tables_in], fmt, cr3, dialects.GENERIC, guests):
                what = f"{level.table} at CR3 {cr3:#x}"
                yield Place(machine.id, Use.VMM_TABLE, what, host(pages, machine.tables_in), bases)


def tables(
    memory: HostMemory, fmt: Format, root: int, dialect: Dialect, avoid: Frames | None = None
) -> Iterator[tuple[Level, Int64, Int64]]:
    """Yield each level's tables ``(level, addresses, first address that each translates)``, every table once.

    Of ordinary paging only user mode's part counts: the rest is the kernel's and every process's. Tables in ``avoid``
    are not followed: no hypervisor keeps its own in memory that it gave to a guest.
    """
    pages = np.array([fmt.root_hpa(root)], dtype=np.int64)
    bases = np.zeros(1, dtype=np.int64)
    seen = pages
    for level in fmt.levels:
        if not pages.size:
            return
        yield level, pages >> 12 << 12, bases
        below: list[tuple[Int64, Int64]] = []
        for start in range(0, pages.size, leaves.CHUNK_TABLES):
            words, _ = leaves.read_tables(memory, fmt, level, pages[start : start + leaves.CHUNK_TABLES])
            if fmt.is_linear and level is fmt.levels[0]:
                words = words[:, : words.shape[1] // 2]
            rows, columns = np.nonzero(words)
            entries = words[rows, columns]
            firsts = bases[start + rows] + (columns.astype(np.int64) << level.shift)
            kinds, restored, _ = dialect.kind(fmt, entries, level, firsts.astype(np.uint64))
            leads = kinds == int(EntryKind.TABLE)
            if fmt.is_linear:
                leads &= (entries & np.uint64(ia32e.USER)) != 0
            below.append((np.asarray(fmt.table(restored[leads])).astype(np.int64), firsts[leads]))
        found, firsts = (np.concatenate([part[i] for part in below]) for i in range(2))
        pages, index = np.unique(found, return_index=True)
        fresh = ~np.isin(pages, seen)
        if avoid is not None:
            fresh &= ~avoid.holds(pages)
        pages, bases = pages[fresh], firsts[index][fresh]
        seen = np.concatenate((seen, pages))


def _frames(siblings: Sequence[Line]) -> Frames:
    ranges = [line.maps[0].frame_ranges() for line in siblings]
    return Frames(*gpamap.union(*(np.concatenate([pair[i] for pair in ranges]) for i in range(2))))


def _vmms(machine: Machine) -> list[tuple[int, int]]:
    return sorted({(slot.root, slot.levels) for slot in machine.recovery.slots}) if machine.recovery else []


def _name(root: Root) -> str:
    return f"{root.kind} root {root.raw:#x}"
