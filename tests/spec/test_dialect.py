"""What hypervisors write beside what the manuals ask for. Entries marked "captured" come from real images."""

from __future__ import annotations

import pytest
from builders.agreement import assert_array_equals_scalars, every_bit

from volatility3_ept.spec import dialect, ept, ia32e, npt
from volatility3_ept.spec.dialect import BHYVE, GENERIC, KVM, XEN, State
from volatility3_ept.spec.paging import PDE, PDPTE, PML4E, PTE, Access, EntryKind

E, N = ept.EPT_4, npt.NPT_4
N48 = npt.npt_format(4, 48)
N51 = npt.npt_format(4, key_bits=1 << 51)
E40 = ept.ept_format(4, 40)
MBEC = ept.ept_format(4, mode_based_execute=True)
ABSENT, TABLE, LEAF, REFUSED, MMIO = EntryKind
PLAIN, TRACKED, RECALC, EMULATED, _ = State

# who reads, format, level, raw, gpa, kind, state
CASES = {
    # KVM's markers for MMIO
    "EPT MMIO, captured": (KVM, E, PTE, 0xF8_000C_0046, 0xC_0000, MMIO, PLAIN),
    "EPT MMIO, captured, author unknown": (GENERIC, E, PTE, 0xF8_000C_0046, 0xC_0000, MMIO, PLAIN),
    "EPT MMIO, read by hardware's rules for another gpa": (GENERIC, E, PTE, 0xF8_000C_0046, 0xC_1000, REFUSED, PLAIN),
    "EPT MMIO, MAXPHYADDR known": (GENERIC, E40, PTE, 0xF8_000C_0046, 0xC_0000, MMIO, PLAIN),
    "EPT MMIO, generation bits": (KVM, E, PTE, 0x8550_00F8_FEC0_07CE, 0xFEC0_0000, MMIO, PLAIN),
    "EPT MMIO, L1TF on a 44-bit cache": (GENERIC, E, PTE, 0xF80_FEE0_0006, 0xFEE0_0000, MMIO, PLAIN),
    "NPT MMIO, captured": (KVM, N, PTE, 0x0008_0000_000C_0037, 0xC_0000, MMIO, PLAIN),
    "NPT MMIO, captured, author unknown": (GENERIC, N, PTE, 0x0008_0000_000C_0037, 0xC_0000, MMIO, PLAIN),
    "NPT MMIO, MAXPHYADDR known": (GENERIC, N48, PTE, 0x0008_0000_FEC0_0037, 0xFEC0_0000, MMIO, PLAIN),
    "NPT MMIO, C-bit and all reserved bits": (KVM, N, PTE, 0x000F_8000_FEC0_0037, 0xFEC0_0000, MMIO, PLAIN),
    "NPT MMIO, the C-bit is bit 51": (GENERIC, N51, PTE, 0x000F_F800_FEC0_0037, 0xFEC0_0000, MMIO, PLAIN),
    "NPT page at its own number with that C-bit": (GENERIC, N51, PTE, 0x0008_0000_0012_3067, 0x12_3000, LEAF, PLAIN),
    "NPT bit 51 at another gpa is no marker": (GENERIC, N48, PTE, 0x0008_0000_FEC0_0037, 0xC_0000, REFUSED, PLAIN),
    # KVM's other entries without a page
    "frozen": (KVM, E, PTE, 0x5A0, 0, ABSENT, PLAIN),
    "frozen, author unknown": (GENERIC, E, PTE, 0x5A0, 0, ABSENT, PLAIN),
    "frozen, suppress #VE": (KVM, E, PDE, 0x8000_0000_0000_05A0, 0, ABSENT, PLAIN),
    "frozen, mode-based execute": (KVM, MBEC, PTE, 0x5A0, 0, ABSENT, PLAIN),
    "frozen, NPT": (KVM, N, PTE, 0x5A0, 0, ABSENT, PLAIN),
    "empty, suppress #VE": (KVM, E, PTE, 0x8000_0000_0000_0000, 0, ABSENT, PLAIN),
    "empty, suppress #VE, author unknown": (GENERIC, E, PML4E, 0x8000_0000_0000_0000, 0, ABSENT, PLAIN),
    "zero": (KVM, E, PTE, 0, 0, ABSENT, PLAIN),
    "hardware would follow it, but bit 11 is clear": (KVM, E, PTE, 0x1_0037, 0, ABSENT, PLAIN),
    "the same, author unknown": (GENERIC, E, PTE, 0x1_0037, 0, LEAF, PLAIN),
    "the same, NPT": (KVM, N, PTE, 0x1_0067, 0, ABSENT, PLAIN),
    # KVM's mappings
    "4K, captured": (KVM, E, PTE, 0x0600_0000_0123_4B77, 0, LEAF, PLAIN),
    "2M, captured": (KVM, E, PDE, 0x0600_0000_7FE0_0BF7, 0, LEAF, PLAIN),
    "4K not writable, captured": (KVM, E, PTE, 0x0123_4975, 0, LEAF, PLAIN),
    "table, captured": (KVM, E, PML4E, 0x0123_4907, 0, TABLE, PLAIN),
    "4K, NPT": (KVM, N, PTE, 0x0123_4F67, 0, LEAF, PLAIN),
    "live, yet refused by the processor": (KVM, E, PTE, 0x0123_4876, 0x0123_4000, REFUSED, PLAIN),
    # access tracking: RWX is 0, bit 52 says "no A/D flags", R and X are kept in bits 54 and 56
    "access-tracked": (KVM, E, PTE, 0x0750_0000_0123_4870, 0, LEAF, TRACKED),
    "access-tracked 2M": (KVM, E, PDE, 0x0750_0000_0120_08F0, 0, LEAF, TRACKED),
    "access-tracked, author unknown: absent": (GENERIC, E, PTE, 0x0750_0000_0123_4870, 0, ABSENT, PLAIN),
    "no A/D flags, not tracked": (KVM, E, PTE, 0x0610_0000_0123_4877, 0, LEAF, PLAIN),
    "tracked shape without bit 52: absent": (KVM, E, PTE, 0x0740_0000_0123_4870, 0, ABSENT, PLAIN),
    "tracked shape without bit 11: absent": (KVM, E, PTE, 0x0750_0000_0123_4070, 0, ABSENT, PLAIN),
    # Xen
    "Xen 4K, captured": (XEN, E, PTE, 0x9C00_0000_0123_4377, 0, LEAF, PLAIN),
    "Xen 2M, captured": (XEN, E, PDE, 0x9C00_0000_0120_03F3, 0, LEAF, PLAIN),
    "Xen table, captured": (XEN, E, PDPTE, 0x9C00_0000_0123_4107, 0, TABLE, PLAIN),
    "Xen table, captured, author unknown": (GENERIC, E, PDPTE, 0x9C00_0000_0123_4107, 0, TABLE, PLAIN),
    "Xen empty, captured": (XEN, E, PDE, 0x8000_0000_0000_0000, 0, ABSENT, PLAIN),
    "Xen recalculation, 4K": (XEN, E, PTE, 0x9C00_0000_0123_437F, 0, LEAF, RECALC),
    "Xen recalculation, 2M": (XEN, E, PDE, 0x9C00_0000_0120_03FB, 0, LEAF, RECALC),
    "Xen recalculation, table": (XEN, E, PDE, 0x9C00_0000_0123_413F, 0, TABLE, RECALC),
    "Xen recalculation, author unknown": (GENERIC, E, PTE, 0x9C00_0000_0123_437F, 0, REFUSED, PLAIN),
    "Xen mmio_dm holds no page": (XEN, E, PTE, 0x8040_0000_0000_0038, 0, ABSENT, PLAIN),
    "Xen NPT 4K, captured": (XEN, N, PTE, 0x0123_4067, 0, LEAF, PLAIN),
    "Xen NPT 2M, captured": (XEN, N, PDE, 0x0120_00E7, 0, LEAF, PLAIN),
    "Xen NPT recalculation": (XEN, N, PTE, 0x0123_4063, 0, LEAF, RECALC),
    "Xen NPT recalculation, table": (XEN, N, PDE, 0x0123_4023, 0, TABLE, RECALC),
    "Xen NPT populate on demand, captured": (XEN, N, PTE, 0x806F_FFFF_FFFF_F000, 0, ABSENT, PLAIN),
    # VirtualBox
    "VirtualBox MMIO": (GENERIC, E, PTE, 0x000F_FFFF_FEE0_003A, 0xFEE0_0000, MMIO, PLAIN),
    "VirtualBox MMIO, other gpa": (GENERIC, E40, PTE, 0x000F_FF00_0000_003A, 0xC_0000, MMIO, PLAIN),
    "write only without type 7 is damage": (GENERIC, E, PTE, 0x1032, 0xC_0000, REFUSED, PLAIN),
    # bhyve: EMUL_V is bit 52, EMUL_RW bit 53
    "bhyve, accessed and dirty": (BHYVE, E, PTE, 0x0030_0000_0123_4037, 0, LEAF, PLAIN),
    "bhyve, not accessed": (BHYVE, E, PTE, 0x0030_0000_0123_4034, 0, LEAF, EMULATED),
    "bhyve, not dirty": (BHYVE, E, PTE, 0x0030_0000_0123_4035, 0, LEAF, EMULATED),
    "bhyve, read only": (BHYVE, E, PTE, 0x0010_0000_0123_4035, 0, LEAF, PLAIN),
    "bhyve, not accessed, no rights at all": (BHYVE, E, PDE, 0x0030_0000_0120_00B0, 0, LEAF, EMULATED),
    "bhyve, EMUL_RW without EMUL_V": (BHYVE, E, PTE, 0x0020_0000_0123_4030, 0, ABSENT, PLAIN),
    "bhyve, not accessed, author unknown": (GENERIC, E, PTE, 0x0030_0000_0123_4030, 0, ABSENT, PLAIN),
    "bhyve has no such thing in NPT": (BHYVE, N, PTE, 0x0030_0000_0123_4066, 0, ABSENT, PLAIN),
}  # fmt: skip


