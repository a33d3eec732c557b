"""The state of guest and host around their control registers: stacks, instruction pointers, bases, descriptor tables.

Each order that known layouts keep is tried as a whole; where none holds, a field is still found when only one place in
the pages meets what the true one must meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from volatility3_ept.core import infer_view
from volatility3_ept.core.control import Criterion
from volatility3_ept.core.infer_anchors import Triples
from volatility3_ept.core.infer_model import Certainty, Findings
from volatility3_ept.core.infer_tables import Gdt, is_idt
from volatility3_ept.core.infer_view import Paging, View, at_least_half, shifted
from volatility3_ept.spec import bits

#: Fields of the host from its CR0 on, in words: in the order of encodings, and as Haswell and later keep them.
HOST_ORDERS: Final[Mapping[str, Mapping[str, int]]] = {
    "by encoding": {"FS_BASE": 3, "GS_BASE": 4, "TR_BASE": 5, "GDTR_BASE": 6, "IDTR_BASE": 7, "RSP": 10, "RIP": 11},
    "as Haswell": {"RSP": -5, "RIP": -4, "IDTR_BASE": 3, "GDTR_BASE": 4, "FS_BASE": 5, "GS_BASE": 6, "TR_BASE": 7},
}
#: Bases of the guest from its CR0 on where natural-width fields are in the order of encodings; DR7 follows them.
GUEST_BASES: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR", "GDTR", "IDTR")
_DR7_AFTER: Final = 8 * (3 + len(GUEST_BASES))
#: VMLAUNCH and VMRESUME; a hypervisor goes on after an exit right behind the one that it entered with.
_ENTRIES: Final = (b"\x0f\x01\xc2", b"\x0f\x01\xc3")
_BEFORE_RIP: Final = 64

_TABLES: Final = Criterion("GDT and IDT", True, "TR's base is in a TSS descriptor, the page-fault handler is code", 5)
_UPPER: Final = np.uint64(bits.field(63, 56))


def guest_run(view: View, triples: Triples, found: Findings) -> int | None:
    """Find DR7, RSP, RIP, RFLAGS, which follow each other: RIP must be code in the guest. Return where DR7 is."""
    places = infer_view.run_places(view)
    rows = triples.guest_paging
    proven = [p for p in places if at_least_half(rows, lambda row, at: rows[row].executes(view.word(row, at)), p + 16)]
    shape = Criterion("DR7, RSP, RIP, RFLAGS in a row", True, "fixed and reserved bits hold in all pages", 3)
    if len(proven) == 1:
        code = Criterion("code at RIP", True, "through the page tables at the guest's CR3", 5)
        place, sure = proven[0], Certainty.CERTAIN
    elif len(places) == 1 and not rows:
        code = Criterion("code at RIP", None, "the guest's page tables are off or cannot be read")
        place, sure = places[0], Certainty.LIKELY
    else:
        for name in ("RSP", "RIP", "RFLAGS"):
            found.reject(f"GUEST_{name}", f"{len(proven) or len(places)} places can hold DR7, RSP, RIP, RFLAGS")
        return None
    for number, name in enumerate(("DR7", "RSP", "RIP", "RFLAGS")):
        found.put(f"GUEST_{name}", place + 8 * number, sure, shape, code)
    return place if sure is Certainty.CERTAIN else None


def guest_bases(view: View, triples: Triples, dr7: int | None, found: Findings) -> None:
    """Name the bases between CR4 and DR7 where exactly they fit in; the guest's GDT must confirm them."""
    start = triples.guest
    if start is None or dr7 is None or dr7 - start != _DR7_AFTER:
        return
    at = {name: start + 8 * (3 + number) for number, name in enumerate(GUEST_BASES)}
    confirmed = _tables_agree(view, triples.guest_paging, at["GDTR"], at["IDTR"], at["TR"])
    order = Criterion("CR4, bases, DR7 in the order of encodings", True, "ten words between the two", 3)
    sure = Certainty.CERTAIN if confirmed else Certainty.LIKELY
    for name, offset in at.items():
        found.put(f"GUEST_{name}_BASE", offset, sure, order, _TABLES if confirmed else replace(_TABLES, held=None))


