"""Targets: what is worked out from a host's own memory. Recovery through the monitor's tables, layout inference."""

from __future__ import annotations

import copy
import functools

import numpy as np
from builders import kernels, layouts, vmm
from builders.machine import Guest
from builders.paging import PAGE, HostRam, Shape
from fuzz.draw import Draw
from readers import READERS, memory_of

from volatility3_ept.core import backing, infer, isf, leaves, walk
from volatility3_ept.core import layouts as tables
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.infer import KnownRoot
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT, Root
from volatility3_ept.core.slots import Slot
from volatility3_ept.spec import ia32e, vmcs
from volatility3_ept.spec.paging import Outcome

_LOW, _HIGH, _G4 = 0x7F12_3450_0000, 0x7F20_0000_3000, 1 << 32
_HVAS = (_LOW, _HIGH, 0, PAGE, 0x7FFF_FFFF_F000)


@functools.cache
def _recoverable(shape: Shape) -> vmm.Guest:
    guest = vmm.Guest(vmm.Host(shape), vmm.Tables(HostRam()))
    guest.vmm = guest.host.process()
    guest.back(0, _LOW, 16, lost=(1, 2, 9))
    guest.back(_G4, _HIGH, 8, lost=(7,))
    guest.host.record(0, 16 * PAGE, _LOW)
    guest.host.record(_G4, 8 * PAGE, _HIGH, words=10)
    return guest


def recovered(data: bytes) -> None:
    """A monitor's page tables in any state: what is recovered is what they map, and EPT always wins."""
    draw = Draw(data)
    guest = copy.deepcopy(_recoverable(draw.choice((vmm.USER_4, vmm.USER_5))))
    ram = guest.host.ram
    for _ in range(32):
        if not draw.left:
            break
        _change_monitor(draw, guest)
    memory = memory_of(ram)
    guest_map = leaves.traverse(memory, READERS[guest.slat.shape], guest.slat.register)
    roots = [draw.choice((guest.vmm.root, 0, guest.slat.root, 1 << 51))] if draw.flag() else []
    result = backing.recover(memory, guest_map, roots)
    _assert_recovered(result, guest_map, memory)
    slots = [Slot.parse(str(slot)) for slot in result.slots]
    assert tuple(slots) == result.slots
    again = backing.again(memory, guest_map, slots)
    assert again.guest_map.words.tolist() == result.guest_map.words.tolist()
    assert again.recovered.tolist() == result.recovered.tolist()


def _change_monitor(draw: Draw, guest: vmm.Guest) -> None:
    """Change an entry of the monitor's or the guest's, map a page at another address, or forge a record."""
    ram = guest.host.ram
    kind = draw.below(5)
    gpa = draw.choice(sorted(guest.pages))
    hva = gpa + (_LOW if gpa < _G4 else _HIGH - _G4)
    near = guest.pages[gpa]
    if kind == 0:
        odd = (vmm.protnone(near), vmm.migrating(near), vmm.swap(3, 77), near | vmm.CODE, near | vmm.DATA, 0)
        guest.vmm.put(hva, "PTE", draw.word(*odd))
    elif kind == 1:
        guest.slat.put(gpa, "PTE", draw.word(near | 0x37, 0, 0xF8_0000_0046 | gpa & 0x7FFF_F000))
    elif kind == 2:
        other = draw.choice(_HVAS) + PAGE * draw.below(8)
        size = draw.choice((PAGE, 0x20_0000))
        try:
            guest.vmm.map(other & 0x7FFF_FFFF_FFFF, draw.choice((near, near & -size)), size, vmm.DATA | 0x80)
        except KeyError:
            return
    elif kind == 3:
        pages = draw.choice((16, 8, 0, 1 << 39, 1))
        guest.host.record(gpa, pages * PAGE, draw.choice((hva, *_HVAS)), draw.choice((8, 9, 10)), draw.number(1))
    else:
        table = draw.choice(guest.vmm.table_pages)
        ram.write_entry(table + 8 * draw.below(512), draw.word(near | 0x67, table | 0x67, near | 0xE7))


