"""Every page has one fate, and the fates add up."""

from __future__ import annotations

import captures
import discovered
import hypothesis
import numpy as np
import pytest
from builders import vmm
from builders.paging import PAGE
from builders.vmm import Guest, Host
from hypothesis import strategies as st
from readers import READERS, memory_of

from volatility3_ept.core import backing, coverage, leaves
from volatility3_ept.core.backing import Recovery
from volatility3_ept.core.coverage import Fate
from volatility3_ept.core.gpamap import Findings, GuestMap
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource
from volatility3_ept.spec.dialect import State

HVA, M2 = 0x7F00_0000_0000, 0x20_0000


def parts(covered):
    return [(gpa, length, str(fate)) for gpa, length, fate in covered.parts()]


def assert_adds_up(covered):
    at = 0
    for gpa, length, _ in covered.parts():
        assert (gpa, length > 0) == (at, True)
        at += length
    assert at == covered.top == sum(covered.totals().values())


@pytest.fixture
def guest():
    """Thirty-two pages at one distance, and a fate for each that can be had within a slot."""
    host = Host()
    guest = Guest(host, host.process())
    guest.back(0, HVA, 32)
    ram = host.ram
    old = ram.allocate()
    for number, entry in {
        3: guest.pages[3 * PAGE] | vmm.DATA,
        4: vmm.protnone(guest.pages[4 * PAGE]),
        5: vmm.swap(0, 77),
        6: vmm.migrating(old),
        7: vmm.swap(31, 1),
        8: 0,
    }.items():
        guest.vmm.put(HVA + number * PAGE, "PTE", entry)
        guest.slat.put(number * PAGE, "PTE", 0)
    return guest


def test_every_fate_that_a_page_can_have(guest):
    ram, slat = guest.host.ram, guest.slat
    ram.drop(guest.pages[0xA * PAGE])
    ram.drop(guest.pages[4 * PAGE])
    slat.put(0x40 * PAGE, "PTE", 0x40 * PAGE | 0x6)
    slat.put(0x41 * PAGE, "PTE", ram.allocate() | 0x2)
    lost = ram.allocate()
    slat.put(M2, "PDE", lost | 0x7)
    ram.drop(lost)
    slat.map(2 * M2, ram.allocate())
    below = memory_of(ram)
    mapped = leaves.traverse(below, READERS[slat.shape], slat.register)
    covered = coverage.account(mapped, below, backing.recover(below, mapped))
    assert parts(covered) == [
        (0, 3 * PAGE, "mapped"),
        (3 * PAGE, PAGE, "recovered"),
        (4 * PAGE, PAGE, "outside the capture"),
        (5 * PAGE, PAGE, "swapped out"),
        (6 * PAGE, PAGE, "migrating"),
        (7 * PAGE, PAGE, "device page or marker"),
        (8 * PAGE, PAGE, "never backed"),
        (9 * PAGE, PAGE, "mapped"),
        (0xA * PAGE, PAGE, "outside the capture"),
        (0xB * PAGE, 0x15 * PAGE, "mapped"),
        (0x20 * PAGE, 0x20 * PAGE, "not mapped"),
        (0x40 * PAGE, PAGE, "MMIO"),
        (0x41 * PAGE, PAGE, "misconfigured"),
        (0x42 * PAGE, M2 - 0x42 * PAGE, "not mapped"),
        (M2, M2, "table unreadable"),
        (2 * M2, PAGE, "mapped"),
    ]
    assert_adds_up(covered)
    assert {fate: total for fate, total in covered.totals().items() if fate is Fate.RECOVERED} == {Fate.RECOVERED: PAGE}
    assert covered.find(5 * PAGE + 0x123) is Fate.SWAPPED
    assert (covered.find(2 * M2 + PAGE), covered.find(-1)) == (None, None)


def test_without_a_vmm_nothing_is_known_of_what_is_missing(guest):
    below = memory_of(guest.host.ram)
    mapped = leaves.traverse(below, READERS[guest.slat.shape], guest.slat.register)
    covered = coverage.account(mapped, below)
    assert parts(covered) == [
        (0, 3 * PAGE, "mapped"), (3 * PAGE, 6 * PAGE, "not mapped"), (9 * PAGE, 23 * PAGE, "mapped"),
    ]  # fmt: skip


