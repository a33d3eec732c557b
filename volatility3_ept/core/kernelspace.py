"""Where a guest's page tables map its kernel: the parts of the upper half that systems keep for the image alone.

All memory is mapped somewhere in a kernel (Linux's direct map, Windows' cache views), so *mapped* proves nothing. The
windows here are where a system maps its own image and no file. Sources: Linux ``Documentation/arch/x86/x86_64/mm.rst``
("kernel text mapping"), with FreeBSD, NetBSD, OpenBSD and seL4 in the same place; XNU ``osfmk/mach/i386/vm_param.h``
(``VM_MIN_KERNEL_ADDRESS`` and the slide above it); Xen ``arch/x86/include/asm/config.h`` (``XEN_VIRT_START``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from volatility3_ept.core import leaves
from volatility3_ept.core import walk as walks
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import bits, dialect
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Access, EntryKind

#: First addresses of the windows of 64-bit systems, 1 GiB each.
_WINDOWS = (0xFFFF_FFFF_8000_0000, 0xFFFF_FF80_0000_0000, 0xFFFF_82D0_8000_0000, 0xFFFF_82D0_4000_0000)
#: Windows maps the kernel and its drivers in this half terabyte (fffff800`00000000), and Linux maps nothing there.
_WINDOWS_IMAGES = 0xFFFF_F800_0000_0000
#: 32-bit systems: lowmem and the kernel share the last gigabyte (2G/2G splits are rare, and then not looked into).
_LOWMEM = 0xC000_0000
#: Linux's page table isolation: the user half of a pair of top tables lies in the page above the kernel's
#: (``arch/x86/include/asm/pgtable.h``, ``PTI_PGTABLE_SWITCH_BIT``).
_USER_HALF = bits.bit(12)
#: Pieces of one window that are returned.
MOST = 1 << 12
#: Address spaces of one guest that are looked into.
_MAX_SPACES = 4


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of a kernel's mapping that is one piece in guest-physical memory too. ``gva`` is sign-extended."""

    gva: int
    length: int
    gpa: int
    access: Access

    @property
    def is_constant(self) -> bool:
        """Tell whether the kernel itself cannot write it."""
        return not self.access & Access.WRITE


def stretches(memory: HostMemory, fmt: Ia32Format | None, spaces: Iterable[int]) -> list[Stretch]:
    """Return what the guest's page tables map in the windows, supervisor pages only, from the fullest space.

    ``spaces`` are values of CR3, of which a user half is replaced by its kernel half where that maps more. Empty where
    paging is off or nothing of the tables is in the capture.
    """
    if fmt is None:
        return []
    best: list[Stretch] = []
    for cr3 in _halves(spaces):
        found = [piece for start in _starts(fmt) for piece in _window(memory, fmt, cr3, start)]
        if sum(piece.length for piece in found) > sum(piece.length for piece in best):
            best = found
    return best


def windows_images(memory: HostMemory, fmt: Ia32Format | None, spaces: Iterable[int]) -> list[Stretch]:
    """Return what the guest's page tables map where Windows has its kernel and drivers; empty in other systems."""
    if fmt is None or len(fmt.levels) < 4:
        return []
    found = (_window(memory, fmt, cr3, _WINDOWS_IMAGES, 3) for cr3 in _halves(spaces))
    return max(found, key=len, default=[])


def _halves(spaces: Iterable[int]) -> list[int]:
    chosen = list(dict.fromkeys(spaces))[:_MAX_SPACES]
    return list(dict.fromkeys(half for cr3 in chosen for half in (cr3 & ~_USER_HALF, cr3)))


def _starts(fmt: Ia32Format) -> tuple[int, ...]:
    return _WINDOWS if len(fmt.levels) >= 4 else (_LOWMEM,)


def _window(memory: HostMemory, fmt: Ia32Format, cr3: int, start: int, depth: int = 2) -> list[Stretch]:
    """Traverse one window: what lies below the entry that covers it, ``depth`` levels of tables."""
    if len(fmt.levels) < 4:
        return _pieces(leaves.traverse(memory, fmt, cr3, dialect.GENERIC), 0, start, Access.ALL)
    steps = walks.walk(memory, fmt, cr3, start).steps[: len(fmt.levels) - depth]
    if len(steps) < len(fmt.levels) - depth or any(step.kind is not EntryKind.TABLE for step in steps):
        return []
    above = Access.ALL
    for step in steps:
        above &= step.access
    below = replace(fmt, levels=fmt.levels[-depth:])
    return _pieces(leaves.traverse(memory, below, fmt.table(steps[-1].entry or 0), dialect.GENERIC), start, 0, above)


def _pieces(space: GuestMap, base: int, first: int, above: Access) -> list[Stretch]:
    """Return the supervisor runs of a map from ``first`` on, what the kernel cannot write first.

    ``base`` is added to their addresses, and ``above`` are the rights of the tables above. A kernel has some hundred
    of them: of more than :data:`MOST` the first are returned, and one to show that there are others.
    """
    rights = space.accesses & int(above)
    chosen = np.flatnonzero(((rights & int(Access.USER)) == 0) & (space.gpas >= first))
    writable = (rights[chosen] & int(Access.WRITE)) != 0
    chosen = chosen[np.argsort(writable, kind="stable")][: MOST + 1]
    rows = zip(space.gpas[chosen].tolist(), space.lengths[chosen].tolist(), space.hpas[chosen].tolist(),
               rights[chosen].tolist(), strict=True)  # fmt: skip
    return [Stretch(base + gva, length, gpa, Access(right)) for gva, length, gpa, right in rows]
