"""What a search found, kept as data: a second command on the same image does not search again.

Only *where* things are is kept. Every page named here is read and judged anew, every root is walked anew, so an index
can make a search shorter and never a result wrong. It is JSON: nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

#: Change it when the meaning of a field changes: an index of another format is not read.
FORMAT = 4


@dataclass(frozen=True)
class Index:
    """The outcome of one search. Addresses are of the memory that was searched.

    ``structures``: pages that were examined as VMCS or VMCB. ``pages``: how many were searched. ``systems``: what runs
    behind each root, by its name, as a row that :mod:`.identify` reads; ``slots``: the memory slots in its VMM's
    address space, as text, none where no VMM was found. ``found``: the roots that page tables alone gave in the
    capture (empty name) and in each machine, as rows that :mod:`.structural` reads. ``inferred``: layouts of unknown
    processors, as :mod:`.unknown` keeps them. ``notes``: what the search said it had cut short.
    """

    structures: tuple[int, ...] = ()
    pages: int = 0
    systems: Mapping[str, str] = field(default_factory=dict)
    slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    found: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inferred: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self, key: str) -> str:
        """Return the text to keep; ``key`` names the capture, the options and the version it belongs to."""
        data = {
            "format": FORMAT,
            "key": key,
            "structures": list(self.structures),
            "pages": self.pages,
            "systems": dict(self.systems),
            "slots": dict(self.slots),
            "found": dict(self.found),
            "inferred": dict(self.inferred),
            "notes": list(self.notes),
        }
        return json.dumps({**data, "sum": _sum(data)})

    @classmethod
    def from_json(cls, text: str, key: str) -> Index | None:
        """Return the index that a text holds; None when it is damaged, of another format, or for another key."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("key") != key:
            return None
        if data.pop("sum", None) != _sum(data):
            return None
        structures, pages, systems, notes = (data.get(name) for name in ("structures", "pages", "systems", "notes"))
        slots, found, inferred = (_lists(data.get(name)) for name in ("slots", "found", "inferred"))
        if not isinstance(structures, list) or not all(
            type(item) is int and 0 <= item < 1 << 52 for item in structures
        ):
            return None
        if type(pages) is not int or not isinstance(systems, dict) or not _texts([*systems, *systems.values()]):
            return None
        if slots is None or found is None or inferred is None or not isinstance(notes, list) or not _texts(notes):
            return None
        return cls(tuple(structures), pages, systems, slots, found, inferred, tuple(notes))


def _sum(data: Mapping[str, object]) -> str:
    """Return a check sum of everything: a changed byte must not change where a search looks."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _lists(value: object) -> dict[str, tuple[str, ...]] | None:
    """Return a mapping of names to texts, None when it is something else."""
    if not isinstance(value, dict) or not all(_texts(item) for item in value.values()):
        return None
    return {str(name): tuple(item) for name, item in value.items()}


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
