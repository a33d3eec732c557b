"""Manipulations of real guests, one by one in a copy of their hosts: each is found, where it is, and nothing else."""

from __future__ import annotations

import captures
import numpy as np
import pytest
from audited import grave
from builders import hooks
from builders.paging import PAGE
from planted import Planted

from volatility3_ept.core import audit, audit_diff, search
from volatility3_ept.core import walk as walks
from volatility3_ept.core.audit_finding import Audit, Finding, Kind, Severity
from volatility3_ept.spec import ia32e

HIGH, MEDIUM = Severity.HIGH, Severity.MEDIUM
TWO = [pytest.param(name, marks=pytest.mark.corpus) for name in ("ept-two", "npt-two")]


@pytest.fixture(params=captures.committed(guests=1))
def real(request) -> Planted:
    """A host with one guest, of each kind of processor."""
    return Planted(request.param)


def audited(real: Planted, hosts=None) -> Audit:
    memory = real.memory
    return audit.audit(search.discover(memory), memory, hosts=hosts)


def alarms(real: Planted, hosts=None) -> list[Finding]:
    return [row for row in audited(real, hosts).findings if row.severity]


def host_page(real: Planted, name: str) -> int:
    """Return the frame that holds a symbol of the host."""
    address = int(real.capture.truth["host"]["kallsyms"][name], 0)
    target = walks.walk(real.below, ia32e.four_level(), real.host_cr3, address).target
    assert target is not None
    return target & ~0xFFF


def test_all_at_once(real):
    """One audit of a host in which somebody did everything."""
    pages = iter(real.code()[8::24])
    expected = []
    if real.kind == "EPT":
        expected.append((Kind.UNREADABLE_PAGE, HIGH, real.shadow(next(pages), 3)))
    expected.append((Kind.SUBSTITUTED, HIGH, real.shadow(next(pages))))
    expected.append((Kind.ODD_RIGHTS, HIGH, real.without_execute(next(pages))))
    gpa = next(pages)
    new = real.map_elsewhere([real.frame(gpa), real.table(gpa)])
    expected += [(Kind.ALIAS, HIGH, gpa), (Kind.EXPOSURE, HIGH, new + PAGE)]
    assert set(grave(alarms(real))) == set(expected)


@pytest.mark.slow
def test_an_execute_only_page_with_a_shadow_copy():
    real = Planted("kvm-ept")
    gpa = real.shadow(real.code()[20], 3)
    (row,) = alarms(real)
    assert (row.kind, row.severity, row.gpa) == (Kind.UNREADABLE_PAGE, HIGH, gpa)
    assert f"nearly the same page lies at {real.frame(gpa):#x}" in row.evidence
    assert hooks.NEW[:3].hex() in row.evidence, "the rest of the jump may be what stood there"


@pytest.mark.slow
@pytest.mark.corpus
def test_a_substituted_frame_whose_neighbours_lie_elsewhere_too():
    """All rights as before, and nothing around it tells: but the monitor has another page there."""
    real = Planted("ept-4k")
    code = real.code()
    words = np.sort(real.machine.memory.words(np.array(code))[0], axis=1)
    gpa = real.shadow(code[int(np.argmax((words[:, 1:] != words[:, :-1]).sum(axis=1)))])
    (row,) = alarms(real)
    assert (row.kind, row.severity, row.gpa) == (Kind.SUBSTITUTED, HIGH, gpa)
    assert f"the monitor's process has frame {real.frame(gpa):#x} there" in row.evidence


@pytest.mark.slow
def test_an_eptp_list_with_a_second_view():
    real = Planted("kvm-ept")
    gpa = real.second_view(real.code()[20])
    found = alarms(real)
    # Where the second view comes first, its page is in the place of the other one too.
    assert {(row.severity, row.gpa) for row in found} == {(HIGH, gpa)}
    assert {Kind.VIEW_FRAME} <= {row.kind for row in found} <= {Kind.VIEW_FRAME, Kind.SUBSTITUTED}


@pytest.mark.slow
def test_a_frame_at_a_second_address(real):
    gpa = real.code()[20]
    real.map_elsewhere([real.frame(gpa)])
    (row,) = alarms(real)
    assert (row.kind, row.severity, row.gpa, row.hpa) == (Kind.ALIAS, HIGH, gpa, real.frame(gpa))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["table", "control structure", "page table", "code", "data"])
