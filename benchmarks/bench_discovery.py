"""How fast machines are found, in bytes of host memory per second."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import generate
import peers
import timing
from generate import GIB, PAGE
from timing import Goal, Options, Report, Sample

TITLE = "1. Discovery"


def host(folder: Path, length: int) -> Path:
    """Write a raw image without holes: one guest of 128 MiB in memory as hosts have it. Written once, then kept."""
    path = folder / f"discovery-{length >> 20}M.raw"
    if path.exists() and path.stat().st_size == length:
        return path
    targets = generate.frames(32768, 64 << 20, 8)
    hierarchy = generate.tables(16 << 20, targets)
    ram = generate.kernel(targets, PAGE, hierarchy, 8 << 20)
    generate.filler(length).tofile(path)
    with path.open("r+b") as file:
        for address, data in [(hierarchy.address, hierarchy.words.tobytes()), *ram.runs()]:
            file.seek(address)
            file.write(data)
    return path


def run(options: Options) -> Report:
    small, large = (host(options.work, size) for size in (GIB // 4, GIB // 2 if options.quick else 2 * GIB))
    own = peers.clean(options.work / "cache-own")
    ours = [*peers.own(), "--offline", "-q", "-f"]

    def scan(image: Path) -> Sample:
        image.touch()  # Another time of modification: the index of an earlier search is not used.
        return timing.command([*ours, str(image), "ept.scan", "--no-host-check"], own)

    actions: dict[tuple[str, str], Callable[[], Sample]] = {
        ("ept.scan", "small"): lambda: scan(small),
        ("ept.scan", "large"): lambda: scan(large),
        ("read", "small"): lambda: timing.command(["sh", "-c", 'cat "$1" > /dev/null', "sh", str(small)]),
        ("read", "large"): lambda: timing.command(["sh", "-c", 'cat "$1" > /dev/null', "sh", str(large)]),
    }
    if options.peers:
        vmscan = [str(peers.volatility(options.work)), "--offline", "-q", "-f"]
        other = peers.clean(options.work / "cache-peer")
        actions["vmscan", "small"] = lambda: timing.command([*vmscan, str(small), "vmscan"], other)
        actions["vmscan", "large"] = lambda: timing.command([*vmscan, str(large), "vmscan"], other)
    samples = timing.in_turn(actions, options.runs)
    extra = large.stat().st_size - small.stat().st_size
    names = list(dict.fromkeys(name for name, _ in actions))
    rates = {
        name: [
            extra / max(b.wall - a.wall, 1e-9)
            for a, b in zip(samples[name, "small"], samples[name, "large"], strict=True)
        ]
        for name in names
    }
    report = Report(TITLE, ("tool", "rate", "whole command, large file: wall", "CPU"))
    for name in names:
        whole = samples[name, "large"]
        report.rows.append((
            f"`{name}`" if name != "read" else "`cat FILE > /dev/null`",
            f"{statistics.median(rates[name]) / 1e9:.3g} GB/s",
            f"{timing.wall(whole):.2f} s",
            f"{timing.cpu(whole):.2f} s",
        ))  # fmt: skip

    def against(name: str) -> float:
        return statistics.median(a / b for a, b in zip(rates["ept.scan"], rates[name], strict=True))

    plain = 1 / against("read")
    if options.peers:
        by, whole = against("vmscan"), timing.ratio(samples["vmscan", "large"], samples["ept.scan", "large"])
        processor = timing.cpu_ratio(samples["vmscan", "large"], samples["ept.scan", "large"])
        figure = f"{by:.1f} x by rate; whole command {whole:.1f} x, in CPU {processor:.1f} x"
        report.goals.append(Goal("20 x `vmscan`", figure, by >= 20))
        report.notes.append(
            "`vmscan` compares the first four bytes of each page with five numbers and looks at nothing else of it: "
            "its rate is that of its reads, and a search that looks at pages cannot be twenty times as fast. What its "
            "command takes longer is Volatility's search for the host's kernel, which ours does not wait for."
        )
        answer = _chipsec(small, options)
        rate = small.stat().st_size / answer.wall
        by = statistics.median(rates["ept.scan"]) / rate
        report.goals.append(Goal("200 x CHIPSEC `ept_finder`", f"{by:.0f} x", by >= 200))
        report.rows.append((
            "CHIPSEC `ept_finder`, small file, 1 run", f"{rate / 1e9:.3g} GB/s", f"{answer.wall:.1f} s",
            f"{answer.cpu:.1f} s",
        ))  # fmt: skip
    report.goals.append(Goal("within 3 x of the plain read", f"{plain:.1f} x as long", plain <= 3))
    report.notes.append(
        f"Files of {timing.size(small.stat().st_size)} and {timing.size(large.stat().st_size)}, raw, without holes, in "
        "the page cache: a third zeros, a third file contents, a third pointers and small numbers, and one guest of "
        "128 MiB. The rate is what the larger file took more, per byte more: start-up counts for no tool."
    )
    return report


def _chipsec(image: Path, options: Options) -> Sample:
    base = options.work / "discovery-chipsec"
    link = base.with_name(base.name + ".dram_lo")
    link.unlink(missing_ok=True)
    link.symlink_to(image)
    folder = options.work / "chipsec-output"
    folder.mkdir(exist_ok=True)
    arguments = [str(peers.chipsec(options.work)), *peers.CHIPSEC_ARGUMENTS, f"file,{base},0x12"]
    return timing.command(["sh", "-c", '"$@" > out.txt; true', "sh", *arguments], cwd=folder)
