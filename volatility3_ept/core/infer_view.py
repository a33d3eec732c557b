"""Pages that look alike, side by side: what layout inference asks of them.

A predicate gives one truth value for each page and each aligned place in it. A field can only be where the predicate
holds in every page, so each further page (another vCPU, another machine) leaves fewer places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from volatility3_ept.core import guestcpu
from volatility3_ept.core import walk as walks
from volatility3_ept.core.memory import Bools, HostMemory, Words
from volatility3_ept.spec import bits, ia32e, registers
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Access, Outcome

#: Rows of 32-bit and 16-bit values of the same pages.
Dwords = npt.NDArray[np.uint32]
Halves = npt.NDArray[np.uint16]

_LAM: Final = bits.field(62, 61)
#: Below this a canonical upper-half value is an address of a kernel; above it more likely a small negative number.
_TOP: Final = (1 << 64) - bits.PAGE_SIZE
_UPPER_HALF: Final = bits.field(63, 56)
#: Addresses that are translated in one memory, at most.
MAX_WALKS: Final = 1 << 13
#: Where the kernels of 32-bit systems are, and how many bits their addresses have.
_LOW_KERNEL, _LOW_TOP, _NARROW = np.uint64(0x8000_0000), np.uint64(0xFFFF_F000), 32
#: Places of DR7, RSP, RIP, RFLAGS that are looked at.
_MAX_RUNS: Final = 8
#: Addresses that must translate before a value counts as a root of page tables, one of them executable.
_ENOUGH: Final = 3


@dataclass
class Space:
    """A memory with the page tables in it. Translations are remembered: the same addresses are tried again.

    Pages can be forged to ask for any number of translations: there is an end to them, after which none is found.
    """

    memory: HostMemory
    left: int = MAX_WALKS
    _known: dict[tuple[str, int, int], tuple[int, Access] | None] = field(default_factory=dict)

    def translate(self, fmt: Ia32Format, cr3: int, address: int) -> tuple[int, Access] | None:
        """Return target and rights of an address; None where it does not translate to memory that is there."""
        page = address >> bits.PAGE_SHIFT
        key = (fmt.name, cr3, page)
        if key not in self._known:
            if not self.left:
                return None
            self.left -= 1
            found = walks.walk(self.memory, fmt, cr3, page << bits.PAGE_SHIFT)
            good = found.outcome is Outcome.MAPPED and found.target is not None
            self._known[key] = (found.target or 0, found.access) if good else None
        hit = self._known[key]
        return None if hit is None else (hit[0] | address & (bits.PAGE_SIZE - 1), hit[1])

    def executes(self, fmt: Ia32Format, cr3: int, address: int) -> bool:
        """Tell whether an address translates to code."""
        hit = self.translate(fmt, cr3, address)
        return hit is not None and Access.EXECUTE in hit[1]

    def read(self, fmt: Ia32Format, cr3: int, address: int, length: int) -> bytes | None:
        """Return bytes at a linear address, within one page or over two; None where any is missing."""
        out = b""
        while len(out) < length:
            at = address + len(out)
            take = min(length - len(out), bits.PAGE_SIZE - at % bits.PAGE_SIZE)
            hit = self.translate(fmt, cr3, at)
            part = None if hit is None else self.memory.read(hit[0], take)
            if part is None:
                return None
            out += part
        return out


@dataclass(frozen=True)
class Paging:
    """A set of page tables in one page's opinion: where they lie, in which mode, from which CR3."""

    space: Space
    fmt: Ia32Format
    cr3: int

    @property
    def is_long(self) -> bool:
        """Tell whether linear addresses are wider than 32 bits."""
        return self.fmt.address_bits > _NARROW

    def translate(self, address: int) -> tuple[int, Access] | None:
        """Return target and rights of a linear address."""
        return self.space.translate(self.fmt, self.cr3, address)

    def executes(self, address: int) -> bool:
        """Tell whether an address translates to code."""
        return self.space.executes(self.fmt, self.cr3, address)

    def writes(self, address: int) -> bool:
        """Tell whether an address translates to data that may be written."""
        hit = self.translate(address)
        return hit is not None and Access.WRITE in hit[1] and Access.EXECUTE not in hit[1]

    def read(self, address: int, length: int) -> bytes | None:
        """Return bytes at a linear address."""
        return self.space.read(self.fmt, self.cr3, address, length)


