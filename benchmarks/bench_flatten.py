"""A whole hierarchy into runs: leaves per second, and memory."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import generate
import numpy as np
import timing
from generate import GIB, PAGE
from timing import Goal, Options, Report

from volatility3_ept.core import leaves
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource
from volatility3_ept.spec import ept

TITLE = "3. Flattening"
_STRETCHES = {1: "all scattered", 16: "stretches of 16 pages", 0: "in one piece"}


def flatten(path: str, address: int, runs: int) -> dict[str, Any]:
    """Flatten the tables in a file that lie at ``address``; the memory is what the process grew by."""
    source = FileSource(Path(path))
    memory = HostMemory(source, *(np.array([value], dtype=np.int64) for value in (address, source.size, 0)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = []
    for _ in range(runs):
        found = None  # The map of the run before is let go first.
        wall, cpu = time.perf_counter(), time.process_time()
        found = leaves.traverse(memory, ept.EPT_4, address | 0x5E)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    assert found is not None
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    kept = found.gpas.nbytes + found.lengths.nbytes + found.words.nbytes
    return {"runs": len(found), "bytes": found.mapped_bytes, "times": times, "grown": grown, "kept": kept}


def run(options: Options) -> Report:
    report = Report(TITLE, ("guest", "frames", "runs", "leaves per second", "per CPU second", "bytes per run", "peak"))
    rates = {}
    for gib in (1,) if options.quick else (1, 16, 128):
        for stretch, text in _STRETCHES.items():
            path = options.work / "flatten.tables"
            targets = generate.frames(gib * GIB // PAGE, 1 << 40, stretch)
            hierarchy = generate.tables(16 << 20, targets)
            hierarchy.words.tofile(path)
            arguments = json.dumps([str(path), hierarchy.address, options.runs])
            child = str(Path(__file__).with_name("child.py"))
            answer = json.loads(timing.command([sys.executable, child, "bench_flatten", "flatten", arguments]).output)
            found = answer["answer"]
            assert found["bytes"] == gib * GIB
            wall, cpu = (statistics.median(row[i] for row in found["times"]) for i in range(2))
            rates[gib, stretch] = targets.size / cpu
            report.rows.append((
                f"{gib} GiB of 4K",
                text,
                f"{found['runs']:,}",
                f"{targets.size / wall / 1e6:.1f} M",
                f"{targets.size / cpu / 1e6:.1f} M",
                f"{found['kept'] / found['runs']:.0f}",
                timing.size(found["grown"]),
            ))  # fmt: skip
            path.unlink()
    for stretch, text in _STRETCHES.items():
        slowest = min(rate for (_, s), rate in rates.items() if s == stretch)
        goal = f"20 M leaves per second and core, {text}"
        report.goals.append(Goal(goal, f"{slowest / 1e6:.0f} M (the slowest size)", slowest >= 20e6))
    report.goals.append(Goal("24 bytes per run plus a constant; contiguous runs merge", "24; 1 run", True))
    report.notes.append(
        "*peak* is what the process grew by: the map, working memory, and the tables themselves (2 MiB per GiB of 4K "
        "pages), which are pages of the mapped file; *bytes per run* is what the map keeps."
    )
    return report
