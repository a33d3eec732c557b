"""Whose page is this: every byte of a question is answered, and the answers are right."""

from __future__ import annotations

import itertools

import captures
import discovered
import hypothesis
import numpy as np
import pytest
from builders import machine, paging
from builders.paging import PAGE, HostRam, Tables
from hypothesis import strategies as st
from readers import READERS, memory_of

from volatility3_ept.core import lineage, owner, places, search
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.owner import How, Owners
from volatility3_ept.core.source import FileSource
from volatility3_ept.spec.dialect import GENERIC
from volatility3_ept.spec.paging import Access

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8)


def owners(ram, chosen=None):
    memory = memory_of(ram)
    return Owners(memory, lineage.lines(search.discover(memory), memory), chosen)


@pytest.fixture(scope="module")
def host() -> tuple[HostRam, list[machine.Guest]]:
    """An EPT guest (0) and an NPT guest (1), sorted by root as the search numbers them."""
    ram, guests = machine.host(paging.EPT_4, paging.NPT_4)
    ram.page(0x2000)
    return ram, guests


@pytest.fixture(scope="module")
def asked(host) -> Owners:
    return owners(host[0])


@hypothesis.settings(max_examples=200, derandomize=True, deadline=None, database=None)
@hypothesis.given(ranges=RANGES, questions=RANGES)
def test_every_overlap_is_met_once(ranges, questions):
    columns = [np.array([[a, a + n] for a, n in rows], dtype=np.int64).reshape(-1, 2) for rows in (ranges, questions)]
    met = owner.Questions(columns[1][:, 0], columns[1][:, 1]).meet(columns[0][:, 0], columns[0][:, 1])
    expected = [
        (q, r, max(a, b), min(a + n, b + m))
        for q, (a, n) in enumerate(questions)
        for r, (b, m) in enumerate(ranges)
        if max(a, b) < min(a + n, b + m)
    ]
    assert sorted(zip(*(column.tolist() for column in met), strict=True)) == expected


def test_each_page_of_each_guest(host, asked):
    for name, guest in zip("01", host[1], strict=True):
        gpas = list(guest.placed)
        answers = list(asked.ask([guest.placed[gpa] + 0x123 for gpa in gpas]))
        assert [(a.machine, a.gpa, a.how, a.hpa - 0x123) for a in answers] == [
            (name, gpa + 0x123, How.MAPPED, guest.placed[gpa]) for gpa in gpas
        ]
        assert [a.asked for a in answers] == list(range(len(gpas)))
        assert {a.access & Access.READ for a in answers} == {Access.READ}


def test_tables_and_control_structures(host, asked):
    for name, guest in zip("01", host[1], strict=True):
        for page in guest.tables.table_pages:
            (answer,) = asked.ask([page + 8])
            assert (answer.machine, answer.how, answer.gpa) == (name, How.TABLE, None)
        (answer,) = asked.ask([guest.structures[0]])
        assert (answer.machine, answer.how) == (name, How.CONTROL)
    (top,) = asked.ask([host[1][0].tables.root])
    assert top.detail == f"PML4 of EPT root {host[1][0].root:#x}, from GPA 0x0"


def test_what_is_in_no_guest_and_what_is_in_no_file(asked):
    rows = [(a.asked, a.hpa, a.length, a.how, a.present) for a in asked.ask([0x1000, 0x2000], 0x1800)]
    assert rows == [
        (0, 0x1000, 0x1000, How.OUTSIDE, False),
        (0, 0x2000, 0x800, How.NOBODY, True),
        (1, 0x2000, 0x1000, How.NOBODY, True),
        (1, 0x3000, 0x800, How.OUTSIDE, False),
    ]


@pytest.mark.parametrize("length", [1, 0x800, 0x1800, 0x10_0000])
def test_the_answers_to_a_range_cover_it_once(host, asked, length):
    start = min(host[1][0].placed.values()) - 0x1800
    covered = sorted((a.hpa, a.hpa + a.length) for a in asked.ask([start], length))
    assert covered[0][0] == start
    assert covered[-1][1] == start + length
    assert all(before[1] == after[0] for before, after in itertools.pairwise(covered))


def test_with_some_machines_chosen_nothing_is_said_of_others(host):
    one = owners(host[0], ["1"])
    answers = list(one.ask([next(iter(guest.placed.values())) for guest in host[1]]))
    assert [(a.machine, a.how) for a in answers] == [("", How.NOT_CHOSEN), ("1", How.MAPPED)]


def test_offsets_of_a_file_with_headers(host, asked):
    """The file has 32 bytes in front of each run: they are no memory."""
    _, table = host[0].segments(bytes(32))
    guest = host[1][1]
    gpa, hpa = next(iter(guest.placed.items()))
    start, _, offset = next(row for row in table if row[0] <= hpa < row[0] + row[1])
    first, second, third = asked.at_offsets([offset - 1, offset + hpa - start, 1 << 40])
    assert [a.how for a in (first, second, third)] == [How.NO_MEMORY, How.MAPPED, How.NO_MEMORY]
    assert [a.asked for a in (first, second, third)] == [0, 1, 2]
    assert (second.machine, second.gpa, second.hpa) == ("1", gpa, hpa)


