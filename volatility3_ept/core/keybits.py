"""Address bits that are no address: the C-bit of AMD's memory encryption, and the KeyIDs of Intel's TME-MK (MKTME).

Where the host encrypts memory, entries of EPT or NPT and the root register carry such bits, and a walk that took them
for address would leave physical memory. Nothing announces their place in a capture, but they give themselves away:
the address with them lies where no memory is, and without them in the capture.

Sources: AMD APM Vol. 2, "Secure Memory Encryption" ("Determining Support", CPUID Fn8000_001F_EBX: C-bit location 5:0,
and the reduction of physical addresses 11:6); Intel SDM Vol. 3A, "Paging", and the specification "Intel Architecture
Memory Encryption Technologies" (the KeyID takes the upper bits of a physical address, below MAXPHYADDR); Linux
``arch/x86/kvm/mmu/spte.c`` (``shadow_me_value``: in every SPTE that maps memory or a table) and
``arch/x86/kvm/svm/svm.c`` (``svm_load_mmu_pgd``: nCR3 has it too).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from volatility3_ept.core import leaves, mask
from volatility3_ept.core.control import ControlStructure, Criterion
from volatility3_ept.core.memory import HostMemory, Int64, Words
from volatility3_ept.core.root import EPT, NPT, Root
from volatility3_ept.spec import bits, ept, paging
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Level, MemoryType

#: A capture may lack the top of the host's memory, and memory itself reaches beyond 40 bits only on large hosts: lower
#: bits are address, whatever they look like.
_MISSING_BITS: Final = 4
_LEAST_BIT: Final = 40
#: Share of the entries of one sort that must carry a key.
_MOST: Final = 0.5
_SAMPLE: Final = 64


def first_bit(memory: HostMemory) -> int:
    """Return the lowest address bit that may carry a key, going by how much memory there is."""
    return max(max(memory.top - 1, 0).bit_length() + _MISSING_BITS, _LEAST_BIT)


def resolved(memory: HostMemory, root: Root) -> Root:
    """Return a root with the place of its key, where its register or its entries carry one and none was given."""
    if root.key_bit:
        return root
    key_bit = infer(memory, root)
    return replace(root, key_bit=key_bit) if key_bit else root


def evidence(root: Root) -> tuple[Criterion, ...]:
    """Return where a root's key is, in words; nothing where it has none."""
    if not root.key_bit:
        return ()
    what = f"bit {root.key_bit} is the C-bit" if root.kind == NPT else f"the bits from {root.key_bit} on are a KeyID"
    return (Criterion("memory encryption", None, f"{what}: the host encrypts memory, and the bits are no address"),)


def of_structures(memory: HostMemory, structures: Iterable[ControlStructure]) -> int:
    """Return the C-bit that the nCR3 of some VMCB carries, 0 where none does."""
    found = (
        _of_address(memory, item.root_raw & paging.FRAME, NPT)
        for item in structures
        if item.kind == "VMCB" and item.has_root
    )
    return next((key_bit for key_bit in found if key_bit), 0)


def infer(memory: HostMemory, root: Root) -> int:
    """Return the lowest address bit that carries a key in a hierarchy; 0 where there is none, or none can be told.

    Up to some dozens of tables of each level are read. NPT: one bit, the C-bit. EPT: all bits from the lowest on that a
    write-back leaf or a table's address has beyond memory.
    """
    fmt = root.format
    if fmt.entry_bytes == 4 or len(fmt.levels) < 4:
        return 0
    address = root.raw & fmt.root_mask
    found = _of_address(memory, address, root.kind)
    if address not in memory and not found:
        return 0
    tally = _Tally(memory, root, bits.field(51, first_bit(memory)))
    tables: Int64 = np.array([address & ~tally.high if found else address], dtype=np.int64)
    for level in fmt.levels:
        words, _ = leaves.read_tables(memory, fmt, level, tables[:_SAMPLE])
        tables = tally.count(level, words[words != 0])
        if not tables.size:
            break
    if root.kind == NPT:
        return found or tally.lowest
    return min(bit for bit in (found, tally.lowest) if bit) if found or tally.lowest else 0