def test_a_page_of_the_hypervisor(real, what):
    hosts = {"": real.host_kernel()}
    page = {
        "table": real.table(real.code()[0]),
        "control structure": real.machine.vcpus[0].hpa,
        "page table": real.host_cr3,
        "code": host_page(real, "_text"),
        "data": host_page(real, "init_task"),
    }[what]
    gpa = real.map_elsewhere([page])
    found = alarms(real, hosts)
    assert {(row.kind, row.severity, row.gpa, row.hpa) for row in found} == {(Kind.EXPOSURE, HIGH, gpa, page)}
    words = {"table": "PT of ", "control structure": "VMC", "page table": "own paging", "code": "code", "data": "data"}
    assert any(words[what] in row.evidence for row in found)


@pytest.mark.slow
def test_a_page_of_the_hypervisor_that_can_only_be_read(real):
    """Bit 1 is W, in EPT and in NPT."""
    gpa = real.map_elsewhere([real.host_cr3], cleared=2)
    assert set(grave(alarms(real))) == {(Kind.EXPOSURE, MEDIUM, gpa)}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_the_tables_and_the_memory_of_another_guest(name):
    real = Planted(name)
    other = real.found.machines[1]
    table = other.root.walk(real.below, int(other.guest_map.gpas[0])).steps[-1].entry_address & ~0xFFF
    used = np.flatnonzero(other.guest_map.accesses & 2)[len(other.guest_map) // 2 :]
    frames = other.guest_map.hpas[used]
    words = real.below.words(frames)[0]
    frame = int(frames[np.flatnonzero((words != words[:, :1]).any(axis=1))[0]])
    gpa = real.map_elsewhere([table, frame])
    found = alarms(real)
    assert {(row.kind, row.hpa) for row in found} == {(Kind.SHARED, frame), (Kind.EXPOSURE, table)}
    assert all(gpa in (row.gpa, row.gpa - PAGE) for row in found)
    assert "machine 1's" in next(row.evidence for row in found if row.kind is Kind.EXPOSURE)


@pytest.mark.slow
def test_a_hypervisor_under_the_whole_machine(real):
    """The host goes on as its guest, with its own guest inside."""
    before = real.machine
    real.thin()
    memory = real.memory
    discovery = search.discover(memory)
    outer, inner = discovery.all()
    assert (outer.id, inner.id, inner.root.address) == ("0", "0.0", before.root.address)
    found = [row for row in audit.audit(discovery, memory).findings if row.severity]
    assert [(row.machine, row.kind, row.severity) for row in found] == [("0", Kind.THIN, HIGH)]
    assert "its tables are hidden from the guest" in found[0].evidence


@pytest.mark.slow
def test_what_changed_until_a_second_capture(real):
    """Each entry that changed is one row, with what it was and what it is."""
    pages = iter(real.code()[8::24])
    before = {gpa: real.entry(gpa)[1] for gpa in real.code()}
    moved = real.shadow(next(pages))
    not_executed = real.without_execute(next(pages))
    fixed, gone = next(pages), next(pages)
    where, entry = real.entry(fixed)
    real.write_entry(where, entry & ~2)
    real.write_entry(real.entry(gone)[0], 0)
    frame = real.take()
    real.write(frame, b"new")
    fresh = real.map_elsewhere([frame])
    expected = {
        moved: (Kind.CHANGED_FRAME, HIGH),
        not_executed: (Kind.CHANGED_RIGHTS, HIGH),
        fixed: (Kind.CHANGED_RIGHTS, Severity.INFO),
        gone: (Kind.CHANGED_PRESENT, Severity.INFO),
        fresh: (Kind.CHANGED_PRESENT, Severity.INFO),
    }
    if real.kind == "EPT":
        uncached = next(pages)
        where, entry = real.entry(uncached)
        real.write_entry(where, entry & ~0x38)
        expected[uncached] = (Kind.CHANGED_TYPE, Severity.INFO)
    memory = real.memory
    found = audit_diff.compare((real.found, real.below), (search.discover(memory), memory)).findings
    assert {row.gpa: (row.kind, row.severity) for row in found} == expected
    for row in found:
        assert row.gpa == fresh or f"PDE {hex(real.large)} became PTE {real.entry(row.gpa)[1]:#x}" in row.evidence
    assert before[moved] != real.entry(moved)[1]
