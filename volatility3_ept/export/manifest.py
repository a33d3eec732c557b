"""What was written, of what, and what is missing: the JSON file beside each image.

It holds nothing that changes from one run to the next: no time, no user, no folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import volatility3_ept
from volatility3_ept.core.coverage import Coverage
from volatility3_ept.export.cpu import Cpu
from volatility3_ept.export.vmcoreinfo import VmCoreInfo

#: The form of the manifest; a reader refuses a number that it does not know.
SCHEMA: Final = 1


def text(parts: Mapping[str, Any]) -> str:
    """Return the file: JSON, one line for each range, so that two of them can be compared line by line."""
    whole = {"schema": SCHEMA, "tool": f"{volatility3_ept.__name__} {volatility3_ept.__version__}", **parts}
    return _written(whole, "") + "\n"


def coverage(found: Coverage) -> dict[str, Any]:
    """Return what became of each page, from 0 to the top of the guest's memory, and the bytes of each fate."""
    return {
        "top": found.top,
        "totals": {str(fate): size for fate, size in found.totals().items()},
        "ranges": [[f"{gpa:#x}", length, str(fate)] for gpa, length, fate in found.parts()],
    }


def cpu(number: int, found: Cpu) -> dict[str, Any]:
    """Return the registers of one vCPU, and those of which nothing is known."""
    held_in = found.structure.held_in
    return {
        "number": number,
        "structure": found.structure.kind,
        "address": f"{found.structure.hpa:#x}",
        "in": f"machine {held_in}" if held_in else "capture",
        "known": found.known(),
        "unknown": list(found.unknown),
    }


def vmcoreinfo(found: VmCoreInfo | None) -> dict[str, Any] | None:
    """Return where the guest kernel's own note lies, None where there is none."""
    if found is None:
        return None
    return {"gpa": f"{found.gpa:#x}", "bytes": len(found.text), "release": found.release, "proof": found.proof}


def ranges(found: Sequence[tuple[int, int]]) -> list[list[Any]]:
    """Return ranges as ``[address, bytes]``."""
    return [[f"{start:#x}", length] for start, length in found]


def _written(value: Any, indent: str) -> str:
    """Return a value as JSON. Dictionaries and lists of lists or dictionaries take one line per item."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {_written(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        items = [_written(item, deeper) for item in value]
        return "[\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}]"
    return json.dumps(value)