def test_a_guest_without_memory_has_no_pages():
    covered = coverage.account(GuestMap(*[np.empty(0, dtype=np.int64)] * 3), HostMemory.from_bytes(b""))
    assert (len(covered), covered.top, covered.find(0)) == (0, 0, None)
    assert not any(covered.totals().values())


def test_a_page_that_lies_in_two_segments_is_in_the_capture_and_half_a_page_is_not():
    segments = [(0x1000, 0x800, 0), (0x1800, 0x800, 0x5000), (0x3800, 0x1000, 0x9000), (0x5100, 0x200, 0xA800)]
    below = HostMemory.from_segments(FileSource(bytes(0xB000)), segments)
    one = np.array([0], dtype=np.int64)
    covered = coverage.account(GuestMap(one, one + 0x5000, one + 0x1000), below)
    assert parts(covered) == [(0, PAGE, "mapped"), (PAGE, 4 * PAGE, "outside the capture")]


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=6)


def rows(ranges, columns=3):
    out = np.zeros((len(ranges), columns), dtype=np.int64)
    for row, (start, length) in enumerate(sorted(ranges)):
        out[row, :2] = start * PAGE, length * PAGE
    return out


def disjoint(ranges):
    """Keep those that begin at or after the end of the last one."""
    kept, at = [], 0
    for start, length in sorted(ranges):
        if start >= at:
            kept.append((start, length))
            at = start + length
    return kept


@hypothesis.settings(max_examples=120, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    mapped=RANGES, states=st.lists(st.booleans(), min_size=6, max_size=6), others=st.tuples(*[RANGES] * 8)
)
def test_any_mixture_adds_up_and_equals_counting_page_by_page(mapped, states, others):
    mapped = disjoint(mapped)
    mmio, bad, unreadable, swapped, migrating, elsewhere, never, unknown = others
    columns = rows(mapped)
    words = np.array([0x10_0000 + start * PAGE | (int(State.RECOVERED) << 7) * states[i]
                      for i, (start, _) in enumerate(mapped)], dtype=np.int64)  # fmt: skip
    findings = Findings(rows(mmio), rows(bad), rows(unreadable))
    whole = GuestMap(columns[:, 0], columns[:, 1], words, findings)
    # Frames of pages above 50 are not in the capture.
    below = HostMemory.from_bytes(bytes(50 * PAGE), 0x10_0000)
    recovery = Recovery(whole, (), rows([], 4), rows(migrating, 4), rows(swapped), rows(elsewhere), rows(never, 2),
                        unreadable=rows(unknown, 2))  # fmt: skip
    covered = coverage.account(whole, below, recovery)
    assert_adds_up(covered)
    named = [(mmio, Fate.MMIO), (swapped, Fate.SWAPPED), (migrating, Fate.MIGRATING), (elsewhere, Fate.ELSEWHERE),
             (bad, Fate.MISCONFIGURED), (unreadable + unknown, Fate.UNREADABLE),
             (never, Fate.NEVER_BACKED)]  # fmt: skip
    for page in range(covered.top // PAGE):
        held = [i for i, (start, length) in enumerate(mapped) if start <= page < start + length]
        if held:
            fate = Fate.OUTSIDE if page >= 50 else Fate.RECOVERED if states[held[0]] else Fate.MAPPED
        else:
            fate = next((f for ranges, f in named if any(s <= page < s + n for s, n in ranges)), Fate.NOT_MAPPED)
        assert covered.find(page * PAGE) is fate


@pytest.mark.parametrize("name", captures.every())
def test_a_real_guest_adds_up(name):
    expected = {
        (guest["pages_mapped"] * PAGE, guest["pages_absent"] * PAGE)
        for guest in captures.get(name).entry.get("guests", [])
        if guest["level"] == 2
    }
    below, _ = discovered.capture(name)
    seen = set()
    for machine in discovered.guests(name):
        covered = coverage.account(machine.guest_map, below, discovered.recovery(name, machine.id))
        assert_adds_up(covered)
        totals = covered.totals()
        assert totals[Fate.OUTSIDE] == totals[Fate.UNREADABLE] == totals[Fate.MISCONFIGURED] == 0
        seen.add((totals[Fate.MAPPED], totals[Fate.RECOVERED]))
    assert expected <= seen
