"""The fields that everything else hangs on: the CR0, CR3, CR4 triples, the control words, the link pointer.

Rules that all known layouts keep (``docs/layout-inference.md`` lists them with their sources): CR0, CR3, CR4 follow
each other, of the guest and of the host; processors keep PROC, PROC2, PIN in a row, hypervisors keep all 32-bit
controls in the order of their encodings; link pointer, DEBUGCTL, PAT, EFER follow each other; the host's PAT
and EFER too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from volatility3_ept.core import infer_view
from volatility3_ept.core.control import Criterion
from volatility3_ept.core.infer_model import Certainty, Findings
from volatility3_ept.core.infer_view import Paging, View, everywhere, shifted
from volatility3_ept.core.memory import Bools
from volatility3_ept.spec import bits, registers, vmcs
from volatility3_ept.spec.vmcs import CONTROL_RULES, Entry, Proc, Proc2

#: Bits of DEBUGCTL that exist (SDM Vol. 3B, "IA32_DEBUGCTL MSR").
_DEBUGCTL: Final = bits.field(15, 6) | bits.field(2, 0)
#: Entry controls that are zero outside SMM; in exit controls the same bits are one.
_SMM_ONLY: Final = Entry.ENTRY_TO_SMM | Entry.DEACTIVATE_DUAL_MONITOR
#: Exit controls 31:18 are never all on at once.
_EXIT_HIGH: Final = bits.field(31, 18)
#: Where the other control words are from PROC, in words: processors, and hypervisors (encodings 4000H, 4002H, ...).
_HARDWARE: Final = {"PROC_BASED_EXEC_CONTROLS": 0, "SECONDARY_PROC_EXEC_CONTROLS": 1, "PIN_BASED_EXEC_CONTROLS": 2}
_SOFTWARE: Final = {
    "PROC_BASED_EXEC_CONTROLS": 0,
    "PIN_BASED_EXEC_CONTROLS": -1,
    "VM_EXIT_CONTROLS": 5,
    "VM_ENTRY_CONTROLS": 8,
    "SECONDARY_PROC_EXEC_CONTROLS": 14,
}
_ORDERS: Final = (
    ("as processors order them", _HARDWARE, 4),
    ("by encoding, 4 bytes apart", _SOFTWARE, 4),
    ("by encoding, 8 bytes apart", _SOFTWARE, 8),
)
#: More triples than this in one page are not tried.
_MAX_TRIPLES: Final = 8
#: PATs that a page holds: the guest's and the host's.
_SIDES: Final = 2
_LONG_MODE: Final = registers.EFER_LMA | registers.EFER_LME


@dataclass(frozen=True)
class Triples:
    """Offsets of the guest's and the host's CR0, where they are known, and the pages whose guest has run."""

    guest: int | None
    host: int | None
    #: Each page's guest page tables as far as they parse, by row.
    guest_paging: dict[int, Paging]
    ran: tuple[int, ...]


def candidates(view: View) -> list[int]:
    """Return the offsets of what can be CR0, CR3, CR4 in every page; a guest that never ran has zeros there."""
    cr0, cr3, cr4 = (test(view.words) for test in (infer_view.cr0_like, infer_view.cr3_like, infer_view.cr4_like))
    good = cr0 & shifted(cr3, 1) & shifted(cr4, 2)
    zero = view.words == 0
    empty = zero & shifted(zero, 1) & shifted(zero, 2)
    offsets = np.flatnonzero((good | empty).all(axis=0) & good.any(axis=0)) * 8
    return [int(offset) for offset in offsets[:_MAX_TRIPLES]]


def control_registers(view: View, found: Findings) -> Triples:
    """Tell the guest's triple from the host's: each CR3 must parse, one in the guest's memory, one in the host's."""
    offsets = candidates(view)
    guest = {offset: paging for offset in offsets if (paging := _guest_proof(view, offset))}
    host = [offset for offset in offsets if _host_proof(view, offset)]
    pairs = [(g, h) for g in guest for h in host if g != h]
    guests, hosts = {g for g, _ in pairs}, {h for _, h in pairs}
    g = guests.pop() if len(guests) == 1 else None
    h = hosts.pop() if len(hosts) == 1 else None
    if g is not None:
        _put_triple(found, "GUEST", g, Certainty.CERTAIN, _parsed("the guest's", len(guest[g]), view.count))
    if h is not None:
        _put_triple(found, "HOST", h, Certainty.CERTAIN, _parsed("the host's", view.count, view.count))
    if not pairs:
        g, h = _by_elimination(offsets, list(guest), host, found)
    ran = tuple(row for row in range(view.count) if g is not None and view.word(row, g))
    return Triples(g, h, guest.get(g, {}) if g is not None else {}, ran)


def _by_elimination(
    offsets: Sequence[int], guest: Sequence[int], host: Sequence[int], found: Findings
) -> tuple[int | None, int | None]:
    """One side alone is proven. The other side's triple is likely the one that is left, if one is."""
    for part in ("GUEST", "HOST"):
        found.reject(f"{part}_CR3", f"{len(offsets)} places can hold CR0, CR3, CR4, and page tables do not tell whose")
    if len(guest) + len(host) != 1:
        return None, None
    proven = (*guest, *host)[0]
    left = [offset for offset in offsets if offset != proven]
    other = left[0] if len(left) == 1 else None
    sides = ("GUEST", "HOST") if guest else ("HOST", "GUEST")
    _put_triple(found, sides[0], proven, Certainty.CERTAIN, Criterion("page tables at CR3", True, "parse", 5))
    if other is not None:
        why = Criterion("page tables at CR3", None, f"those of the only other triple, at {proven:#x}, parse")
        _put_triple(found, sides[1], other, Certainty.LIKELY, why)
    return (proven, other) if guest else (other, proven)


