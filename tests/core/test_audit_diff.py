"""Two captures of one host."""

from __future__ import annotations

from audited import FREE, pair
from builders import hooks
from builders.hooks import Victim
from builders.paging import PAGE, HostRam
from readers import memory_of

from volatility3_ept.core import audit_diff, search
from volatility3_ept.core.audit_finding import Kind, Severity


def test_what_changed_between_two_captures():
    before, after = Victim(HostRam()), Victim(HostRam())
    hooked = hooks.execute_only_hook(after)
    fresh = hooks.alias(after, after.ram.allocate())
    known = memory_of(before.ram), memory_of(after.ram)
    found = audit_diff.compare(*((search.discover(each), each) for each in known)).findings
    assert [(f.kind, f.severity, f.gpa) for f in found] == [
        (Kind.CHANGED_FRAME, Severity.HIGH, hooked),
        (Kind.CHANGED_PRESENT, Severity.INFO, fresh),
    ]
    assert "RWX became --X" in found[0].evidence
    assert audit_diff.compare(*((search.discover(each), each) for each in (known[0], known[0]))).findings == ()


def test_a_machine_that_came_and_one_that_went():
    ram, first, _ = pair()
    alone = Victim(HostRam())
    assert alone.guest.root == first.guest.root
    memories = memory_of(ram), memory_of(alone.ram)
    (gone,) = audit_diff.compare(*((search.discover(each), each) for each in memories)).findings
    assert (gone.machine, gone.kind) == ("1", Kind.CHANGED_MACHINE)


def test_entries_that_map_nothing_are_compared_too():
    before, after = Victim(HostRam()), Victim(HostRam())
    after.tables.put(FREE, "PTE", FREE | 6)  # KVM's marker, with the page's own number
    after.tables.put(FREE + PAGE, "PTE", 0x9000 | 2)  # W without R
    for each in (before, after):
        each.tables.put(FREE + 2 * PAGE, "PTE", 0)
    known = memory_of(before.ram), memory_of(after.ram)
    found = audit_diff.compare(*((search.discover(each), each) for each in known)).findings
    assert [(f.kind, f.severity, f.gpa) for f in found] == [
        (Kind.CHANGED_PRESENT, Severity.LOW, FREE + PAGE),
        (Kind.CHANGED_PRESENT, Severity.INFO, FREE),
    ]
    assert found[1].evidence == f"1 markers came, the first {FREE | 6:#x}"
