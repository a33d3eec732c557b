"""The real nested captures: the tree, and the innermost guest's memory through both hierarchies that map it."""

from __future__ import annotations

import hashlib

import captures
import discovered
import pytest

from volatility3_ept.spec.bits import PAGE_SIZE

NESTED = [
    pytest.param(name, marks=() if capture.entry["committed"] else pytest.mark.corpus)
    for name, capture in captures.manifest().items()
    if name.endswith("nested")
]


@pytest.fixture(params=NESTED)
def case(request):
    """A capture, the truth of its innermost guest, and the machine that was found for it."""
    capture = captures.get(request.param)
    below, found = discovered.capture(request.param)
    (truth,) = [guest for guest in capture.guests if guest.facts["level"] == 3]
    (outer,) = found.machines
    (inner,) = outer.children
    return capture, below, outer, inner, truth


def pages_equal(memory, truth) -> int:
    """Return how many pages equal the truth; fail on one that is there and differs."""
    equal = 0
    for gpa, (_, digest) in truth.pages.items():
        data = memory.read(gpa, PAGE_SIZE)
        if data is not None:
            assert hashlib.sha256(data).hexdigest() == digest, f"page {gpa:#x} is wrong"
            equal += 1
    return equal


def test_the_tree_is_a_guest_and_its_guest(case):
    _, _, outer, inner, _ = case
    assert (outer.id, inner.id, inner.children) == ("0", "0.0", ())


def test_the_machine_is_the_one_of_the_nested_structure_and_its_view_the_shadow(case):
    capture, _, _, inner, truth = case
    roots = {
        item["role"]: int(item["slat_root"], 0)
        for item in capture.truth["control_structures"]
        if item.get("guest") == truth.facts["name"]
    }
    assert {inner.root.address, *(view.root.address for view in inner.views)} == {roots["nested"], roots["shadow"]}


def test_every_page_of_the_innermost_guest_is_right_through_both_hierarchies(case):
    _, below, outer, inner, truth = case
    assert pages_equal(inner.memory, truth) == len(truth.pages)
    for view in inner.views:
        space = outer.memory if view.tables_in else below
        memory = view.root.traverse(space).memory(space)
        assert pages_equal(memory, truth) >= 0.85 * len(truth.pages)


def test_the_frames_are_those_of_the_capture(case):
    capture, below, _, inner, truth = case
    for gpa, (frame, _) in truth.pages.items():
        data = inner.memory.read(gpa, PAGE_SIZE)
        assert data == capture.page(frame * PAGE_SIZE)
        assert data == below.read(frame * PAGE_SIZE, PAGE_SIZE)
