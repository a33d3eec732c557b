"""Registers of a vCPU, and the two notes that carry them, byte by byte as QEMU lays them out."""

from __future__ import annotations

import struct

import pytest

from volatility3_ept.core.control import ControlStructure
from volatility3_ept.export import cpu


def structure(kind: str, hpa: int = 0x1000, **fields: int) -> ControlStructure:
    return ControlStructure(kind, hpa, "test", None, False, 0, 0, 0, None, fields, ())


VMCS = structure(
    "VMCS",
    GUEST_RIP=0x1111, GUEST_RSP=0x2222, GUEST_RFLAGS=0x202, GUEST_CR3=0x3000,
    GUEST_CR0=0x80050033, CR0_GUEST_HOST_MASK=0xFFFF_FFFF_FFFF_FFF1, CR0_READ_SHADOW=0x80050031,
    GUEST_CR4=0x372EB0, CR4_GUEST_HOST_MASK=0x2000, CR4_READ_SHADOW=0,
    GUEST_CS_SELECTOR=0x10, GUEST_CS_LIMIT=0xFFFFFFFF, GUEST_CS_ACCESS_RIGHTS=0xA09B, GUEST_CS_BASE=0,
    GUEST_SS_SELECTOR=0x18, GUEST_SS_ACCESS_RIGHTS=0x1C000, GUEST_SS_BASE=0,
    GUEST_GS_BASE=0xFFFF_8880_0000_0000, GUEST_IDTR_BASE=0xFFFF_FE00_0000_0000, GUEST_IDTR_LIMIT=0xFFF,
)  # fmt: skip
VMCB = structure(
    "VMCB", RIP=0x1111, RSP=0x2222, RAX=0x55, RFLAGS=0x202, CR0=0x80050033, CR2=0x4000, CR3=0x3000, CR4=0x6F0,
    EFER=0xD01,
    CS_SELECTOR=0x10, CS_LIMIT=0xFFFFFFFF, CS_ATTRIB=0xA9B, CS_BASE=0,
    GS_BASE=0xFFFF_8880_0000_0000,
)  # fmt: skip


def test_the_guest_sees_the_shadow_of_bits_that_the_hypervisor_owns():
    values = cpu.read(VMCS).values
    assert values["cr0"] == 0x80050033 & 0xE | 0x80050031
    assert values["cr4"] == 0x370EB0, "VMXE is on in every VMCS"


def test_what_is_not_held_is_unknown_and_never_a_zero_without_a_word():
    assert cpu.read(VMCS).unknown == (
        *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
        *("cr2", "efer", "ds", "es", "fs", "ldtr", "tr", "gdtr"),
    )
    assert not {"rax", "cr2", "efer", "rsp"} & set(cpu.read(VMCB).unknown)


@pytest.mark.parametrize("held", [VMCS, VMCB], ids=["VMCS", "VMCB"])
def test_segment_flags_are_the_upper_half_of_a_descriptor(held):
    """64-bit code, ring 0: G and L, present, execute and read, accessed."""
    assert cpu.read(held).segments["cs"] == cpu.Segment(0x10, 0xFFFFFFFF, 0x00A09B00, 0)


def test_an_unusable_segment_has_no_flags():
    assert cpu.read(VMCS).segments["ss"].flags == 0


def test_prstatus_as_qemu_writes_it():
    data = cpu.prstatus(cpu.read(VMCB), 3)
    assert struct.unpack_from("<III8s", data) == (5, 336, 1, b"CORE\0\0\0\0")
    body = data[20:]
    assert (len(body), struct.unpack_from("<I", body, 32)) == (336, (3,))
    registers = struct.unpack_from("<27Q", body, 112)
    assert (registers[10], registers[16], registers[17], registers[18], registers[19]) == (
        0x55,
        0x1111,
        0x10,
        0x202,
        0x2222,
    )
    assert registers[22] == 0xFFFF_8880_0000_0000


def test_the_qemu_note():
    data = cpu.qemu_state(cpu.read(VMCS))
    assert struct.unpack_from("<III8s", data) == (5, 432, 0, b"QEMU\0\0\0\0")
    body = data[20:]
    assert struct.unpack_from("<II", body) == (1, 432)
    assert struct.unpack_from("<18Q", body, 8)[6::10] == (0x2222, 0x1111)
    assert struct.unpack_from("<4IQ", body, 8 + 144) == (0x10, 0xFFFFFFFF, 0x00A09B00, 0, 0)
    assert struct.unpack_from("<4IQ", body, 8 + 144 + 9 * 24) == (0, 0xFFF, 0, 0, 0xFFFF_FE00_0000_0000)
    assert struct.unpack_from("<5Q", body, 8 + 144 + 240) == (0x80050031 | 2, 0, 0, 0x3000, 0x370EB0)


def test_vcpus_are_in_the_order_of_their_kernel_s_per_cpu_areas():
    first, second = (structure("VMCB", hpa=i, GS_BASE=0xFFFF_8880_0000_0000 + i) for i in (1, 2))
    assert [item.structure.hpa for item in cpu.in_order([second, first])] == [1, 2]


def test_where_one_is_in_user_mode_the_order_is_left_alone():
    first, second = structure("VMCB", hpa=1, GS_BASE=0), structure("VMCB", hpa=2, GS_BASE=1 << 63)
    assert [item.structure.hpa for item in cpu.in_order([second, first])] == [2, 1]
