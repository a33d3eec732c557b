"""Kind 3: frames at two addresses, and frames of two guests."""

from __future__ import annotations

import pytest
from audited import FREE, grave, pair, results
from builders import hooks
from builders.hooks import Victim
from builders.paging import PAGE, HostRam

from volatility3_ept.core import audit_frames
from volatility3_ept.core.audit_finding import Kind, Severity


@pytest.fixture
def victim() -> Victim:
    return Victim(HostRam())


def test_kernel_code_at_a_second_writable_address(victim):
    gpa = victim.code[2]
    hooks.alias(victim, victim.frame(gpa))
    found = results(victim.ram)
    assert grave(found) == [(Kind.ALIAS, Severity.HIGH, gpa)]
    assert f"{FREE:#x}" in found[0].evidence


def test_data_at_a_second_writable_address(victim):
    frame = victim.ram.allocate()
    victim.ram.write(frame, hooks.code(77))
    for number in range(2):
        hooks.alias(victim, frame, FREE + number * PAGE)
    assert grave(results(victim.ram)) == [(Kind.ALIAS, Severity.MEDIUM, FREE)]


@pytest.mark.parametrize("case", ["zero page", "read-only", "ROM shadow"])
def test_what_hypervisors_map_twice_is_info(victim, case):
    frame = victim.ram.allocate()
    if case != "zero page":
        victim.ram.write(frame, hooks.code(9))
    first = 0xF_0000 if case == "ROM shadow" else FREE
    bits = hooks.READ_ONLY if case == "read-only" else None
    hooks.alias(victim, frame, first, bits)
    hooks.alias(victim, frame, 0xFFFF_0000, bits)
    (only,) = results(victim.ram)
    assert (only.kind, only.severity) == (Kind.ALIAS, Severity.INFO)


def test_a_frame_at_three_addresses(victim):
    gpa = victim.code[2]
    for number in range(2):
        hooks.alias(victim, victim.frame(gpa), FREE + number * PAGE)
    assert grave(results(victim.ram)) == [(Kind.ALIAS, Severity.HIGH, gpa)]


@pytest.mark.parametrize(("bits", "expected"), [(None, Severity.LOW), (hooks.READ_ONLY, Severity.INFO)])
def test_more_frames_with_many_addresses_than_are_looked_into(victim, monkeypatch, bits, expected):
    """Pages that KSM merged are many, and nowhere writable."""
    monkeypatch.setattr(audit_frames, "MAX_STRETCHES", 1)
    for page in (0, 2):
        frame = victim.ram.allocate()
        victim.ram.write(frame, hooks.code(page))
        victim.ram.allocate()  # No two of them continue each other.
        for number in range(3):
            hooks.alias(victim, frame, FREE + (8 * number + page) * PAGE, bits)
    rest = results(victim.ram)[-1]
    assert (rest.kind, rest.severity) == (Kind.ALIAS, expected)
    assert ("2 writable stretches with many addresses, 1 looked into" in rest.evidence) is (bits is None)


def test_a_device_that_is_mapped_twice_is_info(victim):
    frames = [victim.ram.allocate() for _ in range(32)]
    for number, frame in enumerate(frames[::2] + frames[1::2]):
        victim.ram.write(frame, hooks.code(number))
        for base in (FREE, 3 * FREE):
            hooks.alias(victim, frame, base + number * PAGE)
    (only,) = results(victim.ram)
    assert (only.kind, only.severity, only.length) == (Kind.ALIAS, Severity.INFO, 32 * PAGE)


def test_a_frame_of_two_guests():
    ram, first, second = pair()
    frame = ram.allocate()
    ram.write(frame, hooks.code(5))
    for each in (first, second):
        hooks.alias(each, frame, FREE)
    assert grave(results(ram)) == [(Kind.SHARED, Severity.MEDIUM, FREE)]


def test_another_guests_kernel():
    ram, first, second = pair()
    hooks.alias(first, second.frame(second.code[1]))
    assert grave(results(ram)) == [(Kind.SHARED, Severity.HIGH, FREE)]


@pytest.mark.parametrize("case", ["read-only", "a shared-memory device"])
def test_what_guests_share_is_info(case):
    ram, first, second = pair()
    frames = [ram.allocate() for _ in range(1 if case == "read-only" else 32)]
    bits = hooks.READ_ONLY if case == "read-only" else None
    for number, frame in enumerate(frames[::2] + frames[1::2]):  # No two of them continue each other in the host.
        ram.write(frame, hooks.code(number))
        hooks.alias(first, frame, FREE + number * PAGE, bits)
        hooks.alias(second, frame, 3 * FREE + number * PAGE, bits)
    (only,) = results(ram)
    assert (only.kind, only.severity) == (Kind.SHARED, Severity.INFO)
