"""Infer an unknown VMCS layout from what the pages hold, with no table of layouts.

Given the EPT roots of a host, which :mod:`.roots` finds by structure, a control structure is a page that names one of
them. All pages with the same revision identifier have the same layout, so they are read side by side: a field can be
only where its rule holds in each of them. What no rule settles stays unknown.

Sources: Intel SDM Vol. 3C, "VM Entries" (what hardware demands of a VMCS), Vol. 3D, appendix "Reserved Controls and
Default Settings"; the order of fields is what the tables in ``symbols/vmcs`` have in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from volatility3_ept.core import infer_anchors, infer_prior, infer_segments, infer_state
from volatility3_ept.core.control import Criterion
from volatility3_ept.core.infer_model import Certainty, Findings, Inferred, KnownRoot, agreement, layout
from volatility3_ept.core.infer_view import Space, View
from volatility3_ept.core.memory import Bools, HostMemory, Int64, Words
from volatility3_ept.spec import bits, paging, vmcs
from volatility3_ept.spec.ept import Eptp

__all__ = [
    "Certainty",
    "Groups",
    "Inferred",
    "KnownRoot",
    "agreement",
    "candidate_pages",
    "infer",
    "infer_all",
    "layout",
]

#: Abort indicators that have been seen are small; what is larger is no header.
_MAX_ABORT: Final = 0xFFF
#: A file in a page cache can hold any number of forged pages. Pages of one revision identifier that are read, and
#: identifiers that are looked into.
MAX_PAGES: Final = 64
MAX_GROUPS: Final = 64
#: Places in the pages of one group that are tried as the EPTP's.
MAX_PLACES: Final = 16
#: Layouts that pages with one revision identifier may have.
MAX_LAYOUTS: Final = 4
#: Control words that a page must hold to count: processor-based, exit, entry.
_WORDS: Final = (
    ("PROC_BASED_EXEC_CONTROLS", 0),
    ("VM_EXIT_CONTROLS", 0),
    ("VM_ENTRY_CONTROLS", vmcs.Entry.ENTRY_TO_SMM | vmcs.Entry.DEACTIVATE_DUAL_MONITOR),
)
#: Bits of an EPTP other than the address, and those that are A/D and shadow stack, which may be on or off.
_LOW: Final = bits.field(11, 0)
_FREE: Final = bits.field(7, 6)
_KINDS: Final = tuple((levels - 1) << 3 | memory_type for levels in (4, 5) for memory_type in (0, 6))


@dataclass
class Groups:
    """Pages that name a known root, by revision identifier, and what was left out."""

    pages: dict[int, dict[int, bytes]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _dropped: Counter[int] = field(default_factory=Counter)

    def add(self, address: int, page: bytes) -> None:
        """Add a page to its group, as long as there is room."""
        identifier = int.from_bytes(page[:4], "little") & vmcs.REVISION_ID
        if identifier not in self.pages and len(self.pages) >= MAX_GROUPS:
            self._dropped[-1] += 1
            return
        group = self.pages.setdefault(identifier, {})
        if len(group) < MAX_PAGES:
            group[address] = page
        else:
            self._dropped[identifier] += 1

    def close(self) -> None:
        """Say what there was no room for."""
        for identifier, count in self._dropped.items():
            what = "other revision ids" if identifier < 0 else f"revision id {identifier:#x}"
            self.notes.append(f"{count} more pages of {what} were not read")


def candidate_pages(memory: HostMemory, roots: Iterable[KnownRoot]) -> Groups:
    """Find the pages that can be control structures of these roots, in one pass.

    A page that belongs to a guest is not looked at: what it holds is the guest's own, true or forged.
    """
    known = list(roots)
    groups = Groups()
    targets = np.array(sorted({root.address for root in known}), dtype=np.uint64)
    if not targets.size:
        return groups
    for start, rows in memory.blocks():
        head = rows[:, 0]
        headed = np.flatnonzero(
            ((head & np.uint64(vmcs.REVISION_ID)) != 0) & (head >> np.uint64(32) <= np.uint64(_MAX_ABORT))
        )
        addresses = start + headed.astype(np.int64) * bits.PAGE_SIZE
        headed = headed[~_in_guests(addresses, known)]
        for index in headed[_names_root(rows[headed], targets).any(axis=1)] if headed.size else ():
            page = np.ascontiguousarray(rows[index])
            if _has_controls(page):
                groups.add(start + int(index) * bits.PAGE_SIZE, page.astype("<u8").tobytes())
    groups.close()
    return groups


def _in_guests(addresses: Int64, roots: Sequence[KnownRoot]) -> Bools:
    """Tell which pages a guest can write. No guest can write its own top table: a root that maps itself is forged."""
    held = np.zeros(addresses.shape, dtype=np.bool_)
    for root in roots:
        if not _within(np.array([root.address], dtype=np.int64), root.frames)[0]:
            held |= _within(addresses, root.frames)
    return held


def _within(addresses: Int64, ranges: tuple[Int64, Int64]) -> Bools:
    starts, ends = ranges
    if not starts.size:
        return np.zeros(addresses.shape, dtype=np.bool_)
    index = np.searchsorted(starts, addresses, side="right") - 1
    held: Bools = (index >= 0) & (addresses < ends[np.maximum(index, 0)])
    return held


def _names_root(rows: Words, targets: Words) -> Bools:
    """Tell which words are an EPTP that names one of the (sorted) roots."""
    low = rows & np.uint64(_LOW & ~_FREE)
    found: Bools = np.isin(low, np.array(_KINDS, dtype=np.uint64))
    where = np.nonzero(found)
    values = rows[where]
    roots = values & np.uint64(paging.FRAME)
    index = np.minimum(np.searchsorted(targets, roots), targets.size - 1)
    found[where] = (targets[index] == roots) & (values >> np.uint64(bits.MAX_PHYSICAL_BITS) == 0)
    return found


def _has_controls(page: Words) -> bool:
    values = page.view(np.uint32)
    for name, zero in _WORDS:
        rule = vmcs.CONTROL_RULES[name]
        mask = rule.must_be_one | rule.must_be_zero | zero
        if not ((values & np.uint32(mask)) == np.uint32(rule.must_be_one)).any():
            return False
    return True


def infer(pages: Mapping[int, bytes], roots: Iterable[KnownRoot], host: HostMemory) -> Inferred:
    """Infer the layout of the pages of one group (address to content). ``host`` holds the host's page tables."""
    known = {root.address: root for root in roots}
    some = dict(list(pages.items())[:MAX_PAGES])
    revision = next((int.from_bytes(page[:4], "little") & vmcs.REVISION_ID for page in some.values()), 0)
    notes = [f"{len(pages) - len(some)} more pages were not read"] if len(some) < len(pages) else []
    targets = np.array(sorted(known), dtype=np.uint64)
    places = _eptp_places(some, targets) if known and some else {}
    order = sorted(places.items(), key=lambda item: -len(item[1]))
    if len(order) > MAX_PLACES:
        notes.append(f"{len(order) - MAX_PLACES} more places that name a root were not tried")
    tried = [_with_eptp(place, {a: some[a] for a in rows}, known, host, revision) for place, rows in order[:MAX_PLACES]]
    most = max(map(_strength, tried), default=(False, 0))
    best = [item for item in tried if _strength(item) == most]
    if not best or any(set(best[0].pages) & set(other.pages) for other in best[1:]):
        return _undecided(revision, best, notes)
    out = len(some) - len(best[0].pages)
    notes += [f"{out} pages of the same revision id do not agree and were left out"] if out else []
    return replace(best[0], notes=(*notes, *best[0].notes))


