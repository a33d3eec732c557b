"""A guest written as an image of its own, against a plain copy of the same bytes and against Volatility's writer."""

from __future__ import annotations

import shutil

import generate
import peers
import timing
from generate import GIB, PAGE
from timing import Goal, Options, Report, Sample

TITLE = "4. Carving"


def run(options: Options) -> Report:
    length = GIB // 8 if options.quick else GIB
    folder = options.work / "carve"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    image, first = folder / "host.raw", 2 * GIB
    targets = generate.frames(length // PAGE, first, 16)
    hierarchy = generate.tables(16 << 20, targets)
    ram = generate.kernel(targets, PAGE, hierarchy, 8 << 20)
    generate.sparse_host(image, first + length, [(hierarchy, ram)])
    with image.open("r+b") as file:
        file.seek(first)
        generate.filler(length).tofile(file)
        for address, data in ram.runs():
            file.seek(address)
            file.write(data)
    cache = peers.clean(options.work / "cache-own")
    ours = [*peers.own(), "--offline", "-q", "-f", str(image)]
    timing.command([*ours, "ept.scan", "--no-host-check"], cache)
    written = folder / "out"

    def carve(form: str, *more: str) -> Sample:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir()
        arguments = ["-o", str(written), "ept.carve", "--guest", "0", "--format", form, *more]
        return timing.command([*ours[:-2], "-f", str(image), *arguments], cache)

    def layerwriter() -> Sample:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir()
        return timing.command([*ours, "-o", str(written), "--guest", "0", "layerwriter"], cache)

    carve("raw")
    plain = folder / "plain.raw"
    next(written.glob("*.raw")).rename(plain)

    def copy() -> Sample:
        target = folder / "copy.raw"
        target.unlink(missing_ok=True)
        return timing.command(["cp", "--sparse=always", str(plain), str(target)])

    def nothing() -> Sample:
        return timing.command([*ours, "ept.walk", "--guest", "0", "--gpa", "0x1000"], cache)

    actions = {
        "start": nothing,
        "cp": copy,
        "raw": lambda: carve("raw"),
        "bare": lambda: carve("raw", "--no-hash"),
        "elf": lambda: carve("elf"),
    }
    samples = timing.in_turn(actions, options.runs)
    samples["layerwriter"] = [layerwriter()]
    start = timing.wall(samples["start"])
    names = {
        "cp": "`cp --sparse=always`",
        "raw": "`ept.carve --format raw`",
        "bare": "`ept.carve --format raw --no-hash`",
        "elf": "`ept.carve --format elf`",
        "layerwriter": "`layerwriter`, 1 run",
    }
    report = Report(TITLE, ("writer", "rate", "without start-up", "wall", "CPU", "peak RSS"))
    rates = {}
    for name, text in names.items():
        found = samples[name]
        wall = timing.wall(found)
        rates[name] = length / (wall if name == "cp" else max(wall - start, wall / 100))
        report.rows.append((
            text,
            f"{length / wall / 1e9:.2f} GB/s",
            f"{rates[name] / 1e9:.2f} GB/s",
            f"{wall:.2f} s",
            f"{timing.cpu(found):.2f} s",
            timing.size(timing.peak(found)),
        ))  # fmt: skip
    for name, how in (("bare", "without the hash"), ("raw", "with it")):
        share, by = rates[name] / rates["cp"], rates[name] / rates["layerwriter"]
        report.goals.append(
            Goal(f"70 % of `cp --sparse=always`, {how}", f"{share:.0%}", None if options.quick else share >= 0.7)
        )
        report.goals.append(Goal(f"10 x `layerwriter`, {how}", f"{by:.1f} x", None if options.quick else by >= 10))
    most = rates["cp"] / rates["layerwriter"]
    report.notes.append(
        f"A guest of {timing.size(length)} whose pages lie in stretches of 16; files in the page cache, written to the "
        "same file system. *without start-up* leaves out what `ept.walk` of one address takes on the same host. "
        "Without `--no-hash`, `ept.carve` also computes the SHA-256 of what it writes, which the others never do. "
        f"`cp` itself is {most:.1f} x as fast as `layerwriter` here: that bounds the second goal."
    )
    shutil.rmtree(folder)
    return report
