"""Which tool finds which machine: small hosts that each hold one trap, ours and two peers on the same bytes.

    python benchmarks/traps.py [--peers] [--write docs/traps.md] [--only NAME ...]

Ours is the ``vol`` of the running interpreter's environment (``pip install .`` first). With ``--peers``, Volatility's
own ``vmscan`` and CHIPSEC's ``tools.vmm.ept_finder`` are installed into environments of their own below ``--work``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import images
import peers
from peers import Answer, PeerError
from trap_cases import CASES, Case

HEADER = """# Traps: what makes a tool miss a virtual machine

Each case is one small host with one thing about it that has made a tool fail. The hosts are written by the builders of
the tests, which share no code with the package. All tools get the same bytes: a raw image, or a LiME file where memory
lies high; CHIPSEC gets one file for each range of memory.

*found*: the address of the machine's top table was reported; in brackets, by what. *false*: reported, and no machine's.

"""
FOOTER = """
Made by `{command}` on {date}, Python {python}: `ept.scan` of volatility3-ept {own}, `vmscan` of Volatility
{volatility}, `tools.vmm.ept_finder` of CHIPSEC {chipsec}.

Read with care. The hosts were built to hold one trap each, and the traps are those that we know of. The guests are
small, six stretches of pages with a page table each, so that CHIPSEC's rule of four page tables in a directory is met.
CHIPSEC is told the revision identifier of the case's VMCS; it finds roots without it. `vmscan` reports control
structures, not machines: where a case has none there is nothing for it to find, and one without tables is reported.
"""


def verdict(case: Case, answer: Answer, nested_by_host_address: bool) -> str:
    """Say in a cell of the table how an answer compares with the truth."""
    truth = {case.inner.get(root, root) if nested_by_host_address else root for root in case.roots}
    hits = sorted(truth & answer.roots.keys())
    wrong = len(answer.roots.keys() - truth)
    if not truth:
        return "nothing (right)" if not wrong else f"**{wrong} false**"
    how = ", ".join(dict.fromkeys(answer.roots[root] for root in hits))
    count = "found" if len(hits) == len(truth) == 1 else "both found" if len(hits) == len(truth) else ""
    if not nested_by_host_address and "VMC" in case.expected and "page tables" in how and "VMC" not in how:
        how += ", **its control structure not attached**"
    text = f"{count} ({how})" if count else f"**{len(hits)} of {len(truth)}** ({how})" if hits else "**missed**"
    return text + (f", **{wrong} false**" if wrong else "")


def cell(ask: Callable[[], Answer], case: Case, nested_by_host_address: bool = False) -> str:
    """Run one tool on one case; a tool that fails says so in its cell."""
    try:
        return verdict(case, ask(), nested_by_host_address)
    except PeerError as error:
        return f"**failed**: {error}"


def run(names: list[str], with_peers: bool, work: Path) -> list[tuple[str, ...]]:
    """Build the cases, ask every tool, and return the rows of the table."""
    table = []
    for build in CASES:
        if names and build.__name__ not in names:
            continue
        case = build()
        folder = work / "traps" / build.__name__
        folder.mkdir(parents=True, exist_ok=True)
        image = images.write(case.ram, folder, "host")
        row = [case.name, case.trap, case.expected, cell(lambda: peers.ask_own(image, work / "cache-own"), case)]  # noqa: B023
        if with_peers:
            base = images.write_ranges(case.ram, folder, "host")
            row.append(cell(lambda: peers.ask_vmscan(image, work), case))  # noqa: B023
            row.append(cell(lambda: peers.ask_chipsec(base, case.revision, work), case, True))  # noqa: B023
        table.append(tuple(row))
        print(" | ".join(row), file=sys.stderr, flush=True)
    return table


def markdown(table: list[tuple[str, ...]]) -> str:
    """Return the rows as a Markdown table."""
    head = ("case", "trap", "expected", "`ept.scan`", "`vmscan`", "CHIPSEC `ept_finder`")[: len(table[0])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *table)) + "\n"


def main() -> int:
    """Run what the command line asks for; the exit status says whether ours passed every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also run vmscan and CHIPSEC")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the document there (default: print the table)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[c.__name__ for c in CASES])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "volatility3_ept-benchmarks")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    table = run(options.only, options.peers, options.work.resolve())
    if options.write:
        footer = FOOTER.format(
            command="python benchmarks/traps.py --peers --write docs/traps.md",
            date=datetime.date.today().isoformat(),
            python=platform.python_version(),
            own=importlib.metadata.version("volatility3-ept"),
            volatility=peers.VOLATILITY,
            chipsec=peers.CHIPSEC,
        )
        options.write.write_text(HEADER + markdown(table) + footer, encoding="utf-8")
    else:
        print(markdown(table))
    return int(any("**" in row[3] for row in table))


if __name__ == "__main__":
    sys.exit(main())