def infer_all(pages: Mapping[int, bytes], roots: Iterable[KnownRoot], host: HostMemory) -> tuple[Inferred, ...]:
    """Infer every layout that the pages of one group have: hypervisors have changed theirs and kept the identifier."""
    known, rest = list(roots), dict(pages)
    found: list[Inferred] = []
    while rest and len(found) < MAX_LAYOUTS:
        item = infer(rest, known, host)
        if item.fields["EPTP"].certainty is not Certainty.CERTAIN:
            return tuple(found) or (item,)
        found.append(item)
        rest = {address: page for address, page in rest.items() if address not in item.pages}
    return tuple(found)


def _undecided(revision: int, readings: Sequence[Inferred], notes: Sequence[str]) -> Inferred:
    """Return what the readings with different places of the EPTP have in common."""
    found = Findings()
    found.reject("EPTP", f"{len(readings)} places name a root, and none has more for it than the others")
    first, *others = readings or (Inferred(revision, found.settled()),)
    for name, item in first.fields.items():
        if name != "EPTP" and all(other.fields[name].offset == item.offset for other in others):
            found.fields[name] = item
    same = all((o.ar_format, o.segment_stride) == (first.ar_format, first.segment_stride) for o in others)
    form, stride = (first.ar_format, first.segment_stride) if same else (None, None)
    return Inferred(revision, found.settled(), form, stride, first.pages, (*notes, *first.notes))


