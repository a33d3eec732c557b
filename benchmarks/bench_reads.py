"""Pages read through a guest's layer, against the bare file and against Volatility's own page-table layer."""

from __future__ import annotations

import random
from pathlib import Path

import generate
import timing
from builders.paging import NPT_4
from generate import PAGE
from timing import Goal, Options, Report, Sample
from volatility3.framework import contexts, interfaces
from volatility3.framework.layers import intel, physical

from volatility3_ept.layers.guest import GuestPhysicalLayer

TITLE = "2. Translation and reads"
_ROOT = 16 << 20


def layers(image: Path) -> dict[str, interfaces.layers.DataLayerInterface]:
    """Return the file, the guest, and Volatility's layer for ordinary paging on the same (nested) page tables."""
    context = contexts.Context()
    context.config["file.location"] = image.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["guest.base_layer"] = "file"
    context.config["guest.root"] = f"ncr3={_ROOT:#x}"
    context.add_layer(GuestPhysicalLayer(context, "guest", "guest"))
    context.config["intel.memory_layer"] = "file"
    context.config["intel.page_map_offset"] = _ROOT
    context.add_layer(intel.Intel32e(context, "intel", "intel"))
    return {name: context.layers[name] for name in ("file", "guest", "intel")}


def run(options: Options) -> Report:
    pages = 4096 if options.quick else 65536
    image = options.work / f"reads-{pages}.raw"
    targets = generate.frames(pages, 64 << 20, 1)
    hierarchy = generate.tables(_ROOT, targets, shape=NPT_4)
    ram = generate.kernel(targets, PAGE, hierarchy, 8 << 20)
    generate.sparse_host(image, (64 << 20) + pages * PAGE, [(hierarchy, ram)])
    with image.open("r+b") as file:
        file.seek(64 << 20)
        generate.filler(pages * PAGE).tofile(file)
    opened = layers(image)
    ordered = list(range(0, pages * PAGE, PAGE))
    mixed = random.Random(1).sample(ordered, pages)
    for gpa in mixed[:256]:
        assert opened["guest"].read(gpa, PAGE) == opened["intel"].read(gpa, PAGE)

    def reader(name: str, order: list[int]) -> Sample:
        read = opened[name].read
        #: Volatility's layer gets a tenth of the pages, and its time is multiplied: it would take all day.
        part = order if name != "intel" else order[: len(order) // 8]

        def action() -> None:
            for address in part:
                read(address, PAGE)

        sample = timing.here(action)
        scale = len(order) / len(part)
        return Sample(sample.wall * scale, sample.cpu * scale)

    actions = {
        (name, how): (lambda name=name, order=order: reader(name, order))
        for how, order in (("sequential", ordered), ("random", mixed))
        for name in opened
    }
    samples = timing.in_turn(actions, options.runs)
    names = {
        "guest": "`GuestPhysicalLayer`",
        "file": "`FileLayer`, bare",
        "intel": "`Intel32e` on the NPT",
    }
    report = Report(TITLE, ("layer", "order", "4 KiB reads/s", "MB/s", "CPU per read"))
    for (name, how), found in samples.items():
        rate = pages / timing.wall(found)
        per = timing.cpu(found) / pages * 1e6
        report.rows.append((names[name], how, f"{rate:,.0f}", f"{rate * PAGE / 1e6:,.0f}", f"{per:.2f} us"))
    for how in ("sequential", "random"):
        bare = timing.ratio(samples["file", how], samples["guest", how])
        report.goals.append(Goal(f"80 % of the bare `FileLayer`, {how}", f"{bare:.0%}", bare >= 0.8))
        by = timing.ratio(samples["intel", how], samples["guest", how])
        report.goals.append(Goal(f"3 x `Intel32e`, {how}", f"{by:.1f} x", by >= 3))
    report.goals.append(Goal("3 x Rekall's `VTxPagedMemory`", "see below", None))
    report.notes += [
        f"A guest of {timing.size(pages * PAGE)} under NPT whose pages lie scattered, every page a run of its own. "
        "Python objects per read, not memory bandwidth, decide: that is why a map of the file is faster than the file.",
        "Rekall's layer is not measured: `rekall-core` 1.7.1, the last release, does not install on a Python that "
        "Volatility 3 supports (its pinned dependencies do not build), and its layer runs only after parts of the "
        "package have been replaced by stubs, which a script should not do to a peer and call the result its speed.",
    ]
    return report
