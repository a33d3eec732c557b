"""All benchmarks, with one command: prints a table for each, goals first.

    python benchmarks/run.py [NAME ...] [--peers] [--quick] [--write docs/performance.md]

Ours is what is installed in the running interpreter's environment. With ``--peers`` Volatility without our plugins and
CHIPSEC are installed, each into an environment of its own below ``--work``, and measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

import images  # noqa: F401  (makes the builders importable)
from timing import Options

NAMES = ("discovery", "reads", "flatten", "carve", "plugins", "scale", "startup")


def machine() -> str:
    """Describe this machine in one line."""
    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores ({model[1] if model else platform.processor()}), {memory:.0f} GiB, "
        f"{platform.system()}, Python {platform.python_version()}; load at the end {load}"
    )


def insert(document: Path, name: str, text: str) -> None:
    """Replace what stands between a benchmark's markers in a document."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    whole = document.read_text(encoding="utf-8")
    before, _, rest = whole.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document} has no place for {name}: {begin} ... {end}")
    document.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES) + " (default: all)")
    parser.add_argument("--peers", action="store_true", help="also install and measure the other tools")
    parser.add_argument(
        "--quick", action="store_true", help="small inputs: shows that it works, the figures mean little"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each measurement, of which the median counts")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this document as well")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "volatility3_ept-benchmarks")
    given = parser.parse_args()
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    given.work.mkdir(parents=True, exist_ok=True)
    options = Options(given.work.resolve(), given.peers, given.quick, given.runs)
    for name in given.names or NAMES:
        report = importlib.import_module(f"bench_{name}").run(options)
        flags = " --peers" * given.peers + " --quick" * given.quick
        made = f"`python benchmarks/run.py {name}{flags} --runs {given.runs}`, {datetime.date.today()}, {machine()}."
        text = f"{report.markdown()}\n{made}\n"
        print(text, flush=True)
        if given.write:
            insert(given.write, name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
