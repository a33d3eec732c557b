"""A host of two guests, one of which has filled its memory with fakes; written as a sparse file.

The attacker's memory lies *below* everything that is the host's, so that whoever looks at pages by address meets the
fakes first. Nothing of the package is imported. The victim is the honest machine that must not be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import control, machine
from .machine import Guest
from .paging import EPT_4, LONG_4, PAGE, GuestRam, HostRam, Shape, Tables

Pages = npt.NDArray[np.uint64]
M2 = 0x20_0000
#: Where the attacker's memory begins, in the host.
LOW = 2 << 20
#: Pages of the attacker's own: a kernel and its tables. The fakes follow.
_OWN = 512
#: Fields of a fake that differ from one to the next.
_EPTP, _NCR3 = 0x140, 0xB0
_HASWELL_MSR_BITMAP, _MSRPM = 0x2F8, 0x48


@dataclass
class Flood:
    """A host's memory: what was written page by page, and the fakes in one piece at :attr:`first`."""

    ram: HostRam
    victim: Guest
    fakes: Pages
    first: int
    #: Root of the attacker, 0 where the capture lacks it.
    attacker: int

    @property
    def size(self) -> int:
        return max(max(self.ram.pages) + PAGE, self.first + self.fakes.nbytes)

    def write(self, path: Path, size: int = 0) -> Path:
        """Write a raw image of ``size`` bytes, in which nothing but these pages takes room."""
        with path.open("wb") as file:
            file.truncate(max(size, self.size))
            for address, page in self.ram.pages.items():
                if any(page):
                    file.seek(address)
                    file.write(page)
            file.seek(self.first)
            file.write(self.fakes.data)
        return path

    def image(self) -> bytes:
        out = bytearray(self.size)
        for address, page in self.ram.pages.items():
            out[address : address + PAGE] = page
        out[self.first : self.first + self.fakes.nbytes] = self.fakes.tobytes()
        return bytes(out)


def flooded(
    count: int,
    fill: Callable[[int, Pages], None],
    shape: Shape = EPT_4,
    announced: bool = True,
    victim: Shape | None = None,
) -> Flood:
    """Build the host. ``fill`` writes ``count`` fakes, given the address of the first, into an array of pages.

    ``announced``: the attacker's EPT or NPT is in the capture; otherwise nothing tells whose memory its memory is.
    """
    span = -(-(count + _OWN) * PAGE // M2) * M2
    ram = HostRam(LOW + span)
    attacker = 0
    if announced:
        tables = Tables(ram, shape)
        for offset in range(0, span, M2):
            tables.map(offset, LOW + offset, M2)
        own = GuestRam(ram, {number * PAGE: LOW + number * PAGE for number in range(_OWN)})
        linear = Tables(own, LONG_4)
        for number in range(64):
            linear.map(machine.KERNEL + number * PAGE, number * PAGE)
        attacker = tables.root
    honest = Guest(ram, victim or shape, pages=64)
    honest.vcpu()
    fakes = np.zeros((count, 512), dtype=np.uint64)
    fill(LOW + _OWN * PAGE, fakes)
    return Flood(ram, honest, fakes, LOW + _OWN * PAGE, attacker)


def control_structures(shape: Shape = EPT_4, root: int = 0) -> Callable[[int, Pages], None]:
    """Return what fills memory with control structures. Each names a page of its own, or all of them ``root``.

    That page lies half of the fakes further on.
    """

    def fill(first: int, pages: Pages) -> None:
        eptp = shape is EPT_4
        page = control.vmcs("haswell") if eptp else control.vmcb()
        pages[:] = np.frombuffer(page, dtype=np.uint64)
        number = np.arange(len(pages), dtype=np.uint64)
        named = first + ((number + np.uint64(len(pages) // 2)) % np.uint64(len(pages))) * np.uint64(PAGE)
        pages[:, (_EPTP if eptp else _NCR3) // 8] = (root or named) | np.uint64(shape.register)
        own = np.uint64(0x50_0000) + number * np.uint64(2 * PAGE)
        pages[:, (_HASWELL_MSR_BITMAP if eptp else _MSRPM) // 8] = own

    return fill


def tables(shape: Shape = EPT_4, entries: int = 6, upper: int = 0, seed: int = 1) -> Callable[[int, Pages], None]:
    """Return what fills memory with tables whose entries name each other: every page is a table of every level.

    ``upper`` further entries in the upper half make them look like an operating system's own.
    """

    def fill(first: int, pages: Pages) -> None:
        rng = np.random.default_rng(seed)
        count = np.uint64(len(pages))
        low = np.uint64(shape.page if shape is EPT_4 else shape.table)
        for columns in (range(entries), range(511, 511 - upper, -1)):
            for column in columns:
                named = rng.integers(0, count, len(pages), dtype=np.uint64)
                pages[:, column] = np.uint64(first) + named * np.uint64(PAGE) | low

    return fill


def both(*fills: Callable[[int, Pages], None]) -> Callable[[int, Pages], None]:
    """Return what gives each of several kinds of fakes an equal part of the memory."""

    def fill(first: int, pages: Pages) -> None:
        share = len(pages) // len(fills)
        for number, part in enumerate(fills):
            begin = number * share
            part(first + begin * PAGE, pages[begin : begin + share])

    return fill


def trees(shape: Shape = EPT_4, leaves: int = 64) -> Callable[[int, Pages], None]:
    """Return what fills memory with whole hierarchies of four tables: sound ones, that map memory of the attacker."""

    def fill(first: int, pages: Pages) -> None:
        number = np.arange(len(pages), dtype=np.uint64)
        own = np.uint64(first) + number * np.uint64(PAGE)
        level = number % np.uint64(4)
        above = level < 3
        pages[above, 0] = own[above] + np.uint64(PAGE) | np.uint64(shape.table)
        last = np.flatnonzero(~above)
        for column in range(leaves):
            page = (number[last] * np.uint64(7) + np.uint64(column)) % np.uint64(len(pages))
            pages[last, column] = np.uint64(first) + page * np.uint64(PAGE) | np.uint64(shape.page)

    return fill
