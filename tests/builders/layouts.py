"""VMCS layouts that nobody has seen: random ones that keep the rules of the known ones, and the known ones themselves.

Nothing of the package under test is imported: known layouts are read from their JSON files, and random ones follow the
adjacency rules literally. A layout is a dictionary of field name -> (offset, size).

Rules that all layouts keep (:data:`EVERYWHERE`), and those that only processors keep (:data:`PROCESSORS`): read off the
measured tables of Nehalem, Westmere and Haswell, and the sources of KVM, Xen, VirtualBox, ACRN and Bochs.
"""

from __future__ import annotations

import base64
import functools
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

SYMBOLS = Path(__file__).parents[2] / "symbols" / "vmcs"
PAGE = 4096
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
HASWELL_SEGMENTS = ("ES", "CS", "SS", "DS", "LDTR", "TR", "FS", "GS")
HOST_SELECTORS = [f"HOST_{name}_SELECTOR" for name in ("ES", "CS", "SS", "DS", "FS", "GS", "TR")]

EVERYWHERE = """
GUEST_CR0 GUEST_CR3 GUEST_CR4
HOST_CR0 HOST_CR3 HOST_CR4
GUEST_DR7 GUEST_RSP GUEST_RIP GUEST_RFLAGS
HOST_RSP HOST_RIP
HOST_FS_BASE HOST_GS_BASE HOST_TR_BASE
GUEST_IA32_SYSENTER_ESP GUEST_IA32_SYSENTER_EIP
HOST_IA32_SYSENTER_ESP HOST_IA32_SYSENTER_EIP
IO_BITMAP_A IO_BITMAP_B
VM_EXIT_MSR_STORE_ADDR VM_EXIT_MSR_LOAD_ADDR VM_ENTRY_MSR_LOAD_ADDR
VMCS_LINK_POINTER GUEST_IA32_DEBUGCTL
CR0_GUEST_HOST_MASK CR4_GUEST_HOST_MASK CR0_READ_SHADOW CR4_READ_SHADOW
"""
PROCESSORS = """
GUEST_CR0 GUEST_CR3 GUEST_CR4
HOST_IA32_PAT HOST_IA32_EFER HOST_IA32_PERF_GLOBAL_CTRL HOST_CR0 HOST_CR3 HOST_CR4
EXIT_QUALIFICATION IO_RCX IO_RSI IO_RDI IO_RIP GUEST_LINEAR_ADDRESS GUEST_DR7 GUEST_RSP GUEST_RIP GUEST_RFLAGS
HOST_RSP HOST_RIP
HOST_FS_BASE HOST_GS_BASE HOST_TR_BASE
GUEST_IA32_SYSENTER_ESP GUEST_IA32_SYSENTER_EIP
HOST_IA32_SYSENTER_ESP HOST_IA32_SYSENTER_EIP
IO_BITMAP_A IO_BITMAP_B
VM_EXIT_MSR_STORE_ADDR VM_EXIT_MSR_LOAD_ADDR VM_ENTRY_MSR_LOAD_ADDR
VMCS_LINK_POINTER GUEST_IA32_DEBUGCTL GUEST_IA32_PAT GUEST_IA32_EFER
GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3 CR0_GUEST_HOST_MASK CR4_GUEST_HOST_MASK CR0_READ_SHADOW CR4_READ_SHADOW
EPTP GUEST_PHYSICAL_ADDRESS
PROC_BASED_EXEC_CONTROLS SECONDARY_PROC_EXEC_CONTROLS PIN_BASED_EXEC_CONTROLS
PAGE_FAULT_ERROR_CODE_MASK PAGE_FAULT_ERROR_CODE_MATCH
EXIT_REASON VM_EXIT_INTR_INFO VM_EXIT_INTR_ERROR_CODE IDT_VECTORING_INFO IDT_VECTORING_ERROR_CODE VM_EXIT_INSTRUCTION_LEN VM_EXIT_INSTRUCTION_INFO
VM_ENTRY_INTR_INFO VM_ENTRY_EXCEPTION_ERROR_CODE VM_ENTRY_INSTRUCTION_LEN
"""  # noqa: E501
HEADER = ("VMCS_REVISION_ID", "VMX_ABORT_INDICATOR")


