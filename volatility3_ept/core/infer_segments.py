"""Segment registers: where their slots are, and how access rights are stored.

Processors keep a slot per register: 24 bytes (selector, base 8 on, limit 16, rights 20; ES CS SS DS FS GS LDTR TR) or,
since Haswell, 16 bytes (selector, rights 2, limit 4, base 8; ES CS SS DS LDTR TR FS GS). Hypervisors keep an array per
part. What VM entry demands of eight registers at once (SDM Vol. 3C, "Checks on Guest Segment Registers") fits one
place only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from volatility3_ept.core.control import Criterion
from volatility3_ept.core.infer_model import HOST_SEGMENTS, SEGMENTS, Certainty, Findings
from volatility3_ept.core.infer_state import task_tables
from volatility3_ept.core.infer_tables import Gdt
from volatility3_ept.core.infer_view import Paging, View, at_least_half, canonical
from volatility3_ept.core.memory import Bools
from volatility3_ept.spec import bits
from volatility3_ept.spec.vmcs import AccessRightsFormat

Values = npt.NDArray[np.uint64]

_ORDERS: Final = (SEGMENTS, ("ES", "CS", "SS", "DS", "LDTR", "TR", "FS", "GS"))
_FORMATS: Final = (AccessRightsFormat.PLAIN32, AccessRightsFormat.ROTATE32)
_G, _UNUSABLE, _PRESENT, _S = bits.bit(15), bits.bit(16), bits.bit(7), bits.bit(4)
_RESERVED: Final = bits.field(31, 17) | bits.field(11, 8)
#: Limits of GDTR and IDTR stand between the limits and the rights of the eight registers.
_LIMITS_BEFORE_RIGHTS: Final = 10
#: Distance of the 32-bit fields of an array.
_ARRAY_STRIDES: Final = (4, 8)


@dataclass(frozen=True)
class _Plan:
    """One way to keep segment registers: places of the parts of register ``k`` are ``start + part + stride * k``."""

    text: str
    stride: int
    ar_format: AccessRightsFormat
    order: tuple[str, ...]
    rights: int
    limit: int
    selector: int | None = None
    base: int | None = None

    @property
    def rights_size(self) -> int:
        return 2 if self.ar_format is AccessRightsFormat.PACK16 else 4

    def places(self, start: int) -> Iterator[tuple[str, int, int]]:
        """Yield the fields with offset and size."""
        parts = (("SELECTOR", self.selector, 2), ("ACCESS_RIGHTS", self.rights, self.rights_size),
                 ("LIMIT", self.limit, 4), ("BASE", self.base, 8))  # fmt: skip
        for number, register in enumerate(self.order):
            for name, part, size in parts:
                if part is not None:
                    yield f"GUEST_{register}_{name}", start + part + self.stride * number, size


def _plans() -> Iterator[_Plan]:
    for order in _ORDERS:
        yield _Plan("slots of 16 bytes", 16, AccessRightsFormat.PACK16, order, rights=2, limit=4, selector=0, base=8)
        for ar_format in _FORMATS:
            yield _Plan("slots of 24 bytes", 24, ar_format, order, rights=20, limit=16, selector=0, base=8)
    for stride in _ARRAY_STRIDES:
        for ar_format in _FORMATS:
            rights = _LIMITS_BEFORE_RIGHTS * stride
            yield _Plan("an array for each part", stride, ar_format, SEGMENTS, rights=rights, limit=0)


def segments(view: View, ran: tuple[int, ...], found: Findings) -> None:
    """Find the guest's segment registers; pages whose guest never ran say nothing."""
    rows = view.words[list(ran)] if ran else view.words
    fits = [(plan, start) for plan in _plans() for start in _starts(rows, plan)]
    if len(fits) != 1:
        found.notes.append(f"{len(fits)} places fit as the guest's segment registers")
        return
    plan, start = fits[0]
    found.ar_format, found.segment_stride = plan.ar_format, plan.stride
    rules = Criterion("rules of VM entry", True, "all eight registers obey them in all pages; no other place", 5)
    kept = Criterion("stored as", True, f"{plan.text}, access rights {plan.ar_format.value}", 3)
    for name, offset, size in plan.places(start):
        found.put(name, offset, Certainty.CERTAIN, rules, kept, size=size)


def _starts(words: Values, plan: _Plan) -> list[int]:
    """Return the offsets at which all eight registers are possible in all pages."""
    last = max(offset + size for _, offset, size in plan.places(0))
    starts = np.arange(8, bits.PAGE_SIZE - last + 1, 8 if plan.base is not None else 4)
    good = np.ones((len(words), starts.size), dtype=np.bool_)
    for number, register in enumerate(plan.order):
        at = starts + plan.stride * number
        stored = _gather(words, at + plan.rights, plan.rights_size)
        good &= _possible(register, _unpacked(stored, plan.ar_format), _gather(words, at + plan.limit, 4))
        if plan.base is not None and plan.selector is not None:
            good &= canonical(_gather(words, at + plan.base, 8))
            if register == "TR":
                good &= (_gather(words, at + plan.selector, 2) & np.uint64(4)) == 0
    return [int(start) for start in starts[good.all(axis=0)]]


