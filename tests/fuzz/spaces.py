"""Memory with paging hierarchies, taken from bytes: chains that lead deep, and whatever the bytes make of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from builders import paging
from builders.paging import PAGE, HostRam, Shape
from fuzz.draw import Draw
from readers import memory_of

from volatility3_ept.core.memory import HostMemory

#: Pages that tables lie in, data that leaves map, and an address that nothing is at.
POOL = tuple(0x10_0000 + number * PAGE for number in range(8))
DATA, MISSING = 0x80_0000, 0x7000_0000
INDEXES = (0, 1, 255, 256, 511)
#: What hypervisors, guests and damage put into an entry beside the ordinary bits.
ODD = (0x7, 0x38, 0x6, 0x2, 0x870 | 0x750 << 48, 0x9C00 << 48, 0x30 << 48, 0x3A, 0xF8_0000_0046, 0x0008_0000_0000_0037)
#: Pages of one image, and entries of one pool.
_MOST_PAGES, _MOST_ENTRIES = 24, 96
#: An input that begins with this byte lists whole pages; any other one, changes to a hierarchy of the pool.
IMAGE = 0xFF


@dataclass
class Space:
    """Some memory with a hierarchy in it: ``root`` is the raw register."""

    ram: HostRam
    shape: Shape
    root: int
    used: set[int] = field(default_factory=lambda: set(INDEXES))

    @property
    def memory(self) -> HostMemory:
        """The same as the package sees it."""
        return memory_of(self.ram)

    def addresses(self, rng: random.Random, count: int) -> list[int]:
        """Return addresses that the hierarchy may translate."""
        used = sorted(self.used)
        offsets = (0, 0x123, 0xFFF)
        return [
            sum(rng.choice(used) % (1 << bits) << shift for _, shift, bits in self.shape.rungs) | rng.choice(offsets)
            for _ in range(count)
        ]


def space(draw: Draw, shape: Shape) -> Space:
    """Return a hierarchy of a shape: whole pages where the input is an image (see :func:`image`), else a pool."""
    return _image(draw, shape) if draw.number(1) == IMAGE else pool(draw, shape)


def pool(draw: Draw, shape: Shape) -> Space:
    """Return a chain of tables from the first page of the pool down to data, and then every change that is drawn."""
    ram = HostRam()
    present = draw.number(1)
    for number, page in enumerate(POOL):
        if not number or not present >> number & 1:
            ram.page(page)
    ram.write(DATA, paging.stamp(DATA))
    found = Space(ram, shape, POOL[0] + shape.root_offset | shape.register)
    for level in range(len(shape.rungs)):
        _put(found, POOL[level], level, 0, _plain(shape, level, POOL[level + 1]))
    for _ in range(_MOST_ENTRIES):
        if not draw.left:
            break
        _change(draw, found)
    return found


def _plain(shape: Shape, level: int, target: int) -> int:
    """Return an ordinary entry: of a table, or at the last level of a page."""
    if level == len(shape.rungs) - 1:
        return DATA | shape.page
    return target | (shape.table if level else shape.top)


def _put(where: Space, table: int, level: int, index: int, entry: int) -> None:
    """Write one entry, if that page is in the capture."""
    if table in where.ram.pages:
        index %= 1 << where.shape.rungs[level][2]
        where.used.add(index)
        base = table + (0 if level else where.shape.root_offset)
        width = where.shape.width
        where.ram.write_entry(base + index * width, entry & (1 << 8 * width) - 1, width)


def _change(draw: Draw, where: Space) -> None:
    """Write one entry of some kind."""
    shape = where.shape
    level = draw.below(len(shape.rungs))
    _, shift, _ = shape.rungs[level]
    table = POOL[level] if draw.flag() else draw.choice(POOL)
    index = draw.choice(INDEXES) if draw.flag() else draw.below(512)
    kind = draw.below(6)
    target = draw.choice((*POOL, DATA, DATA + PAGE, MISSING))
    if kind == 0:
        entry = target | (shape.table if level else shape.top)
    elif kind == 1:
        entry = target & -(1 << shift) | (shape.page if shift == 12 else shape.large)
    elif kind == 2:
        entry = draw.number(5) << 12 & -(1 << shift) | (shape.page if shift == 12 else shape.large)
    elif kind == 3:
        entry = index << shift | draw.choice(ODD)
    elif kind == 4:
        entry = draw.number()
    else:
        entry = 0
    odd = draw.number(1)
    if odd & 0x80:
        entry ^= draw.choice(ODD) if odd & 0x40 else 1 << (odd & 63)
    _put(where, table, level, index, entry)


def _image(draw: Draw, shape: Shape) -> Space:
    """Return the pages that :func:`image` wrote down. Every page named is in the capture, no other."""
    ram = HostRam()
    root = draw.number()
    found = Space(ram, shape, root)
    for _ in range(draw.below(_MOST_PAGES) + 1):
        page = draw.number(5) << 12
        ram.page(page)
        for _ in range(draw.below(513)):
            index, entry = draw.below(512), draw.number()
            found.used.add(index)
            ram.write_entry(page + 8 * index, entry)
        if not draw.left:
            break
    return found


def image(root: int, pages: dict[int, dict[int, int]]) -> bytes:
    """Write pages down (address to entries by index) in the form in which :func:`space` reads them."""
    kept = list(pages.items())[:_MOST_PAGES]
    out = bytearray([IMAGE]) + root.to_bytes(8, "little") + bytes([len(kept) - 1])
    for page, entries in kept:
        out += (page >> 12).to_bytes(5, "little") + len(entries).to_bytes(2, "little")
        for index, entry in entries.items():
            out += index.to_bytes(2, "little") + entry.to_bytes(8, "little")
    return bytes(out)
