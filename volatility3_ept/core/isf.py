"""Write a VMCS layout as a Volatility ISF table, in the form of those in ``symbols/vmcs``.

``layouts.parse_isf`` reads it back, and Volatility can load it as a symbol table. What is only likely is left out
unless it is asked for, and named in the metadata then.
"""

from __future__ import annotations

import base64
import json
from typing import Any, Final

from volatility3_ept.core.infer_model import Certainty, Inferred, layout
from volatility3_ept.core.layouts import Layout

_TYPES: Final = {1: "unsigned char", 2: "unsigned short", 4: "unsigned long", 8: "unsigned long long"}
_FORMAT: Final = "6.1.0"
_POINTER: Final = {"pointer": 8}


def to_isf(inferred: Inferred, least: Certainty = Certainty.CERTAIN, cpu: str = "unknown", date: str = "") -> str:
    """Return an inferred layout as the text of a table. ``date`` is an ISO date and time, for the metadata.

    ``least`` CERTAIN writes only what is certain; LIKELY writes the likely fields too.
    """
    table = layout(inferred, least)
    ids = sorted(table.revision_ids)
    symbols = {
        "revision_id" if number == 0 else f"revision_id_{number + 1}": {
            "address": 0,
            "constant_data": base64.b64encode(str(identifier).encode()).decode(),
        }
        for number, identifier in enumerate(ids)
    }
    return json.dumps(
        {
            "metadata": {"format": _FORMAT, "producer": _producer(inferred, table, cpu, date)},
            "base_types": {name: _base_type(size) for name, size in {**_names(), **_POINTER}.items()},
            "enums": {},
            "symbols": symbols,
            "user_types": {"_VMCS": {"kind": "struct", "size": table.size, "fields": _fields(table)}},
        },
        indent=2,
    )


def _producer(inferred: Inferred, table: Layout, cpu: str, date: str) -> dict[str, Any]:
    """Describe where the offsets come from, in the keys that the other tables have."""
    details: dict[str, Any] = {
        "access_rights": table.ar_format.value if table.ar_format else None,
        "cpu": cpu,
        "is_software": table.is_software,
        "notes": f"Inferred from {len(inferred.pages)} control structures in a memory image.",
        "sources": [],
        **table.provenance,
    }
    producer: dict[str, Any] = {"name": "volatility3_ept", "version": "1.0.0", "layout": details}
    if date:
        producer["datetime"] = date
    return producer


def _names() -> dict[str, int]:
    return {name: size for size, name in _TYPES.items()}


def _base_type(size: int) -> dict[str, Any]:
    return {"endian": "little", "kind": "int", "signed": False, "size": size}


def _fields(table: Layout) -> dict[str, Any]:
    return {
        name: {"offset": field.offset, "type": {"kind": "base", "name": _TYPES[field.size]}}
        for name, field in table.fields.items()
    }
