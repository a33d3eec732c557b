"""Memory that EPT or NPT lacks, recovered through the page tables of the hypervisor's process.

Hypervisors fill EPT and NPT when the guest touches a page, and empty them again. The pages themselves stay in the
user address space of the VMM (QEMU, Firecracker, crosvm). Its process is the one that maps the guest's frames at a
constant distance from their guest-physical addresses; what else it maps within those slots is the guest's too.

A page is recovered only on evidence, and where the two tables disagree EPT or NPT wins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from volatility3_ept.core import foreign, gpamap, hosttables, mask, memslots, slots
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.hosttables import Frames
from volatility3_ept.core.memory import Bools, HostMemory, Int64
from volatility3_ept.core.slotpages import CODE, DATA, GONE, HIDDEN, Found, gather, joined_rows, no_rows, sorted_rows
from volatility3_ept.core.slots import Inverse, Matched, Slot
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.dialect import State
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.linux_pte import HostEntry

#: The VMM's process maps this share of the guest's frames, or it is not the VMM's process.
_LARGE_MAJORITY = 0.5
#: A typical page shares its distance with this share of the guest, and with so many pages. The outer VMM, too, maps a
#: nested guest's frames, but at countless distances.
_FEW_SLOTS, _FEW_PAGES = 1 / 64, 4
#: Address spaces that are matched page by page, those that map most of the guest first.
_FINALISTS = 16


@dataclass(frozen=True)
class Recovery:
    """What the VMM's own page tables say of a guest. Without a VMM, ``guest_map`` is the one that was given.

    Each array has one row per stretch of guest-physical memory, ascending: ``recovered`` and ``migrating``: ``gpa,
    length, hpa, hva`` (of a migrating page the frame that it is leaving); ``swapped``, ``elsewhere`` (device memory,
    markers): ``gpa, length, hva``; ``never_backed``: ``gpa, length``, no host page at all within a slot;
    ``conflicts``: ``gpa, length, hpa by EPT or NPT, hpa by the host``. ``unreadable``: ``gpa, length``, the host's
    own table is not in the capture. ``protected`` bytes of the recovered ones were mapped PROT_NONE. ``read_only``:
    those of the recovered that the VMM itself may not write, in the same columns: the host's zero page, pages merged
    by KSM, pages of a file that nobody has written yet.
    """

    guest_map: GuestMap
    slots: tuple[Slot, ...] = ()
    recovered: Int64 = field(default_factory=lambda: no_rows(4))
    migrating: Int64 = field(default_factory=lambda: no_rows(4))
    swapped: Int64 = field(default_factory=lambda: no_rows(3))
    elsewhere: Int64 = field(default_factory=lambda: no_rows(3))
    never_backed: Int64 = field(default_factory=lambda: no_rows(2))
    conflicts: Int64 = field(default_factory=lambda: no_rows(4))
    unreadable: Int64 = field(default_factory=lambda: no_rows(2))
    protected: int = 0
    notes: tuple[str, ...] = ()
    read_only: Int64 = field(default_factory=lambda: no_rows(4))

    def __deepcopy__(self, memo: dict[int, object]) -> Recovery:
        """Return itself: nothing in it changes."""
        return self

    @property
    def root(self) -> int | None:
        """The top table of the VMM's address space (its CR3), None when no VMM was found."""
        return self.slots[0].root if self.slots else None

    @property
    def recovered_bytes(self) -> int:
        """Bytes that EPT or NPT lacks and the VMM has."""
        return int(self.recovered[:, 1].sum())


@dataclass(frozen=True)
class _Vmm:
    """One address space and what it maps of the guest."""

    fmt: Ia32Format
    root: int
    matched: Matched

    @property
    def rank(self) -> tuple[int, int]:
        """Order address spaces: the one that explains most, in the fewest pieces."""
        return self.matched.bytes, -self.matched.gpas.size