@pytest.mark.parametrize(("who", "fmt", "level", "raw", "gpa", "kind", "state"), CASES.values(), ids=CASES)
def test_kind_and_state_of_an_entry(who, fmt, level, raw, gpa, kind, state):
    got_kind, restored, got_state = who.kind(fmt, raw, level, gpa)
    assert (EntryKind(got_kind), State(got_state)) == (kind, state)
    assert fmt.table(restored) == fmt.table(raw), "restoring never touches the address"


@pytest.mark.parametrize(
    ("who", "fmt", "level", "raw", "letters", "memory_type"),
    [
        (KVM, E, PTE, 0x0750_0000_0123_4870, "R-X", 0b1110),
        (KVM, E, PTE, 0x0650_0000_0123_4870, "R--", 0b1110),
        (KVM, E, PTE, 0x0600_0000_0123_4B77, "RWX", 0b1110),
        (KVM, E, PTE, 0x0123_4975, "R-X", 0b1110),
        (XEN, E, PTE, 0x9C00_0000_0123_437F, "RWX", 0b1110),
        (XEN, E, PDE, 0x9C00_0000_0120_03F3, "RW-", 0b1110),
        (XEN, N, PTE, 0x0123_4063, "RWX", 0),
        (BHYVE, E, PTE, 0x0030_0000_0123_4034, "RWX", 6),
        (BHYVE, E, PTE, 0x0030_0000_0123_4035, "RWX", 6),
        (BHYVE, E, PTE, 0x0010_0000_0123_4034, "R-X", 6),
    ],
)
def test_rights_and_type_once_the_authors_bookkeeping_is_undone(who, fmt, level, raw, letters, memory_type):
    restored, _ = who.restore(fmt, raw, level)
    assert Access(fmt.rights(restored, level)).letters() == letters
    assert fmt.memory_type(restored) == memory_type


