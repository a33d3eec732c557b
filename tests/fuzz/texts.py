"""Targets: what is kept as text and read back. Roots, slots, the index of a search, layouts, a configuration."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json

import numpy as np
import volatility
from builders import paging
from builders.machine import Guest, host
from builders.paging import HostRam
from fuzz.draw import Draw
from readers import memory_of
from volatility3.framework import contexts, exceptions

from volatility3_ept.core import layouts, search, structural
from volatility3_ept.core.guestcpu import Registers
from volatility3_ept.core.index import FORMAT, Index
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root, RootError
from volatility3_ept.core.slots import Slot
from volatility3_ept.layers import discovery, errors
from volatility3_ept.layers.guest import GuestPhysicalLayer

_WORDS = ("eptp", "ncr3", "=", ",", "0x", "0xfadf05e", "0x100000", "levels", "4", "5", "2", "maxphyaddr", "46", "cbit",
          "47", "-1", "mbec", "dialect", "kvm", "KVM", "Xen", "host", "0", ".", "_", " ", "\n", "e", "1")  # fmt: skip


def roots(data: bytes) -> None:
    """What ``--guest`` takes: a root, an id, or one clear line; a root written as text reads back as the same root."""
    text = Draw(data).text(_WORDS)
    try:
        root = Root.parse(text)
    except RootError as error:
        assert "\n" not in str(error) or "\n" in text
    else:
        assert Root.parse(str(root)) == root, str(root)
        assert str(root).isprintable()
        assert 0 < root.address < 1 << 52
        assert root.format.root_hpa(root.raw) == root.address
    with contextlib.suppress(errors.GuestError):
        discovery.check_syntax(text)
    with contextlib.suppress(errors.GuestError):
        normal = discovery.explicit(text)
        assert discovery.explicit(normal) == normal


_NUMBERS = ("0x0", "0", "0x1000", "0x7f1234500000", ":", ":", ":", "0x100000000", "-1", "4", "5", "1", "0x", "1e3", "_")


def slots(data: bytes) -> None:
    """A slot of a configuration or an index: written as text it reads back; numbers that no slot has are refused."""
    draw = Draw(data)
    if draw.flag():
        text = draw.text(_NUMBERS)
    else:
        near = (0, 1, 0x1000, 1 << 32, 1 << 47, (1 << 52) - 1, 1 << 63)
        text = ":".join(f"{draw.word(*near):#x}" for _ in range(5)) + f":{draw.below(3)}:{draw.below(7)}"
    with contextlib.suppress(ValueError):
        slot = Slot.parse(text)
        assert Slot.parse(str(slot)) == slot
        # Every number of it must fit the arrays that it is compared with.
        assert all(number >> 62 in (0, -1) for number in (slot.gpa, slot.length, slot.hva, slot.distance, slot.matched))


_REGISTERS = ("cr3", "cr0", "rip", "pdptes", "held_by", "=", "=", ",", "+", "0x1", "0x80050033", "VMCS at 0x1000", "-1",
              "ffffffffffffffff", "1ffffffffffffffff", "0x0+0x1+0x2+0x3", "fs_base", "_", "\x1b", "efer")  # fmt: skip


def registers(data: bytes) -> None:
    """The registers of a saved configuration: one error, or what reads back as itself and is printable."""
    with contextlib.suppress(ValueError):
        found = Registers.parse(Draw(data).text(_REGISTERS))
        assert str(found).isprintable()
        assert Registers.parse(str(found)) == found


@functools.cache
def _searched() -> tuple[HostMemory, Index, tuple[tuple[str, str], ...]]:
    ram, _ = host(paging.EPT_4, paging.NPT_4, pages=24)
    memory = memory_of(ram)
    found = search.discover(memory)
    return memory, found.index, tuple((machine.id, str(machine.root)) for machine in found.all())


_KEY = "0123456789abcdef"
#: Values of the wrong sort, where an index has lists of text.
_WRONG = (None, 0, -1, 1.5, True, "", "x", [], {}, [[]], [None], {"": 0}, "0x10", 1 << 60, float("inf"), "\x1b[31m")


def index(data: bytes) -> None:
    """An index whose bytes changed is not used; one rewritten by hand gives no exception and no other roots."""
    draw = Draw(data)
    memory, kept, roots_found = _searched()
    text = kept.to_json(_KEY)
    assert Index.from_json(text, _KEY) == kept
    assert Index.from_json(text, _KEY + "0") is None
    if draw.flag():
        changed = _damaged(draw, text)
        assert Index.from_json(changed, _KEY) in ((kept,) if _same(changed, text) else (None,))
        return
    forged = _rewritten(draw, kept)
    if forged is None:
        return
    again = search.discover(memory, known=forged)
    # Pages that are not named are not looked at, and a root that is named is walked as it is: never another place.
    places = {Root.parse(root).address for _, root in roots_found}
    assert {machine.root.address for machine in again.machines} <= places


def _damaged(draw: Draw, text: str) -> str:
    """Cut a text, change characters of it, or put others in."""
    for _ in range(8):
        if not draw.left:
            break
        at, kind = draw.below(len(text) + 1), draw.below(3)
        piece = draw.text(("[", "]", "{", "}", '"', ",", "null", "1", "-", "[" * 2000))[:4000] if kind == 2 else ""
        text = text[:at] + (piece or ("" if kind == 1 else chr(draw.number(1)))) + text[at + kind % 2 :][: 1 << 20]
    return text if not draw.flag(8) else text[: draw.below(len(text) + 1)]


def _same(changed: str, text: str) -> bool:
    """Tell whether two texts are the same JSON."""
    try:
        return json.loads(changed) == json.loads(text)
    except (ValueError, RecursionError):
        return False


def _rewritten(draw: Draw, kept: Index) -> Index | None:
    """Return an index with fields that were replaced, as far as it can be read at all."""
    data = json.loads(kept.to_json(_KEY))
    for _ in range(6):
        if not draw.left:
            break
        _replace(draw, data)
    fields = ("structures", "pages", "systems", "slots", "found", "inferred", "notes")
    values = {name: data.get(name) for name in fields}
    return Index.from_json(_sealed(values), _KEY)


def _sealed(values: dict[str, object]) -> str:
    """Write fields of any sort as :meth:`Index.to_json` does, so that only their content can be wrong."""
    data = {"format": FORMAT, "key": _KEY, **values}
    return json.dumps({**data, "sum": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()})


def _replace(draw: Draw, data: object) -> None:
    """Replace something somewhere in a JSON value; rows of it that are JSON themselves are opened."""
    for _ in range(6):
        if isinstance(data, dict) and data:
            key = draw.choice(sorted(data))
        elif isinstance(data, list) and data:
            key = draw.below(len(data))
        else:
            return
        value = data[key]
        if isinstance(value, str) and value.startswith("{") and draw.flag():
            with contextlib.suppress(ValueError, RecursionError):
                inner = json.loads(value)
                _replace(draw, inner)
                data[key] = json.dumps(inner)
            return
        if not isinstance(value, (dict, list)) or not value or draw.flag(4):
            is_text = isinstance(value, str) and draw.flag()
            data[key] = _damaged(draw, value) if is_text else copy.deepcopy(draw.choice(_WRONG))
            return
        data = value


_TABLE = {
    "base_types": {"unsigned long": {"size": 4}, "unsigned long long": {"size": 8}},
    "metadata": {"producer": {"layout": {"access_rights": "plain32", "is_software": False}}},
    "symbols": {"revision_id": {"constant_data": "MTg="}},
    "user_types": {
        "_VMCS": {
            "size": 4096,
            "fields": {
                "EPTP": {"offset": 320, "type": {"kind": "base", "name": "unsigned long long"}},
                "GUEST_CS_ACCESS_RIGHTS": {"offset": 50, "type": {"kind": "base", "name": "unsigned long"}},
                "X_ARRAY": {
                    "offset": 64,
                    "type": {"kind": "array", "count": 2, "subtype": {"kind": "base", "name": "unsigned long"}},
                },
            },
        }
    },
}


def tables(data: bytes) -> None:
    """The table of an inferred layout in an index: one that is damaged is refused, the others lie in their page."""
    draw = Draw(data)
    table = json.loads(json.dumps(_TABLE))
    for _ in range(8):
        if not draw.left:
            break
        _replace(draw, table)
    try:
        layout = layouts.parse_isf("fuzzed", json.dumps(table))
    except ValueError:
        return
    page = bytes(range(256)) * 16
    for name, value in layout.read_all(page).items():
        place = layout.fields[name]
        assert 0 <= place.offset <= 4096 - place.size
        assert 0 <= value < 1 << 8 * place.size
    assert structural.rows_to_found([json.dumps(table)], _searched()[0]) is None


@functools.cache
def _saved() -> tuple[contexts.Context, Guest, HostMemory, str]:
    ram = HostRam(0x1000)
    guest = Guest(ram, paging.EPT_4, 12)
    memory = memory_of(ram)
    root = Root.parse(f"eptp={guest.root:#x}")
    return volatility.buffer_context(ram.image()), guest, memory, root.fingerprint(memory)


def configuration(data: bytes) -> None:
    """A saved configuration in any state: the guest's memory as the tables give it, or one clear error."""
    draw = Draw(data)
    context, guest, memory, table = _saved()
    values = {
        "base_layer": "base",
        "root": f"eptp={guest.root:#x}",
        "table": table,
        "slots": ["0x0:0x1000:0x7f0000000000:0x5000:0x1000:0x0:0x4"],
        "guest": "0",
    }
    for _ in range(4):
        if not draw.left:
            break
        name = draw.choice(("root", "table", "slots", "guest"))
        if name == "slots":
            values[name] = [draw.text(_NUMBERS), *values[name]][: draw.below(3)]
        else:
            values[name] = draw.text(_WORDS) if draw.flag() else _damaged(draw, values[name])
    for name, value in values.items():
        context.config[f"guest.{name}"] = value
    try:
        layer = GuestPhysicalLayer(context, "guest", "guest")
    except errors.EptError as error:
        assert error.message
        return
    root = Root.parse(values["root"])
    assert root.fingerprint(layer.context.layers["base"] and memory) in ("", values["table"])
    expected = root.traverse(memory)
    for gpa in (0, 0x1000, 0xB123, 0xC000):
        target = int(expected.to_hpa(np.array([gpa]))[0])
        try:
            assert layer.read(gpa, 1) == memory.read(target, 1)
        except exceptions.InvalidAddressException:
            assert target < 0 or target not in memory