def recover(
    below: HostMemory,
    guest_map: GuestMap,
    host_roots: Sequence[int] = (),
    key_bits: int = 0,
    confirm: bool = True,
    others: Sequence[GuestMap] = (),
) -> Recovery:
    """Find the VMM's process in the memory below a guest, and in it the pages that the guest's map lacks.

    ``host_roots`` are CR3 values to try first (HOST_CR3 of the guest's VMCSs is its VMM's). ``key_bits`` are address
    bits that carry the host's own encryption key (SME's C-bit). ``guest_map`` is the guest's EPT or NPT. ``confirm``
    costs one more pass over the memory: KVM's own records then say where each slot begins and ends. ``others`` are the
    maps of the other guests in that memory: what lies in their frames is no table of the host either.
    """
    inverse = Inverse.of(guest_map)
    notes = [f"{inverse.shared:#x} bytes of frames that the guest maps over and over"] if inverse.shared else []
    if not inverse.votes:
        return Recovery(guest_map, notes=(*notes, "the guest maps nothing that leads to its VMM"))
    usable = _unowned(below, (guest_map, *others))
    vmm = _best(below, inverse, hosttables.seeds(host_roots), usable, key_bits, notes)
    if vmm is None:
        roots, cut = hosttables.find(below, usable, key_bits)
        notes += cut
        vmm = _best(below, inverse, roots, usable, key_bits, notes)
        if vmm is None:
            notes.append(f"none of {roots.size} address spaces of the host maps this guest's frames")
    if vmm is None:
        return Recovery(guest_map, notes=tuple(notes))
    found = slots.derive(vmm.matched, guest_map, vmm.root, len(vmm.fmt.levels))
    if len(found) == slots.MAX_SLOTS:
        notes.append(f"more than {slots.MAX_SLOTS} slots: those with fewest matches were left out")
    if confirm:
        found = memslots.confirm(below, guest_map, vmm.matched, found, usable)
    return _collect(below, guest_map, vmm.fmt, found, usable, notes, others)


def again(
    below: HostMemory,
    guest_map: GuestMap,
    known: Sequence[Slot],
    key_bits: int = 0,
    others: Sequence[GuestMap] = (),
) -> Recovery:
    """Return what :func:`recover` returned, from the slots that it found: nothing is searched for.

    Its notes are the same but for those on the search itself: what was too common to vote, what was passed over.
    """
    if not known:
        return Recovery(guest_map)
    levels = known[0].levels
    fmt = ia32e.four_level(key_bits=key_bits) if levels == 4 else ia32e.five_level(key_bits=key_bits)
    return _collect(below, guest_map, fmt, tuple(known), _unowned(below, (guest_map, *others)), [], others)


def _unowned(below: HostMemory, maps: Sequence[GuestMap]) -> hosttables.Usable:
    """Return the test for table addresses: a hypervisor hands no page table of the host to a guest."""
    ranges = [each.frame_ranges() for each in maps]
    owned = Frames(*gpamap.union(*(np.concatenate([pair[i] for pair in ranges]) for i in range(2))))

    def usable(tables: Int64) -> Bools:
        return (tables > 0) & (tables < below.top) & ~owned.holds(tables)

    return usable


def _best(
    below: HostMemory,
    inverse: Inverse,
    roots: Int64,
    usable: hosttables.Usable,
    key_bits: int,
    notes: list[str],
) -> _Vmm | None:
    """Return the address space that explains most of the guest's frames, if that is a large majority."""
    frames = inverse.frames
    enough = _LARGE_MAJORITY * int((frames.ends - frames.starts).sum())
    for fmt in (ia32e.four_level(key_bits=key_bits), ia32e.five_level(key_bits=key_bits)):
        weights = hosttables.weigh(below, fmt, roots, frames, usable)
        if (weights < 0).any():
            notes.append(
                f"{int((weights < 0).sum())} {fmt.name} roots have too many tables, or came after too many: passed over"
            )
        # What maps the same frames over and over is no better for it.
        weights = np.minimum(weights, int((frames.ends - frames.starts).sum()))
        order = np.argsort(-weights, kind="stable")
        many = int((weights >= enough).sum())
        if many > _FINALISTS:
            notes.append(
                f"{many} address spaces map most of the guest's frames; {_FINALISTS} were matched page by page"
            )
        order = order[:_FINALISTS]
        best: _Vmm | None = None
        for root in roots[order[weights[order] >= enough]].tolist():
            matched = slots.match(hosttables.flatten(below, fmt, root, usable), inverse)
            if matched is None:
                notes.append(f"the address space at {root:#x} maps this guest's frames over and over: passed over")
                continue
            vmm = _Vmm(fmt, root, matched)
            if _explains(vmm.matched, inverse) and (best is None or vmm.rank > best.rank):
                best = vmm
        if best is not None:
            return best
    return None


def _explains(matched: Matched, inverse: Inverse) -> bool:
    constant = matched.typical >= max(_FEW_SLOTS * inverse.votes, min(_FEW_PAGES * PAGE_SIZE, inverse.votes))
    return matched.bytes >= _LARGE_MAJORITY * inverse.votes and constant


