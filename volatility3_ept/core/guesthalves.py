"""Which half of a pair a guest's top table is: the user's, without the kernel, or the kernel's, with everything.

Page table isolation gives each process two top tables. While a process runs in user mode CR3 names the one that maps
no more of the kernel than the way into it, and a kernel address does not translate there. Nothing in CR3 alone says
so: a table is taken for a user half, and another for its kernel half, by what both hold.

* Linux keeps the pair in two neighbouring pages, the kernel's first (``arch/x86/entry/calling.h``: "PGDs are 8k. Flip
  bit 12 to switch between the two halves"; ``arch/x86/mm/pti.c``, ``__pti_set_user_pgtbl``: every entry of user memory
  is written into both, and made no-execute in the kernel's).
* Windows (KVA shadow) keeps them apart (``KPROCESS.UserDirectoryTableBase``): only a search finds the kernel's, which
  has the same user entries and, as every top table of Windows, an entry that names the table itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volatility3_ept.core.control import Criterion
from volatility3_ept.core.leaves import read_tables
from volatility3_ept.core.memory import Bools, HostMemory, Words
from volatility3_ept.spec import bits, ia32e
from volatility3_ept.spec.ia32e import Ia32Format

NAME = "kernel half"
#: Entries that a user half has of the kernel at most: the entry code, the stacks that it uses, an LDT, ESPFIX; with PAE
#: the kernel's code, 2M each.
MAX_SHADOW = 16
#: Linux's bit of CR3 for the user half (``PTI_USER_PGTABLE_BIT``).
_PAIR = bits.bit(bits.PAGE_SHIFT)
#: Bits in which the two halves may differ: the processor sets A in each on its own, the kernel's is no-execute.
_OWN = ia32e.ACCESSED | ia32e.DIRTY | ia32e.NO_EXECUTE
_FEW_CANDIDATES = 16
#: Large pages above which the upper half is a kernel's: a user half has at most the kernel's code in them.
_LARGE_BYTES = 64 << 20
_MAX_TABLES = 1 << 12


@dataclass(frozen=True)
class Top:
    """The entries that say what an address space holds: those of the top table, or all PDEs of PAE.

    ``lower`` are those of user memory as every system divides it: half of it, and three gigabytes of four with PAE.
    """

    lower: Words
    upper: Words

    @property
    def kernel_entries(self) -> int:
        """Present entries of the upper half. Their user bit says nothing: Linux sets it in all its upper tables."""
        return int(_present(self.upper).sum())

    @property
    def user_entries(self) -> int:
        """Present entries of the lower half that user mode may pass."""
        return int((_present(self.lower) & ((self.lower & np.uint64(ia32e.USER)) != 0)).sum())

    @property
    def may_be_user_half(self) -> bool:
        """Tell whether there is user memory below, and few entries above."""
        return self.user_entries > 0 and self.kernel_entries <= MAX_SHADOW


def top(memory: HostMemory, mode: Ia32Format, cr3: int) -> Top | None:
    """Return the top of an address space in guest-physical ``memory``; None where it cannot be read."""
    words, good = read_tables(memory, mode, mode.levels[0], np.array([mode.root_hpa(cr3)], dtype=np.int64))
    if not good[0]:
        return None
    entries = words[0]
    if mode.pae_directory:
        there = np.flatnonzero(_present(entries))
        entries = np.zeros(4 * 512, dtype=np.uint64)
        tables, _ = memory.words(np.asarray(mode.table(words[0][there])).astype(np.int64))
        entries.reshape(4, 512)[there] = tables
        return Top(entries[: 3 * 512], entries[3 * 512 :])
    half = entries.size // 2
    return Top(entries[:half], entries[half:])


def maps_a_kernel(memory: HostMemory, mode: Ia32Format, seen: Top) -> bool:
    """Tell whether the upper half has more large pages than a user half can have; few entries may lead to them."""
    upper = seen.upper[_present(seen.upper)]
    tables, total = np.asarray(mode.table(upper)).astype(np.int64), 0
    for level in mode.levels[1:-1]:
        words, _ = read_tables(memory, mode, level, tables[:_MAX_TABLES])
        entries = words[_present(words)]
        leaf = np.asarray(mode.is_leaf(entries, level))
        total += int(leaf.sum()) * level.page_size
        tables = np.asarray(mode.table(entries[~leaf])).astype(np.int64)
    return total > _LARGE_BYTES


def linux_kernel_half(memory: HostMemory, mode: Ia32Format, cr3: int) -> tuple[int | None, Criterion | None]:
    """Return the kernel half of Linux's pair, and why it is that; None, None where CR3 is no user half of one.

    Both halves must have the same user entries, and the other one everything that this one has of the kernel, and more.
    """
    if not cr3 & _PAIR or mode.entry_bytes == 4:
        return None, None
    own, other = top(memory, mode, cr3), top(memory, mode.from_memory, cr3 ^ _PAIR)
    if own is None or other is None or not own.may_be_user_half or not _same_user(own.lower, other.lower[None])[0]:
        return None, None
    above, kernel = _present(own.upper), _present(other.upper)
    if (above & ~kernel).any() or not (kernel & ~above).any():
        return None, None
    text = (
        f"CR3 {cr3:#x} is the user half of a pair (page table isolation): the page below it has the same user entries, "
        f"{int(_present(own.lower).sum())} of them, and {other.kernel_entries} of the kernel instead of "
        f"{own.kernel_entries}"
    )
    return mode.root_hpa(cr3) ^ _PAIR, Criterion(NAME, True, text, 3)


def windows_kernel_half(memory: HostMemory, mode: Ia32Format, cr3: int) -> tuple[int | None, Criterion]:
    """Search all memory for the kernel half of a pair whose halves are no neighbours; one pass over it.

    None, and why, where there is none or more than one.
    """
    own = top(memory, mode, cr3)
    if own is None or len(mode.levels) < 4:
        return None, Criterion(NAME, None, "no tables of 64-bit paging: no search")
    lower = np.flatnonzero(_present(own.lower))
    if not lower.size:
        return None, Criterion(NAME, None, f"CR3 {cr3:#x} maps no user memory that another table could share")
    found: list[tuple[int, int]] = []
    first, root = int(lower[0]), mode.root_hpa(cr3)
    for address, rows in memory.blocks():
        hits = np.flatnonzero(((rows[:, first] ^ own.lower[first]) & ~np.uint64(_OWN)) == 0)
        hits = hits[_same_user(own.lower, rows[hits, :256])]
        pages, upper = address + hits * bits.PAGE_SIZE, rows[hits, 256:]
        counts = _present(upper).sum(axis=1)
        itself = np.asarray(mode.table(upper)) == pages.astype(np.uint64)[:, None]
        good = (_present(upper) & itself).any(axis=1) & (counts > own.kernel_entries) & (pages != root)
        found += zip(pages[good].tolist(), counts[good].tolist(), strict=True)
        if len(found) > _FEW_CANDIDATES:
            break
    if len(found) == 1:
        page, count = found[0]
        text = (f"CR3 {cr3:#x} is the user half of a pair (KVA shadow): the table at {page:#x} has the same user "
                f"entries, names itself, and has {count} of the kernel instead of {own.kernel_entries}")  # fmt: skip
        return page, Criterion(NAME, True, text, 2)
    why = f"{len(found)} tables could be the other" if found else "no other table has the same user entries"
    text = f"CR3 {cr3:#x} has {own.kernel_entries} entries of a kernel only and may be the user half of a pair; {why}"
    return None, Criterion(NAME, None, text)


def _present(entries: Words) -> Bools:
    present: Bools = (entries & np.uint64(ia32e.PRESENT)) != 0
    return present


def _same_user(lower: Words, others: Words) -> Bools:
    """Tell for each row of ``others`` whether it has the user entries of ``lower``, and no others."""
    mine = np.where(_present(lower), lower & ~np.uint64(_OWN), np.uint64(0))
    theirs = np.where(_present(others), others & ~np.uint64(_OWN), np.uint64(0))
    same: Bools = (mine == theirs).all(axis=1)
    return same
