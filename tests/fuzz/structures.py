"""Targets: one page judged as a VMCS, and as a VMCB."""

from __future__ import annotations

import functools
import math

import numpy as np
from builders import control, paging
from builders.machine import Guest
from builders.paging import PAGE, HostRam
from fuzz.draw import Draw
from readers import memory_of

from volatility3_ept.core import candidate, guestcpu, vmcb, vmcs
from volatility3_ept.core import layouts as tables
from volatility3_ept.core.control import ControlStructure, Verdict
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.export import cpu
from volatility3_ept.spec import bits, describe

#: An input that begins with this byte is a page, literally.
PAGE_ITSELF = 0xFF
_LAYOUTS = tuple(control.REVISIONS)
_HOME = 0x29_4000
_WIDTHS = (52, 46, 39, 36)
#: Numbers that mean something to some field.
_NEAR = (0, 1, 0x5E, 0x10_005E, 0x7F, 0xB5A0_6DFA, 0x0012_14EF, 0x8005_0033, 0x37_26B0, 0xD01, 0xFFFF_FFFF_8100_0000)


def vmcs_page(data: bytes) -> None:
    """A page as a VMCS: judged the same by both finders, never more than its bytes say, decoded into plain text."""
    draw = Draw(data)
    page = _page(draw, lambda: control.vmcs(draw.choice(_LAYOUTS)), tuple(tables.load_layouts()))
    _judge(draw, page, vmcs)


def vmcb_page(data: bytes) -> None:
    """The same of a VMCB."""
    draw = Draw(data)
    page = _page(draw, lambda: draw.choice(_VMCBS)(), (tables.vmcb_layout(),))
    _judge(draw, page, vmcb)


_VMCBS = (control.vmcb, control.sev_es_vmcb, control.host_save_area, control.xen_host_vmcb)


def _page(draw: Draw, make, known: tuple[tables.Layout, ...]) -> bytes:
    """Return a page: the input itself, or a control structure with changes in fields, and anywhere."""
    if draw.number(1) == PAGE_ITSELF:
        return draw.take(PAGE)
    page = bytearray(bytes(PAGE) if draw.flag(8) else make())
    layout = draw.choice(known)
    fields = list(layout.fields.values())
    for _ in range(64):
        if not draw.left:
            break
        if draw.flag(4):
            offset, size = draw.below(PAGE), draw.choice((1, 2, 4, 8))
        else:
            offset, size = draw.choice(fields)[:2]
            size = min(size, 8)
        size = min(size, PAGE - offset)
        old = int.from_bytes(page[offset : offset + size], "little")
        page[offset : offset + size] = (draw.word(old, *_NEAR) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(page)


def _judge(draw: Draw, page: bytes, module) -> None:
    """Judge a page with every kind of limit; what is believed must have passed the cheap test too."""
    rows = np.frombuffer(page, dtype="<u8").reshape(1, -1)
    width, top = draw.choice(_WIDTHS), draw.choice((None, 1 << 30, 0x1000))
    present = draw.choice((None, lambda address: address < 1 << 28, lambda address: None))
    found = module.examine(page, _HOME, width, top, present)
    assert found == module.examine(rows[0], _HOME, width, top, present)
    maybe = bool(module.candidates(rows)[0])
    strided = np.zeros((2, 1024), dtype=np.uint64)[:, ::2]
    strided[1] = rows[0]
    assert module.candidates(strided).tolist() == [bool(module.candidates(strided[:1])[0]), maybe]
    if found is None:
        return
    assert maybe or not _is_flawless(found, page), "the cheap test lost a page with which nothing is wrong"
    _assert_plain(found)
    _assert_consistent(found, page, width)
    _through_tables(found)


def _is_flawless(found: ControlStructure, page: bytes) -> bool:
    """Tell whether nothing speaks against a page. A VMCS has a header, and is unmistakable only with an EPTP."""
    head = int.from_bytes(page[:8], "little")
    headed = head & 0x7FFF_FFFF and head >> 32 <= 0xFFF and "EPTP" in found.fields
    return not found.failed and bool(headed or found.kind == "VMCB") and found.verdict is Verdict.LIKELY


def _assert_plain(found: ControlStructure) -> None:
    """Everything that is printed of a page is printable, whatever its fields hold."""
    assert all(line.isprintable() for line in found.explain().split("\n"))
    for name, value in found.fields.items():
        assert describe.field(found.kind, name, value).isprintable()


def _assert_consistent(found: ControlStructure, page: bytes, width: int) -> None:
    assert math.isclose(min(max(found.score, 0), 1), found.score)
    assert found.hpa == _HOME
    assert not found.root_hpa % PAGE
    assert found.root_hpa >> 52 == 0
    assert found.root_hpa in (0, found.root_raw & bits.field(51, 12)) or found.kind == "VMCB"
    assert (found.levels in (0, 4, 5)) and (found.has_root or not found.root_hpa)
    assert found.table is not None
    for name, place in found.table.fields.items():
        if not name.endswith("_ACCESS_RIGHTS"):
            assert found.fields[name] == int.from_bytes(page[place.offset : place.offset + place.size], "little")
    registers = cpu.read(found)
    assert len(cpu.prstatus(registers, 1)) % 4 == len(cpu.qemu_state(registers)) % 4 == 0
    for root in candidate.roots(found, width):
        assert root.raw == found.root_raw
        assert str(root) == str(type(root).parse(str(root)))


@functools.cache
def _guest() -> HostMemory:
    """Return the memory of a guest whose kernel is mapped."""
    ram = HostRam()
    guest = Guest(ram, paging.EPT_4, 12)
    own = {gpa: bytes(ram.page(hpa)) for gpa, hpa in guest.placed.items()}
    memory = HostRam()
    for gpa, data in own.items():
        memory.write(gpa, data)
    return memory_of(memory)


def _through_tables(found: ControlStructure) -> None:
    """Registers of all sorts lead through a guest's tables, or say why not."""
    state = guestcpu.registers(found)
    mode, criterion = guestcpu.paging(_guest(), state)
    assert str(criterion).isprintable()
    if mode is not None:
        assert criterion.held
        assert mode in guestcpu.formats(state)
