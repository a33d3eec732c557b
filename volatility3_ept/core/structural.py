"""Roots that page tables alone gave away, as candidates for machines, and as rows of an index."""

from __future__ import annotations

import json
from collections.abc import Iterable

from volatility3_ept.core.candidate import Candidate
from volatility3_ept.core.control import Criterion
from volatility3_ept.core.likeness import Certainty, Found
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root
from volatility3_ept.spec import ia32e

_MODES = {mode.name: mode for mode in (ia32e.four_level(), ia32e.five_level(), ia32e.pae(), ia32e.legacy())}


def row(found: Found, memory: HostMemory) -> str:
    """Return a root as text for an index, with a hash of its table."""
    return json.dumps(
        {
            "root": str(found.root),
            "table": found.root.fingerprint(memory),
            "certainty": found.certainty.value,
            "cr3": found.guest_cr3,
            "paging": found.paging.name if found.paging else None,
            "evidence": [[item.name, item.held, item.detail, item.weight] for item in found.evidence],
        }
    )


def rows_to_found(rows: Iterable[str], memory: HostMemory) -> tuple[Found, ...] | None:
    """Return the roots that rows of an index name, walked anew; None when a table is not the one it was."""
    found = []
    for text in rows:
        try:
            data = json.loads(text)
            root = Root.parse(data["root"])
            evidence = tuple(Criterion(name, held, detail, weight) for name, held, detail, weight in data["evidence"])
            certainty, cr3, paging, table = (data[name] for name in ("certainty", "cr3", "paging", "table"))
            sure = Certainty(certainty)
        except (ValueError, KeyError, TypeError):
            return None
        if root.fingerprint(memory) != table:
            return None
        found.append(Found(root, sure, evidence, root.traverse(memory), cr3, _MODES.get(paging)))
    return tuple(found)


def candidate(found: Found, memory: HostMemory) -> Candidate:
    """Return a root as a candidate without control structures."""
    verdict = Criterion("page tables alone", True, f"{found.certainty}, without any control structure", 3)
    return Candidate(
        found.root,
        (),
        found.guest_map,
        found.guest_map.memory(memory),
        found.paging,
        (verdict, *found.evidence),
        accepted=found.certainty is not Certainty.POSSIBLE,
        guest_cr3=found.guest_cr3,
    )
