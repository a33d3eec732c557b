"""What hypervisors write into EPT and NPT beside what the manual asks for.

Hardware refuses some entries on purpose of their author: markers for MMIO, pages whose accesses are being tracked,
entries whose type is to be recalculated. Read by the manual alone, the first look like damage and the other two like
missing memory. A :class:`Dialect` tells them apart; :data:`GENERIC` serves tables of an unknown author.

Sources: Linux arch/x86/kvm/mmu/spte.h and spte.c (bit 11 since "KVM: x86/mmu: Use bit 11 for MMU_PRESENT", v5.13);
Xen xen/arch/x86/mm/p2m-ept.c, p2m-pt.c and asm/hvm/vmx/vmx.h (``ept_entry_t``); FreeBSD sys/amd64/include/pmap.h and
sys/amd64/amd64/pmap.c (``EPT_PG_EMUL_V``); VirtualBox src/VBox/VMM/VMMAll/PGMAllBth.h and pgm.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from volatility3_ept.spec import bits, ept, ia32e
from volatility3_ept.spec.paging import Entries, EntryKind, Format, Level


def _word(entry: Entries, truth: Entries) -> Entries:
    """Return a truth value as 0 or 1 of the entry's own type: numpy does not mix uint64 with signed integers."""
    return (entry & 0) | truth


class State(IntEnum):
    """Why an entry that the hardware would not follow still holds a page, or PLAIN when it would."""

    PLAIN = 0
    ACCESS_TRACKED = 1
    RECALC_PENDING = 2
    EMULATED_AD = 3
    #: In no EPT or NPT entry: found through the page tables of the hypervisor's process (core/backing.py).
    RECOVERED = 4

    @property
    def text(self) -> str:
        """Return the state in words, empty for a plain entry."""
        return ("", "access-tracked", "recalculation pending", "A/D emulated", "recovered")[int(self)]


#: GFN bits that every marker keeps in place. Against L1TF, KVM sets the five top bits that the cache decodes and moves
#: the GFN's own upwards: 39:35 on a processor of 40 bits, 35:31 on the smallest one.
_MARKER_GFN: Final = bits.field(30, 12)
_WRITE_EXECUTE: Final = ept.WRITE | ept.EXECUTE


@dataclass(frozen=True)
class Dialect:
    """Reads the entries of one hypervisor. The base class follows the manual and knows the common MMIO markers."""

    name: str = "generic"

    def marker(self, fmt: Format, entry: Entries, level: Level, gpa: Entries) -> Entries:
        """Tell whether an entry stands for MMIO at ``gpa``: it holds the page's own number where a frame would be.

        EPT: write and execute without read (KVM), or write alone with memory type 7 (VirtualBox). NPT: present with
        an address bit set that the processor reserves (KVM).
        """
        own_number = (entry & _MARKER_GFN) == (gpa & _MARKER_GFN)
        if isinstance(fmt, ept.EptFormat):
            kvm = ((entry & ept.RWX) == _WRITE_EXECUTE) & own_number
            virtualbox = ((entry & ept.RWX) == ept.WRITE) & ((entry & ept.MEMORY_TYPE) == ept.MEMORY_TYPE)
            return kvm | virtualbox
        if fmt.entry_bytes == 4:
            return entry != entry
        # With the C-bit in bit 51 the reserved bits end below it (Linux arch/x86/kvm/svm/svm.c, svm_adjust_mmio_mask).
        top_bit = (entry & bits.bit(50 if fmt.key_bits & bits.bit(51) else 51)) != 0
        return ((entry & ia32e.PRESENT) != 0) & top_bit & own_number

    def restore(self, fmt: Format, entry: Entries, level: Level) -> tuple[Entries, Entries]:
        """Return the entry as hardware would have to see it to reach the page, and its :class:`State`."""
        return entry, (entry & 0)

    def present(self, fmt: Format, entry: Entries) -> Entries:
        """Tell whether a restored entry leads on."""
        return fmt.present(entry)

    def software(self, fmt: Format, entry: int, level: Level) -> tuple[str, ...]:
        """Name the software bits that are set in an entry."""
        return ()

    def software_bits(self, fmt: Format) -> int:
        """Return the bits that this author uses for its own purposes: architectural names would mislead there."""
        return 0

    def kind(self, fmt: Format, entry: Entries, level: Level, gpa: Entries) -> tuple[Entries, Entries, Entries]:
        """Classify an entry.

        Returns its :class:`EntryKind` (as an int, or an array of them), the restored entry and its :class:`State`.
        A marker is looked for first: hardware would call it misconfigured.
        """
        mmio = self.marker(fmt, entry, level, gpa)
        restored, state = self.restore(fmt, entry, level)
        present = self.present(fmt, restored) & (mmio ^ True)
        refused = present & fmt.misconfigured(restored, level)
        leaf = fmt.is_leaf(restored, level)
        # Arithmetic instead of branches: one expression for an int and for an array.
        sound = present & (refused ^ True)
        kind = (
            mmio * int(EntryKind.MMIO)
            + refused * int(EntryKind.MISCONFIGURED)
            + (sound & leaf) * int(EntryKind.LEAF)
            + (sound & (leaf ^ True)) * int(EntryKind.TABLE)
        )
        return kind, restored, state