@dataclass(frozen=True)
class View:
    """The pages: ``words[page, offset // 8]`` and so on, and for each page the guest that its EPTP names."""

    addresses: tuple[int, ...]
    words: Words
    host: Space
    guests: tuple[Space, ...]

    @classmethod
    def of(cls, pages: Mapping[int, bytes], guests: Sequence[Space], host: Space) -> View:
        """Lay pages side by side; ``guests`` are the memories that their EPTPs name, in the order of the pages."""
        words = np.frombuffer(b"".join(pages.values()), dtype="<u8").reshape(len(pages), -1).astype(np.uint64)
        return cls(tuple(pages), words, host, tuple(guests))

    def only(self, rows: Sequence[int]) -> View:
        """Return a view of some of the pages."""
        picked = np.ascontiguousarray(self.words[list(rows)])
        addresses, guests = (tuple(values[row] for row in rows) for values in (self.addresses, self.guests))
        return View(addresses, picked, self.host, guests)  # type: ignore[arg-type]

    @property
    def count(self) -> int:
        """Number of pages."""
        return len(self.addresses)

    @property
    def dwords(self) -> Dwords:
        """The pages as 32-bit values, ``[page, offset // 4]``."""
        return self.words.view(np.uint32)

    @property
    def halves(self) -> Halves:
        """The pages as 16-bit values, ``[page, offset // 2]``."""
        return self.words.view(np.uint16)

    def word(self, row: int, offset: int) -> int:
        """Return the 64-bit value at a byte offset of one page; 0 outside."""
        return int(self.words[row, offset // 8]) if 0 <= offset <= bits.PAGE_SIZE - 8 else 0

    def values(self, row: int) -> set[int]:
        """Return all 64-bit values of one page."""
        return set(self.words[row].tolist())

    def column(self, offset: int) -> list[int]:
        """Return the 64-bit values at a byte offset, of every page."""
        return [self.word(row, offset) for row in range(self.count)]

    def guest_paging(self, row: int, triple: int) -> list[Paging]:
        """Return the readings of the CR0, CR3, CR4 at an offset as the guest's; none where paging is off."""
        cr0, cr3, cr4 = (self.word(row, triple + 8 * i) for i in range(3))
        state = guestcpu.Registers(cr0=cr0, cr3=cr3, cr4=cr4)
        return [Paging(self.guests[row], mode, cr3) for mode in guestcpu.formats(state)]

    def host_paging(self, row: int, triple: int) -> Paging:
        """Return the reading of the CR0, CR3, CR4 at an offset as a 64-bit host's."""
        cr4 = self.word(row, triple + 16)
        mode = ia32e.five_level() if cr4 & registers.CR4_LA57 else ia32e.four_level()
        return Paging(self.host, mode, self.word(row, triple + 8))

    def pointers(self, row: int, is_long: bool = True) -> list[int]:
        """Return the values of a page that can be addresses of a kernel: of a 64-bit one, or of a 32-bit one."""
        values = self.words[row]
        high = (values & np.uint64(_UPPER_HALF)) == np.uint64(_UPPER_HALF)
        able = high & (values < np.uint64(_TOP)) if is_long else (values >= _LOW_KERNEL) & (values < _LOW_TOP)
        return sorted(set(values[able].tolist()))

    def parses(self, row: int, paging: Paging) -> bool:
        """Tell whether tables translate what the page holds of addresses: enough of them, and some code."""
        hits = codes = 0
        pages = {address >> bits.PAGE_SHIFT: address for address in self.pointers(row, paging.is_long)}
        for address in pages.values():
            found = paging.translate(address)
            hits += found is not None
            codes += found is not None and Access.EXECUTE in found[1]
            if hits >= _ENOUGH and codes:
                return True
        return False


def everywhere(flags: Bools, step: int) -> list[int]:
    """Return the byte offsets at which a predicate holds in every page; ``step`` is the size of its values."""
    return [int(index) * step for index in np.flatnonzero(flags.all(axis=0))]


def shifted(flags: Bools, places: int) -> Bools:
    """Return the predicate as seen from ``places`` values further on; beyond the page it is false."""
    out = np.zeros_like(flags)
    if places >= 0:
        out[:, : flags.shape[1] - places] = flags[:, places:]
    else:
        out[:, -places:] = flags[:, :places]
    return out


def at_least_half(rows: Collection[int], test: Callable[..., bool], *arguments: object) -> bool:
    """Tell whether ``test(row, *arguments)`` holds for one row and for half of them: captures are smeared."""
    held = sum(test(row, *arguments) for row in rows)
    return held > 0 and 2 * held >= len(rows)


def cr0_like(words: Words) -> Bools:
    """CR0 in VMX operation: NE set, no reserved bit, no impossible pair."""
    good: Bools = (
        ((words & np.uint64(registers.CR0_RESERVED | registers.CR0_NE)) == np.uint64(registers.CR0_NE))
        & (((words & np.uint64(registers.CR0_PG)) == 0) | ((words & np.uint64(registers.CR0_PE)) != 0))
        & (((words & np.uint64(registers.CR0_NW)) == 0) | ((words & np.uint64(registers.CR0_CD)) != 0))
    )
    return good


def cr3_like(words: Words) -> Bools:
    """An address below 2^52, with linear-address masking or without."""
    good: Bools = (words & np.uint64(bits.field(63, 52) & ~_LAM)) == 0
    return good


def cr4_like(words: Words) -> Bools:
    """CR4 in VMX operation: VMXE set, no reserved bit."""
    wanted = registers.CR4_RESERVED | registers.CR4_VMXE
    good: Bools = (words & np.uint64(wanted)) == np.uint64(registers.CR4_VMXE)
    return good


def efer_like(words: Words) -> Bools:
    """EFER: no reserved bit, LMA only with LME. Zero passes."""
    lma, lme = np.uint64(registers.EFER_LMA), np.uint64(registers.EFER_LME)
    good: Bools = ((words & np.uint64(registers.EFER_RESERVED)) == 0) & (((words & lma) == 0) | ((words & lme) != 0))
    return good


def pat_like(words: Words) -> Bools:
    """IA32_PAT as systems set it: memory types that exist, write-back first, at least four not UC."""
    octets = words.view(np.uint8).reshape(*words.shape, 8)
    types = np.isin(octets, np.array([0, 1, 4, 5, 6, 7], dtype=np.uint8)).all(axis=2)
    good: Bools = types & (octets[:, :, 0] == 6) & ((octets != 0).sum(axis=2) >= 4)
    return good


def dr7_like(words: Words) -> Bools:
    """DR7: bit 10 is one; bits 12, 14, 15 and 63:32 are zero."""
    fixed = bits.field(63, 32) | bits.field(15, 14) | bits.bit(12) | bits.bit(10)
    good: Bools = (words & np.uint64(fixed)) == np.uint64(bits.bit(10))
    return good


def rflags_like(words: Words) -> Bools:
    """RFLAGS: bit 1 is one, no reserved bit."""
    wanted = registers.RFLAGS_RESERVED | registers.RFLAGS_ONE
    good: Bools = (words & np.uint64(wanted)) == np.uint64(registers.RFLAGS_ONE)
    return good


def canonical(words: Words) -> Bools:
    """Canonical in 57 bits, as 5-level paging has them."""
    top = words.view(np.int64) >> np.int64(56)
    good: Bools = (top == 0) | (top == -1)
    return good


def run_places(view: View) -> list[int]:
    """Return the offsets of what can be DR7, RSP, RIP, RFLAGS in a row; a guest that never ran has zeros there."""
    words, zero = view.words, view.words == 0
    good = (
        dr7_like(words) & shifted(canonical(words), 1) & shifted(canonical(words), 2) & shifted(rflags_like(words), 3)
    )
    empty = shifted(zero, 1) & shifted(zero, 2) & shifted(zero, 3)
    places = np.flatnonzero((good | empty).all(axis=0) & good.any(axis=0))[:_MAX_RUNS]
    return [int(index) * 8 for index in places]