def _assert_recovered(result: backing.Recovery, guest_map: GuestMap, memory: HostMemory) -> None:
    """Each recovered page is mapped by the monitor where its slot says, by nothing in EPT, and no marker is there."""
    assert all(note.isprintable() for note in result.notes)
    whole = result.guest_map
    assert (whole.gpas[1:] >= whole.gpas[:-1] + whole.lengths[:-1]).all()
    assert whole.mapped_bytes == guest_map.mapped_bytes + result.recovered_bytes
    markers = guest_map.findings.mmio.tolist()
    fmt = ia32e.five_level() if result.slots and result.slots[0].levels == 5 else ia32e.four_level()
    for gpa, length, hpa, hva in result.recovered.tolist()[:64]:
        assert not guest_map.find(np.array([gpa, gpa + length - 1]))[1].any()
        assert not any(gpa < start + span and start < gpa + length for start, span, _ in markers)
        own = walk.walk(memory, fmt, result.root or 0, hva)
        if own.outcome in (Outcome.MAPPED, Outcome.OUT_OF_RANGE):
            assert own.target == hpa
    # What EPT or NPT maps is untouched.
    index, inside = whole.find(guest_map.gpas)
    assert inside.all()
    assert whole.hpas[index].tolist() == guest_map.hpas.tolist()


@functools.cache
def _unknown(seed: int) -> tuple[HostRam, Guest, dict[int, bytes], layouts.Layout]:
    """Return a host with three vCPUs in a layout that nobody has seen."""
    ram = HostRam()
    hypervisor = kernels.Hypervisor(ram)
    guest = hypervisor.guest(24)
    layout = (layouts.processor, layouts.hypervisor, layouts.loose)[seed % 3](seed)
    pages = {}
    for number in range(3):
        address = ram.allocate()
        pages[address] = layout.write(0x5A5A_0001, hypervisor.vmcs(guest, number))
        ram.write(address, pages[address])
    return ram, guest, pages, layout


def inferred(data: bytes) -> None:
    """Pages of an unknown layout with changes: no field outside the page, no two certain fields in one place."""
    draw = Draw(data)
    ram, guest, pages, layout = _unknown(draw.below(9))
    changed = {address: bytearray(page) for address, page in pages.items()}
    places = list(layout.fields.values())
    for _ in range(24):
        if not draw.left:
            break
        page = draw.choice(list(changed.values()))
        offset, size = draw.choice(places) if draw.flag() else (8 * draw.below(512), 8)
        old = int.from_bytes(page[offset : offset + size], "little")
        new = draw.word(old, guest.root, *layouts.ODD) & (1 << 8 * size) - 1
        for other in changed.values() if draw.flag() else (page,):
            other[offset : offset + size] = new.to_bytes(size, "little")
    own = copy.deepcopy(ram)
    for address, page in changed.items():
        own.write(address, bytes(page))
    memory = memory_of(own)
    root = Root(EPT, guest.root).resolved(memory)
    known = [KnownRoot.of(memory, root, root.traverse(memory))]
    groups = infer.candidate_pages(memory, known)
    assert set(groups.pages) <= {int.from_bytes(page[:4], "little") & vmcs.REVISION_ID for page in changed.values()}
    for pages_of_one in [{a: bytes(p) for a, p in changed.items()}, *groups.pages.values()]:
        for result in infer.infer_all(pages_of_one, known, memory):
            _assert_inferred(result)


def _assert_inferred(result: infer.Inferred) -> None:
    taken: set[int] = set()
    assert all(note.isprintable() for note in result.notes)
    for name, item in result.fields.items():
        if item.offset is None:
            continue
        place = set(range(item.offset, item.offset + item.size))
        assert 0 <= item.offset <= PAGE - item.size, name
        if item.certainty is infer.Certainty.CERTAIN:
            assert not taken & place, f"{name} overlaps another certain field"
            taken |= place
    written = infer.layout(result)
    read = tables.parse_isf(written.name, isf.to_isf(result))
    assert dict(read.fields) == dict(written.fields)
    assert (read.ar_format, read.revision_ids) == (written.ar_format, written.revision_ids)
