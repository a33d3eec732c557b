"""A host of 1 TiB, sparse, with two guests of 256 GiB: one of 4K pages, one of 2M pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import generate
import peers
import timing
from generate import GIB, M2, PAGE
from timing import Goal, Options, Report

TITLE = "6. Scale"
_MOST = 1.5 * GIB


def host(path: Path, gib: int, total: int, stretch: int) -> Path:
    """Write a host of ``total`` GiB with two guests of ``gib`` GiB: about 2 MiB per GiB of 4K pages."""
    guests = []
    for number, page in enumerate((PAGE, M2)):
        targets = generate.frames(
            gib * GIB // page, (number + 1) * (total // 4) * GIB, stretch if page == PAGE else 4, page
        )
        hierarchy = generate.tables((1 + number) * 4 * GIB, targets, page)
        guests.append((hierarchy, generate.kernel(targets, page, hierarchy, (64 << 20) + number * PAGE)))
    return generate.sparse_host(path, total * GIB, guests)


def measure(path: Path, options: Options, report: Report, name: str, gib: int) -> dict[str, timing.Sample]:
    """Run the commands of an analysis on one host, each in a process of its own."""
    cache_folder, out = options.work / "cache-scale", options.work / "scale-out"
    for folder in (cache_folder, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    cache = peers.clean(cache_folder)
    ours = [*peers.own(), "--offline", "-q", "-f", str(path)]
    steps = {
        "`ept.scan`, first": ["ept.scan", "--no-host-check"],
        "`ept.scan`, again": ["ept.scan", "--no-host-check"],
        "`ept.walk --gpa`, one address": ["ept.walk", "--guest", "0", "--gpa", hex((gib - 1) * GIB + 0x123)],
        "`ept.walk --eptp --gpa`, no search": ["ept.walk", "--eptp", hex(4 * GIB | 0x5E), "--gpa", "0x1000"],
        "`ept.map`": ["ept.map", "--guest", "0"],
        "`ept.carve`, 256 MiB": [
            "ept.carve",
            "--guest",
            "0",
            "--format",
            "raw",
            "--start",
            "0",
            "--length",
            "0x10000000",
        ],
    }
    samples = {}
    for text, arguments in steps.items():
        if arguments[0] == "ept.carve":
            arguments = ["-o", str(out), *arguments]
        try:
            samples[text] = sample = timing.command([*ours, *arguments], cache)
        except RuntimeError as error:
            report.rows.append((name, text, "failed", "", str(error)[-60:]))
            continue
        report.rows.append((name, text, f"{sample.wall:.1f} s", f"{sample.cpu:.1f} s", timing.size(sample.peak)))
    shutil.rmtree(out)
    found = timing.command([*ours, "-r", "json", "ept.scan", "--no-host-check"], cache).output
    machines = json.loads(found[found.index("[") :])
    assert [row["Mapped"] for row in machines] == [f"{gib}G"] * 2 or len(machines) == 2, machines
    return samples


def run(options: Options) -> Report:
    report = Report(TITLE, ("host", "command", "wall", "CPU", "peak RSS"))
    path = options.work / "scale.raw"
    sizes = ((2, 8, 16),) if options.quick else ((64, 256, 1), (64, 256, 16), (256, 1024, 16))
    results = {}
    for gib, total, stretch in sizes:
        free = shutil.disk_usage(options.work).free
        if free < 2 * GIB:
            report.notes.append(f"A host of {total} GiB was left out: only {timing.size(free)} of disk are free.")
            continue
        host(path, gib, total, stretch)
        how = "scattered" if stretch == 1 else f"stretches of {stretch} pages"
        name = f"{total} GiB, guests of {gib} GiB, 4K pages: {how}"
        results[gib, stretch] = measure(path, options, report, name, gib)
        path.unlink()
    for (gib, stretch), samples in results.items():
        if samples and (stretch == 1 or gib == max(key[0] for key in results)):
            most = max(sample.peak for sample in samples.values())
            how = "every page its own run" if stretch == 1 else "stretches of 16 pages"
            text = f"peak RSS below 1.5 GiB ({gib} GiB guests, {how})"
            report.goals.append(Goal(text, timing.size(most), most < _MOST))
    first = "`ept.scan`, first"
    if (64, 16) in results and (256, 16) in results:
        small, large = (results[gib, 16][first].cpu for gib in (64, 256))
        figure = f"4 x the guest: {large / small:.1f} x the CPU time"
        report.goals.append(Goal("never quadratic", figure, large / small < 6))
    report.notes.append(
        "The file holds the tables and a few pages; all other memory is holes, which are not read. Single runs. Peak "
        "RSS counts pages of the mapped file, too: the tables of the guest of 4K pages alone are 2 MiB per GiB."
    )
    return report
