"""One machine as ``ept.map`` shows it: the fate of every page, where its memory lies in the host, what it shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from volatility3_ept.core import coverage, sharing
from volatility3_ept.core.coverage import Coverage, Fate
from volatility3_ept.core.lineage import HostRuns, Line
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.sharing import Shared
from volatility3_ept.spec.bits import size_name

#: No memory of the guest: such pages have no share of it.
NO_MEMORY = (Fate.MMIO, Fate.NOT_MAPPED)
#: Nothing is lost where one of these holds.
AT_HAND = (Fate.MAPPED, Fate.RECOVERED)


class Part(NamedTuple):
    """A stretch of one fate. ``hpa`` is None where it lies in no frame, or in ``runs`` pieces instead of one."""

    gpa: int
    length: int
    fate: Fate
    hpa: int | None
    runs: int


@dataclass(frozen=True)
class Portrait:
    """What is known of one machine's memory."""

    line: Line
    coverage: Coverage
    runs: HostRuns
    shared: Shared = field(default_factory=Shared)

    @property
    def id(self) -> str:
        """What ``--guest`` takes."""
        return self.line.id

    @property
    def memory(self) -> int:
        """Bytes of guest memory: all that is no device and no hole."""
        return memory_bytes(self.coverage.totals())

    @property
    def system(self) -> str:
        """What runs in the machine."""
        return self.line.machine.system if self.line.machine else "unknown"

    @property
    def confidential(self) -> tuple[str, ...]:
        """What says that some of the memory is ciphertext in the capture."""
        return self.line.machine.confidential if self.line.machine else ()

    @property
    def facts(self) -> str:
        """The root and the slots in one line."""
        machine = self.line.machine
        if machine is None:
            return self.id
        text = f"{machine.root.kind} root {machine.root.raw:#x}, {machine.root.levels} levels"
        slots = machine.recovery.slots if machine.recovery else ()
        if slots:
            plural = "slot" if len(slots) == 1 else "slots"
            text += f", {len(slots)} memory {plural} of {size_name(sum(slot.length for slot in slots))}"
        return text + (f", in machine {machine.tables_in}" if machine.tables_in else "")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the traversal and the recovery have to say; the same in every run."""
        said = list(self.line.maps[0].findings.notes)
        machine = self.line.machine
        said += self.confidential
        recovery = machine.recovery if machine else None
        if recovery is None:
            said.append("pages that EPT or NPT lacks were not looked for")
        elif not recovery.slots:
            said.append(
                "no process of the host was found that maps this guest's memory: what EPT or NPT lacks is unknown"
            )
        else:
            sure = sum(slot.confirmed for slot in recovery.slots)
            said.append(f"the monitor's process, at CR3 {recovery.root:#x}, keeps the guest in {len(recovery.slots)} "
                        f"memory slots; {sure} with the bounds of KVM's own record")  # fmt: skip
        if recovery is not None and recovery.conflicts.size:
            size = size_name(int(recovery.conflicts[:, 1].sum()))
            said.append(f"{size} lie in other frames by the host's page tables: EPT or NPT was believed")
        return tuple(said)

    def parts(self) -> Iterator[Part]:
        """Yield the stretches of the coverage, ascending, with the frames that they lie in."""
        runs, covered = self.runs, self.coverage
        ends = covered.gpas + covered.lengths
        first = np.searchsorted(runs.gpas + runs.lengths, covered.gpas, side="right")
        count = np.maximum(np.searchsorted(runs.gpas, ends, side="left") - first, 0)
        hpas = runs.to_hpa(covered.gpas)
        for part, pieces, hpa in zip(covered.parts(), count.tolist(), hpas.tolist(), strict=True):
            yield Part(*part, hpa if hpa >= 0 and pieces == 1 else None, pieces)

    def summary(self) -> str:
        """Say in one line how much memory there is and whether all of it can be read."""
        return summary(self.coverage.totals())


def summary(totals: dict[Fate, int]) -> str:
    """Return the totals of a coverage in one line: memory, what of it can be read, and what cannot."""
    memory = memory_bytes(totals)
    held = sum(totals[fate] for fate in AT_HAND)
    lost = memory - held - totals[Fate.NEVER_BACKED]
    text = f"{size_name(memory)} of memory, {size_name(held)} of it readable"
    if totals[Fate.NEVER_BACKED]:
        text += f", {size_name(totals[Fate.NEVER_BACKED])} never backed"
    return text + (f", {size_name(lost)} out of reach" if lost else "")


def portraits(lines: Sequence[Line], memory: HostMemory, chosen: Sequence[str] | None = None) -> list[Portrait]:
    """Return the machines of ``lines``, or those whose ids are ``chosen``. ``memory`` is the capture's."""
    runs = [line.host_runs() for line in lines]
    shared = sharing.count(lines, runs, memory)
    found = []
    for line, own in zip(lines, runs, strict=True):
        if chosen is None or line.id in chosen:
            machine = line.machine
            guest_map = machine.guest_map if machine else line.maps[0]
            covered = coverage.account(guest_map, line.below, machine.recovery if machine else None)
            found.append(Portrait(line, covered, own, shared[line.id]))
    return found


def memory_bytes(totals: dict[Fate, int]) -> int:
    """Return how much of the address space is memory."""
    return sum(size for fate, size in totals.items() if fate not in NO_MEMORY)


def shared_text(shared: Shared) -> list[str]:
    """Say what a machine shares. Sharing is ordinary; the words must not make an attack of it."""
    said = []
    if shared.repeated:
        zeros = f", {size_name(shared.zero)} of them zeros" if shared.zero else ""
        said.append(
            f"shared: {size_name(shared.repeated)} of frames appear at several addresses of this guest{zeros}; "
            f"they stand for {size_name(shared.saved)} more guest memory"
        )
    if shared.others:
        said.append(f"shared: {size_name(shared.others)} of frames are mapped by {', '.join(shared.with_guests)} too")
    return said
