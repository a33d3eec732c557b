"""What our plugins add to a Volatility that does not use them."""

from __future__ import annotations

import peers
import timing
from images import ROOT
from timing import Goal, Options, Report

TITLE = "7. Start-up"
_CAPTURE = ROOT / "testdata" / "kvm-ept" / "host.elf"


def run(options: Options) -> Report:
    report = Report(TITLE, ("command", "with ours: wall", "CPU", "without: wall", "CPU", "added wall", "added CPU"))
    wanted = (f"volatility3=={peers.VOLATILITY}", "pefile", "yara-python", "numpy")
    plain = [str(peers.environment(options.work, "plain-with-libraries", *wanted) / "vol")]
    commands = {"vol -h": ["-h"]}
    if _CAPTURE.exists():
        symbols = str(ROOT / "testdata" / "symbols")
        commands["vol linux.pslist"] = ["--offline", "-q", "-s", symbols, "-f", str(_CAPTURE), "linux.pslist"]
    for text, arguments in commands.items():
        own, other = peers.clean(options.work / "cache-own"), peers.clean(options.work / "cache-peer")
        actions = {
            "with": lambda a=arguments, e=own: timing.command([*peers.own(), *a], e),
            "without": lambda a=arguments, e=other: timing.command([*plain, *a], e),
        }
        timing.in_turn(actions, 1)
        samples = timing.in_turn(actions, options.runs * 2)
        pairs = list(zip(samples["with"], samples["without"], strict=True))
        added = [
            sorted(getattr(a, kind) - getattr(b, kind) for a, b in pairs)[len(pairs) // 2] for kind in ("wall", "cpu")
        ]
        report.rows.append((
            f"`{text}`",
            *(f"{value:.2f} s" for s in samples.values() for value in (timing.wall(s), timing.cpu(s))),
            *(f"{value * 1000:+.0f} ms" for value in added),
        ))  # fmt: skip
        report.goals.append(Goal(f"`{text}`: no goal was set", f"{added[1] * 1000:+.0f} ms of CPU", None))
    report.notes.append(
        "The other environment holds the same Volatility and the same libraries (numpy, pefile, yara-python), so that "
        "what is added is ours alone."
    )
    return report
