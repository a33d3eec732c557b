"""Where fields are: the VMCS layouts of processors and hypervisors, and the VMCB.

The tables are Volatility ISF files (``symbols/``). They are read here with the standard library, so that
nothing below the plugins needs Volatility; Volatility itself can load the same files.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from volatility3_ept.spec import vmcs_fields
from volatility3_ept.spec.vmcs import AccessRightsFormat

_PACKAGE: Final = "volatility3_ept"
_SYMBOLS: Final = "symbols"
#: A hypervisor that reports the identifier of the processor below to its guest; the identifier then says
#: nothing.
_HOST_HARDWARE: Final = "host hardware"


class Field(NamedTuple):
    """Where a field is: byte offset in the page, and size in bytes."""

    offset: int
    size: int

    def read(self, page: bytes | memoryview) -> int:
        """Read the field from a page, little-endian."""
        return int.from_bytes(page[self.offset : self.offset + self.size], "little")


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to lay out a control structure in its page."""

    name: str
    revision_ids: frozenset[int]
    #: How access rights are stored; None where there is only one form (VMCB) or none was seen.
    ar_format: AccessRightsFormat | None
    size: int
    fields: Mapping[str, Field]
    provenance: Mapping[str, Any]
    #: A hypervisor's own format: found in the memory of a guest that is a hypervisor itself.
    is_software: bool

    @property
    def any_revision_id(self) -> bool:
        """Tell whether any revision identifier may head this layout."""
        return self.provenance.get("revision_id_rule") == _HOST_HARDWARE

    def read(self, page: bytes | memoryview, name: str) -> int | None:
        """Read one field; None when this layout does not have it."""
        field = self.fields.get(name)
        return None if field is None else field.read(page)

    def read_all(self, page: bytes | memoryview) -> dict[str, int]:
        """Read every field, in the order of their offsets."""
        return {name: field.read(page) for name, field in self.fields.items()}

    @property
    def encodings(self) -> Mapping[int, Field]:
        """The VMCS fields by encoding instead of by name."""
        known = vmcs_fields.BY_NAME
        return {known[name].encoding: field for name, field in self.fields.items() if name in known}


def parse_isf(name: str, text: str) -> Layout:
    """Read one ISF table that holds a single structure; raise ValueError when it holds none, or several."""
    try:
        return _parse(name, json.loads(text))
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: no table of a control structure ({error!r})") from error


def _parse(name: str, table: Mapping[str, Any]) -> Layout:
    structures = table["user_types"]
    if len(structures) != 1:
        raise ValueError(f"{name}: one structure expected, {len(structures)} found")
    (structure,) = structures.values()
    sizes = {key: int(value["size"]) for key, value in table["base_types"].items()}
    fields = {
        key: Field(int(value["offset"]), _size_of(value["type"], sizes))
        for key, value in sorted(structure["fields"].items(), key=lambda item: int(item[1]["offset"]))
    }
    size = int(structure["size"])
    if not all(0 <= field.offset <= size - field.size and field.size > 0 for field in fields.values()):
        raise ValueError(f"{name}: a field lies outside the structure")
    details = dict(table["metadata"]["producer"]["layout"])
    stored = details.get("access_rights")
    return Layout(
        name=name,
        revision_ids=frozenset(_revision_ids(table["symbols"])),
        ar_format=AccessRightsFormat(stored) if stored else None,
        size=size,
        fields=MappingProxyType(fields),
        provenance=MappingProxyType(details),
        is_software=bool(details["is_software"]),
    )


@functools.cache
def load_layouts() -> tuple[Layout, ...]:
    """Return every VMCS layout, those of processors first. Read once per process."""
    layouts = [parse_isf(name, text) for name, text in _tables("vmcs")]
    return tuple(sorted(layouts, key=lambda layout: (layout.is_software, layout.name)))


@functools.cache
def vmcb_layout() -> Layout:
    """Return the layout of the VMCB."""
    return _one("svm", "amd_vmcb")


@functools.cache
def vmsa_layout() -> Layout:
    """Return the layout of the encrypted save area of an SEV-ES guest."""
    return _one("svm", "amd_vmsa")


def _one(folder: str, wanted: str) -> Layout:
    return next(parse_isf(name, text) for name, text in _tables(folder) if name == wanted)


def _size_of(descriptor: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    if descriptor["kind"] == "array":
        return int(descriptor["count"]) * _size_of(descriptor["subtype"], sizes)
    return sizes[descriptor["name"]]


def _revision_ids(symbols: Mapping[str, Any]) -> Iterator[int]:
    """Yield the constants ``revision_id``, ``revision_id_2``, ...: decimal digits in base64."""
    for name, symbol in symbols.items():
        if name.startswith("revision_id"):
            yield int(base64.b64decode(symbol["constant_data"]))


def _tables(folder: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each table, from inside the package or from beside it in a source checkout."""
    packed = resources.files(_PACKAGE).joinpath(_SYMBOLS).joinpath(folder)
    checkout = Path(__file__).resolve().parents[2] / _SYMBOLS / folder
    root = next((place for place in (packed, checkout) if place.is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"no {_SYMBOLS}/{folder} in the package {_PACKAGE} or beside it")
    for entry in sorted(root.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json"):
            yield entry.name.removesuffix(".json"), entry.read_text(encoding="utf-8")