def _collect(below: HostMemory, guest_map: GuestMap, fmt: Ia32Format, found: tuple[Slot, ...],
             usable: hosttables.Usable, notes: list[str], others: Sequence[GuestMap]) -> Recovery:  # fmt: skip
    """Go through the VMM's address space once more, and sort what lies in the slots."""
    gathered = [Found() for _ in found]
    roots = sorted({slot.root for slot in found})
    for chunk in itertools.chain.from_iterable(hosttables.flatten(below, fmt, root, usable) for root in roots):
        for slot, target in zip(found, gathered, strict=True):
            gather(chunk, slot, guest_map, target)
    kept: list[Slot] = []
    believed: list[Found] = []
    notes += _about(found, guest_map, fmt)
    for slot, target in zip(found, gathered, strict=True):
        disputed = sum(int(rows[:, 1].sum()) for rows in target.conflicts)
        if disputed > slot.matched:
            notes.append(f"slot at {slot.gpa:#x} not believed: {disputed:#x} bytes disagree, {slot.matched:#x} agree")
            continue
        left_out = sum(int(rows[:, 1].sum()) for rows in target.resident[target.alien])
        if left_out:
            notes.append(f"slot at {slot.gpa:#x}: {left_out:#x} bytes of another mapping were left out")
        kept.append(slot)
        believed.append(target)
    return _recovery(guest_map, tuple(kept), believed, notes, others)


def _about(found: Sequence[Slot], guest_map: GuestMap, fmt: Ia32Format) -> Iterator[str]:
    """Yield how well a VMM explains a guest: from its slots alone, so that who knows them says the same."""
    if not found:
        return
    matched, sure = sum(slot.matched for slot in found), sum(slot.confirmed for slot in found)
    roots = ", ".join(f"{root:#x}" for root in sorted({slot.root for slot in found}))
    share = min(matched / max(guest_map.mapped_bytes, 1), 1)
    yield f"VMM at CR3 {roots} ({fmt.name}): {share:.1%} of the guest's frames at a constant distance"
    yield f"{sure} of {len(found)} slots have the bounds of a record of KVM's in the host's memory"
    for slot in found if sure else ():
        if not slot.confirmed:
            yield f"slot at {slot.gpa:#x} has no record of KVM's, where others have one: it may be misplaced"


def _recovery(guest_map: GuestMap, found: tuple[Slot, ...], gathered: list[Found], notes: list[str],
              others: Sequence[GuestMap]) -> Recovery:  # fmt: skip
    """Bring what was gathered into order; what no table knows within a slot was never backed."""
    parts: list[Int64] = []
    read_only: list[Int64] = []
    for target in gathered:
        own = CODE if target.alien == DATA else DATA
        parts += [*target.resident[own], *target.resident[HIDDEN]]
        read_only += target.read_only[own]
    shared = joined_rows(sorted_rows(read_only, 4))
    recovered, theirs = foreign.split(joined_rows(sorted_rows(parts, 4)), shared, others)
    if theirs.size:
        notes.append(f"{int(theirs[:, 1].sum()):#x} bytes lie in frames of another guest, open to writing: left out")
    gone = {kind: sorted_rows([rows for target in gathered for rows in target.gone[kind]], 4) for kind in GONE}
    conflicts = joined_rows(sorted_rows([rows for target in gathered for rows in target.conflicts], 4))
    aside = sorted_rows([theirs, *(rows for target in gathered for rows in target.resident[target.alien])], 4)
    whole = _merged(guest_map, recovered)
    known = np.concatenate([recovered[:, :2], aside[:, :2], *(rows[:, :2] for rows in gone.values())])
    taken = gpamap.union(
        np.concatenate((guest_map.gpas, known[:, 0])),
        np.concatenate((guest_map.gpas + guest_map.lengths, known[:, 0] + known[:, 1])),
    )
    spans = np.array([(slot.gpa, slot.gpa + slot.length) for slot in found], dtype=np.int64).reshape(-1, 2)
    never = np.stack(mask.subtract((spans[:, 0], spans[:, 1]), taken), axis=1)
    if conflicts.size:
        notes.append(f"{int(conflicts[:, 1].sum()):#x} bytes lie in other frames by the host's tables: EPT or NPT wins")
    protected = sum(int(rows[:, 1].sum()) for target in gathered for rows in target.resident[HIDDEN])
    return Recovery(
        whole,
        found,
        recovered,
        joined_rows(gone[HostEntry.MIGRATING]),
        joined_rows(gone[HostEntry.SWAPPED][:, (0, 1, 3)]),
        joined_rows(gone[HostEntry.ELSEWHERE][:, (0, 1, 3)]),
        never,
        conflicts,
        joined_rows(gone[HostEntry.NONE][:, (0, 1)]),
        protected,
        tuple(notes),
        shared,
    )


def _merged(guest_map: GuestMap, recovered: Int64) -> GuestMap:
    """Return the map with the recovered pages in it: 4K pages to which EPT or NPT gives the guest no access now."""
    if not recovered.size:
        return guest_map
    words = recovered[:, 2] | int(State.RECOVERED) << gpamap.STATE_SHIFT
    gpas = np.concatenate((guest_map.gpas, recovered[:, 0]))
    order = np.argsort(gpas, kind="stable")
    lengths = np.concatenate((guest_map.lengths, recovered[:, 1]))
    return replace(
        guest_map, gpas=gpas[order], lengths=lengths[order], words=np.concatenate((guest_map.words, words))[order]
    )
