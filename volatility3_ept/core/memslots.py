"""KVM's own record of a guest's memory slots, found by its shape: no symbol of the host is needed.

``struct kvm_memory_slot`` (Linux include/linux/kvm_host.h, arch/x86/include/asm/kvm_host.h) holds, in this order and
with few words between them, the first guest frame, the number of pages, pointers of the kernel (dirty bitmap, reverse
maps, large-page counts), the address in the VMM, and flags. Whatever the kernel's version, the first two are
neighbours and the address follows at 64 to 80 bytes; and its distance from the guest-physical address is one that the
guest's frames have voted for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.hosttables import Usable
from volatility3_ept.core.memory import HostMemory, Int64, Words
from volatility3_ept.core.slots import Matched, Slot
from volatility3_ept.spec.bits import PAGE_SHIFT, PAGE_SIZE

#: Words from ``base_gfn`` to ``userspace_addr``: three, and the architecture's five (before v4.7), six or seven.
_STEPS = (8, 9, 10)
#: Where the kernel's addresses begin: the upper half of 57-bit linear addresses.
_KERNEL = np.uint64(0xFF00_0000_0000_0000)
_MAX_FLAGS, _MAX_SPACES = np.uint64(64), np.uint64(4)
#: Records that are looked at; a process has thousands of pointers into its guest's memory, and few of this shape.
_MAX_RECORDS = 4096


def confirm(
    memory: HostMemory, guest_map: GuestMap, matched: Matched, slots: Sequence[Slot], usable: Usable
) -> tuple[Slot, ...]:
    """Return the slots with the bounds that KVM's records give them; those without a fitting record as they were.

    Records are believed when they hold every match of their distance. KVM's slots do not overlap, so a slot without a
    record gives way to one with it: a few frames that matched by accident. Where EPT has MMIO markers within a record,
    the slot keeps to its matches.
    """
    found = _records(memory, sorted({slot.distance for slot in slots}), slots, usable)
    weight = {distance: sum(s.matched for s in slots if s.distance == distance) for distance in found}
    sure: list[Slot] = []
    settled: set[int] = set()
    for distance in sorted(found, key=lambda d: -weight[d]):
        own = [slot for slot in slots if slot.distance == distance]
        chosen = _chosen(found[distance], matched, distance)
        if chosen and not any(_overlap(slot, low, high) for low, high in chosen for slot in sure):
            settled.add(distance)
            for low, high in chosen:
                if _any_marker(guest_map, low, high):
                    sure += [_slot(slot, max(low, slot.gpa), min(high, slot.gpa + slot.length), matched, False)
                             for slot in own if _overlap(slot, low, high)]  # fmt: skip
                else:
                    sure.append(_slot(own[0], low, high, matched, True))
    rest = [
        slot
        for slot in slots
        if slot.distance not in settled and not any(_overlap(slot, s.gpa, s.gpa + s.length) for s in sure)
    ]
    return tuple(sorted(sure + rest, key=lambda slot: slot.gpa))


def _records(
    memory: HostMemory, distances: list[int], slots: Sequence[Slot], usable: Usable
) -> dict[int, list[tuple[int, int]]]:
    """Return by distance the guest-physical ranges ``(start, end)`` that records of that shape name."""
    found: dict[int, set[tuple[int, int]]] = {}
    low, high = min(distances + [slot.hva for slot in slots]), max(slot.hva for slot in slots)
    # A guest that is a hypervisor itself may have its guest's memory at address 0; no record of KVM's has.
    low = max(low, PAGE_SIZE)
    if high < low:
        return {}
    table = np.array(distances, dtype=np.int64)
    for address, rows in memory.blocks():
        words = rows.reshape(-1)
        hits = np.flatnonzero(words - np.uint64(low) <= np.uint64(high - low))
        hits = hits[(words[hits] & np.uint64(PAGE_SIZE - 1)) == 0]
        if hits.size:
            hits = hits[usable(address + hits * 8 & -PAGE_SIZE)]
        for start, end, distance in _shaped(words, hits, table)[:_MAX_RECORDS].tolist():
            if len(found.setdefault(distance, set())) < _MAX_RECORDS:
                found[distance].add((start, end))
    return {distance: sorted(ranges) for distance, ranges in found.items()}


def _shaped(words: Words, hits: Int64, distances: Int64) -> Int64:
    """Return ``start, end, distance`` for each word at ``hits`` that stands where a record has ``userspace_addr``."""
    parts = [np.empty((0, 3), dtype=np.int64)]
    for step in _STEPS:
        at = hits[(hits >= step) & (hits + 1 < words.size)]
        frame, count, tail = words[at - step], words[at - step + 1], words[at + 1]
        pointers = words[at[:, None] + np.arange(2 - step, 0)]
        fits = (frame < np.uint64(1 << 40)) & (count > 0) & (count < np.uint64(1 << 40))
        fits &= ((pointers == 0) | (pointers >= _KERNEL)).all(axis=1) & (pointers != 0).any(axis=1)
        # Flags (32 bits, few in use), then the slot's number and its address space.
        fits &= ((tail & np.uint64(0xFFFF_FFFF)) < _MAX_FLAGS) & (tail >> np.uint64(48) < _MAX_SPACES)
        start = frame[fits].astype(np.int64) << PAGE_SHIFT
        distance = words[at[fits]].astype(np.int64) - start
        end = start + (count[fits].astype(np.int64) << PAGE_SHIFT)
        parts.append(np.stack([start, end, distance], axis=1)[np.isin(distance, distances)])
    return np.concatenate(parts)


def _chosen(ranges: list[tuple[int, int]], matched: Matched, distance: int) -> list[tuple[int, int]]:
    """Return the smallest disjoint ranges that hold every match of one distance; none when they do not.

    A slot that was made anew with another size may have left its old record behind.
    """
    of = matched.distances == distance
    starts, ends = matched.gpas[of], matched.ends[of]
    open_ = np.ones(starts.size, dtype=np.bool_)
    chosen: list[tuple[int, int]] = []
    for low, high in sorted(ranges, key=lambda item: item[1] - item[0]):
        inside = (starts >= low) & (ends <= high)
        if (inside & open_).any() and not any(low < end and start < high for start, end in chosen):
            chosen.append((low, high))
            open_ &= ~inside
    return sorted(chosen) if not open_.any() else []


def _slot(like: Slot, low: int, high: int, matched: Matched, confirmed: bool) -> Slot:
    inside = (matched.distances == like.distance) & (matched.gpas >= low) & (matched.ends <= high)
    held = int((matched.ends - matched.gpas)[inside].sum())
    return replace(like, gpa=low, length=high - low, hva=low + like.distance, matched=held, confirmed=confirmed)


def _overlap(slot: Slot, low: int, high: int) -> bool:
    return slot.gpa < high and low < slot.gpa + slot.length


def _any_marker(guest_map: GuestMap, low: int, high: int) -> bool:
    mmio = guest_map.findings.mmio
    return bool(((mmio[:, 0] < high) & (mmio[:, 0] + mmio[:, 1] > low)).any())
