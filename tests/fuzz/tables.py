"""Targets: one walk, a whole hierarchy, the walk in two dimensions."""

from __future__ import annotations

import random

import numpy as np
from agreement import FORMATS, assert_same
from builders import naive, paging
from builders.paging import PAGE, GuestRam, HostRam, Tables
from fuzz import spaces
from fuzz.draw import Draw
from fuzz.spaces import Space

from volatility3_ept.core import gpamap, leaves, nested
from volatility3_ept.core import walk as walks
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root
from volatility3_ept.core.walk import Walk
from volatility3_ept.spec import dialect, ia32e
from volatility3_ept.spec.dialect import Dialect
from volatility3_ept.spec.paging import Access, Format, Outcome

NAMES = tuple(FORMATS)
AUTHORS = tuple(dialect.DIALECTS)
SECOND = {
    paging.EPT_4.name: naive.ept,
    paging.EPT_5.name: naive.ept,
    paging.NPT_4.name: naive.npt,
    paging.NPT_5.name: naive.npt,
}
_PAGE_ENDS = (Outcome.MAPPED, Outcome.OUT_OF_RANGE)
_RIGHTS = int(Access.READ | Access.WRITE | Access.EXECUTE)


def _drawn(data: bytes) -> tuple[str, Format, Dialect, random.Random, Space]:
    draw = Draw(data)
    name = draw.choice(NAMES)
    shape, fmt = FORMATS[name]
    who = dialect.DIALECTS[draw.choice(AUTHORS)]
    return name, fmt, who, random.Random(draw.number(2)), spaces.space(draw, shape)


def walk(data: bytes) -> None:
    """One address at a time: against a second walker, and against what each step says."""
    name, fmt, who, rng, where = _drawn(data)
    memory = where.memory
    for address in [*where.addresses(rng, 8), rng.getrandbits(64)]:
        result = walks.walk(memory, fmt, where.root, address, who)
        _assert_sound(result, fmt, memory)
        if who is dialect.GENERIC and name in SECOND and not address >> fmt.address_bits:
            _assert_as_second(name, where, result)


def _assert_sound(result: Walk, fmt: Format, memory: HostMemory) -> None:
    """Hold a walk against its own steps."""
    assert len(result.steps) <= len(fmt.levels)
    assert result.reason.isprintable()
    assert all(text.isprintable() for step in result.steps for text in step.flags)
    assert (result.target is not None) == (result.outcome in _PAGE_ENDS)
    if result.target is None:
        assert result.access is Access.NONE
        return
    assert (result.target in memory) == (result.outcome is Outcome.MAPPED)
    assert not (result.target - result.address) % result.page_size
    together = Access.ALL
    for step in result.steps:
        together &= step.access
    assert result.access == together, "rights are the AND over all levels"


def _assert_as_second(name: str, where: Space, result: Walk) -> None:
    shifts = [shift for _, shift, _ in where.shape.rungs]
    outcome, target, rights, size = SECOND[name](where.ram, where.root, result.address, shifts)
    if outcome == "page":
        held = target is not None and target & -PAGE in where.ram.pages
        outcome = str(Outcome.MAPPED if held else Outcome.OUT_OF_RANGE)
    assert (str(result.outcome), result.target, result.page_size) == (outcome, target, size)
    assert int(result.access) & _RIGHTS == rights


def flatten(data: bytes) -> None:
    """A whole hierarchy: its map against the walk, and the guest's memory against both."""
    _, fmt, who, rng, where = _drawn(data)
    memory = where.memory
    found = leaves.traverse(memory, fmt, where.root, who)
    if rng.random() < 0.2:
        who = leaves.infer_dialect(memory, fmt, where.root)
        found = leaves.traverse(memory, fmt, where.root)
    _assert_bounded(found, fmt, where)
    guest = found.memory(memory)
    assert_inside(guest, memory)
    some = rng.sample(range(len(found)), min(len(found), 12))
    edges = [edge for run in map(found.run, some) for edge in (run.gpa, run.gpa + run.length - 1)]
    odd = [row[0] for part in _odd(found) for row in part.tolist()[:4]]
    # Where tables were not followed the map says so, and lacks what is behind them.
    whole = not found.findings.notes
    for address in [*where.addresses(rng, 8), *edges, *odd]:
        result = walks.walk(memory, fmt, where.root, address, who)
        inside = bool(found.find(np.array([address]))[1][0])
        if whole or inside:
            assert_same(found, fmt, result, address)
            expected = memory.read(result.target, 1) if result.outcome is Outcome.MAPPED else None
            assert guest.read(address, 1) == expected, f"{address:#x} ({result.outcome}) in the guest's memory"
        if inside:
            assert address in found.to_gpas(result.target)


