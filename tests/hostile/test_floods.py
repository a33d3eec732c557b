"""A guest that has filled its memory with fakes: the honest machines stay, the work is bounded, every cut is said.

The attacker's memory lies below the host's, so that the fakes are met first.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from builders import floods
from builders.floods import Flood
from builders.paging import EPT_4, LONG_4, NPT_4

from volatility3_ept.core import search, triage
from volatility3_ept.core.machines import Discovery, Machine
from volatility3_ept.core.memory import HostMemory

COUNT = 2000
KINDS = pytest.mark.parametrize("shape", [EPT_4, NPT_4], ids=["EPT", "NPT"])
#: The attacker's own EPT or NPT is in the capture, or nothing tells whose its memory is.
WHOSE = pytest.mark.parametrize("announced", [True, False], ids=["of a known guest", "of nobody"])


def found(flood: Flood) -> Discovery:
    return search.discover(HostMemory.from_bytes(flood.image()))


def honest(result: Discovery, flood: Flood) -> Machine:
    """Return the victim, whole; and see that it is a machine of the host."""
    (machine,) = [m for m in result.machines if m.root.address == flood.victim.tables.root & ~0xFFF]
    assert not machine.tables_in
    assert machine.memory.size == 64 * 4096
    assert machine.system.startswith("Linux 6.6.6-test")
    assert [vcpu.hpa for vcpu in machine.vcpus] == flood.victim.structures
    return machine


def said(result: Discovery, text: str) -> bool:
    return any(text in note for note in result.notes)


@KINDS
@WHOSE
def test_fake_control_structures_do_not_push_out_the_real_one(shape, announced, small_bounds):
    flood = floods.flooded(COUNT, floods.control_structures(shape), shape, announced)
    result = found(flood)
    honest(result, flood)
    assert said(result, f"{COUNT + 1} pages look like control structures")
    assert len(result.index.structures) <= 160
    assert said(result, "are named by control structures; 24 were walked") or len(result.index.structures) < 24
    if announced:
        assert said(result, f"{COUNT} of them in the memory of guests")
        assert all(m.root.address in (flood.attacker, flood.victim.tables.root) for m in result.machines)


@KINDS
def test_fakes_that_name_the_honest_root_are_none_of_its_processors(shape, small_bounds):
    """They lie in another guest's memory, where that number is another address."""
    flood = floods.flooded(COUNT, floods.control_structures(shape), shape)
    flood = floods.flooded(COUNT, floods.control_structures(shape, flood.victim.tables.root), shape)
    honest(found(flood), flood)


@KINDS
@WHOSE
def test_fake_hierarchies_do_not_push_out_the_real_one(shape, announced, small_bounds):
    """Four tables each, sound at every level; thousands of them."""
    flood = floods.flooded(COUNT, floods.trees(shape), shape, announced)
    result = found(flood)
    honest(result, flood)
    assert said(result, "more tables read as hierarchies and were not judged")
    if announced:
        assert said(result, "lie in the memory of the guest of")
        assert [m.root.address for m in result.machines] == sorted((flood.attacker, flood.victim.tables.root))


@KINDS
@WHOSE
def test_pages_that_are_tables_of_every_level(shape, announced, small_bounds, tables_read):
    """Whatever names one of them names a hierarchy, and from each one the whole memory is reached."""
    flood = floods.flooded(COUNT, floods.tables(shape), shape, announced)
    result = found(flood)
    honest(result, flood)
    assert sum(tables_read) < 40 * COUNT


def test_a_guests_own_page_tables_by_the_thousand(small_bounds):
    flood = floods.flooded(COUNT, floods.tables(LONG_4, upper=4))
    honest(found(flood), flood)


def test_control_structures_and_the_hierarchies_that_they_name(small_bounds):
    flood = floods.flooded(COUNT, floods.both(floods.control_structures(), floods.trees()))
    result = found(flood)
    honest(result, flood)
    assert len(result.all()) < 100


def test_what_a_flood_cost_is_said_again_by_a_search_with_an_index(small_bounds):
    flood = floods.flooded(COUNT, floods.both(floods.control_structures(), floods.trees()))
    memory = HostMemory.from_bytes(flood.image())
    first = search.discover(memory)
    again = search.discover(memory, known=first.index)
    assert set(again.notes) == set(first.notes)
    assert [(m.id, m.root) for m in again.all()] == [(m.id, m.root) for m in first.all()]


def test_few_candidates_are_all_examined_in_any_case():
    flood = floods.flooded(100, floods.control_structures())
    result = found(flood)
    assert not said(result, "pages look like control structures")
    assert len(result.index.structures) == 101
    assert triage.MAX_EXAMINED > 1000


_CHILD = """
import resource, sys
from volatility3_ept.core import search
from volatility3_ept.core.memory import HostMemory
found = search.discover(HostMemory.from_file(sys.argv[1]))
for machine in found.machines:
    print(f"{machine.root.address:#x}", machine.memory.size // 4096, len(machine.vcpus))
print("CPU", resource.getrusage(resource.RUSAGE_SELF).ru_utime)
# Not ru_maxrss: that begins with the size of the process that started this one.
print("KiB", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
LARGE = {
    "VMCS": (EPT_4, floods.control_structures(EPT_4)),
    "VMCB": (NPT_4, floods.control_structures(NPT_4)),
    "EPT tables": (EPT_4, floods.tables(EPT_4)),
    "NPT tables": (NPT_4, floods.tables(NPT_4)),
    "guest page tables": (EPT_4, floods.tables(LONG_4, upper=4)),
    "EPT hierarchies": (EPT_4, floods.trees(EPT_4)),
    "NPT hierarchies": (NPT_4, floods.trees(NPT_4)),
    "VMCS and hierarchies": (EPT_4, floods.both(floods.control_structures(), floods.trees())),
}


@pytest.mark.slow
@WHOSE
@pytest.mark.parametrize("kind", LARGE)
def test_a_hundred_thousand_fakes_in_a_sparse_gigabyte(kind, announced, tmp_path):
    """A minute of processor time and 1.5 GiB at most; the builder's own memory is not counted."""
    shape, fill = LARGE[kind]
    flood = floods.flooded(100_000, fill, shape, announced)
    image = flood.write(tmp_path / "host.raw", 1 << 30)
    done = subprocess.run([sys.executable, "-c", _CHILD, str(image)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    image.unlink()
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [f"{flood.victim.tables.root:#x}", "64", "1"] in rows
    cost = dict(row for row in rows if len(row) == 2)
    assert float(cost["CPU"]) < 60
    assert int(cost["KiB"]) < 1536 << 10
