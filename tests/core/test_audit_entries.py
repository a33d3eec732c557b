"""Kind 6: entries that the processor refuses, and RAM that is not write-back."""

from __future__ import annotations

import pytest
from audited import FREE, grave, results
from builders import hooks
from builders.hooks import Victim
from builders.paging import HostRam

from volatility3_ept.core.audit_finding import Kind, Severity


@pytest.fixture
def victim() -> Victim:
    return Victim(HostRam())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(0x32, "W without R"), (0x17, "reserved memory type 2"), (0x3F, "reserved memory type 7")],
    ids=["write-only", "type 2", "type 7"],
)
def test_an_entry_that_the_processor_refuses(victim, entry, reason):
    victim.tables.put(FREE, "PTE", victim.ram.allocate() | entry)
    found = results(victim.ram)
    assert grave(found) == [(Kind.MISCONFIGURED, Severity.MEDIUM, FREE)]
    assert reason in found[0].evidence


def test_a_single_page_of_ram_that_is_not_cached(victim):
    gpa = hooks.rights(victim, victim.data[1], hooks.UNCACHED)
    found = results(victim.ram)
    assert grave(found) == [(Kind.MEMORY_TYPE, Severity.LOW, gpa)]
    assert "UC" in found[0].evidence
