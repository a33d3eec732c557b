"""Targets: a whole host. Discovery with a hostile guest and with damage, audit, identification."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

from builders import control, hooks, paging
from builders.machine import Guest, host
from builders.paging import PAGE, GuestRam, HostRam, Shape
from fuzz.draw import Draw
from fuzz.tables import assert_inside
from readers import memory_of

from volatility3_ept.core import audit, identify, search
from volatility3_ept.core.audit_finding import MAX_ROWS
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.machines import Discovery, Machine, View
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT, NPT, Root
from volatility3_ept.spec import ia32e

SHAPES = (paging.EPT_4, paging.NPT_4, paging.EPT_5, paging.NPT_5)
#: What a guest writes to be taken for something: the beginnings of strings, headers, records.
TEXTS = (
    b"Linux version 6.1.0-test (root@host) (gcc (Debian 12.2.0) 12.2.0) #1 SMP\n\0",
    b"Linux version 6.1.0\x1b[31m<script>alert(1)</script> (",
    b"Linux version ",
    b"RSDS" + bytes(20) + b"ntkrnlmp.pdb\0",
    b"RSDS" + bytes(range(20)) + b"hvix64.pdb\0",
    b"MZ" + bytes(58) + b"\x80\0\0\0" + bytes(64) + b"PE\0\0\x64\x86\xff\xff" + b"\xff" * 64,
    b"FreeBSD 14.0-RELEASE #0 releng/14.0-n265380\n\0",
    b"Darwin Kernel Version 22.1.0: root:xnu-8792\0",
    b"VMCOREINFO\0\0OSRELEASE=6.1.0\n",
    b"\x7fELF\x02\x01\x01",
    b"\xff" * 64,
    b"(builder@\x00\x00) #1",
)


@functools.cache
def _two_guests(first: Shape, second: Shape) -> tuple[HostRam, tuple[Guest, ...], Machine]:
    """Return a host of two guests, and the first of them as a search finds it while nothing is wrong."""
    ram, guests = host(first, second, pages=24)
    found = search.discover(memory_of(ram))
    honest = next(machine for machine in found.machines if machine.root.raw & -PAGE == guests[0].root & -PAGE)
    return ram, tuple(guests), honest


def _copied(ram: HostRam) -> HostRam:
    return copy.deepcopy(ram)


def hostile_guest(data: bytes) -> None:
    """A guest writes into its own memory what it likes: its neighbour is found as before, and nothing new on the host.

    ``Nothing that a guest writes can become a machine of the host``, and all that is printed is printable.
    """
    draw = Draw(data)
    original, (victim, attacker), honest = _two_guests(draw.choice(SHAPES), draw.choice(SHAPES))
    ram = _copied(original)
    # A VMCB does not say how many levels its NPT has: the page tables of the guest decide, so here they are left alone.
    decisive = {table for table in attacker.own.table_pages if "NPT" in attacker.shape.name}
    own = [hpa for gpa, hpa in sorted(attacker.placed.items()) if gpa not in decisive]
    interesting = _interesting(original, (victim, attacker))
    for _ in range(24):
        if not draw.left:
            break
        _forge(draw, ram, draw.choice(own), interesting)
    memory = memory_of(ram)
    found = search.discover(memory)
    again = [machine for machine in found.machines if machine.root == honest.root]
    assert len(again) == 1, "the honest guest is found, once"
    assert (again[0].guest_map.gpas.tolist(), again[0].guest_map.words.tolist()) == (
        honest.guest_map.gpas.tolist(),
        honest.guest_map.words.tolist(),
    )
    assert [vcpu.hpa for vcpu in again[0].vcpus] == [vcpu.hpa for vcpu in honest.vcpus]
    forged = set(attacker.placed.values())
    assert not [str(m.root) for m in found.machines if m.root.address in forged and not m.tables_in]
    _assert_discovery(found, memory)


def damaged_host(data: bytes) -> None:
    """Anything is damaged, anywhere: a search ends, and what it returns is within the capture and printable.

    With the index of that search, a second one finds the same.
    """
    draw = Draw(data)
    original, guests, _ = _two_guests(draw.choice(SHAPES), draw.choice(SHAPES))
    ram = _copied(original)
    pages = sorted(ram.pages)
    special = [table for guest in guests for table in guest.tables.table_pages] + guests[0].structures
    interesting = _interesting(original, guests)
    for _ in range(24):
        if not draw.left:
            break
        page = draw.choice(special) if draw.flag() else draw.choice(pages)
        if draw.flag(8):
            ram.pages.pop(page, None)
        elif page in ram.pages:
            _forge(draw, ram, page, interesting)
    memory = memory_of(ram)
    found = search.discover(memory)
    _assert_discovery(found, memory)
    again = search.discover(memory, known=found.index)
    assert [(m.id, m.root, m.system) for m in again.all()] == [(m.id, m.root, m.system) for m in found.all()]
    assert again.index == found.index


def _interesting(ram: HostRam, guests: Sequence[Guest]) -> tuple[int, ...]:
    """Return addresses that a forger would name: of tables and of pages, on the host and in a guest."""
    named = [table for guest in guests for table in guest.tables.table_pages]
    named += [page for guest in guests for page in sorted(guest.placed.values())[:6]]
    return (*named, *sorted(guests[-1].placed)[:6], max(ram.pages), 0, 1 << 45)


def _forge(draw: Draw, ram: HostRam, page: int, interesting: Sequence[int]) -> None:
    """Write one thing into a page: a control structure, a table, a text, an entry."""
    kind = draw.below(6)
    target = draw.choice(interesting)
    if kind == 0:
        ram.write(page, control.vmcs(draw.choice(("haswell", "bochs_3_0", "kvm", "xen")), eptp=target | 0x5E))
    elif kind == 1:
        ram.write(page, control.vmcb(ncr3=target))
    elif kind == 2:
        low = draw.choice((0x7, 0x27, 0x63, 0x67, 0xB7, 0xE7, 0x807))
        count = draw.choice((1, 4, 256, 512))
        step = draw.choice((0, PAGE, 0x20_0000))
        start = draw.choice((0, 255, 511))
        for number in range(min(count, 512 - start)):
            ram.write_entry(page + 8 * (start + number), (target + number * step | low) & (1 << 64) - 1)
    elif kind == 3:
        text = draw.choice(TEXTS)
        ram.write(page + draw.below(PAGE - len(text)), text)
    elif kind == 4:
        ram.write_entry(page + 8 * draw.below(512), draw.word(target | 0x7, target | 0x37, target))
    else:
        ram.write(page + draw.below(PAGE - 32), draw.take(32))


def _assert_discovery(found: Discovery, memory: HostMemory) -> None:
    """Everything of a search is within the capture, bounded and printable."""
    machines = found.all()
    assert len({machine.id for machine in machines}) == len(machines) <= 64
    assert all(note.isprintable() for note in found.notes)
    for machine in machines:
        assert (machine.system + machine.found_by).isprintable()
        assert len(machine.system) < 200
        assert all(str(item).isprintable() for item in machine.evidence)
        assert machine.memory.size
        assert_inside(machine.memory, memory)
        parent = found.find(machine.tables_in) if machine.tables_in else None
        below = parent.memory if parent else memory
        _assert_walks(machine.root, machine.guest_map, below)
    for candidate in found.rejected:
        assert all(str(item).isprintable() for item in candidate.evidence)


def _assert_walks(root: Root, guest_map: GuestMap, below: HostMemory) -> None:
    """The map of a machine says what a walk says, at some pages."""
    for index in range(0, len(guest_map), max(len(guest_map) // 8, 1)):
        run = guest_map.run(index)
        result = root.walk(below, run.gpa)
        assert (result.target, result.access) == (run.hpa, run.access)


@functools.cache
def _victim(shape: Shape) -> hooks.Victim:
    victim = hooks.Victim(HostRam(), shape, pages=40, code_pages=6)
    hooks.second_view(victim, {}, vmfunc=False)
    return victim


def audited(data: bytes) -> None:
    """Tables changed in every way: an audit ends, says what it cut short, and prints nothing but plain text."""
    draw = Draw(data)
    shape = draw.choice(SHAPES[:2])
    victim = _victim(shape)
    ram = _copied(victim.ram)
    frames = sorted(victim.guest.placed.values())
    entries = [victim.tables.entry_address(gpa, "PTE") for gpa in sorted(victim.guest.placed)]
    for _ in range(48):
        if not draw.left:
            break
        kind = draw.below(4)
        at = draw.choice(entries) if kind < 3 else draw.choice(victim.tables.table_pages) + 8 * draw.below(512)
        frame = draw.choice(frames) | draw.choice((0x37, 0x34, 0x33, 0x35, 0x07, 0x67, 0xB7, 0xE7))
        ram.write_entry(at, draw.word(frame, ram.read_entry(at)))
        if kind == 2:
            ram.write(draw.choice(frames) + draw.below(PAGE - 16), draw.take(8))
    memory = memory_of(ram)
    kind = EPT if shape is paging.EPT_4 else NPT
    root = Root(kind, victim.tables.register).resolved(memory)
    machines = [_machine(str(number), root, memory, victim) for number in range(1 + draw.flag(4))]
    found = Discovery(tuple(machines))
    result = audit.audit(found, memory)
    assert len(result.findings) <= len(machines) * 17 * 4 * (MAX_ROWS + 1)
    assert all(note.isprintable() for note in result.notes)
    for row in result.findings:
        assert row.machine in {machine.id for machine in machines}
        assert (row.evidence + row.benign + str(row.severity)).isprintable()
        assert row.length >= 0
        assert row.gpa is None or 0 <= row.gpa < 1 << 64
        assert row.hpa is None or 0 <= row.hpa < 1 << 52


def _machine(name: str, root: Root, memory: HostMemory, victim: hooks.Victim) -> Machine:
    guest_map = root.traverse(memory)
    view = View(root, "")
    return Machine(name, root, guest_map, guest_map.memory(memory), (), (), "", "", ia32e.four_level(),
                   views=(view,), guest_cr3=victim.guest.own.register)  # fmt: skip


@functools.cache
def _system() -> tuple[Guest, dict[int, bytes]]:
    ram = HostRam()
    guest = Guest(ram, paging.EPT_4, 16)
    return guest, {gpa: bytes(ram.page(hpa)) for gpa, hpa in guest.placed.items()}


def identified(data: bytes) -> None:
    """Strings and headers glued together, in a kernel's own memory and anywhere: a short plain name, or unknown."""
    draw = Draw(data)
    guest, pages = _system()
    ram = HostRam()
    for gpa, page in pages.items():
        ram.write(gpa, page)
    space = GuestRam(ram, {gpa: gpa for gpa in pages})
    gpas = sorted(pages)
    for _ in range(32):
        if not draw.left:
            break
        page = guest.kernel_gpa if draw.flag() else draw.choice(gpas)
        text = draw.choice(TEXTS) if draw.flag(4) else draw.choice(TEXTS)[: draw.below(80)] + draw.take(draw.below(48))
        room = PAGE - max(len(text), 1)
        at = draw.choice((0, 64, room, draw.below(room)))
        space.write(page + at, text)
    memory = memory_of(ram)
    mode = draw.choice((None, ia32e.four_level()))
    spaces = [guest.own.register] if mode else []
    found = identify.identify(memory, mode, spaces)
    assert identify.system(memory, mode, spaces) == found.name
    assert (found.name + found.why + found.family).isprintable()
    assert all(text.isprintable() for text in (*found.banners, *found.texts))
    assert 0 < len(found.name) < 200
    name, evidence = identify.from_row(found.row)
    assert (name, evidence.held) == (found.name, found.is_certain or None)