def test_a_restored_table_of_xen_has_no_memory_type():
    restored, state = XEN.restore(E, 0x9C00_0000_0123_413F, PDE)
    assert (restored, state) == (0x9C00_0000_0123_4107, State.RECALC_PENDING)


@pytest.mark.parametrize(
    ("who", "fmt", "raw", "names"),
    [
        (GENERIC, E, 0xFFFF_FFFF_FFFF_FFFF, ()),
        (KVM, E, 0x0600_0000_0123_4B77, ("MMU_PRESENT", "HOST_WRITABLE", "MMU_WRITABLE")),
        (KVM, E, 0x0010_0000_0123_4877, ("MMU_PRESENT", "AD_DISABLED")),
        (KVM, E, 0x0020_0000_0123_4877, ("MMU_PRESENT", "AD_WRPROT")),
        (KVM, N, 0x0123_4F67, ("MMU_PRESENT", "HOST_WRITABLE", "MMU_WRITABLE")),
        (XEN, E, 0x9C00_0000_0123_4377, ("p2m type ram_rw", "access 7")),
        (XEN, E, 0x8040_0000_0000_0000, ("p2m type mmio_dm", "access 0")),
        (XEN, N, 0x806F_FFFF_FFFF_F000, ("p2m type populate_on_demand",)),
        (XEN, N, 0x07F0_0000_0000_0000, ("p2m type 127",)),
        (BHYVE, E, 0x0070_0000_0000_0C00, ("MANAGED", "WIRED", "EMUL_V", "EMUL_RW", "PROMOTED")),
    ],
)
def test_software_bits_by_name(who, fmt, raw, names):
    assert who.software(fmt, raw, PTE) == names