@dataclass
class _Tally:
    """Counts the entries of a hierarchy, level by level: tables and leaves, and which of them carry a key.

    ``high`` are the address bits that may belong to one.
    """

    memory: HostMemory
    root: Root
    high: int
    total: Counter[bool] = field(default_factory=Counter)
    keyed: Counter[bool] = field(default_factory=Counter)
    keys: Counter[int] = field(default_factory=Counter)

    def count(self, level: Level, words: Words) -> Int64:
        """Take in the entries of one level; returns the tables that they name, without a key."""
        fmt, high = self.root.format, np.uint64(self.high)
        entries = _followed(self.root, words)
        leaf = np.asarray(fmt.is_leaf(entries, level))
        if self.root.kind == EPT:
            # A device's registers may lie anywhere, and are not mapped write-back.
            kinds = (entries & np.uint64(ept.MEMORY_TYPE)) >> np.uint64(ept.MEMORY_TYPE_SHIFT)
            kept = ~leaf | (kinds == int(MemoryType.WB))
            entries, leaf = entries[kept], leaf[kept]
        frame = np.uint64(paging.FRAME & ~(level.page_size - 1))
        addresses = np.where(leaf, entries & frame, entries & np.uint64(paging.FRAME))
        keys, plain = addresses & high, (addresses & ~high).astype(np.int64)
        inside = self.memory.locate(plain, 1) >= 0
        has_key = (keys != 0) & inside
        if self.root.kind == NPT:
            # KVM's marker for MMIO sets bit 51 as well, beside an address that may be anybody's; it is never a table.
            has_key &= ((keys & (keys - np.uint64(1))) == 0) & ~leaf
        for is_leaf in (True, False):
            self.total[is_leaf] += int((leaf == is_leaf).sum())
            self.keyed[is_leaf] += int((has_key & (leaf == is_leaf)).sum())
        self.keys.update(keys[has_key].tolist())
        return mask.distinct(plain[~leaf & inside])

    @property
    def lowest(self) -> int:
        """The lowest bit of the key, 0 where too few entries carry one."""
        if not any(self.total[sort] and self.keyed[sort] >= _MOST * self.total[sort] for sort in (True, False)):
            return 0
        if self.root.kind == NPT:
            return self.keys.most_common(1)[0][0].bit_length() - 1
        union = 0
        for key in self.keys:
            union |= key
        return (union & -union).bit_length() - 1


def for_guest(memory: HostMemory, mode: Ia32Format, cr3: int) -> Ia32Format:
    """Return a guest's paging mode that takes the key in its CR3 out of every address; ``memory`` is the guest's.

    A guest of SEV sets the C-bit in CR3 and in every entry that maps private memory, a TD the shared bit in the others.
    """
    if mode.entry_bytes == 4 or len(mode.levels) < 4 or mode.key_bits:
        return mode
    key_bit = _of_address(memory, cr3 & mode.root_mask, NPT)
    return replace(mode, key_bits=bits.bit(key_bit)) if key_bit else mode


def _of_address(memory: HostMemory, address: int, kind: str) -> int:
    """Return the key's lowest bit in an address that lies in memory without it alone; 0 where there is none."""
    high = address & bits.field(51, first_bit(memory))
    plain = address & ~high
    if not high or not plain or address in memory or plain not in memory:
        return 0
    lowest = (high & -high).bit_length() - 1
    return lowest if kind == EPT or high == bits.bit(lowest) else 0


def _followed(root: Root, entries: Words) -> Words:
    """Return the entries that lead on, markers for MMIO left out as far as they can be told without their address."""
    present = np.asarray(root.format.present(entries))
    if root.kind == EPT:
        present = present & ((entries & np.uint64(ept.RWX)) != np.uint64(ept.WRITE | ept.EXECUTE))
    chosen: Words = entries[present]
    return chosen
