"""The VMCS: its header, its control bits and the forms in which processors store segment access rights.

Sources: Intel SDM Vol. 3C, "Virtual Machine Control Structures" ("Format of the VMCS Region", "VM-Execution
Control Fields", "VM-Exit Control Fields", "VM-Entry Control Fields", "Guest Register State"), Vol. 3D,
appendix "VMX Capability Reporting Facility"; Bochs ``cpu/vmx.cc`` for the stored forms of access rights.
Where a field is kept depends on the processor (``symbols/vmcs``); which fields there are is in
``vmcs_fields``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Final, NamedTuple

from volatility3_ept.spec.bits import bit
from volatility3_ept.spec.segments import SegmentBits

#: Dword 0 of the region: the revision identifier, and bit 31, set in a shadow VMCS.
REVISION_ID: Final = 0x7FFF_FFFF
SHADOW_INDICATOR: Final = bit(31)
#: The link pointer of a VMCS that has no shadow VMCS.
NO_LINK: Final = 0xFFFF_FFFF_FFFF_FFFF

#: Revision identifiers seen in the wild, among them those whose layout nobody has published (VirtualBox and
#: Bochs processor databases, hypervisor sources, user reports).
REVISION_SEEN_ON: Final[dict[int, str]] = {
    0x02: "Silvermont (Pentium N3530)",
    0x04: "Skylake and later",
    0x05: "Core Duo (Yonah)",
    0x07: "Core 2 (Conroe), VIA L4700, Zhaoxin KX-U5581",
    0x0B: "Core 2",
    0x0D: "Penryn",
    0x0E: "Nehalem",
    0x0F: "Westmere",
    0x10: "Sandy Bridge, Ivy Bridge",
    0x12: "Haswell, Broadwell",
    0x13: "Core Ultra 200",
    0x01: "VMware (nested) or Hyper-V (enlightened VMCS)",
    0x2B: "Bochs",
    0x123: "a fork of QEMU",
    0xDA0400: "Xen (nested)",
    0x11E57ED0: "KVM (nested)",
    0x15407E12: "ACRN (nested)",
    0x40000001: "Xen 4.2 or VirtualBox (nested)",
    0x4D565841: "uXen",
}


class Abort(IntEnum):
    """VMX-abort indicators (SDM Vol. 3C, "VMX Aborts")."""

    NONE = 0
    SAVING_GUEST_MSRS = 1
    HOST_PDPTE = 2
    VMCS_CORRUPTED = 3
    LOADING_HOST_MSRS = 4
    MACHINE_CHECK = 5
    HOST_MODE_MISMATCH = 6


class ActivityState(IntEnum):
    """Guest activity states."""

    ACTIVE = 0
    HLT = 1
    SHUTDOWN = 2
    WAIT_FOR_SIPI = 3


class Pin(IntFlag):
    """Pin-based VM-execution controls."""

    EXTERNAL_INTERRUPT_EXITING = bit(0)
    NMI_EXITING = bit(3)
    VIRTUAL_NMIS = bit(5)
    PREEMPTION_TIMER = bit(6)
    POSTED_INTERRUPTS = bit(7)


class Proc(IntFlag):
    """Primary processor-based VM-execution controls."""

    INTERRUPT_WINDOW_EXITING = bit(2)
    TSC_OFFSETTING = bit(3)
    HLT_EXITING = bit(7)
    INVLPG_EXITING = bit(9)
    MWAIT_EXITING = bit(10)
    RDPMC_EXITING = bit(11)
    RDTSC_EXITING = bit(12)
    CR3_LOAD_EXITING = bit(15)
    CR3_STORE_EXITING = bit(16)
    TERTIARY_CONTROLS = bit(17)
    CR8_LOAD_EXITING = bit(19)
    CR8_STORE_EXITING = bit(20)
    TPR_SHADOW = bit(21)
    NMI_WINDOW_EXITING = bit(22)
    MOV_DR_EXITING = bit(23)
    UNCONDITIONAL_IO_EXITING = bit(24)
    IO_BITMAPS = bit(25)
    MONITOR_TRAP_FLAG = bit(27)
    MSR_BITMAPS = bit(28)
    MONITOR_EXITING = bit(29)
    PAUSE_EXITING = bit(30)
    SECONDARY_CONTROLS = bit(31)


class Proc2(IntFlag):
    """Secondary processor-based VM-execution controls, in force with ``Proc.SECONDARY_CONTROLS``."""

    VIRTUALIZE_APIC_ACCESSES = bit(0)
    ENABLE_EPT = bit(1)
    DESCRIPTOR_TABLE_EXITING = bit(2)
    ENABLE_RDTSCP = bit(3)
    VIRTUALIZE_X2APIC = bit(4)
    ENABLE_VPID = bit(5)
    WBINVD_EXITING = bit(6)
    UNRESTRICTED_GUEST = bit(7)
    APIC_REGISTER_VIRTUALIZATION = bit(8)
    VIRTUAL_INTERRUPT_DELIVERY = bit(9)
    PAUSE_LOOP_EXITING = bit(10)
    RDRAND_EXITING = bit(11)
    ENABLE_INVPCID = bit(12)
    ENABLE_VMFUNC = bit(13)
    VMCS_SHADOWING = bit(14)
    ENCLS_EXITING = bit(15)
    RDSEED_EXITING = bit(16)
    ENABLE_PML = bit(17)
    EPT_VIOLATION_VE = bit(18)
    CONCEAL_VMX_FROM_PT = bit(19)
    ENABLE_XSAVES = bit(20)
    PASID_TRANSLATION = bit(21)
    MODE_BASED_EXECUTE = bit(22)
    SUB_PAGE_WRITE = bit(23)
    PT_USES_GUEST_PHYSICAL = bit(24)
    TSC_SCALING = bit(25)
    USER_WAIT_AND_PAUSE = bit(26)
    ENABLE_PCONFIG = bit(27)
    ENCLV_EXITING = bit(28)
    BUS_LOCK_DETECTION = bit(30)
    INSTRUCTION_TIMEOUT = bit(31)


class Exit(IntFlag):
    """Primary VM-exit controls."""

    SAVE_DEBUG_CONTROLS = bit(2)
    HOST_64_BIT = bit(9)
    LOAD_PERF_GLOBAL_CTRL = bit(12)
    ACKNOWLEDGE_INTERRUPT = bit(15)
    SAVE_PAT = bit(18)
    LOAD_PAT = bit(19)
    SAVE_EFER = bit(20)
    LOAD_EFER = bit(21)
    SAVE_PREEMPTION_TIMER = bit(22)
    CLEAR_BNDCFGS = bit(23)
    CONCEAL_VMX_FROM_PT = bit(24)
    CLEAR_RTIT_CTL = bit(25)
    CLEAR_LBR_CTL = bit(26)
    CLEAR_UINV = bit(27)
    LOAD_CET = bit(28)
    LOAD_PKRS = bit(29)
    SAVE_PERF_GLOBAL_CTRL = bit(30)
    SECONDARY_CONTROLS = bit(31)


class Entry(IntFlag):
    """VM-entry controls."""

    LOAD_DEBUG_CONTROLS = bit(2)
    GUEST_64_BIT = bit(9)
    ENTRY_TO_SMM = bit(10)
    DEACTIVATE_DUAL_MONITOR = bit(11)
    LOAD_PERF_GLOBAL_CTRL = bit(13)
    LOAD_PAT = bit(14)
    LOAD_EFER = bit(15)
    LOAD_BNDCFGS = bit(16)
    CONCEAL_VMX_FROM_PT = bit(17)
    LOAD_RTIT_CTL = bit(18)
    LOAD_UINV = bit(19)
    LOAD_CET = bit(20)
    LOAD_LBR_CTL = bit(21)
    LOAD_PKRS = bit(22)
    LOAD_FRED = bit(23)


class ControlRule(NamedTuple):
    """Bits of a control word that must be one, and bits that no processor lets be one."""

    must_be_one: int
    must_be_zero: int

    def holds(self, value: int) -> bool:
        """Tell whether a control word obeys."""
        return value & self.must_be_one == self.must_be_one and not value & self.must_be_zero


#: The default1 class without the controls that the TRUE capability MSRs allow to be zero.
CONTROL_RULES: Final[dict[str, ControlRule]] = {
    "PIN_BASED_EXEC_CONTROLS": ControlRule(0x0000_0016, 0xFFFF_FF00),
    "PROC_BASED_EXEC_CONTROLS": ControlRule(0x0400_6172, bit(0) | bit(18)),
    "VM_EXIT_CONTROLS": ControlRule(0x0003_6DFB, 0),
    "VM_ENTRY_CONTROLS": ControlRule(0x0000_11FB, 0xFF00_0000),
}

CONTROL_FLAGS: Final[dict[str, type[IntFlag]]] = {
    "PIN_BASED_EXEC_CONTROLS": Pin,
    "PROC_BASED_EXEC_CONTROLS": Proc,
    "SECONDARY_PROC_EXEC_CONTROLS": Proc2,
    "VM_EXIT_CONTROLS": Exit,
    "VM_ENTRY_CONTROLS": Entry,
}


def control_names(field: str, value: int) -> tuple[str, ...]:
    """Name the controls that are on, lowest bit first, without the unnamed (default1) ones."""
    return tuple(flag.name or "" for flag in CONTROL_FLAGS[field] if value & flag)


class AccessRightsFormat(str, Enum):
    """How a processor keeps the access rights of a segment in its VMCS."""

    PLAIN32 = "plain32"  #: as VMREAD gives them
    ROTATE32 = "rotate32"  #: rotated left by 8
    PACK16 = "pack16"  #: 16 bits, the unusable bit (16) moved to bit 11

    def unpack(self, stored: int) -> int:
        """Turn what is in memory into what VMREAD would give."""
        if self is AccessRightsFormat.ROTATE32:
            return (stored >> 8 | stored << 24) & 0xFFFF_FFFF
        if self is AccessRightsFormat.PACK16:
            return stored & 0xF0FF | (stored & 0x800) << 5
        return stored


@dataclass(frozen=True)
class AccessRights(SegmentBits):
    """Segment access rights as VMREAD gives them (SDM Vol. 3C, "Format of Access Rights")."""

    @property
    def is_long(self) -> bool:
        """Bit 13, L: 64-bit code."""
        return bool(self.raw & bit(13))

    @property
    def is_unusable(self) -> bool:
        """Bit 16: the register holds a null selector."""
        return bool(self.raw & bit(16))

    @property
    def has_reserved(self) -> bool:
        """Tell whether bits 11:8 or 31:17 are set, which VM entry refuses in a usable segment."""
        return bool(self.raw & 0xFFFE_0F00)
