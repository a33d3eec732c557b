from __future__ import annotations

import copy

import numpy as np
import pytest

from volatility3_ept.core import gpamap
from volatility3_ept.core.gpamap import GuestMap, Run
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec.dialect import State
from volatility3_ept.spec.paging import Access

RX, ALL = Access.READ | Access.EXECUTE, Access.ALL
RUNS = [
    Run(0x0, 0x2000, 0x5000, ALL, 6, 0x1000, State.PLAIN),
    Run(0x2000, 0x1000, 0x5000, RX, 6, 0x1000, State.ACCESS_TRACKED),
    Run(0x20_0000, 0x40_0000, 0x4000_0000, ALL, 0, 0x20_0000, State.RECALC_PENDING),
    Run(0x4000_0000, 0x4000_0000, 0xF_FFFF_C000_0000, Access.NONE, 5, 0x4000_0000, State.EMULATED_AD),
    Run(0x8000_0000, 0x40_0000, 0x80_0000, Access.READ, 4, 0x40_0000, State.PLAIN),
]


def guest_map(runs: list[Run]) -> GuestMap:
    """Pack runs by hand: access 3:0, memory type 6:4, state 9:7, size code 11:10."""
    codes = {0x1000: 0, 0x20_0000: 1, 0x4000_0000: 2, 0x40_0000: 3}
    words = [r.hpa | int(r.access) | r.memory_type << 4 | int(r.state) << 7 | codes[r.page_size] << 10 for r in runs]
    columns = ([r.gpa for r in runs], [r.length for r in runs], words)
    return GuestMap(*(np.array(column, dtype=np.int64) for column in columns))


@pytest.fixture
def mapped():
    return guest_map(RUNS)


EMPTY = guest_map([])


def test_every_attribute_of_a_run_survives_packing(mapped):
    assert list(mapped.runs()) == RUNS
    assert mapped.run(3) == RUNS[3]
    assert mapped.accesses.tolist() == [run.access for run in RUNS]
    assert mapped.hpas.tolist() == [run.hpa for run in RUNS]


def test_totals(mapped):
    assert (len(mapped), mapped.top) == (5, 0x8040_0000)
    assert mapped.mapped_bytes == sum(run.length for run in RUNS)
    assert mapped.page_counts() == {0x1000: 3, 0x20_0000: 2, 0x4000_0000: 1, 0x40_0000: 1}
    assert (len(EMPTY), EMPTY.top, EMPTY.mapped_bytes, EMPTY.page_counts()) == (0, 0, 0, {})


ADDRESSES = {
    0x0: 0x5000,
    0x1FFF: 0x6FFF,
    0x2000: 0x5000,
    0x2FFF: 0x5FFF,
    0x3000: -1,
    0x1F_FFFF: -1,
    0x5F_FFFF: 0x403F_FFFF,
    0x60_0000: -1,
    0x7FFF_FFFF: 0xF_FFFF_FFFF_FFFF,
    0x803F_FFFF: 0xBF_FFFF,
    0x8040_0000: -1,
    0xFFFF_FFFF_FFFF: -1,
}


def test_addresses_translate_up_to_the_last_byte_of_a_run_and_not_beyond(mapped):
    gpas = np.array(list(ADDRESSES), dtype=np.int64)
    index, inside = mapped.find(gpas)
    assert mapped.to_hpa(gpas).tolist() == list(ADDRESSES.values())
    assert inside.tolist() == [hpa >= 0 for hpa in ADDRESSES.values()]
    held = [RUNS[i] for i in index[inside].tolist()]
    assert all(run.gpa <= gpa < run.gpa + run.length for run, gpa in zip(held, gpas[inside].tolist(), strict=True))


def test_an_empty_map_translates_nothing():
    assert EMPTY.to_hpa(np.array([0, 5])).tolist() == [-1, -1]
    assert EMPTY.find(np.array([0]))[1].tolist() == [False]
    assert EMPTY.frame_ranges()[0].size == 0
    assert EMPTY.to_gpas(0) == []
    assert EMPTY.memory(HostMemory.from_bytes(bytes(0x1000))).size == 0


def test_the_inverse_ascends_by_host_address_and_keeps_every_alias(mapped):
    rows = list(zip(*(column.tolist() for column in mapped.inverse()), strict=True))
    assert rows == sorted(((run.hpa, run.length, run.gpa) for run in RUNS), key=lambda row: row[0])


def test_a_shared_frame_has_all_its_guest_addresses(mapped):
    assert mapped.to_gpas(0x5123) == [0x123, 0x2123]
    assert mapped.to_gpas(0x6123) == [0x1123]
    assert mapped.to_gpas(0x7000) == []


def test_frame_ranges_count_a_shared_frame_once(mapped):
    starts, ends = mapped.frame_ranges()
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [
        (0x5000, 0x7000), (0x80_0000, 0xC0_0000), (0x4000_0000, 0x4040_0000), (0xF_FFFF_C000_0000, 1 << 52),
    ]  # fmt: skip


def test_the_memory_of_a_map_reads_through_it():
    below = HostMemory.from_bytes(b"".join(bytes([page]) * 0x1000 for page in range(8)))
    memory = guest_map(RUNS[:2]).memory(below)
    assert [memory.read(gpa, 1) for gpa in (0, 0x1000, 0x2000, 0x3000)] == [b"\x05", b"\x06", b"\x05", None]


def test_copying_a_context_does_not_copy_the_map(mapped):
    assert copy.deepcopy([mapped])[0] is mapped


def ranges(pairs):
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return columns[0], columns[1]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], []),
        ([(5, 9)], [(5, 9)]),
        ([(5, 9), (0, 2)], [(0, 2), (5, 9)]),
        ([(0, 5), (5, 9)], [(0, 9)]),
        ([(0, 9), (2, 3), (4, 12)], [(0, 12)]),
        ([(0, 100), (1, 2), (50, 60), (200, 201)], [(0, 100), (200, 201)]),
    ],
)
def test_union(pairs, expected):
    assert list(zip(*(column.tolist() for column in gpamap.union(*ranges(pairs))), strict=True)) == expected


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ([], [(0, 9)], 0),
        ([(0, 9)], [(9, 12)], 0),
        ([(0, 9)], [(3, 5)], 2),
        ([(0, 9), (20, 30)], [(5, 25)], 9),
        ([(0, 3), (6, 9)], [(0, 3), (6, 9)], 6),
        ([(10, 20)], [(0, 11), (19, 100)], 2),
    ],
)
def test_overlap_is_counted_in_bytes_and_is_symmetric(first, second, common):
    assert gpamap.overlap_bytes(ranges(first), ranges(second)) == common
    assert gpamap.overlap_bytes(ranges(second), ranges(first)) == common


@pytest.mark.parametrize("seed", range(4))
def test_union_and_overlap_equal_counting_each_byte(seed):
    rng = np.random.default_rng(seed)
    sets, unions = [], []
    for _ in range(2):
        starts = rng.integers(0, 300, 12)
        ends = starts + rng.integers(1, 30, 12)
        sets.append({byte for start, end in zip(starts, ends, strict=True) for byte in range(start, end)})
        unions.append(gpamap.union(starts, ends))
        covered = {byte for start, end in zip(*unions[-1], strict=True) for byte in range(start, end)}
        assert covered == sets[-1]
        assert (unions[-1][0][1:] > unions[-1][1][:-1]).all(), "disjoint, and ranges that touch are one"
    assert gpamap.overlap_bytes(*unions) == len(sets[0] & sets[1])
