"""The traversal against the walk, and the walk against a second one that shares nothing with it.

Hierarchies are drawn sparse and hostile: entries of every kind, at every level, whose tables may be shared, missing
or data. Draws are the same on every run.
"""

from __future__ import annotations

import random

import hypothesis
import numpy as np
import pytest
from agreement import FORMATS, assert_same
from builders import naive as manuals
from builders import paging
from builders.paging import HostRam, Shape
from hypothesis import strategies as st
from readers import READERS, memory_of

from volatility3_ept.core import leaves
from volatility3_ept.core.walk import walk
from volatility3_ept.spec import dialect
from volatility3_ept.spec.paging import Access, Outcome


def deterministic(examples: int) -> hypothesis.settings:
    """The same draws on every run, no clock that could fail it; a failing seed is as good as a smaller one."""
    return hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=(hypothesis.Phase.generate,),
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )


#: Where the entries of a table are written, and hence which addresses are worth asking for.
INDEXES = (0, 1, 255, 511)
TABLES_PER_LEVEL = 2
DATA = 0x80_0000
MISSING = 0x7000_0000

#: Bits beside the ordinary ones, one or some at a time: what hypervisors and damage put there.
ODD_BITS = (*(1 << number for number in range(64)), 0x7, 0x38, 0x870 | 0x750 << 48, 0x9C00 << 48, 0x30 << 48)
#: MMIO in NPT, and in EPT by KVM and by VirtualBox.
MARKERS = ((0x0008_0000_0000_0037,), (0xF8_0000_0046, 0x000F_FF80_0000_003A))
SEEDS = st.integers(0, (1 << 64) - 1)


def address_in(rng: random.Random, shape: Shape) -> int:
    """Return an address that the tables of :func:`hierarchy` may translate."""
    return sum((rng.choice((0, 0, *INDEXES)) % (1 << bits)) << shift for _, shift, bits in shape.rungs)


def hierarchy(rng: random.Random, shape: Shape) -> tuple[HostRam, int]:
    """Return memory with tables of every sort, and the raw root register."""
    ram = HostRam()
    ram.write(DATA, paging.stamp(DATA))
    tables = [
        [0x10_0000 + (level << 16) + (n << 12) for n in range(TABLES_PER_LEVEL if level else 1)]
        for level in range(len(shape.rungs))
    ]
    for level, (_, shift, index_bits) in enumerate(shape.rungs):
        below = tables[level + 1] if level + 1 < len(tables) else []
        for number, table in enumerate(tables[level]):
            if number and rng.random() < 0.3:
                continue  # not in the capture
            base = table + (0 if level else shape.root_offset)
            ram.page(table)
            for index in sorted({choice % (1 << index_bits) for choice in INDEXES}):
                entry = _entry(rng, shape, level, shift, index, below)
                ram.write_entry(base + index * shape.width, entry & (1 << 8 * shape.width) - 1, shape.width)
    return ram, tables[0][0] + shape.root_offset | shape.register


def _entry(rng: random.Random, shape: Shape, level: int, shift: int, index: int, below: list[int]) -> int:
    kinds = ["table"] * 7 + ["leaf", "empty", "anything"] if below else ["leaf"] * 4 + ["marker", "empty", "anything"]
    kind = rng.choice(kinds)
    if kind == "table":
        bits = (0 if level else shape.top) or shape.table
        entry = rng.choice([*below * 4, MISSING, DATA]) | bits | rng.choice([0, 0x800, 0x800, 0x400, 0x100])
    elif kind == "leaf":
        frame = rng.choice([DATA, DATA, DATA + 0x1000, MISSING]) & ~((1 << shift) - 1)
        entry = frame | (shape.page if shift == 12 else shape.large) | rng.choice([0, 0x800, 0x800])
    elif kind == "marker":
        # The page's own number, if the tables above it are those of index 0.
        entry = index << shift | rng.choice(MARKERS[shape in (paging.EPT_4, paging.EPT_5)])
    elif kind == "empty":
        entry = rng.choice([0, 0x5A0, 0x8000_0000_0000_0000, 0x806F_FFFF_FFFF_F000])
    else:
        entry = rng.getrandbits(64)
    return entry ^ rng.choice(ODD_BITS) if rng.random() < 0.2 else entry


@pytest.mark.parametrize("who", dialect.DIALECTS.values(), ids=dialect.DIALECTS)
@pytest.mark.parametrize(("shape", "fmt"), FORMATS.values(), ids=FORMATS)
def test_the_traversal_agrees_with_the_walk(shape, fmt, who):
    """On the first and last byte of runs, and at addresses mapped, absent, refused, MMIO and unreadable."""

    @deterministic(examples=14)
    @hypothesis.given(SEEDS)
    def agree(seed):
        rng = random.Random(seed)
        ram, root = hierarchy(rng, shape)
        memory = memory_of(ram)
        found = leaves.traverse(memory, fmt, root, who)
        addresses = {address_in(rng, shape) | 0x123 for _ in range(16)}
        addresses |= {table[0] for table in found.findings.unreadable.tolist()}
        some = rng.sample(range(len(found)), min(len(found), 30))
        addresses |= {edge for run in map(found.run, some) for edge in (run.gpa, run.gpa + run.length - 1)}
        # A draw of "anything" may lead to a table above it: the map then says so, and lacks what is behind it.
        whole = not found.findings.notes
        for address in sorted(addresses):
            result = walk(memory, fmt, root, address, who)
            if whole or bool(found.find(np.array([address]))[1][0]):
                assert_same(found, fmt, result, address)
            assert (result.target is not None) == (result.outcome in (Outcome.MAPPED, Outcome.OUT_OF_RANGE))

    agree()


# A second walker, from the manuals alone.


@pytest.mark.parametrize(
    ("shape", "naive"),
    [
        (paging.EPT_4, manuals.ept),
        (paging.EPT_5, manuals.ept),
        (paging.NPT_4, manuals.npt),
        (paging.NPT_5, manuals.npt),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_walk_agrees_with_a_second_one_written_from_the_manuals(shape, naive):
    shifts = [shift for _, shift, _ in shape.rungs]
    outcomes = set()

    @deterministic(examples=100)
    @hypothesis.given(SEEDS)
    def agree(seed):
        rng = random.Random(seed)
        ram, root = hierarchy(rng, shape)
        memory = memory_of(ram)
        for _ in range(16):
            gpa = address_in(rng, shape) | rng.choice([0, 0x123, 0xFFF])
            result = walk(memory, READERS[shape], root, gpa)
            outcome, target, rights, size = naive(ram, root, gpa, shifts)
            in_capture = target is not None and target & ~0xFFF in ram.pages
            if outcome == "page":
                outcome = str(Outcome.MAPPED if in_capture else Outcome.OUT_OF_RANGE)
            outcomes.add(outcome)
            assert (str(result.outcome), result.target, result.page_size) == (outcome, target, size)
            assert int(result.access) & int(Access.READ | Access.WRITE | Access.EXECUTE) == rights

    agree()
    assert outcomes == {str(outcome) for outcome in Outcome}, "the draws must reach every end that a walk can have"
