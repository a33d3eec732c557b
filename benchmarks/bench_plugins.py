"""Whole plugins inside a guest, against the same plugins on that guest's memory as a raw image."""

from __future__ import annotations

import shutil
from pathlib import Path

import peers
import timing
from images import ROOT
from timing import Goal, Options, Report, Sample

TITLE = "5. Whole plugins"
_CAPTURE = ROOT / "testdata" / "kvm-ept"
_PLUGINS = {
    "linux.pslist": [],
    "linux.lsof": [],
    "regexscan.RegExScan": ["--pattern", "Linux version [0-9.]+"],
}


def guest_image(target: Path) -> Path:
    """Write the guest's memory as the truth beside the capture has it: by host frame, no nested tables involved."""
    import captures

    capture = captures.get("kvm-ept")
    pages = capture.guests[0].pages
    with target.open("wb") as file:
        file.truncate(max(pages) + 4096)
        for gpa, (frame, _) in pages.items():
            file.seek(gpa)
            file.write(capture.page(frame << 12))
    return target


def raw_host(target: Path) -> Path:
    """Write the host as a raw image, so that Volatility's reader of ELF cores has no part in the comparison."""
    import captures

    capture = captures.get("kvm-ept")
    with capture.path.open("rb") as image, target.open("wb") as file:
        for start, size, offset in capture._segments:
            image.seek(offset)
            file.seek(start)
            file.write(image.read(size))
    return target


def run(options: Options) -> Report:
    titles = ("plugin", "host", "in the guest: wall", "CPU", "on its raw image: wall", "CPU", "ratio", "CPU ratio")
    report = Report(TITLE, titles)
    if not _CAPTURE.is_dir():
        report.notes.append("Not measured: the capture `testdata/kvm-ept` is not here.")
        return report
    folder = options.work / "plugins"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    guest = guest_image(folder / "guest.raw")
    hosts = {"raw": raw_host(folder / "host.raw"), "ELF core": _CAPTURE / "host.elf"}
    cache = peers.clean(folder / "cache")
    ours = [*peers.own(), "--offline", "-q", "-s", str(ROOT / "testdata" / "symbols"), "-f"]

    def run_plugin(plugin: str, image: Path, *arguments: str) -> Sample:
        return timing.command([*ours, str(image), *arguments, plugin, *_PLUGINS[plugin]], cache)

    for plugin in _PLUGINS:
        actions = {name: (lambda p=plugin, h=host: run_plugin(p, h, "--guest", "0")) for name, host in hosts.items()}
        actions["guest"] = lambda p=plugin: run_plugin(p, guest)
        warm = timing.in_turn(actions, 1)  # Fills Volatility's caches, and the index.
        lines = {name: sorted(found[0].output.splitlines()) for name, found in warm.items()}
        samples = timing.in_turn(actions, options.runs)
        for name in hosts:
            ratio = timing.ratio(samples[name], samples["guest"])
            processor = timing.cpu_ratio(samples[name], samples["guest"])
            report.rows.append((
                f"`{plugin}`" + ("" if lines[name] == lines["guest"] else " (different output)"),
                name,
                *(f"{value:.2f} s" for key in (name, "guest") for value in
                  (timing.wall(samples[key]), timing.cpu(samples[key]))),
                f"{ratio:.2f} x",
                f"{processor:.2f} x",
            ))  # fmt: skip
            if name == "raw":
                figure = f"{processor:.2f} x in CPU, {ratio:.2f} x in wall time"
                report.goals.append(Goal(f"`{plugin}`: at most 1.15 x", figure, processor <= 1.15))
    report.notes.append(
        "The host of `testdata/kvm-ept`, warm: symbol tables and the index of the search are cached, as for the second "
        "command of an analysis. The guest's raw image holds its pages as the monitor's own records place them, zeros "
        "where it has none. Outputs were compared. The goals are judged on the raw host: to open an ELF core of "
        "thousands of segments takes Volatility about a second of CPU, with and without a guest."
    )
    shutil.rmtree(folder)
    return report
