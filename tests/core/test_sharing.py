"""Shared frames are counted, each once, and machines that run in each other are no strangers."""

from __future__ import annotations

import captures
import discovered
import hypothesis
import numpy as np
import pytest
from builders import machine, paging
from builders.paging import PAGE, HostRam
from hypothesis import strategies as st
from readers import memory_of

from volatility3_ept.core import lineage, portrait, search, sharing
from volatility3_ept.core.sharing import Shared

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=8)


def counted(ram):
    memory = memory_of(ram)
    lines = lineage.lines(search.discover(memory), memory)
    return sharing.count(lines, [line.host_runs() for line in lines], memory)


@hypothesis.settings(max_examples=150, derandomize=True, deadline=None, database=None)
@hypothesis.given(ranges=RANGES)
def test_often_equals_counting(ranges):
    starts, ends = (np.array([r[0] + i * r[1] for r in ranges], dtype=np.int64) for i in (0, 1))
    found = sharing.often(starts, ends)
    covered = {at for low, high in zip(*(column.tolist() for column in found), strict=True) for at in range(low, high)}
    assert covered == {at for at in range(40) if sum(s <= at < s + n for s, n in ranges) > 1}


def test_guests_that_share_nothing():
    ram, _ = machine.host(paging.EPT_4, paging.NPT_4)
    assert counted(ram) == {"0": Shared(), "1": Shared()}


def test_one_frame_at_many_addresses():
    ram, (guest,) = machine.host(paging.EPT_4)
    zero, other = ram.allocate(), ram.allocate()
    ram.write(other, b"text")
    for number in range(8):
        guest.tables.map(0x40_0000 + number * PAGE, zero)
    for number in range(2):
        guest.tables.map(0x50_0000 + number * PAGE, other)
    assert counted(ram) == {"0": Shared(repeated=2 * PAGE, saved=8 * PAGE, zero=PAGE)}


def test_frames_of_two_guests():
    ram, (first, second, third) = machine.host(paging.EPT_4, paging.EPT_4, paging.NPT_4)
    for number in range(3):
        frame = ram.allocate()
        first.tables.map(0x40_0000 + number * PAGE, frame)
        second.tables.map(0x70_0000 + number * PAGE, frame)
    third.tables.map(0x40_0000, frame)
    assert counted(ram) == {
        "0": Shared(others=3 * PAGE, with_guests=("1", "2")),
        "1": Shared(others=3 * PAGE, with_guests=("0", "2")),
        "2": Shared(others=PAGE, with_guests=("0", "1")),
    }


def test_a_nested_guest_does_not_share_with_the_machine_around_it():
    ram = HostRam()
    outer = machine.Guest(ram, paging.EPT_4, 96)
    outer.vcpu()
    machine.Guest(outer.ram, paging.EPT_4, 8).vcpu()
    assert counted(ram) == {"0": Shared(), "0.0": Shared()}


def test_it_is_said_in_words_that_accuse_nobody():
    said = portrait.shared_text(
        Shared(repeated=PAGE, saved=7 * PAGE, zero=PAGE, others=2 * PAGE, with_guests=("1", "2"))
    )
    assert said == [
        "shared: 4K of frames appear at several addresses of this guest, 4K of them zeros; they stand for 28K more "
        "guest memory",
        "shared: 8K of frames are mapped by 1, 2 too",
    ]
    assert not Shared()
    assert portrait.shared_text(Shared()) == []


@pytest.mark.parametrize("name", captures.every())
def test_a_real_guest_shares_as_the_truth_has_it(name):
    below, discovery = discovered.capture(name)
    lines = lineage.lines(discovery, below)
    found = sharing.count(lines, [line.host_runs() for line in lines], below)
    expected = set()
    for truth in captures.get(name).guests:
        if truth.facts.get("level", 2) == 2:
            frames = [frame for frame, _ in truth.pages.values()]
            once, count = np.unique(frames, return_counts=True)
            expected.add((int((count > 1).sum()) * PAGE, (len(frames) - once.size) * PAGE))
    assert expected <= {(item.repeated, item.saved) for item in found.values()}
