"""What the traversal must have in common with the walk: for the tests of agreement, and for fuzzing."""

from __future__ import annotations

import numpy as np
from builders import paging
from readers import READERS

from volatility3_ept.spec import ept, ia32e, npt
from volatility3_ept.spec.paging import Outcome

FORMATS = {shape.name: (shape, fmt) for shape, fmt in READERS.items()} | {
    "EPT, MAXPHYADDR 39": (paging.EPT_4, ept.ept_format(4, 39)),
    "EPT, mode-based execute": (paging.EPT_4, ept.ept_format(4, 46, mode_based_execute=True)),
    "EPT, no execute-only": (paging.EPT_4, ept.EptFormat("EPT", ept.EPT_4.levels, execute_only=False)),
    "NPT, C-bit": (paging.NPT_4, npt.npt_format(4, 43, key_bits=1 << 47)),
    "NPT, PAE": (paging.PAE, npt.npt_format(3)),
    "NPT, 32-bit": (paging.LEGACY, npt.npt_format(2)),
    "32-bit, no PSE": (paging.LEGACY, ia32e.legacy(large_pages=False)),
}


def assert_same(found, fmt, result, address: int) -> None:
    """Hold one answer of the map against one walk."""
    findings = found.findings

    def rows(table):
        return [row for row in table.tolist() if row[0] <= address < row[0] + row[1]]

    index, inside = found.find(np.array([address]))
    inside = bool(inside[0])
    assert inside == (result.target is not None)
    assert bool(rows(findings.mmio)) == (result.outcome is Outcome.MMIO)
    assert bool(rows(findings.misconfigured)) == (result.outcome is Outcome.MISCONFIGURED)
    assert bool(rows(findings.unreadable)) == (result.outcome is Outcome.UNREADABLE)
    if inside:
        run = found.run(int(index[0]))
        assert found.to_hpa(np.array([address])).tolist() == [result.target]
        assert (run.access, run.page_size, run.state) == (result.access, result.page_size, result.state)
        assert run.memory_type == result.memory_type & 7
        assert run.gpa % run.page_size == 0
        assert run.hpa % run.page_size == 0
    for table in (findings.mmio, findings.misconfigured):
        assert all(row[2] & (1 << 64) - 1 == result.steps[-1].entry for row in rows(table))
    for _, span, table in rows(findings.unreadable):
        step = result.steps[-1]
        assert 0 <= step.entry_address - table < fmt.entry_bytes * step.level.entries
        assert span == step.level.page_size * step.level.entries
