"""A guest's memory in the host's own addresses, however deeply the guest is nested.

A machine's map leads to the memory that holds its tables: the host's, or that of the machine it runs in. Here the maps
of a whole line of machines are composed into one, and the rights of all of them with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from volatility3_ept.core import gpamap
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.machines import Discovery, Machine
from volatility3_ept.core.memory import Bools, HostMemory, Int64
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec.dialect import State


@dataclass(frozen=True)
class HostRuns:
    """Where a guest's memory lies in the host: runs ascending by guest-physical address.

    ``accesses`` are :class:`~volatility3_ept.spec.paging.Access` bits, the AND over all hierarchies of the line.
    ``recovered``: one of the hierarchies lacks the page, and its VMM has it.
    """

    gpas: Int64
    lengths: Int64
    hpas: Int64
    accesses: Int64
    recovered: Bools

    def __len__(self) -> int:
        """Return the number of runs."""
        return int(self.gpas.size)

    @property
    def bytes(self) -> int:
        """Guest-physical bytes that lead to a frame of the host."""
        return int(self.lengths.sum())

    def frames(self) -> tuple[Int64, Int64]:
        """Return the host's ranges ``(starts, ends)`` that the guest uses, ascending and disjoint."""
        return gpamap.union(self.hpas, self.hpas + self.lengths)

    def to_hpa(self, gpas: Int64) -> Int64:
        """Translate many addresses at once; -1 where nothing is mapped."""
        if not len(self):
            return np.full(np.shape(gpas), -1, dtype=np.int64)
        index = np.maximum(np.searchsorted(self.gpas, gpas, side="right") - 1, 0)
        within = np.asarray(gpas, dtype=np.int64) - self.gpas[index]
        return np.where((within >= 0) & (within < self.lengths[index]), self.hpas[index] + within, np.int64(-1))


@dataclass(frozen=True)
class Line:
    """A machine and those it runs in: maps from the innermost to the one over the host. ``below`` holds its tables.

    ``id`` is what ``--guest`` takes; ``ids`` name the machines of ``maps``.
    """

    id: str
    maps: tuple[GuestMap, ...]
    ids: tuple[str, ...]
    below: HostMemory
    machine: Machine | None = None

    def host_runs(self) -> HostRuns:
        """Compose the maps."""
        runs = _plain(self.maps[0])
        for outer in self.maps[1:]:
            runs = _through(runs, outer)
        return runs

    def through(self, gpas: Int64) -> list[tuple[str, Int64]]:
        """Return for addresses of the innermost machine those in each machine around it, as ``(id, addresses)``."""
        steps: list[tuple[str, Int64]] = []
        for inner, name in zip(self.maps[:-1], self.ids[1:], strict=True):
            gpas = inner.to_hpa(gpas)
            steps.append((name, gpas))
        return steps


def whole(machine: Machine) -> GuestMap:
    """Return what EPT or NPT maps, and what was recovered beside it."""
    return machine.recovery.guest_map if machine.recovery else machine.guest_map


def line(found: Discovery, memory: HostMemory, machine: Machine) -> Line:
    """Return a machine of ``found`` with all machines around it; ``memory`` is the capture's."""
    members = [machine]
    while members[-1].tables_in:
        outer = found.find(members[-1].tables_in)
        if outer is None:
            raise LookupError(f"machine {members[-1].tables_in}, in which {machine.id} runs, is not among those found")
        members.append(outer)
    below = members[1].memory if len(members) > 1 else memory
    return Line(machine.id, tuple(map(whole, members)), tuple(m.id for m in members), below, machine)


def lines(found: Discovery, memory: HostMemory) -> list[Line]:
    """Return every machine with those around it, parents before children."""
    return [line(found, memory, machine) for machine in found.all()]


def alone(name: str, guest_map: GuestMap, below: HostMemory) -> Line:
    """Return the line of a root of the host that the user gave: no machine is known for it."""
    return Line(name, (guest_map,), (name,), below)


def _plain(guest_map: GuestMap) -> HostRuns:
    return HostRuns(guest_map.gpas, guest_map.lengths, guest_map.hpas, guest_map.accesses, _recovered(guest_map.words))


def _recovered(words: Int64) -> Bools:
    again: npt.NDArray[np.bool_] = (words >> gpamap.STATE_SHIFT & 7) == int(State.RECOVERED)
    return again


def _through(runs: HostRuns, outer: GuestMap) -> HostRuns:
    """Follow runs through the map of the machine around: what that lacks, the inner one lacks too."""
    order = np.argsort(runs.hpas, kind="stable")
    starts = runs.hpas[order]
    index, other, low, high = overlaps(starts, starts + runs.lengths[order], outer.gpas, outer.gpas + outer.lengths)
    index = order[index]
    gpas = runs.gpas[index] + low - runs.hpas[index]
    hpas = outer.hpas[other] + low - outer.gpas[other]
    accesses = runs.accesses[index] & outer.accesses[other]
    recovered = runs.recovered[index] | _recovered(outer.words)[other]
    back = np.argsort(gpas, kind="stable")
    return HostRuns(gpas[back], (high - low)[back], hpas[back], accesses[back], recovered[back])