def guest_tables(view: View, rows: Mapping[int, Paging], found: Findings) -> None:
    """Name GDTR and IDTR base behind the segment slots: as two more slots of 16 bytes, or one behind the other."""
    start, task = found.certain("GUEST_ES_SELECTOR"), found.certain("GUEST_TR_BASE")
    behind = {16: (8 * 16 + 8, 9 * 16 + 8), 24: (8 * 24, 8 * 24 + 8)}.get(found.segment_stride or 0)
    if start is None or task is None or behind is None:
        return
    gdtr, idtr = (start + step for step in behind)
    if _tables_agree(view, rows, gdtr, idtr, task):
        place = Criterion("behind the segment slots", True, "as processors keep them", 2)
        found.put("GUEST_GDTR_BASE", gdtr, Certainty.CERTAIN, place, _TABLES)
        found.put("GUEST_IDTR_BASE", idtr, Certainty.CERTAIN, place, _TABLES)


def _tables_agree(view: View, rows: Mapping[int, Paging], gdtr: int, idtr: int, task: int) -> bool:
    """Tell whether the guest's memory has a GDT with TR's base, and an IDT, where the fields say."""

    def agrees(row: int) -> bool:
        gdt = Gdt.at(rows[row], view.word(row, gdtr))
        named = gdt is not None and view.word(row, task) in gdt.tasks().values()
        return named and is_idt(rows[row], view.word(row, idtr))

    return at_least_half(rows, agrees)


def host_state(view: View, triples: Triples, found: Findings) -> dict[int, Paging]:
    """Find RSP, RIP and the bases of the host by the orders that are known; return the host's page tables by row."""
    start = triples.host
    if start is None or found.certain("HOST_CR3") is None:
        return {}
    rows = {row: view.host_paging(row, start) for row in range(view.count)}
    for proof, sure, tables in (
        (_order_proven, Certainty.CERTAIN, Criterion("GDT, IDT, stack, code", True, "are what they must be", 5)),
        (_order_fits, Certainty.LIKELY, Criterion("stack and code", True, "RSP to a stack, RIP to code", 2)),
    ):
        fits = [
            (text, places)
            for text, steps in HOST_ORDERS.items()
            if _order_holds(view, rows, places := {name: start + 8 * step for name, step in steps.items()}, proof)
        ]
        if len(fits) == 1:
            text, places = fits[0]
            order = Criterion("order around the host's CR0", True, text, 3)
            for name, offset in places.items():
                found.put(f"HOST_{name}", offset, sure, order, tables)
            break
    return rows


def _order_holds(
    view: View,
    rows: Mapping[int, Paging],
    places: Mapping[str, int],
    proof: Callable[[Paging, Mapping[str, int]], bool],
) -> bool:
    """Tell whether an order fits: RIP is the same in all pages, and what the fields hold is right."""
    if min(places.values()) < 8 or max(places.values()) > bits.PAGE_SIZE - 8:
        return False
    if len(set(view.column(places["RIP"]))) != 1:
        return False
    return at_least_half(rows, lambda r: proof(rows[r], {n: view.word(r, offset) for n, offset in places.items()}))


def _order_fits(paging: Paging, value: Mapping[str, int]) -> bool:
    tables = all(value[f"{name}_BASE"] >> 63 for name in ("TR", "GDTR", "IDTR"))
    bases = all(bits.is_canonical(base, 57) for name, base in value.items() if name.endswith("_BASE"))
    return tables and bases and paging.writes(value["RSP"]) and paging.executes(value["RIP"])


def _order_proven(paging: Paging, value: Mapping[str, int]) -> bool:
    if not _order_fits(paging, value) or not is_idt(paging, value["IDTR_BASE"]):
        return False
    gdt = Gdt.at(paging, value["GDTR_BASE"])
    return gdt is not None and value["TR_BASE"] in gdt.tasks().values()


def host_stack(view: View, rows: Mapping[int, Paging], found: Findings) -> None:
    """Find RSP and RIP of the host by what they point to: a stack, and the code behind a VMLAUNCH or VMRESUME."""
    if not rows or found.certain("HOST_RIP") is not None:
        return
    high = (view.words & _UPPER) == _UPPER
    constant = shifted(np.broadcast_to((view.words == view.words[0]).all(axis=0), view.words.shape), 1)
    free = [p for p in infer_view.everywhere(high & shifted(high, 1) & constant, 8) if p != found.certain("GUEST_RSP")]

    def points_well(row: int, place: int) -> bool:
        return rows[row].writes(view.word(row, place)) and rows[row].executes(view.word(row, place + 8))

    pairs = [place for place in free if at_least_half(rows, points_well, place)]
    behind = [
        p for p in pairs if at_least_half(rows, lambda row, at: _behind_entry(rows[row], view.word(row, at)), p + 8)
    ]
    points = Criterion("stack and code", True, "RSP to a stack, RIP to code, RIP the same in all pages", 3)
    entry = Criterion("VMLAUNCH or VMRESUME before RIP", len(behind) == 1 or None, f"within {_BEFORE_RIP} bytes", 5)
    if len(behind) == 1:
        place, sure = behind[0], Certainty.CERTAIN
    elif len(pairs) == 1:
        place, sure = pairs[0], Certainty.LIKELY
    else:
        for name in ("RSP", "RIP"):
            found.reject(f"HOST_{name}", f"{len(pairs)} pairs point to a stack and to code")
        return
    found.put("HOST_RSP", place, sure, points, entry)
    found.put("HOST_RIP", place + 8, sure, points, entry)


