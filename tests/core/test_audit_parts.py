"""What the findings are made of."""

from __future__ import annotations

import pytest
from builders import hooks
from builders.hooks import Victim
from builders.paging import PAGE, HostRam
from readers import memory_of

from volatility3_ept.core import audit_bytes, audit_mapdiff, search
from volatility3_ept.core.audit_finding import MAX_ROWS, Finding, Kind, Severity, capped


@pytest.fixture
def victim() -> Victim:
    return Victim(HostRam())


def test_pages_side_by_side():
    page = hooks.code(1)
    difference = audit_bytes.of(page, hooks.patched(page))
    assert difference.is_copy
    assert [first for first, _ in difference.places] == [hooks.AT]
    assert audit_bytes.of(page, page).text(None, None) == "the bytes are equal"
    assert not audit_bytes.of(page, page[::-1]).is_copy
    assert "iced-x86 is not installed" in difference.text(None, 0x1000)


def test_the_difference_of_two_maps_equals_looking_page_by_page(victim):
    hooks.execute_only_hook(victim)
    other = Victim(HostRam())
    hooks.alias(other, other.ram.allocate())
    maps = [search.discover(memory_of(each.ram)).machines[0].guest_map for each in (victim, other)]
    found = audit_mapdiff.difference(*maps)
    pages = {gpa + at for gpa, size in zip(found.gpas.tolist(), found.lengths.tolist(), strict=True)
             for at in range(0, size, PAGE)}  # fmt: skip
    seen = []
    for each in maps:
        seen.append({run.gpa + at: (run.hpa + at, run.access) for run in each.runs()
                     for at in range(0, run.length, PAGE)})  # fmt: skip
    assert pages == {gpa for gpa in seen[0] | seen[1] if seen[0].get(gpa) != seen[1].get(gpa)}


def test_rows_beyond_the_limit_are_counted():
    rows = [Finding("0", Kind.ALIAS, Severity.MEDIUM, n * PAGE, PAGE, None, "") for n in range(MAX_ROWS + 7)]
    *kept, last = capped(rows)
    assert len(kept) == MAX_ROWS
    assert (last.length, last.evidence[:6]) == (7 * PAGE, "7 more")