def _guest_proof(view: View, offset: int) -> dict[int, Paging]:
    """Return for each page the mode in which its guest's tables parse; empty when fewer than half do."""
    proven: dict[int, Paging] = {}
    paged = 0
    runs = infer_view.run_places(view)
    for row in range(view.count):
        readings = view.guest_paging(row, offset)
        paged += bool(readings)
        good = next((p for p in readings if view.parses(row, p) or _runs(view, row, p, runs)), None)
        if good is not None:
            proven[row] = good
    return proven if 2 * len(proven) >= paged else {}


def _runs(view: View, row: int, paging: Paging, places: Sequence[int]) -> bool:
    """Tell whether RIP is code and RSP a stack: a small guest has few other addresses to translate."""
    return any(
        paging.executes(view.word(row, place + 16)) and paging.translate(view.word(row, place + 8) - 8) is not None
        for place in places
        if view.word(row, place + 8) >= bits.PAGE_SIZE
    )


def _host_proof(view: View, offset: int) -> bool:
    return infer_view.at_least_half(range(view.count), _is_host, view, offset)


def _is_host(row: int, view: View, offset: int) -> bool:
    fixed = view.word(row, offset) & registers.CR0_VMX_FIXED == registers.CR0_VMX_FIXED
    return fixed and view.parses(row, view.host_paging(row, offset))


def believable(view: View) -> View:
    """Return the pages whose host registers parse, all at one offset: others are damaged, or forged in a page cache.

    All pages, where none does: the host's page tables may be missing from the capture.
    """
    rows_at: dict[int, list[int]] = {}
    for row in range(view.count):
        for offset in candidates(view.only([row])):
            if _is_host(row, view, offset):
                rows_at.setdefault(offset, []).append(row)
    best = max(rows_at.values(), key=len, default=None)
    return view if best is None or len(best) == view.count else view.only(best)


def _parsed(whose: str, count: int, pages: int) -> Criterion:
    return Criterion(
        "page tables at CR3", True, f"{whose} translate what the page holds of addresses, in {count} of {pages}", 5
    )


