"""What a damaged capture may say: each page is the truth's, or the damage in it is stated."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import captures
import numpy as np
from captures import PAGE, Capture

from volatility3_ept.core import search
from volatility3_ept.core.machines import Discovery, Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource

NAMES = ("kvm-ept", "kvm-npt")
FRAME = 0x000F_FFFF_FFFF_F000


@dataclass(frozen=True)
class Truth:
    """A capture as it was, and what is known of its one guest."""

    capture: Capture
    data: bytes

    @property
    def segments(self):
        return self.capture._segments

    @functools.cached_property
    def memory(self) -> HostMemory:
        return HostMemory.from_segments(FileSource(self.data), list(self.segments))

    @functools.cached_property
    def root(self) -> int:
        return next(int(s["slat_root"], 0) for s in self.capture.truth["control_structures"] if "slat_root" in s)

    @functools.cached_property
    def structure(self) -> int:
        return next(int(s["hpa"], 0) for s in self.capture.truth["control_structures"] if "slat_root" in s)

    @functools.cached_property
    def pages(self) -> tuple[np.ndarray, np.ndarray]:
        """Guest-physical addresses, and where they lie in the host."""
        rows = sorted((gpa, frame * PAGE) for gpa, (frame, _) in self.capture.guests[0].pages.items())
        table = np.array(rows, dtype=np.int64)
        return table[:, 0], table[:, 1]

    @functools.cached_property
    def tables(self) -> list[list[int]]:
        """Addresses of the tables of the guest's EPT or NPT, level by level, read here entry by entry."""
        levels = [[self.root]]
        for _ in range(3):
            below = set()
            for table in levels[-1]:
                for entry in struct.unpack("<512Q", self.capture.page(table)):
                    # Not present, a large page, or KVM's marker for MMIO: no table.
                    if entry & 7 and not entry & 0x80 and entry & (1 << 11):
                        below.add(entry & FRAME)
            levels.append(sorted(below))
        return levels


@functools.cache
def truth(name: str) -> Truth:
    capture = captures.get(name)
    return Truth(capture, capture.path.read_bytes())


def searched(data: bytes | bytearray, segments) -> tuple[HostMemory, Discovery]:
    memory = HostMemory.from_segments(FileSource(bytes(data)), list(segments))
    return memory, search.discover(memory)


def guest_of(found: Discovery, known: Truth) -> Machine | None:
    return next((m for m in found.machines if m.root.address == known.root), None)


def assert_nothing_else(found: Discovery, known: Truth) -> None:
    """No machine but the true one is claimed; and where even that is missing, somebody says why."""
    assert {m.root.address for m in found.all()} <= {known.root}
    if not found.machines:
        assert found.rejected or found.near_misses or found.pages


def assert_true_or_stated(found: Discovery, known: Truth) -> int:
    """See that each page of the guest lies in its true frame, or is among those that are called into question.

    Returns how many of the truth's pages are there and equal.
    """
    machine = guest_of(found, known)
    assert_nothing_else(found, known)
    if machine is None:
        return 0
    gpas, hpas = known.pages
    whole = machine.recovery.guest_map if machine.recovery else machine.guest_map
    seen = whole.to_hpa(gpas)
    wrong = (seen >= 0) & (seen != hpas)
    doubtful = questioned(machine, gpas)
    rows, held = machine.memory.words(gpas)
    true, _ = known.memory.words(hpas)
    equal = held & (rows == true).all(axis=1)
    silent = wrong & ~doubtful & ~equal
    assert not silent.any(), f"{int(silent.sum())} pages are another's and nothing says so: {gpas[silent][:8]}"
    # What the truth does not know must not be there either: firmware's and devices' pages are known to both.
    invented = _pages(whole) - set(gpas.tolist())
    plain = _pages(undamaged(known.capture.name)) - set(gpas.tolist())
    new = np.array(sorted(invented - plain), dtype=np.int64)
    assert questioned(machine, new).all(), f"pages that no guest had: {new[:8]}"
    return int(equal.sum())


def questioned(machine: Machine, gpas: np.ndarray) -> np.ndarray:
    """Tell which pages the result itself calls into question: a conflict with the host's own tables, or a slot left."""
    asked = np.zeros(gpas.shape, dtype=bool)
    recovery = machine.recovery
    rows = [] if recovery is None else [row[:2] for row in recovery.conflicts.tolist()]
    doubted = [s for s in recovery.slots if not s.confirmed] if recovery else []
    rows += [(s.gpa, s.length) for s in doubted if any(f"slot at {s.gpa:#x} has no" in n for n in recovery.notes)]
    for gpa, length in rows:
        asked |= (gpas >= gpa) & (gpas < gpa + length)
    slots = recovery.slots if recovery else ()
    if slots:
        # Outside of every slot of the VMM: the host has no memory for the guest there.
        asked |= ~np.any([(gpas >= s.gpa) & (gpas < s.gpa + s.length) for s in slots], axis=0)
    else:
        asked |= True  # No VMM was found, and the machine's evidence says so.
        assert any(item.name == "recovered" and item.held is None for item in machine.evidence)
    return asked


@functools.cache
def undamaged(name: str):
    known = truth(name)
    machine = guest_of(searched(known.data, known.segments)[1], known)
    return machine.recovery.guest_map


def _pages(guest_map) -> set[int]:
    return {
        page
        for gpa, length in zip(guest_map.gpas.tolist(), guest_map.lengths.tolist(), strict=True)
        for page in range(gpa, gpa + length, PAGE)
    }
