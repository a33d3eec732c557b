"""Prints ``docs/stock-plugins.md``: each ``linux.*`` plugin on the captures of one guest in git, on truth and guest.

python tests/sweep_page.py > docs/stock-plugins.md
"""

from __future__ import annotations

import datetime
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import captures
import sweep
from sweep import Outcome
from volatility3.framework import constants

import volatility3_ept

PAGE = """\
# Volatility's own plugins through `--guest`

Every `linux.*` plugin of Volatility, run twice on the guest of `kvm-ept` and of `kvm-npt`:

- **truth**: on an image of the guest made from its ground truth. The monitor that ran the guest looked up the host
  frame of each page it held in its own page tables, and hashed the page; the image holds those pages, each checked by
  its SHA-256. No EPT or NPT has touched it, and it has the {absent} pages that the EPT or NPT does not map.
- **guest**: `vol -f host.elf --guest 0 PLUGIN`, on the image of the host.

Both run with the same symbols (`-s testdata/symbols --offline`) and the same options. *Same* means: the same columns,
the same rows in the same order with every cell equal, offsets included, the same files byte for byte where the plugin
writes files, and the same type of exception where it ends with one.

**Of {compared} comparisons, {different}.**

The pages that the EPT or NPT does not map lie below 512 KiB: boot memory that the guest never touched. All but one are
zero; the one at 0x1000 holds the GDT that the monitor wrote for the first instructions. No plugin depends on them.

| | |
|---|---|
| Date | {date} |
| Volatility | {volatility} |
| volatility3_ept | {ours} |
| Python | {python} |

This page is written by `python tests/sweep_page.py > docs/stock-plugins.md` (a few minutes). Each comparison is a test
too: `pytest tests/plugins/test_stock_plugins.py` runs a handful of them, `-m slow` all others and those of
`kvm-nested`, whose guest runs a guest of its own. `linux.vmayarascan` needs yara-python.

## Rows

Rows; then files (f), where the plugin writes some; then the exception that ended it, if one did. Zero rows on both
images say little: this guest is a static busybox with a few marker processes and one network interface; no module is
loaded and nothing is traced.

{rows}

## Plugins that fail on the truth too

They end with the same exception on both images, and what they gave before it is the same. The cause lies in the plugin
or in the symbol table: it is made from the kernel's BTF and `/proc/kallsyms` and lacks what only DWARF and `vmlinux`
hold.

{errors}

## Options

All other plugins ran without options.

{options}
"""

#: Both outcomes, or why the plugin was not run.
Result = tuple[Outcome, Outcome] | str


def results(name: str) -> dict[str, Result]:
    """Run every plugin on one capture."""
    found: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        pair = sweep.Pair(captures.manifest()[name], Path(folder))
        for plugin in sweep.plugin_names():
            print(f"{name} {plugin}", file=sys.stderr)
            try:
                found[plugin] = pair.compare(plugin)
            except sweep.NotRunError as reason:
                found[plugin] = str(reason)
        pair.close()
    return found


def verdict(both: Result) -> str:
    """Return one word for a comparison."""
    return "not run" if isinstance(both, str) else "yes" if both[0].facts == both[1].facts else "**no**"


def cell(outcome: Outcome) -> str:
    """Return an outcome as text."""
    files = f" + {len(outcome.files)} f" if outcome.files else ""
    return f"{len(outcome.rows)}{files}" + (f", {outcome.error}" if outcome.error else "")


def table(*rows: tuple[str, ...]) -> str:
    """Return a table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def comparison(found: dict[str, dict[str, Result]]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the main table."""
    yield "Plugin", *(f"{name}: {image}" for name in found for image in ("truth", "guest")), "Same"
    for plugin in sweep.plugin_names():
        both = [found[name][plugin] for name in found]
        cells = [text for pair in both for text in ([pair] * 2 if isinstance(pair, str) else map(cell, pair))]
        yield plugin, *cells, ", ".join(sorted({verdict(pair) for pair in both}))
    for module in sweep.load():
        yield module.removeprefix("volatility3.plugins."), *["a library is missing"] * 2 * len(found), "not run"


def failures(found: dict[str, dict[str, Result]]) -> Iterator[tuple[str, ...]]:
    """Yield the plugins that fail on the truth."""
    yield "Plugin", "Exception"
    for plugin, both in next(iter(found.values())).items():
        if not isinstance(both, str) and both[0].error:
            yield plugin, f"{both[0].error}: {both[0].message}"


def options() -> Iterator[tuple[str, ...]]:
    """Yield what each plugin was asked."""
    yield "Plugin", "Options"
    for plugin, arguments in sweep.ARGUMENTS.items():
        yield plugin, ", ".join(f"`{key}={value}`" for key, value in arguments.items())
    for plugin, option in sweep.NEED_MODULE.items():
        yield plugin, f"`{option}` = the first module that linux.lsmod shows"


def main() -> int:
    """Print the page; 1 when anything differs."""
    found = {name: results(name) for name in captures.committed(guests=1)}
    verdicts = [verdict(both) for each in found.values() for both in each.values()]
    different = verdicts.count("**no**")
    absent = {captures.manifest()[name].entry["guests"][0]["pages_absent"] for name in found}
    page = PAGE.format(
        absent=" and ".join(map(str, sorted(absent))),
        compared=len(verdicts) - verdicts.count("not run"),
        different=f"{different} differ" if different else "none differs",
        date=datetime.datetime.now().astimezone().date(),
        volatility=constants.PACKAGE_VERSION,
        ours=volatility3_ept.__version__,
        python=platform.python_version(),
        rows=table(*comparison(found)),
        errors=table(*failures(found)),
        options=table(*options()),
    )
    print(page, end="")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