def _gather(words: Values, offsets: npt.NDArray[np.int64], size: int) -> Values:
    """Return the values of ``size`` bytes at these offsets, of every page."""
    narrow = words.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[size])
    values: Values = np.ascontiguousarray(narrow[:, offsets // size].astype(np.uint64))
    return values


def _unpacked(stored: Values, ar_format: AccessRightsFormat) -> Values:
    """Undo the stored form as :class:`AccessRightsFormat` does, but keep bits that should be zero in sight."""
    plain = stored
    if ar_format is AccessRightsFormat.ROTATE32:
        plain = (stored >> np.uint64(8) | stored << np.uint64(24)) & np.uint64(0xFFFF_FFFF)
    if ar_format is AccessRightsFormat.PACK16:
        plain = stored & np.uint64(0xF7FF) | (stored & np.uint64(0x800)) << np.uint64(5)
    return plain


def _possible(register: str, rights: Values, limit: Values) -> Bools:
    """Tell whether rights and limit are such as VM entry lets a register have."""

    def has(mask: int) -> Bools:
        flags: Bools = (rights & np.uint64(mask)) != 0
        return flags

    types = rights & np.uint64(0xF)
    clean = (rights & np.uint64(_RESERVED)) == 0
    small, large = (limit & np.uint64(0xFFF)) == 0xFFF, (limit >> np.uint64(20)) != 0
    sized = (small | ~has(_G)) & (~large | has(_G))
    usable: Bools = clean & ~has(_UNUSABLE) & has(_PRESENT) & sized
    if register == "CS":
        return usable & has(_S) & _any_of(types, 3, 9, 11, 13, 15)
    if register == "TR":
        return usable & ~has(_S) & _any_of(types, 3, 11)
    unusable: Bools = has(_UNUSABLE) & ((rights & np.uint64(bits.field(31, 17))) == 0)
    if register == "LDTR":
        return unusable | (usable & ~has(_S) & _any_of(types, 2))
    data = _any_of(types, 3, 7) if register == "SS" else _any_of(types, 1, 3, 5, 7, 11, 15)
    return unusable | (usable & has(_S) & data)


def _any_of(values: Values, *wanted: int) -> Bools:
    found: Bools = np.isin(values, np.array(wanted, dtype=np.uint64))
    return found


def selectors(view: View, rows: Mapping[int, Paging], part: str, found: Findings) -> None:
    """Find an array of selectors: what they name in the GDT must be code, data, and the very task of TR's base.

    The host has seven, ES CS SS DS FS GS TR, each with RPL and TI zero; a guest eight, where it has no slots.
    """
    names = HOST_SEGMENTS if part == "HOST" else SEGMENTS
    wanted = f"{part}_TR_SELECTOR"
    if not rows or found.certain(wanted) is not None:
        return
    if part == "GUEST" and found.segment_stride not in _ARRAY_STRIDES:
        return  # Not an array, as far as is known.
    tables = {row: _gdts(view, row, paging, part, found) for row, paging in rows.items()}
    task = found.certain(f"{part}_TR_BASE")

    def agrees(row: int, start: int, step: int) -> bool:
        values = [int(view.halves[row, (start + step * number) // 2]) for number in range(len(names))]
        named = dict(zip(names, values, strict=True))
        bases = {view.word(row, task)} if task is not None else view.values(row)
        return any(_names_segments(named, gdt, bases) for gdt in tables[row])

    fits = [
        (start, step) for start, step in _arrays(view, list(rows), names) if at_least_half(rows, agrees, start, step)
    ]
    if len(fits) != 1:
        found.reject(wanted, f"{len(fits)} places hold selectors that the GDT confirms")
        return
    start, step = fits[0]
    what = f"code, data and TR's base are what these {len(names)} selectors name; no other place"
    for number, name in enumerate(names):
        found.put(f"{part}_{name}_SELECTOR", start + step * number, Certainty.CERTAIN, Criterion("GDT", True, what, 5))


def _gdts(view: View, row: int, paging: Paging, part: str, found: Findings) -> tuple[Gdt, ...]:
    """Return the GDTs that may be a row's: the one at GDTR base where that is known."""
    gdtr = found.certain(f"{part}_GDTR_BASE")
    tables = task_tables(view, row, paging)
    return tuple(gdt for address, gdt in tables.items() if gdtr is None or address == view.word(row, gdtr))


def _arrays(view: View, rows: list[int], names: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Yield offset and step of what can be selectors in most pages, with nothing between them.

    CS and TR are not null; the host's RPL and TI are zero, its SS is not null, and CS, SS, TR are the same for all.
    """
    halves = view.halves[rows]
    is_host = names is HOST_SEGMENTS
    full = ("CS", "SS", "TR") if is_host else ("CS", "TR")
    for step in (2, 4, 8):
        starts = np.arange(8, bits.PAGE_SIZE - step * len(names), 2)
        good = np.ones((len(rows), starts.size), dtype=np.bool_)
        for number, name in enumerate(names):
            values = halves[:, (starts + step * number) // 2]
            good &= (values & 7 == 0) if is_host else (values < 0x1000)
            if name in full:
                good &= values > 3
                good &= (values == values[0]) | (not is_host)
            for gap in range(2, step, 2) if number + 1 < len(names) else ():
                good &= halves[:, (starts + step * number + gap) // 2] == 0
        for start in starts[good.mean(axis=0) >= 0.5].tolist():
            yield start, step


def _names_segments(values: Mapping[str, int], gdt: Gdt, bases: set[int]) -> bool:
    """Tell whether selectors name what their registers must hold; ``bases`` are those that TR may have."""
    found = {name: gdt.descriptor(value) for name, value in values.items()}
    code, tr = found["CS"], found["TR"]
    if code is None or tr is None or not code.is_code or not tr.is_task or tr.base not in bases:
        return False
    others = [name for name in values if name not in ("CS", "TR", "LDTR")]
    return all(
        values[name] < 4 or ((item := found[name]) is not None and (item.is_data or item.is_code)) for name in others
    )
