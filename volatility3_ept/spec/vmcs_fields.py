"""Every VMCS field by name and encoding, and how an encoding is built.

Sources: Intel SDM Vol. 3D, appendix "Field Encoding in VMCS"; Vol. 3C, "VMREAD, VMWRITE, and Encodings of
VMCS Fields"; Linux ``arch/x86/include/asm/vmx.h``; Bochs ``cpu/vmx.h``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Final


class Width(IntEnum):
    """Bits 14:13 of an encoding. The width of a field says nothing about where a processor keeps it."""

    BITS_16 = 0
    BITS_64 = 1
    BITS_32 = 2
    NATURAL = 3

    @property
    def size_bytes(self) -> int:
        """Size of the value in bytes; natural width counts as 64-bit."""
        return (2, 8, 4, 8)[self]


class FieldType(IntEnum):
    """Bits 11:10 of an encoding."""

    CONTROL = 0
    READ_ONLY = 1
    GUEST = 2
    HOST = 3


@dataclass(frozen=True, slots=True)
class VmcsField:
    """One field: its name and the parts of its encoding."""

    name: str
    width: Width
    type: FieldType
    index: int

    @property
    def encoding(self) -> int:
        """The operand VMREAD and VMWRITE take to reach the whole field."""
        return self.width << 13 | self.type << 10 | self.index << 1


@dataclass(frozen=True, slots=True)
class DecodedEncoding:
    """The parts of an encoding. ``is_high`` is set when it names bits 63:32 of a 64-bit field."""

    width: Width
    type: FieldType
    index: int
    is_high: bool


def decode_encoding(encoding: int) -> DecodedEncoding:
    """Split a VMCS field encoding; raise ValueError when a reserved bit (12 or 31:15) is set."""
    if encoding & ~0x6FFF:
        raise ValueError(f"reserved bits in VMCS field encoding {encoding:#x}")
    width = Width(encoding >> 13 & 3)
    is_high = bool(encoding & 1)
    if is_high and width is not Width.BITS_64:
        raise ValueError(f"only 64-bit fields have a high half: {encoding:#x}")
    return DecodedEncoding(width, FieldType(encoding >> 10 & 3), encoding >> 1 & 0x1FF, is_high)


_SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")


def _names(pattern: str, registers: tuple[str, ...] = _SEGMENTS) -> str:
    return " ".join(pattern.format(register) for register in registers)


# Names in index order; "-" marks an index that no public document assigns.
_GROUPS: Final[dict[tuple[Width, FieldType], str]] = {
    (Width.BITS_16, FieldType.CONTROL): """
        VPID POSTED_INTERRUPT_NOTIFICATION_VECTOR EPTP_INDEX HLAT_PREFIX_SIZE LAST_PID_POINTER_INDEX""",
    (Width.BITS_16, FieldType.GUEST): _names("GUEST_{}_SELECTOR")
    + """
        GUEST_INTERRUPT_STATUS GUEST_PML_INDEX GUEST_UINV""",
    (Width.BITS_16, FieldType.HOST): _names("HOST_{}_SELECTOR", ("ES", "CS", "SS", "DS", "FS", "GS", "TR")),
    (Width.BITS_64, FieldType.CONTROL): """
        IO_BITMAP_A IO_BITMAP_B MSR_BITMAP VM_EXIT_MSR_STORE_ADDR VM_EXIT_MSR_LOAD_ADDR VM_ENTRY_MSR_LOAD_ADDR
        EXECUTIVE_VMCS_POINTER PML_ADDRESS TSC_OFFSET VIRTUAL_APIC_ADDR APIC_ACCESS_ADDR
        POSTED_INTERRUPT_DESC_ADDR VM_FUNCTION_CONTROLS EPTP EOI_EXIT_BITMAP0 EOI_EXIT_BITMAP1
        EOI_EXIT_BITMAP2 EOI_EXIT_BITMAP3 EPTP_LIST_ADDR VMREAD_BITMAP_ADDR VMWRITE_BITMAP_ADDR
        VIRT_EXCEPTION_INFO_ADDR XSS_EXITING_BITMAP ENCLS_EXITING_BITMAP SPPTP TSC_MULTIPLIER
        TERTIARY_PROC_EXEC_CONTROLS ENCLV_EXITING_BITMAP LOW_PASID_DIRECTORY HIGH_PASID_DIRECTORY SHARED_EPTP
        PCONFIG_EXITING_BITMAP HLATP PID_POINTER_TABLE_ADDR SECONDARY_VM_EXIT_CONTROLS - -
        IA32_SPEC_CTRL_MASK IA32_SPEC_CTRL_SHADOW""",
    (Width.BITS_64, FieldType.READ_ONLY): "GUEST_PHYSICAL_ADDRESS",
    (Width.BITS_64, FieldType.GUEST): """
        VMCS_LINK_POINTER GUEST_IA32_DEBUGCTL GUEST_IA32_PAT GUEST_IA32_EFER GUEST_IA32_PERF_GLOBAL_CTRL
        GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3 GUEST_IA32_BNDCFGS GUEST_IA32_RTIT_CTL
        GUEST_IA32_LBR_CTL GUEST_IA32_PKRS""",
    (Width.BITS_64, FieldType.HOST): "HOST_IA32_PAT HOST_IA32_EFER HOST_IA32_PERF_GLOBAL_CTRL HOST_IA32_PKRS",
    (Width.BITS_32, FieldType.CONTROL): """
        PIN_BASED_EXEC_CONTROLS PROC_BASED_EXEC_CONTROLS EXCEPTION_BITMAP PAGE_FAULT_ERROR_CODE_MASK
        PAGE_FAULT_ERROR_CODE_MATCH CR3_TARGET_COUNT VM_EXIT_CONTROLS VM_EXIT_MSR_STORE_COUNT
        VM_EXIT_MSR_LOAD_COUNT VM_ENTRY_CONTROLS VM_ENTRY_MSR_LOAD_COUNT VM_ENTRY_INTR_INFO
        VM_ENTRY_EXCEPTION_ERROR_CODE VM_ENTRY_INSTRUCTION_LEN TPR_THRESHOLD SECONDARY_PROC_EXEC_CONTROLS
        PLE_GAP PLE_WINDOW INSTRUCTION_TIMEOUT_CONTROL""",
    (Width.BITS_32, FieldType.READ_ONLY): """
        VM_INSTRUCTION_ERROR EXIT_REASON VM_EXIT_INTR_INFO VM_EXIT_INTR_ERROR_CODE IDT_VECTORING_INFO
        IDT_VECTORING_ERROR_CODE VM_EXIT_INSTRUCTION_LEN VM_EXIT_INSTRUCTION_INFO""",
    (Width.BITS_32, FieldType.GUEST): _names("GUEST_{}_LIMIT", (*_SEGMENTS, "GDTR", "IDTR"))
    + " "
    + _names("GUEST_{}_ACCESS_RIGHTS")
    + """
        GUEST_INTERRUPTIBILITY_STATE GUEST_ACTIVITY_STATE GUEST_SMBASE GUEST_IA32_SYSENTER_CS -
        VMX_PREEMPTION_TIMER_VALUE""",
    (Width.BITS_32, FieldType.HOST): "HOST_IA32_SYSENTER_CS",
    (Width.NATURAL, FieldType.CONTROL): """
        CR0_GUEST_HOST_MASK CR4_GUEST_HOST_MASK CR0_READ_SHADOW CR4_READ_SHADOW CR3_TARGET_VALUE0
        CR3_TARGET_VALUE1 CR3_TARGET_VALUE2 CR3_TARGET_VALUE3""",
    (Width.NATURAL, FieldType.READ_ONLY): """
        EXIT_QUALIFICATION IO_RCX IO_RSI IO_RDI IO_RIP GUEST_LINEAR_ADDRESS""",
    (Width.NATURAL, FieldType.GUEST): "GUEST_CR0 GUEST_CR3 GUEST_CR4 "
    + _names("GUEST_{}_BASE", (*_SEGMENTS, "GDTR", "IDTR"))
    + """
        GUEST_DR7 GUEST_RSP GUEST_RIP GUEST_RFLAGS GUEST_PENDING_DEBUG_EXCEPTIONS GUEST_IA32_SYSENTER_ESP
        GUEST_IA32_SYSENTER_EIP GUEST_IA32_S_CET GUEST_SSP GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR""",
    (Width.NATURAL, FieldType.HOST): """
        HOST_CR0 HOST_CR3 HOST_CR4 HOST_FS_BASE HOST_GS_BASE HOST_TR_BASE HOST_GDTR_BASE HOST_IDTR_BASE
        HOST_IA32_SYSENTER_ESP HOST_IA32_SYSENTER_EIP HOST_RSP HOST_RIP HOST_IA32_S_CET HOST_SSP
        HOST_IA32_INTERRUPT_SSP_TABLE_ADDR""",
}

FIELDS: Final[tuple[VmcsField, ...]] = tuple(
    VmcsField(name, width, field_type, index)
    for (width, field_type), names in _GROUPS.items()
    for index, name in enumerate(names.split())
    if name != "-"
)
BY_NAME: Final[Mapping[str, VmcsField]] = MappingProxyType({field.name: field for field in FIELDS})
BY_ENCODING: Final[Mapping[int, VmcsField]] = MappingProxyType({field.encoding: field for field in FIELDS})