@dataclass(frozen=True)
class Kvm(Dialect):
    """Linux KVM since 5.13: bit 11 marks a live SPTE; whatever lacks it is a marker or a remnant, not a mapping."""

    name: str = "KVM"

    def marker(self, fmt: Format, entry: Entries, level: Level, gpa: Entries) -> Entries:
        """Not live, yet shaped so that the processor faults on it for good: W and X without R, or a reserved bit."""
        dead = (entry & KVM_PRESENT) == 0
        if isinstance(fmt, ept.EptFormat):
            return dead & ((entry & ept.RWX) == _WRITE_EXECUTE)
        return dead & super().marker(fmt, entry, level, gpa)

    def restore(self, fmt: Format, entry: Entries, level: Level) -> tuple[Entries, Entries]:
        """Give an access-tracked SPTE (processors without A/D flags) its saved R and X back (spte.h, bits 54 and 56).

        Write permission is never saved: KVM gives it back when the guest writes.
        """
        if not isinstance(fmt, ept.EptFormat):
            return entry, (entry & 0)
        live = (entry & (KVM_PRESENT | KVM_AD_DISABLED)) == (KVM_PRESENT | KVM_AD_DISABLED)
        tracked = live & ((entry & ept.RWX) == 0)
        saved = (entry >> KVM_SAVED_SHIFT) & (ept.READ | ept.EXECUTE)
        return entry | (saved * tracked), _word(entry, tracked) * int(State.ACCESS_TRACKED)

    def present(self, fmt: Format, entry: Entries) -> Entries:
        """Bit 11 decides, and the hardware must agree once tracking is undone."""
        return ((entry & KVM_PRESENT) != 0) & fmt.present(entry)

    def software_bits(self, fmt: Format) -> int:
        """Bits 58:52 and 11 in EPT, 11:9 in NPT."""
        return KVM_PRESENT | bits.field(58, 52) if isinstance(fmt, ept.EptFormat) else bits.field(11, 9)

    def software(self, fmt: Format, entry: int, level: Level) -> tuple[str, ...]:
        """Name KVM's software bits."""
        is_ept = isinstance(fmt, ept.EptFormat)
        host, mmu = (bits.bit(57), bits.bit(58)) if is_ept else (bits.bit(9), bits.bit(10))
        named = [("MMU_PRESENT", KVM_PRESENT), ("HOST_WRITABLE", host), ("MMU_WRITABLE", mmu)]
        if is_ept:
            named += [("AD_DISABLED", KVM_AD_DISABLED), ("AD_WRPROT", bits.bit(53))]
        return tuple(name for name, mask in named if entry & mask)


KVM_PRESENT: Final = bits.bit(11)
#: SPTE_TDP_AD_DISABLED: bits 53:52 hold the A/D type, 0 on a processor that keeps the flags itself.
KVM_AD_DISABLED: Final = bits.bit(52)
KVM_SAVED_SHIFT: Final = 54


