"""A vCPU's registers as far as its control structure holds them, and the notes of an ELF core that carry them.

A VMCS and a VMCB hold what the processor itself saves at an exit. The general-purpose registers are the hypervisor's
to save, in a structure of its own, and are not here; only RSP is in both, RAX in a VMCB.

Sources: QEMU ``target/i386/arch_dump.c`` (both notes), Linux ``include/uapi/linux/elfcore.h`` (NT_PRSTATUS); Intel SDM
Vol. 3C, "Guest Register State", "Guest/Host Masks and Read Shadows for CR0 and CR4"; AMD APM Vol. 2, "VMCB State Save
Area".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from volatility3_ept.core.control import ControlStructure
from volatility3_ept.spec import bits

#: In the order of QEMU's note.
GENERAL: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "ldtr", "tr")
_TABLES: Final = ("gdtr", "idtr")
_CONTROL: Final = ("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer")
_NT_PRSTATUS: Final = 1
_QEMU_STATE_VERSION: Final = 1
#: In the order of NT_PRSTATUS (struct user_regs_struct).
_USER_REGISTERS: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


@dataclass(frozen=True)
class Segment:
    """A segment register or descriptor-table register. ``flags`` are bits 63:32 of a descriptor, as QEMU has them."""

    selector: int = 0
    limit: int = 0
    flags: int = 0
    base: int = 0


@dataclass(frozen=True)
class Cpu:
    """The registers of one vCPU. A name that is missing is a register that the control structure does not hold."""

    structure: ControlStructure
    values: Mapping[str, int] = field(hash=False)
    segments: Mapping[str, Segment] = field(hash=False)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The registers that stand as 0 in the notes because nothing is known of them."""
        named = (*(name for name in (*GENERAL, *_CONTROL) if name not in self.values),)
        return named + tuple(name for name in (*SEGMENTS, *_TABLES) if name not in self.segments)

    def known(self) -> dict[str, str]:
        """Return every known register as hexadecimal text."""
        found = {name: f"{value:#x}" for name, value in self.values.items()}
        for name, segment in self.segments.items():
            if name not in _TABLES:
                found[f"{name}_selector"] = f"{segment.selector:#x}"
            found[f"{name}_base"] = f"{segment.base:#x}"
            found[f"{name}_limit"] = f"{segment.limit:#x}"
        return found


def read(structure: ControlStructure) -> Cpu:
    """Return the registers as the guest sees them."""
    return _from_vmcs(structure) if structure.kind == "VMCS" else _from_vmcb(structure)


def in_order(structures: Sequence[ControlStructure]) -> tuple[Cpu, ...]:
    """Return the registers of all vCPUs, by vCPU number as far as it can be told.

    Nothing in a control structure numbers its vCPU. Linux lays out its per-CPU areas in the order of its CPUs, and GS
    holds their address while the kernel runs: where all vCPUs are in the kernel, that is the order.
    """
    cpus = [read(structure) for structure in structures]
    bases = [cpu.segments["gs"].base if "gs" in cpu.segments else 0 for cpu in cpus]
    if all(base >> 63 for base in bases) and len(set(bases)) == len(bases):
        return tuple(cpu for _, cpu in sorted(zip(bases, cpus, strict=True), key=lambda pair: pair[0]))
    return tuple(cpus)


def _from_vmcs(structure: ControlStructure) -> Cpu:
    fields = structure.fields
    names = {name: f"GUEST_{name.upper()}" for name in ("rip", "rsp", "rflags", "cr3")} | {"efer": "GUEST_IA32_EFER"}
    values = {name: fields[theirs] for name, theirs in names.items() if theirs in fields}
    for name in ("CR0", "CR4"):
        if f"GUEST_{name}" in fields:
            # Bits that the hypervisor owns read as the shadow says: CR4.VMXE is always on, and no guest sees it.
            owned, shadow = fields.get(f"{name}_GUEST_HOST_MASK", 0), fields.get(f"{name}_READ_SHADOW", 0)
            values[name.lower()] = fields[f"GUEST_{name}"] & ~owned | shadow & owned
    segments = {}
    for name in (*SEGMENTS, *_TABLES):
        held = [fields.get(f"GUEST_{name.upper()}_{part}") for part in ("SELECTOR", "LIMIT", "ACCESS_RIGHTS", "BASE")]
        if held[3] is not None:
            rights = held[2] or 0
            flags = 0 if rights & bits.bit(16) else (rights & 0xF0FF) << 8
            segments[name] = Segment(held[0] or 0, held[1] or 0, flags, held[3])
    return Cpu(structure, values, segments)


def _from_vmcb(structure: ControlStructure) -> Cpu:
    fields = structure.fields
    names = ("rip", "rsp", "rax", "rflags", "cr0", "cr2", "cr3", "cr4", "efer")
    values = {name: fields[name.upper()] for name in names if name.upper() in fields}
    segments = {}
    for name in (*SEGMENTS, *_TABLES):
        held = [fields.get(f"{name.upper()}_{part}") for part in ("SELECTOR", "LIMIT", "ATTRIB", "BASE")]
        if held[3] is not None:
            rights = held[2] or 0
            flags = (rights & 0xFF) << 8 | (rights & 0xF00) << 12
            segments[name] = Segment(held[0] or 0, held[1] or 0, flags, held[3])
    return Cpu(structure, values, segments)


def prstatus(cpu: Cpu, number: int) -> bytes:
    """Return NT_PRSTATUS of one vCPU, its number from 1 on as the process id, as QEMU writes it."""
    found = dict(cpu.values)
    for name, segment in cpu.segments.items():
        found |= {name: segment.selector, f"{name}_base": segment.base}
    registers = struct.pack("<27Q", *(found.get(name, 0) for name in _USER_REGISTERS))
    return note(b"CORE", _NT_PRSTATUS, struct.pack("<32xI76x", number) + registers + bytes(8))


def qemu_state(cpu: Cpu) -> bytes:
    """Return the note "QEMU" of one vCPU: control registers and segments, which NT_PRSTATUS has no room for."""
    values = [cpu.values.get(name, 0) for name in (*GENERAL, "rip", "rflags")]
    body = struct.pack("<18Q", *values)
    for name in (*SEGMENTS, *_TABLES):
        segment = cpu.segments.get(name, Segment())
        body += struct.pack("<4IQ", segment.selector, segment.limit, segment.flags & 0xFFFFFFFF, 0, segment.base)
    body += struct.pack("<5Q", *(cpu.values.get(name, 0) for name in ("cr0", "cr1", "cr2", "cr3", "cr4")))
    return note(b"QEMU", 0, struct.pack("<II", _QEMU_STATE_VERSION, len(body) + 8) + body)


def note(name: bytes, kind: int, body: bytes) -> bytes:
    """Return one note of an ELF core: name and body each padded to four bytes."""
    padded = name + bytes(4 - len(name) % 4)
    return struct.pack("<III", len(name) + 1, len(body), kind) + padded + body + bytes(-len(body) % 4)
