"""Many addresses at once give what one walk at a time gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
from builders import paging
from builders.paging import PAGE, HostRam, Tables
from readers import READERS, memory_of

from volatility3_ept.core import walk as walks
from volatility3_ept.core.gva import Space
from volatility3_ept.spec.paging import Outcome

SHAPES = (paging.LONG_4, paging.LONG_5, paging.PAE, paging.LEGACY)


def build(shape, seed=7):
    """Return a space with pages of every size, entries that are refused, and tables that are not in the capture."""
    rng = random.Random(seed)
    ram = HostRam()
    tables = Tables(ram, shape)
    top = 1 << shape.rungs[0][1] + shape.rungs[0][2]
    mapped = []
    for number in range(60):
        address = rng.randrange(top) & -PAGE
        size = rng.choice(paging.LEAF_SIZES[shape.name]) if number % 3 == 0 else PAGE
        try:
            tables.map(address & -size, ram.reserve(size) if size > PAGE else ram.allocate(), size)
        except ValueError:
            continue
        mapped.append(address)
    ram.drop(tables.table_pages[-1])
    for number in range(8):  # large pages with a reserved bit: the processor refuses them
        address = rng.randrange(top) & -(1 << 22)
        tables.put(address, "PDE", ram.reserve(1 << 22) | 0xE3 | (1 << 21 if shape is paging.LEGACY else 1 << 13))
        mapped.append(address + number * PAGE)
    fmt = READERS[shape]
    return Space(memory_of(ram), fmt, tables.register), mapped, top, rng


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_translation_equals_the_walk(shape):
    space, mapped, top, rng = build(shape)
    asked = [
        *mapped,
        *(address ^ rng.randrange(1 << 22) for address in mapped),
        *(rng.randrange(top) for _ in range(99)),
    ]
    found = space.translate(np.array(asked)).tolist()
    for address, gpa in zip(asked, found, strict=True):
        walk = walks.walk(space.memory, space.fmt, space.cr3, address)
        expected = walk.target if walk.outcome in (Outcome.MAPPED, Outcome.OUT_OF_RANGE) else None
        assert gpa == (-1 if expected is None else expected), walk.reason
    assert sum(gpa >= 0 for gpa in found) > 20


def test_a_read_runs_over_pages_that_lie_apart_and_ends_at_a_hole():
    ram = HostRam()
    tables = Tables(ram, paging.LONG_4)
    base = 0xFFFF_8000_0001_0000
    first, _, second = ram.allocate(), ram.allocate(), ram.allocate()
    tables.map(base, second)
    tables.map(base + PAGE, first)
    ram.write(second + PAGE - 4, b"left")
    ram.write(first, b"right")
    space = Space(memory_of(ram), READERS[paging.LONG_4], tables.register)
    assert space.read(base + PAGE - 4, 9) == b"leftright"
    assert space.read(base + 2 * PAGE - 4, 9) is None
    assert space.number(base + PAGE, 4) == int.from_bytes(b"righ", "little")
    assert space.number(base + 2 * PAGE) == 0
    assert space.physical(base + PAGE + 5) == first + 5
    assert space.physical(base + 2 * PAGE) == -1


@pytest.mark.parametrize(("gva", "is_kernel"), [
    (0xFFFF_F803_5A60_0000, True), (0xF803_5A60_0000, False), (0x7FF6_1234_0000, False), (0, False),
    (0xFFFE_F803_5A60_0000, False),
])  # fmt: skip
def test_a_kernel_address_is_canonical_and_in_the_upper_half(gva, is_kernel):
    space = Space(memory_of(HostRam()), READERS[paging.LONG_4], 0x1000)
    assert space.is_kernel(gva) is is_kernel
    assert space.canonical(space.plain(0xFFFF_F803_5A60_0000)) == 0xFFFF_F803_5A60_0000