def _put_triple(found: Findings, part: str, offset: int, certainty: Certainty, proof: Criterion) -> None:
    row = Criterion("CR0, CR3, CR4 in a row", True, "fixed and reserved bits hold in all pages", 3)
    for place, name in enumerate(("CR0", "CR3", "CR4")):
        found.put(f"{part}_{name}", offset + 8 * place, certainty, row, proof)


def obeys(view: View, name: str) -> Bools:
    """Tell where a control word can be: the bits that every processor fixes."""
    rule = CONTROL_RULES[name]
    values = view.dwords
    good: Bools = (values & np.uint32(rule.must_be_one | rule.must_be_zero)) == np.uint32(rule.must_be_one)
    if name == "VM_ENTRY_CONTROLS":
        good &= (values & np.uint32(_SMM_ONLY)) == 0
    if name == "VM_EXIT_CONTROLS":
        good &= (values & np.uint32(_EXIT_HIGH)) != np.uint32(_EXIT_HIGH)
    if name == "PROC_BASED_EXEC_CONTROLS":
        good &= (values & np.uint32(Proc.SECONDARY_CONTROLS)) != 0
    return good


def control_words(view: View, found: Findings) -> None:
    """Find the five control words: by their order where it is one that is known, else those that stand alone."""
    fits = {name: set(everywhere(obeys(view, name), 4)) for name in CONTROL_RULES}
    secondary = (view.dwords & np.uint32(Proc2.ENABLE_EPT)) != 0
    fits["SECONDARY_PROC_EXEC_CONTROLS"] = set(everywhere(secondary & (view.dwords != np.uint32(0xFFFF_FFFF)), 4))
    orders = [
        (text, {name: proc + width * step for name, step in steps.items()})
        for proc in sorted(fits["PROC_BASED_EXEC_CONTROLS"])
        for text, steps, width in _ORDERS
        if all(proc + width * step in fits[name] for name, step in steps.items())
    ]
    if len(orders) == 1:
        text, places = orders[0]
        order = Criterion("order of the controls", True, text, 3)
        for name, offset in places.items():
            found.put(name, offset, Certainty.CERTAIN, _fixed(name), order)
    elif orders:
        found.notes.append(f"{len(orders)} places fit as control words in a known order")
    sure = Certainty.CERTAIN if len(orders) == 1 else Certainty.LIKELY
    for name in ("PROC_BASED_EXEC_CONTROLS", "VM_EXIT_CONTROLS", "VM_ENTRY_CONTROLS"):
        _alone(found, name, fits[name], sure)
    found.reject("PIN_BASED_EXEC_CONTROLS", "has too few fixed bits to be found alone")


def _fixed(name: str) -> Criterion:
    if name in CONTROL_RULES:
        return Criterion("fixed bits", True, f"{CONTROL_RULES[name].must_be_one:#x} set in all pages", 2)
    return Criterion("EPT enabled", True, "bit 1 set in all pages")


def _alone(found: Findings, name: str, fits: set[int], sure: Certainty) -> None:
    """A word that no other place could be; certain where the order of others shows that they were written back."""
    if len(fits) == 1:
        alone = Criterion("only place", True, "no other word of the pages has these bits")
        found.put(name, min(fits), sure, _fixed(name), alone)
    elif fits:
        found.reject(name, f"{len(fits)} places have the bits that must be one")