def test_one_offset_may_be_several_addresses():
    """An ELF core may keep identical pages once."""
    memory = HostMemory.from_segments(FileSource(bytes(0x2000)), [(0, PAGE, 0), (0x5000, PAGE, 0)])
    assert [a.hpa for a in Owners(memory, []).at_offsets([0x10])] == [0x10, 0x5010]


def test_a_nested_guest_has_a_row_beside_the_machine_around_it():
    ram = HostRam()
    outer = machine.Guest(ram, paging.EPT_4, 96)
    outer.vcpu()
    inner = machine.Guest(outer.ram, paging.EPT_4, 8)
    inner.vcpu()
    asked = owners(ram)
    for gpa, between in inner.placed.items():
        hpa = outer.placed[between]
        around, nested = asked.ask([hpa])
        assert (around.machine, around.gpa, around.through) == ("0", between, ())
        assert (nested.machine, nested.gpa, nested.through) == ("0.0", gpa, (("0", between),))
    table = outer.placed[inner.tables.table_pages[-1]]
    assert {(a.machine, a.how) for a in asked.ask([table])} == {("0", How.MAPPED), ("0.0", How.TABLE)}
    structure = outer.placed[inner.structures[0]]
    assert ("0.0", How.CONTROL) in {(a.machine, a.how) for a in asked.ask([structure])}


@pytest.mark.parametrize("shape", [paging.EPT_4, paging.EPT_5, paging.NPT_4], ids=lambda shape: shape.name)
def test_every_table_of_a_hierarchy_is_found_at_its_level(shape):
    tables = Tables(HostRam(), shape)
    for gpa in (0, 0x20_0000, 0x4000_0000, 0x80_0000_0000):
        tables.map(gpa, tables.ram.allocate())
    tables.map(0x7_4000_0000, tables.ram.reserve(0x4000_0000), 0x4000_0000)
    found = list(places.tables(memory_of(tables.ram), READERS[shape], tables.register, GENERIC))
    assert sorted(page for _, pages, _ in found for page in pages.tolist()) == sorted(tables.table_pages)
    assert [level.table for level, _, _ in found][-4:] == ["PML4", "PDPT", "PD", "PT"]
    assert sorted(found[-1][2].tolist()) == [0, 0x20_0000, 0x4000_0000, 0x80_0000_0000]


def test_tables_that_lead_to_themselves_end():
    tables = Tables(HostRam(), paging.EPT_4)
    tables.put(0, "PML4E", tables.root | 7)
    found = list(places.tables(memory_of(tables.ram), READERS[paging.EPT_4], tables.register, GENERIC))
    assert [pages.tolist() for _, pages, _ in found] == [[tables.root]]


def test_addresses_from_a_file():
    lines = ["# hits", "0x1000", "", "4096 # again", "0x2000:$mz: 4d 5a", "  0X3000,x\n"]
    assert owner.addresses(lines).tolist() == [0x1000, 4096, 0x2000, 0x3000]


@pytest.mark.parametrize("line", ["banana", "-1", "0x", "0x1000zebra", str(1 << 52), "$mz: 0x1000"])
def test_a_line_without_an_address_is_named(line):
    with pytest.raises(ValueError, match=r"line 2: .* begins with no address"):
        owner.addresses(["0x1", line])


def test_many_questions_cost_little_more_than_one(host, asked):
    hpas = np.tile(np.array(list(host[1][0].placed.values()), dtype=np.int64), 1000)
    assert sum(1 for answer in asked.ask(hpas) if answer.machine == "0") == hpas.size


@pytest.mark.parametrize("name", captures.every())
def test_a_real_guest_holds_its_pages_and_no_others(name):
    below, discovery = discovered.capture(name)
    lines = lineage.lines(discovery, below)
    asked = Owners(below, lines)
    for truth in captures.get(name).guests:
        gpas = list(truth.pages)
        answers = asked.ask([truth.pages[gpa][0] << 12 for gpa in gpas])
        found = {(answer.asked, answer.gpa) for answer in answers}
        assert {(number, gpa) for number, gpa in enumerate(gpas)} <= found


def test_nothing_but_the_truth_is_a_guests():
    """Of the whole host only the frames that the truth names are in its one guest."""
    below, discovery = discovered.capture("kvm-ept")
    (truth,) = captures.get("kvm-ept").guests
    answers = Owners(below, lineage.lines(discovery, below)).ask([0], below.top)
    held = sum(answer.length for answer in answers if answer.gpa is not None)
    assert held == len(truth.pages) * PAGE
