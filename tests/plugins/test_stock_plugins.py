"""Volatility's own plugins: ``--guest 0`` on the host's image gives what the guest's true memory gives.

One test for each plugin and capture. ``docs/stock-plugins.md`` is the same comparison as a table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import captures
import pytest
import sweep
import volatility
from volatility3.framework import constants
from volatility3.framework.layers import elf

from volatility3_ept.core import search
from volatility3_ept.layers import host

DOCUMENT = Path(__file__).parents[2] / "docs" / "stock-plugins.md"

#: What an ordinary run compares, in the first capture: processes as a list and a tree, files, user memory, the log.
QUICK = (
    "linux.envars.Envars",
    "linux.kmsg.Kmsg",
    "linux.lsof.Lsof",
    "linux.mountinfo.MountInfo",
    "linux.pslist.PsList",
    "linux.pstree.PsTree",
)
#: Needs yara-python, which nothing else here does.
OPTIONAL = {"volatility3.plugins.linux.vmayarascan"}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="each plugin runs in a fork")


def comparisons():
    for capture in [*captures.committed(guests=1), *captures.committed(guests=2)]:
        for plugin in sweep.plugin_names():
            quick = capture == captures.committed(guests=1)[0] and plugin in QUICK
            yield pytest.param(capture, plugin, marks=() if quick else pytest.mark.slow, id=f"{capture}-{plugin}")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Both images of a capture's guest, opened when they are first wanted."""
    opened = {}

    def pair(name):
        if name not in opened:
            opened[name] = sweep.Pair(captures.get(name), tmp_path_factory.mktemp(name))
        return opened[name]

    yield pair
    for each in opened.values():
        each.close()


@needs_fork
@pytest.mark.parametrize(("capture", "plugin"), list(comparisons()))
def test_a_plugin_gives_the_same_through_guest(pairs, capture, plugin):
    try:
        truth, guest = pairs(capture).compare(plugin)
    except sweep.NotRunError as reason:
        pytest.skip(str(reason))
    assert truth.differences(guest) == []
    assert not truth.error.startswith("SIG"), "no answer in time"


@needs_fork
def test_the_truth_is_the_guest_and_not_the_host(pairs):
    name = captures.committed(guests=1)[0]
    rows = pairs(name).truth.run("linux.pslist.PsList").rows
    found = {(row[2], row[5]) for row in rows}
    assert found >= {p for p in captures.get(name).guests[0].processes if not p[1].startswith("kworker")}


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("name", captures.committed(guests=1))
def test_the_comparison_notices_missing_pages(pairs, name, tmp_path):
    """Not a comparison that is always content: without the pages of one process, psscan is not the same."""
    pair = pairs(name)
    truth = pair.truth.run("linux.psscan.PsScan")
    offset = next(row[1] for row in truth.rows if row[5] == "guest_db_server")
    first = offset & -captures.PAGE  # a task_struct begins anywhere in it and is longer than two pages
    without = range(first, first + 3 * captures.PAGE, captures.PAGE)
    sweep.write_truth(pair.capture, tmp_path / "less.lime", without)
    less = sweep.Image(tmp_path / "less.lime")
    lost = truth.differences(less.run("linux.psscan.PsScan"))
    less.close()
    assert any("guest_db_server" in line and line.startswith("-") for line in lost)


@pytest.mark.parametrize("name", captures.committed(guests=1))
def test_pages_that_the_slat_lacks_hold_nothing_but_the_boot_gdt(name):
    """Why no plugin differs: what the EPT or NPT does not hold is zero, but for the monitor's GDT at 0x1000."""
    capture = captures.get(name)
    truth = capture.guests[0].pages
    context = volatility.file_context(capture.path)
    context.config["core.base_layer"] = "base"
    context.add_layer(elf.Elf64Layer(context, "core", "core"))
    memory = host.host_memory(context, "core")
    guest = search.discover(memory).machines[0].guest_map.memory(memory)
    absent = [gpa for gpa in truth if gpa not in guest]
    assert len(absent) == capture.entry["guests"][0]["pages_absent"]
    assert max(absent) < 0x8_0000
    assert [gpa for gpa in absent if any(capture.page(truth[gpa][0] * captures.PAGE))] == [0x1000]


def test_every_plugin_is_in_the_document():
    text = DOCUMENT.read_text()
    if f"| Volatility | {constants.PACKAGE_VERSION} |" not in text:
        pytest.skip(f"{DOCUMENT.name} is of another Volatility than {constants.PACKAGE_VERSION}")
    listed = set(re.findall(r"^\| (linux\.\S+) \|.*\| (?:yes|not run) \|$", text, re.MULTILINE))
    assert listed >= set(sweep.plugin_names())


def test_every_plugin_can_be_loaded():
    missing = set(sweep.load())
    assert missing <= OPTIONAL
    if missing:
        pytest.skip(f"not compared, a library is missing: {', '.join(sorted(missing))}")