@dataclass
class Layout:
    """Where fields are, and how access rights are stored."""

    name: str
    fields: dict[str, tuple[int, int]]
    rights: str | None
    revisions: list[int] = field(default_factory=list)

    def write(self, revision: int, values: dict[str, int]) -> bytes:
        """Write a page with those values that the layout has a place for; the header gets ``revision``."""
        page = bytearray(PAGE)
        page[0:4] = revision.to_bytes(4, "little")
        for name, (offset, size) in self.fields.items():
            if name in values and name not in HEADER:
                value = stored(self.rights, values[name]) if name.endswith("_ACCESS_RIGHTS") else values[name]
                page[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        return bytes(page)

    def read(self, page: bytes) -> dict[str, int]:
        """Read all fields of a page, access rights in their architectural form."""
        values = {
            n: int.from_bytes(page[offset : offset + size], "little") for n, (offset, size) in self.fields.items()
        }
        return {n: plain(self.rights, v) if n.endswith("_ACCESS_RIGHTS") else v for n, v in values.items()}


#: What fields that are not in use can hold: all ones, control words, registers, kernel addresses, small numbers.
ODD = (
    *(0, 1, 0x10, 0x40, 0x7F, 0x400, 0x500, 0xD01, 0xFFF, 0x11FB, 0x2080, 0x3_6DFB, 0x10_0000, 0x37_26B0),
    *(0x8005_0033, 0xB5A0_6DFA, 0x0007_0406_0007_0406, 0xFFFF_FE00_0000_1000, 0xFFFF_FFFF_8100_0000, (1 << 64) - 1),
)


def stale(
    values: dict[str, int], seed: int, unused: list[str], zeroed: float = 0.1, odd: float = 0.3
) -> dict[str, int]:
    """Return values as memory may hold them: guest fields that were not written back are zero, unused ones are odd."""
    rng = random.Random(seed)
    out = dict(values)
    for name in values:
        if name.startswith("GUEST_") and rng.random() < zeroed:
            out[name] = 0
        elif name in unused and rng.random() < odd:
            out[name] = rng.choice(ODD)
    return out


def stored(form: str | None, value: int) -> int:
    """Put access rights into the form in which they are kept."""
    if form == "rotate32":
        return (value << 8 | value >> 24) & 0xFFFF_FFFF
    return value & 0xF0FF | (value >> 16 & 1) << 11 if form == "pack16" else value


def plain(form: str | None, value: int) -> int:
    """Undo :func:`stored`."""
    if form == "rotate32":
        return (value >> 8 | value << 24) & 0xFFFF_FFFF
    return value & 0xF0FF | (value >> 11 & 1) << 16 if form == "pack16" else value


@functools.cache
def known() -> dict[str, Layout]:
    """Return the layouts of ``symbols/vmcs``, read without the package."""
    return {path.stem: _load(path) for path in sorted(SYMBOLS.glob("*.json"))}


def _load(path: Path) -> Layout:
    table = json.loads(path.read_text())
    (structure,) = table["user_types"].values()
    sizes = {name: kind["size"] for name, kind in table["base_types"].items()}
    fields = {
        name: (item["offset"], sizes[item["type"]["name"]])
        for name, item in structure["fields"].items()
        if item["type"]["kind"] == "base"
    }
    ids = [
        int(base64.b64decode(s["constant_data"])) for n, s in table["symbols"].items() if n.startswith("revision_id")
    ]
    return Layout(path.stem, fields, table["metadata"]["producer"]["layout"].get("access_rights"), ids)


def whole_westmere() -> Layout:
    """Return Westmere's layout with what nobody measured where Nehalem has it: access rights, PAT, GDTR and IDTR."""
    ours, nehalem = known()["intel_westmere"], known()["intel_nehalem"]
    taken = {byte for offset, size in ours.fields.values() for byte in range(offset, offset + size)}
    more = {
        name: (offset, size)
        for name, (offset, size) in nehalem.fields.items()
        if name not in ours.fields and taken.isdisjoint(range(offset, offset + size))
    }
    return Layout("intel_westmere, completed", {**ours.fields, **more}, "rotate32", ours.revisions)


def widths() -> dict[str, int]:
    """Return the size of every field that a layout of everything has: those of VirtualBox and Bochs together."""
    both = {**known()["virtualbox_vvmcs"].fields, **known()["bochs_2026"].fields}
    return {name: size for name, (_, size) in both.items() if not name.startswith("X_") and name not in HEADER}


def processor(seed: int) -> Layout:
    """Return a random layout as a processor could have it: all rules that the three known families keep."""
    rng = random.Random(seed)
    blocks = [_row(names, 8 if _size(names[0]) == 8 else 4) for names in rows(PROCESSORS)]
    rights, slots = rng.choice((("pack16", _slots16()), ("rotate32", _slots24()), ("plain32", _slots24())))
    blocks += [slots, _row(HOST_SELECTORS, rng.choice((2, 4, 8)))]
    return _scatter(f"processor {seed}", rng, blocks, rights)


def loose(seed: int) -> Layout:
    """Return a random layout that keeps the rules of all known ones and no other."""
    rng = random.Random(seed)
    blocks = [_row(names, 8) for names in rows(EVERYWHERE)]
    return _scatter(f"loose {seed}", rng, blocks, rng.choice(("plain32", "rotate32")))


def hypervisor(seed: int) -> Layout:
    """Return a random layout as a hypervisor could have it: an array for each kind and width, ordered by encoding."""
    rng = random.Random(seed)
    steps = {2: rng.choice((2, 8)), 4: rng.choice((4, 8)), 8: 8}
    reference = sorted(known()["bochs_2026"].fields.items(), key=lambda item: item[1][0])
    groups: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
    for name, (offset, size) in reference:
        if name in widths() and offset >= _BOCHS[0][0]:
            natural = offset >= _BOCHS[3][0]
            kind = _bochs_type(offset)
            group = groups.setdefault((natural * 100 + size, kind), {})
            group[name] = (steps[size] * _bochs_index(offset), size)
    return _scatter(f"hypervisor {seed}", rng, list(groups.values()), rng.choice(("plain32", "rotate32")), rest=False)


_BOCHS = ((0x10, 0x20), (0x210, 0x54), (0x750, 0x30), (0xA50, 0x30))


def _bochs_slot(offset: int) -> tuple[int, int]:
    start, count = next((s, n) for s, n in reversed(_BOCHS) if offset >= s)
    return (offset - start) // 4 // count, (offset - start) // 4 % count // 2


def _bochs_type(offset: int) -> int:
    return _bochs_slot(offset)[0]


def _bochs_index(offset: int) -> int:
    return _bochs_slot(offset)[1]


def rows(text: str) -> list[list[str]]:
    """Return the names of each line."""
    return [line.split() for line in text.strip().splitlines()]


def _size(name: str) -> int:
    return widths()[name]


def _row(names: list[str], step: int) -> dict[str, tuple[int, int]]:
    return {name: (step * number, _size(name)) for number, name in enumerate(names)}


def _slots24() -> dict[str, tuple[int, int]]:
    parts = (("SELECTOR", 0, 2), ("BASE", 8, 8), ("LIMIT", 16, 4), ("ACCESS_RIGHTS", 20, 4))
    return {f"GUEST_{s}_{p}": (24 * n + at, size) for n, s in enumerate(SEGMENTS) for p, at, size in parts}


def _slots16() -> dict[str, tuple[int, int]]:
    parts = (("SELECTOR", 0, 2), ("ACCESS_RIGHTS", 2, 2), ("LIMIT", 4, 4), ("BASE", 8, 8))
    return {f"GUEST_{s}_{p}": (16 * n + at, size) for n, s in enumerate(HASWELL_SEGMENTS) for p, at, size in parts}


def _scatter(
    name: str, rng: random.Random, blocks: list[dict[str, tuple[int, int]]], rights: str, rest: bool = True
) -> Layout:
    """Place blocks, and every other field on its own, at random without overlap; all naturally aligned."""
    placed = {field for block in blocks for field in block}
    if rest:
        blocks = blocks + [{field: (0, size)} for field, size in widths().items() if field not in placed]
    rng.shuffle(blocks)
    blocks.sort(key=lambda block: -max(offset for offset, _ in block.values()))
    free = bytearray(b"\1" * PAGE)
    free[:16] = bytes(16)
    fields = {}
    for block in blocks:
        end = max(offset + size for offset, size in block.values())
        align = max(size for _, size in block.values())
        starts = [at for at in range(16, PAGE - end + 1, align) if all(free[at : at + end])]
        at = rng.choice(starts)
        free[at : at + end] = bytes(end)
        fields.update({field: (at + offset, size) for field, (offset, size) in block.items()})
    return Layout(name, fields, rights)