def _eptp_places(pages: Mapping[int, bytes], targets: Words) -> dict[int, list[int]]:
    """Return for each offset at which a page names a root the addresses of the pages that do."""
    found: dict[int, list[int]] = {}
    for address, page in pages.items():
        row = np.frombuffer(page, dtype="<u8").astype(np.uint64).reshape(1, -1)
        for index in np.flatnonzero(_names_root(row, targets)[0]):
            found.setdefault(int(index) * 8, []).append(address)
    return found


def _strength(inferred: Inferred) -> tuple[bool, int]:
    """Order readings: by whether the pages are control structures, then by how many of them agree."""
    return inferred.fields["EPTP"].certainty is Certainty.CERTAIN, len(inferred.pages)


def _with_eptp(
    place: int, pages: Mapping[int, bytes], known: Mapping[int, KnownRoot], host: HostMemory, revision: int
) -> Inferred:
    """Infer everything else, given where the EPTP is."""
    spaces = {address: Space(root.memory) for address, root in known.items()}
    eptps = [Eptp(int.from_bytes(page[place : place + 8], "little")).root_hpa for page in pages.values()]
    below = Space(host)
    view = infer_anchors.believable(View.of(pages, [spaces[address] for address in eptps], below))
    found = _everything(view, place)
    if not all(space.left for space in (below, *spaces.values())):
        # What was not tried might have been a second place for something.
        found = Findings(notes=["the pages ask for more translations of addresses than are made"])
        found.reject("EPTP", "too many addresses to try: pages forged to that end?")
    return Inferred(
        revision, found.settled(), found.ar_format, found.segment_stride, view.addresses, tuple(found.notes)
    )  # fmt: skip


def _everything(view: View, place: int) -> Findings:
    """Find all fields, each step with what the steps before it have settled."""
    found = Findings()
    triples = infer_anchors.control_registers(view, found)
    infer_anchors.control_words(view, found)
    _put_eptp(place, len(set(view.column(place))), view.count, found)
    infer_anchors.link_and_msrs(view, triples, found)
    dr7 = infer_state.guest_run(view, triples, found)
    host_rows = infer_state.host_state(view, triples, found)
    infer_state.guest_bases(view, triples, dr7, found)
    infer_segments.segments(view, triples.ran, found)
    infer_state.guest_tables(view, triples.guest_paging, found)
    infer_state.host_stack(view, host_rows, found)
    for part, rows, others in (
        ("GUEST", triples.guest_paging, host_rows),
        ("HOST", host_rows, triples.guest_paging),
        ("GUEST", triples.guest_paging, host_rows),
    ):
        infer_state.descriptor_tables(view, rows, others, part, found)
    for part, rows in (("HOST", host_rows), ("GUEST", triples.guest_paging)):
        infer_segments.selectors(view, rows, part, found)
    infer_prior.common_places(view, found)
    if found.certain("EPTP") is not None:
        return found
    nothing = Findings()
    nothing.fields["EPTP"] = found.fields["EPTP"]
    return nothing


def _put_eptp(place: int, roots: int, pages: int, found: Findings) -> None:
    """Judge the EPTP: equality with a root is much, but only in a page that is a control structure otherwise."""
    names = Criterion("names a known root", True, f"{roots} roots in {pages} pages; memory type and length valid", 5)
    controls = sum(found.fields[name].offset is not None for name, _ in _WORDS if name in found.fields)
    control = Criterion("control words", controls >= 2, f"{controls} of {len(_WORDS)} found", 2)
    parts = [part for part in ("GUEST", "HOST") if found.certain(f"{part}_CR3") is not None]
    proven = Criterion("CR3 parses", bool(parts), ", ".join(parts) or "neither guest's nor host's", 3, essential=True)
    if len(parts) + bool(control.held) > 1:
        found.put("EPTP", place, Certainty.CERTAIN, names, control, proven)
    else:
        found.reject("EPTP", f"the page at hand is no control structure: {control}; {proven}")