FORMATS = (E, E40, MBEC, ept.EPT_5, N48, npt.NPT_5, npt.npt_format(3), ia32e.four_level(), ia32e.pae(), ia32e.legacy())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.name}, {fmt.physical_bits}")
@pytest.mark.parametrize("who", dialect.DIALECTS.values(), ids=dialect.DIALECTS)
def test_arrays_and_single_entries_agree(who, fmt):
    width = 8 * fmt.entry_bytes
    captured = {raw for _, _, _, raw, _, _, _ in CASES.values()}
    raws = every_bit(*(raw & (1 << width) - 1 for raw in captured), width=width)
    for level in fmt.levels:
        for gpa in (0, 0xC_0000):
            assert_array_equals_scalars(lambda raw, at=level, here=gpa: who.kind(fmt, raw, at, here), raws)


@pytest.mark.parametrize(
    ("is_ept", "total", "bit11", "xen", "emulated", "name"),
    [
        (True, 0, 0, 0, 0, "generic"),
        (True, 9, 9, 0, 0, "KVM"),
        (False, 9, 9, 0, 0, "KVM"),
        (True, 9, 8, 0, 0, "generic"),
        (True, 9, 0, 9, 0, "Xen"),
        (False, 9, 0, 9, 0, "generic"),
        (True, 9, 0, 8, 0, "generic"),
        (True, 9, 0, 0, 9, "bhyve"),
        (True, 9, 9, 0, 9, "bhyve"),
        (False, 9, 9, 0, 9, "KVM"),
    ],
)
def test_the_author_is_named_only_when_every_entry_bears_the_mark(is_ept, total, bit11, xen, emulated, name):
    assert dialect.infer(is_ept, total, bit11, xen, emulated).name == name


def test_states_read_as_words():
    words = ["", "access-tracked", "recalculation pending", "A/D emulated", "recovered"]
    assert [state.text for state in State] == words
