"""The real captures without their control structures: the page tables alone must give the same guests."""

from __future__ import annotations

import captures
import numpy as np
import pytest

from volatility3_ept.core import search
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource
from volatility3_ept.spec.bits import PAGE_SIZE


def zeroed(capture: captures.Capture) -> np.ndarray:
    """Return the file with every VMCS, VMCB and VMXON page overwritten by zeros, wherever it lies."""
    data = np.fromfile(capture.path, dtype=np.uint8)
    for item in capture.truth["control_structures"]:
        if "hpa" in item:
            hpa = int(item["hpa"], 0)
            start, _, offset = next(s for s in capture._segments if s[0] <= hpa < s[0] + s[1])
            data[offset + hpa - start : offset + hpa - start + PAGE_SIZE] = 0
    return data


@pytest.fixture(scope="module", params=captures.every())
def case(request):
    """A capture, and what is found in it with its control structures and without them."""
    capture = captures.get(request.param)
    whole = HostMemory.from_segments(FileSource(capture.path), capture._segments)
    blank = HostMemory.from_segments(FileSource(zeroed(capture)), capture._segments)
    return capture, search.discover(whole), search.discover(blank)


def test_the_same_machines_are_found_without_control_structures(case):
    _, announced, unannounced = case
    assert {m.id: m.root.address for m in unannounced.machines} == {m.id: m.root.address for m in announced.machines}
    assert all("page tables" in m.found_by for m in unannounced.machines)


def test_they_hold_the_same_memory(case):
    _, announced, unannounced = case
    for one, other in zip(announced.machines, unannounced.machines, strict=True):
        assert one.memory.starts.tolist() == other.memory.starts.tolist()
        assert one.memory.offsets.tolist() == other.memory.offsets.tolist()


def test_a_cr3_of_the_guest_is_found_with_them(case):
    _, _, unannounced = case
    assert all(m.guest_cr3 is not None for m in unannounced.machines)


def test_an_index_gives_the_same_result_as_the_search_that_made_it(case):
    capture, announced, _ = case
    whole = HostMemory.from_segments(FileSource(capture.path), capture._segments)
    again = search.discover(whole, known=announced.index)
    assert [(m.id, m.root, m.found_by, m.system, m.evidence) for m in again.all()] == [
        (m.id, m.root, m.found_by, m.system, m.evidence) for m in announced.all()
    ]
    assert again.index == announced.index
