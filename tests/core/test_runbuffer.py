"""Runs that are gathered piece by piece are those that the whole gives at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volatility3_ept.core.memory import join_runs
from volatility3_ept.core.runbuffer import RunBuffer, merged

PAGE = 4096


def columns(rows):
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return tuple(np.ascontiguousarray(table[:, i]) for i in range(3))


@st.composite
def runs(draw):
    """Ascending runs of one to three pages; most begin where the one before ends, in both spaces."""
    rows, start, target = [], 0, 1 << 20
    for gap, move, pages in draw(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 3)), max_size=12)):
        start += PAGE * gap
        target += PAGE * 7 * move
        rows.append((start, pages * PAGE, target))
        start, target = start + pages * PAGE, target + pages * PAGE
    return rows


@settings(derandomize=True, max_examples=150, deadline=None)
@given(rows=runs(), pieces=st.integers(1, 5))
def test_pieces_join_as_the_whole_does(rows, pieces):
    buffer = RunBuffer(len(rows))
    for part in np.array_split(np.arange(len(rows)), pieces):
        buffer.add(*join_runs(*columns([rows[i] for i in part.tolist()])))
    assert buffer.ascending
    assert [c.tolist() for c in buffer.columns()] == [c.tolist() for c in join_runs(*columns(rows))]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(rows=runs(), data=st.data())
def test_buffers_of_several_levels_are_one_ascending_list(rows, data):
    buffers = [RunBuffer(len(rows)) for _ in range(3)]
    for row in rows:
        buffers[data.draw(st.integers(0, 2))].add(*columns([row]))
    assert [c.tolist() for c in merged(buffers)] == [c.tolist() for c in join_runs(*columns(rows))]


def test_runs_that_do_not_ascend_are_sorted():
    buffer = RunBuffer(3)
    buffer.add(*columns([(8 * PAGE, PAGE, 0)]))
    buffer.add(*columns([(PAGE, PAGE, 5 * PAGE), (9 * PAGE, PAGE, PAGE)]))
    assert not buffer.ascending
    assert [c.tolist() for c in merged([buffer])] == [[PAGE, 8 * PAGE], [PAGE, 2 * PAGE], [5 * PAGE, 0]]


@pytest.mark.parametrize("buffers", [[], [RunBuffer(0)], [RunBuffer(9), RunBuffer(4)]])
def test_nothing_is_no_runs(buffers):
    assert [c.size for c in merged(buffers)] == [0, 0, 0]


def test_room_that_was_not_needed_is_given_back():
    buffer = RunBuffer(1000)
    buffer.add(*columns([(0, PAGE, 0)]))
    assert all(column.base is None for column in buffer.columns())