def _odd(found: GuestMap) -> tuple[np.ndarray, ...]:
    return found.findings.mmio, found.findings.misconfigured, found.findings.unreadable


def _assert_bounded(found: GuestMap, fmt: Format, where: Space) -> None:
    """Each level reads each table once, and a bounded number of times more; runs ascend and do not overlap."""
    # Addresses of tables that are not in the capture are not bounded by it: an entry names each of them.
    named = 1 + 1024 * len(where.ram.pages)
    assert found.findings.tables <= len(fmt.levels) * (named + leaves.MAX_REPEATS)
    assert all(note.isprintable() for note in found.findings.notes)
    assert (found.gpas[1:] >= found.gpas[:-1] + found.lengths[:-1]).all()
    assert (found.lengths > 0).all()
    assert found.top <= 1 << fmt.address_bits
    starts, ends = found.frame_ranges()
    assert (starts[1:] > ends[:-1]).all()
    assert gpamap.overlap_bytes((starts, ends), (starts, ends)) == int((ends - starts).sum()) <= found.mapped_bytes


def assert_inside(guest: HostMemory, below: HostMemory) -> None:
    """Hold that every byte of a guest's memory is a byte of the memory below."""
    order = np.argsort(below.offsets)
    starts, ends = below.offsets[order], (below.offsets + below.lengths)[order]
    index = np.searchsorted(starts, guest.offsets, side="right") - 1
    assert (index >= 0).all()
    assert (guest.offsets + guest.lengths <= ends[index]).all()


GUESTS = (paging.LONG_4, paging.LONG_5, paging.PAE, paging.LEGACY)
_GUEST_FORMATS = {
    paging.LONG_4.name: ia32e.four_level(),
    paging.LONG_5.name: ia32e.five_level(),
    paging.PAE.name: ia32e.pae(),
    paging.LEGACY.name: ia32e.legacy(),
}
_OUTER = {"eptp": (paging.EPT_4, paging.EPT_5), "ncr3": (paging.NPT_4, paging.NPT_5)}


def two_dimensions(data: bytes) -> None:
    """A guest-virtual address: each reference against the walks it stands for, and the bytes at both ends."""
    draw = Draw(data)
    kind = draw.choice(tuple(_OUTER))
    shape = draw.choice(_OUTER[kind])
    inner = draw.choice(GUESTS)
    rng = random.Random(draw.number(2))
    below, outer, placed = _backed(draw, shape)
    guest = spaces.pool(draw, inner)
    for gpa, page in guest.ram.pages.items():
        if gpa in placed:
            GuestRam(below, placed).write(gpa, bytes(page))
    memory = spaces.memory_of(below)
    root = Root.parse(f"{kind}={outer.register:#x},levels={len(shape.rungs)},dialect=generic")
    seen = root.traverse(memory).memory(memory)
    fmt = _GUEST_FORMATS[inner.name]
    for gva in guest.addresses(rng, 6):
        result = nested.walk(memory, root, seen, fmt, guest.root, gva)
        own = walks.walk(seen, fmt, guest.root, gva)
        _assert_nested(result, own, root, memory)
        assert sum(reference.count for reference in result.references) <= (len(fmt.levels) + 1) * (len(shape.rungs) + 1)
        if result.outcome is Outcome.MAPPED:
            assert seen.read(result.gpa, 1) == memory.read(result.hpa, 1) is not None


def _backed(draw: Draw, shape: paging.Shape) -> tuple[HostRam, Tables, dict[int, int]]:
    """Return a host with a guest that has the pages of a pool, some without a mapping, with rights that are drawn."""
    below = HostRam(0x300_0000)
    outer = Tables(below, shape)
    placed = outer.back([*spaces.POOL, spaces.DATA])
    for gpa in placed:
        odd = draw.number(1)
        if odd & 0x80:
            outer.put(gpa, "PTE", outer.get(gpa, "PTE") ^ 1 << (odd & 63))
    return below, outer, placed


def _assert_nested(result: nested.TwoDimensional, own: Walk, root: Root, memory: HostMemory) -> None:
    assert result.reason.isprintable()
    for reference, step in zip(result.references, own.steps, strict=False):
        assert (reference.gpa, reference.step) == (step.entry_address, step)
        assert reference.nested == root.walk(memory, step.entry_address)
    assert result.gpa == own.target
    if own.target is None:
        assert result.hpa is None
        assert result.access is Access.NONE
        assert result.outcome not in _PAGE_ENDS or own.outcome is Outcome.UNREADABLE
        return
    last = root.walk(memory, own.target)
    assert (result.outcome, result.hpa) == (last.outcome, last.target)
    assert result.access == own.access & last.access
