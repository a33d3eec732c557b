"""Roots that page tables alone gave away, as candidates for machines, and as rows of an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from volatility3_ept.core import kinship
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
            sure, mode = Certainty(certainty), _MODES.get(paging)
            plain = all(_is_plain(item) for item in evidence) and isinstance(cr3, int | None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not plain or root.fingerprint(memory) != table:
            return None
        found.append(Found(root, sure, evidence, root.traverse(memory), cr3, mode))
    return tuple(found)


def _is_plain(item: Criterion) -> bool:
    """Tell whether a criterion holds what its fields are for, and nothing that would spoil a terminal."""
    texts = isinstance(item.name, str) and isinstance(item.detail, str) and (item.name + item.detail).isprintable()
    return texts and isinstance(item.held, bool | None) and isinstance(item.weight, int)


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


def merged(
    below: HostMemory, accepted: Sequence[Candidate], found: Sequence[Found]
) -> tuple[list[Candidate], list[Candidate]]:
    """Add the roots that page tables alone gave, and return which of them were not believed.

    One that is only possible can be a view of another, nothing more.
    """
    named = {c.root.address: number for number, c in enumerate(accepted)}
    whole = list(accepted)
    doubtful = []
    for item in found:
        new = candidate(item, below)
        if item.root.address in named:
            number = named[item.root.address]
            whole[number] = replace(whole[number], evidence=(*whole[number].evidence, new.evidence[0]))
        elif new.accepted:
            whole.append(new)
        else:
            doubtful.append(new)
    mains = {id(c) for c in kinship.families([*whole, *doubtful])[0]}
    views = [c for c in doubtful if id(c) not in mains]
    return whole + views, [c for c in doubtful if id(c) in mains]