@dataclass(frozen=True)
class Xen(Dialect):
    """Xen's p2m tables. Memory type 7 (EPT) or a cleared user bit (NPT) asks for recalculation; the frame is valid."""

    name: str = "Xen"

    def restore(self, fmt: Format, entry: Entries, level: Level) -> tuple[Entries, Entries]:
        """Undo the request for recalculation: write-back for a leaf, no type for a table; the user bit for NPT."""
        if isinstance(fmt, ept.EptFormat):
            pending = ((entry & ept.MEMORY_TYPE) == ept.MEMORY_TYPE) & fmt.present(entry)
            leaf = fmt.is_leaf(entry, level)
            # 7 (111b) becomes 6 (110b) in a leaf and 0 in a table.
            taken = _word(entry, pending & leaf) * bits.bit(3) | _word(entry, pending & (leaf ^ True)) * ept.MEMORY_TYPE
            return entry ^ taken, _word(entry, pending) * int(State.RECALC_PENDING)
        pending = (entry & (ia32e.PRESENT | ia32e.USER)) == ia32e.PRESENT
        return entry | _word(entry, pending) * ia32e.USER, _word(entry, pending) * int(State.RECALC_PENDING)

    def software_bits(self, fmt: Format) -> int:
        """Type and access: bits 61:52 and 11:10 in EPT, 62:52 in NPT."""
        return bits.field(61, 52) | bits.field(11, 10) if isinstance(fmt, ept.EptFormat) else bits.field(62, 52)

    def software(self, fmt: Format, entry: int, level: Level) -> tuple[str, ...]:
        """Name the p2m type of an entry (bits 57:52 in EPT, 58:52 in NPT) and its access (bits 61:58, EPT)."""
        if isinstance(fmt, ept.EptFormat):
            kind, access = entry >> 52 & 0x3F, entry >> 58 & 0xF
            return (f"p2m type {_XEN_TYPES.get(kind, kind)}", f"access {access}")
        kind = entry >> 52 & 0x7F
        return (f"p2m type {_XEN_TYPES.get(kind, kind)}",)


#: Xen xen/include/asm-x86/p2m.h, ``p2m_type_t``.
_XEN_TYPES: Final = {
    0: "ram_rw", 1: "invalid", 2: "ram_logdirty", 3: "ram_ro", 4: "mmio_dm", 5: "mmio_direct", 6: "populate_on_demand",
}  # fmt: skip


@dataclass(frozen=True)
class Bhyve(Dialect):
    """FreeBSD bhyve on a processor without EPT A/D flags: R and W are used as accessed and dirty flags."""

    name: str = "bhyve"

    def restore(self, fmt: Format, entry: Entries, level: Level) -> tuple[Entries, Entries]:
        """Give back R where EMUL_V (bit 52) says valid, and W where EMUL_RW (bit 53) says writable."""
        if not isinstance(fmt, ept.EptFormat):
            return entry, (entry & 0)
        valid = (entry >> 52) & 1
        writable = (entry >> 53) & valid
        restored = entry | valid | (writable << 1)
        changed = restored != entry
        return restored, _word(entry, changed) * int(State.EMULATED_AD)

    def software_bits(self, fmt: Format) -> int:
        """Bits 54:52 and 11:10."""
        return bits.field(54, 52) | bits.field(11, 10)

    def software(self, fmt: Format, entry: int, level: Level) -> tuple[str, ...]:
        """Name bhyve's software bits."""
        named = (("MANAGED", 10), ("WIRED", 11), ("EMUL_V", 52), ("EMUL_RW", 53), ("PROMOTED", 54))
        return tuple(name for name, number in named if entry & bits.bit(number))


GENERIC: Final = Dialect()
KVM: Final = Kvm()
XEN: Final = Xen()
BHYVE: Final = Bhyve()
DIALECTS: Final = {dialect.name.lower(): dialect for dialect in (GENERIC, KVM, XEN, BHYVE)}


def infer(is_ept: bool, total: int, with_bit11: int, with_xen_access: int, with_emulated: int) -> Dialect:
    """Name the author of a hierarchy from counts over its entries that hardware takes as present, markers left out.

    ``with_bit11``: KVM's mark. ``with_xen_access``: bits 61:58 not zero and bit 11 clear. ``with_emulated``: bit 52
    set, which only bhyve sets in an entry that hardware follows. A mark must be on every entry: one that lacks it
    means that another hand wrote the tables.
    """
    if not total:
        return GENERIC
    if is_ept and with_emulated == total:
        return BHYVE
    if with_bit11 == total:
        return KVM
    if is_ept and with_xen_access == total:
        return XEN
    return GENERIC
