"""The machines in the real captures, found once for all tests."""

from __future__ import annotations

import functools

import captures

from volatility3_ept.core import backing, search
from volatility3_ept.core.backing import Recovery
from volatility3_ept.core.machines import Discovery, Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource


@functools.cache
def capture(name: str) -> tuple[HostMemory, Discovery]:
    """Return the memory of a capture and what is in it; skips the test where the capture is absent."""
    held = captures.get(name)
    below = HostMemory.from_segments(FileSource(held.path), held._segments)
    return below, search.discover(below)


def guests(name: str) -> list[Machine]:
    """Return the guests of the host itself."""
    return [machine for machine in capture(name)[1].machines if not machine.tables_in]


@functools.cache
def recovery(name: str, machine_id: str) -> Recovery:
    """Return what the VMM's page tables say of a guest of the host."""
    below, discovery = capture(name)
    machine = discovery.find(machine_id)
    assert machine is not None
    return backing.recover(below, machine.guest_map)
