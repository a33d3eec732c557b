"""Walks as rows: every entry read, decoded, and why the walk ends where it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from volatility3.framework import renderers
from volatility3.framework.renderers import format_hints

if TYPE_CHECKING:
    from volatility3_ept.core.nested import TwoDimensional
    from volatility3_ept.core.walk import Step, Walk
    from volatility3_ept.spec.paging import Format

Row = tuple[int, tuple[Any, ...]]

#: Ref counts memory references as the processor makes them; Input is the address being translated.
COLUMNS = [
    ("Ref", int),
    ("Entry", str),
    ("Input", format_hints.Hex),
    ("Entry HPA", format_hints.Hex),
    ("Raw", format_hints.Hex),
    ("Decoded", str),
    ("Result", str),
]


def one_dimensional(walk: Walk, fmt: Format) -> Iterator[Row]:
    """Yield the rows of a walk of one guest-physical address."""
    for number, step in enumerate(walk.steps, 1):
        yield 0, _entry(number, step.level.name, walk.address, step.entry_address, step, fmt)
    yield 0, _end(walk, fmt)


def two_dimensional(walk: TwoDimensional, fmt: Format, guest: Format) -> Iterator[Row]:
    """Yield the rows of a two-dimensional walk: each guest entry, and below it the nested walk that led to it."""
    number = 0
    for reference in walk.references:
        inner = len(reference.nested.steps)
        step = reference.step
        if step is None:
            yield 0, (number + inner, "page", _hex(reference.gpa), _hex(walk.hpa), _none(), "", "guest-physical page")
        else:
            name = f"guest {step.level.name}"
            at = reference.nested.target
            # An entry that the processor holds is no reference to memory: no number, no address.
            ref = _none() if step.is_held else number + inner + 1
            text = "held in the VMCS" if step.is_held else f"entry at GPA {reference.gpa:#x}"
            yield 0, _entry(ref, name, walk.gva, at, step, guest, text)
        for index, below in enumerate(reference.nested.steps, 1):
            yield 1, _entry(number + index, below.level.name, reference.gpa, below.entry_address, below, fmt)
        number += reference.count
    access = walk.access.letters() if walk.hpa is not None else ""
    size = f"{_size(walk.page_size)} page, " if walk.page_size else ""
    text = _result(walk)
    yield 0, (_none(), "result", _hex(walk.gva), _hex(walk.hpa), _none(), f"{size}{access}".strip(", "), text)


def _entry(
    number: Any, name: str, address: int, where: int | None, step: Step, fmt: Format, result: str = ""
) -> tuple[Any, ...]:
    raw = renderers.UnreadableValue() if step.entry is None else format_hints.Hex(step.entry)
    return number, name, _hex(address), _hex(where), raw, decoded(step, fmt), result or _next(step, fmt)


def _end(walk: Walk, fmt: Format) -> tuple[Any, ...]:
    what = ""
    if walk.target is not None:
        kind = memory_type(walk.memory_type, fmt)
        what = ", ".join(part for part in (f"{_size(walk.page_size)} page", walk.access.letters(), kind) if part)
    return (
        _none(),
        "result",
        _hex(walk.address),
        _hex(walk.target),
        _none(),
        what,
        _result(walk),
    )


def _result(walk: Walk | TwoDimensional) -> str:
    """Return the outcome, a colon and the reason, for a person and for a script that splits at the colon."""
    return f"{walk.outcome}: {walk.reason}"


def decoded(step: Step, fmt: Format) -> str:
    """Return an entry in words: what it is, its own rights, flags, memory type and software bits."""
    if step.entry is None:
        return ""
    parts = [step.kind.name.lower(), step.access.letters() if step.kind.name in ("TABLE", "LEAF") else ""]
    if step.kind.name == "LEAF":
        parts.append(memory_type(int(fmt.memory_type(step.entry)), fmt))
    return " ".join(part for part in (*parts, step.state.text, *step.flags) if part)


def memory_type(value: int, fmt: Format) -> str:
    """Return an EPT memory type by name; empty for formats whose entries do not hold one."""
    from volatility3_ept.spec.ept import EptFormat
    from volatility3_ept.spec.paging import MemoryType

    if not isinstance(fmt, EptFormat):
        return ""
    names = {int(item): item.name for item in MemoryType}
    return names.get(value & 7, f"type {value & 7}")


def _next(step: Step, fmt: Format) -> str:
    if step.entry is None:
        return "not in the capture"
    if step.kind.name == "TABLE":
        return f"table at {fmt.table(step.entry):#x}"
    if step.kind.name == "LEAF":
        return f"page at {fmt.frame(step.entry, step.level):#x}"
    return ""


def _size(size_bytes: int) -> str:
    from volatility3_ept.spec.bits import size_name

    return size_name(size_bytes)


def _hex(value: int | None) -> Any:
    return _none() if value is None else format_hints.Hex(value)


def _none() -> Any:
    return renderers.NotApplicableValue()
