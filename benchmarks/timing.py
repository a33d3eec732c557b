"""Measuring: paired runs in turn, medians, CPU seconds beside wall time, peak memory of a command."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Key = TypeVar("Key")


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    work: Path
    peers: bool = False
    quick: bool = False
    runs: int = 5


@dataclass(frozen=True)
class Sample:
    """One run: seconds of wall time and of CPU, peak resident set in bytes (of a command), and what it printed."""

    wall: float
    cpu: float
    peak: int = 0
    output: str = ""


@dataclass(frozen=True)
class Goal:
    """One goal of the project beside the figure that was measured. ``met`` is None where nothing could be measured."""

    text: str
    figure: str
    met: bool | None


@dataclass
class Report:
    """What one benchmark gives: goals first, then a table of medians, then what a reader should know."""

    title: str
    head: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        if self.goals:
            lines += ["| goal | measured | |", "| --- | --- | --- |"]
            words = {True: "met", False: "**missed**", None: "not measured"}
            lines += [f"| {goal.text} | {goal.figure} | {words[goal.met]} |" for goal in self.goals]
            lines.append("")
        lines += ["| " + " | ".join(self.head) + " |", "|" + " --- |" * len(self.head)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"


def here(action: Callable[[], object]) -> Sample:
    """Run something in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def command(arguments: list[str], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Sample:
    """Run a command to its end; RuntimeError with its last line when it fails."""
    program = [sys.executable, "-S", "-E", str(Path(__file__).with_name("measure.py")), *arguments]
    result = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    status, wall, cpu, peak = result.stderr.rpartition("\n")[2].split()
    if status != "0":
        last = (result.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{' '.join(arguments)}: exit status {status}: {last}")
    return Sample(float(wall), float(cpu), int(peak) * 1024, result.stdout)


def in_turn(actions: Mapping[Key, Callable[[], Sample]], runs: int) -> dict[Key, list[Sample]]:
    """Run A B C A B C ...: what else the machine does meanwhile disturbs all of them alike."""
    samples: dict[Key, list[Sample]] = {name: [] for name in actions}
    for _ in range(runs):
        for name, action in actions.items():
            samples[name].append(action())
    return samples


def wall(samples: list[Sample]) -> float:
    return statistics.median(sample.wall for sample in samples)


def cpu(samples: list[Sample]) -> float:
    return statistics.median(sample.cpu for sample in samples)


def peak(samples: list[Sample]) -> int:
    return max(sample.peak for sample in samples)


def ratio(slow: list[Sample], fast: list[Sample]) -> float:
    """Return the median over the pairs: how many times as long the first took, in wall time."""
    return statistics.median(a.wall / b.wall for a, b in zip(slow, fast, strict=True))


def cpu_ratio(slow: list[Sample], fast: list[Sample]) -> float:
    return statistics.median(a.cpu / b.cpu for a, b in zip(slow, fast, strict=True))


def size(count: float) -> str:
    """Return a number of bytes as people write it."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.3g} {unit}"
    return f"{count:.0f} B"