def link_and_msrs(view: View, triples: Triples, found: Findings) -> None:
    """Find the link pointer with the guest's PAT and EFER behind it, then the host's PAT and EFER."""
    pats, efers, zero = infer_view.pat_like(view.words), infer_view.efer_like(view.words), view.words == 0
    links = _links(view)
    alone = links & shifted((view.words & np.uint64(~_DEBUGCTL & bits.field(63, 0))) == 0, 1)
    behind = shifted(pats | zero, 2) & shifted(efers, 3) & shifted(pats, 2).any(axis=0)
    chains, places = everywhere(alone & behind, 8), everywhere(alone, 8)
    # Values like these may stand about for no reason: what is left must be the only reading.
    is_clear = len(everywhere(links & behind, 8)) == 1 and int(pats.any(axis=0).sum()) <= _SIDES
    if len(chains) == 1 and is_clear and (len(places) == 1 or _in_long_mode(view, triples, chains[0] + 24)):
        offset = chains[0]
        chain = Criterion("DEBUGCTL, PAT, EFER behind it", True, "all valid; no other place has them", 3)
        none = Criterion("no link, or a shadow VMCS", True, "in all pages", 2)
        found.put("VMCS_LINK_POINTER", offset, Certainty.CERTAIN, none, chain)
        found.put("GUEST_IA32_PAT", offset + 16, Certainty.CERTAIN, Criterion("memory types", True), chain)
        used = any(view.column(offset + 24))
        sure = Certainty.CERTAIN if used else Certainty.LIKELY
        valid = Criterion("EFER", used or None, "valid" if used else "zero")
        found.put("GUEST_IA32_EFER", offset + 24, sure, valid, chain)
    elif len(places) == 1:
        only = Criterion("only place", True, "no link, or a shadow VMCS, and a possible DEBUGCTL behind it", 2)
        found.put("VMCS_LINK_POINTER", places[0], Certainty.LIKELY, only)
    else:
        found.reject("VMCS_LINK_POINTER", f"{len(places)} places can hold it")
    _host_msrs(view, triples.host, pats, found)


def _in_long_mode(view: View, triples: Triples, offset: int) -> bool:
    """Tell whether what would be EFER agrees with guests whose page tables parse in long mode."""
    rows = [row for row, paging in triples.guest_paging.items() if paging.is_long]
    return bool(rows) and all(view.word(row, offset) & _LONG_MODE == _LONG_MODE for row in rows)


def _links(view: View) -> Bools:
    """Tell where a link pointer can be: all ones, or the address of a shadow VMCS with this revision identifier."""
    links: Bools = view.words == np.uint64(vmcs.NO_LINK)
    low = np.uint64(bits.field(63, 52) | bits.field(11, 0))
    header = (int(view.words[0, 0]) & vmcs.REVISION_ID) | vmcs.SHADOW_INDICATOR
    for row, column in np.argwhere(((view.words & low) == 0) & (view.words != 0)):
        raw = view.host.memory.read(int(view.words[row, column]), 4)
        if raw is not None and int.from_bytes(raw, "little") == header:
            links[row, column] = True
    return links


def _long_mode(view: View) -> Bools:
    wanted = np.uint64(_LONG_MODE)
    good: Bools = infer_view.efer_like(view.words) & ((view.words & wanted) == wanted)
    return good


def _host_msrs(view: View, host_triple: int | None, pats: Bools, found: Findings) -> None:
    """The host's PAT and EFER are before its CR0 in processors; elsewhere they stand alone. Theirs never change."""
    constant = (view.words == view.words[0]).all(axis=0)
    own = found.certain("GUEST_IA32_PAT")
    efers = _long_mode(view) & constant
    places = [offset for offset in everywhere(pats & shifted(efers, 1) & constant, 8) if offset != own]
    fixed = Criterion("EFER of a 64-bit host", True, "the same in all pages", 2)
    types = Criterion("memory types", True, "the same in all pages")
    before = -1 if host_triple is None or found.certain("HOST_CR0") is None else host_triple - 24
    is_clear = len(places) == 1 and own is not None and int(pats.any(axis=0).sum()) <= _SIDES
    if before in places or is_clear:
        place = before if before in places else places[0]
        order = "before CR0, as processors keep them" if before in places else "only place beside the guest's"
        row = Criterion("PAT and EFER in a row", True, order, 2)
        found.put("HOST_IA32_PAT", place, Certainty.CERTAIN, types, row)
        found.put("HOST_IA32_EFER", place + 8, Certainty.CERTAIN, fixed, row)
    elif before > 0 and before + 8 in everywhere(efers, 8):
        found.put("HOST_IA32_EFER", before + 8, Certainty.LIKELY, fixed)
    else:
        found.reject("HOST_IA32_EFER", f"{len(places)} places can hold it")