def _behind_entry(paging: Paging, address: int) -> bool:
    before = paging.read(address - _BEFORE_RIP, _BEFORE_RIP)
    return before is not None and any(code in before for code in _ENTRIES)


def descriptor_tables(
    view: View, rows: Mapping[int, Paging], others: Mapping[int, Paging], part: str, found: Findings
) -> None:
    """Find GDTR and IDTR base (and the host's FS, GS, TR) where only one place points to such a table.

    ``others`` are the page tables of the other side. Linux keeps the tables of guest and host at the same address: a
    value that both sides could hold proves nothing.
    """
    if not rows:
        return
    taken = {item.offset for item in found.fields.values() if item.certainty is Certainty.CERTAIN}
    free = [offset for offset in _pointers(view, rows) if offset not in taken]
    gdts = {row: task_tables(view, row, paging) for row, paging in rows.items()}

    def holds_gdt(row: int, offset: int, tables: Mapping[int, Paging]) -> bool:
        gdt = Gdt.at(tables[row], view.word(row, offset))
        return gdt is not None and bool(view.values(row) & set(gdt.tasks().values()))

    def holds_idt(row: int, offset: int, tables: Mapping[int, Paging]) -> bool:
        return is_idt(tables[row], view.word(row, offset))

    for field, proof, text in (
        (f"{part}_GDTR_BASE", holds_gdt, "its TSS descriptor holds a base that the page holds"),
        (f"{part}_IDTR_BASE", holds_idt, "its page-fault handler is code"),
    ):
        places = [offset for offset in free if at_least_half(rows, proof, offset, rows)]
        if len(places) == 1 and not any(proof(row, places[0], others) for row in others):
            only = Criterion("only place", True, "that leads to such a table, and not on the other side", 2)
            found.put(field, places[0], Certainty.CERTAIN, Criterion("descriptor table", True, text, 5), only)
        else:
            found.reject(field, f"{len(places)} places lead to such a table, or it is there for guest and host alike")
    if part == "HOST" and found.certain("HOST_TR_BASE") is None:
        _host_task(view, rows, gdts, free, found)


def task_tables(view: View, row: int, paging: Paging) -> dict[int, Gdt]:
    """Return the GDTs that a page points to and whose TSS descriptor holds a base that the page holds too."""
    values = view.values(row)
    tables = (Gdt.at(paging, address) for address in view.pointers(row))
    return {gdt.address: gdt for gdt in tables if gdt is not None and values & set(gdt.tasks().values())}


def _pointers(view: View, rows: Iterable[int]) -> list[int]:
    high = (view.words[list(rows)] & _UPPER) == _UPPER
    return [int(i) * 8 for i in np.flatnonzero(high.mean(axis=0) >= 0.5)]


def _host_task(
    view: View, rows: Mapping[int, Paging], gdts: Mapping[int, Mapping[int, Gdt]], free: list[int], found: Findings
) -> None:
    """FS, GS, TR base follow each other: TR's is in a TSS descriptor, GS's points to the host's data."""

    def agrees(row: int, place: int) -> bool:
        fs, gs, task = (view.word(row, place + 8 * step) for step in (-2, -1, 0))
        bases = {base for gdt in gdts[row].values() for base in gdt.tasks().values()}
        return task in bases and bool(gs >> 63) and rows[row].writes(gs) and bits.is_canonical(fs, 57)

    places = [o for o in free if o >= 24 and at_least_half(rows, agrees, o)]
    if len(places) != 1:
        found.reject("HOST_TR_BASE", f"{len(places)} places fit FS, GS, TR base")
        return
    row_of = Criterion("FS, GS, TR base in a row", True, "GS to data of the host, TR as in its GDT; no other place", 5)
    for step, name in enumerate(("FS", "GS", "TR")):
        found.put(f"HOST_{name}_BASE", places[0] + 8 * (step - 2), Certainty.CERTAIN, row_of)
