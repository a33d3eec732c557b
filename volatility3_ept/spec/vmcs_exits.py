"""Basic exit reasons.

Sources: Intel SDM Vol. 3D, appendix "VMX Basic Exit Reasons"; Linux ``arch/x86/include/uapi/asm/vmx.h``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from volatility3_ept.spec.bits import bit

#: Bits 15:0 of the exit-reason field; bit 31 says that VM entry itself failed.
BASIC_REASON: Final = 0xFFFF
ENTRY_FAILURE: Final = bit(31)


class ExitReason(IntEnum):
    """Basic exit reasons, bits 15:0 of the exit-reason field."""

    EXCEPTION_OR_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT_SIGNAL = 3
    STARTUP_IPI = 4
    IO_SMI = 5
    OTHER_SMI = 6
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    GETSEC = 11
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    RSM = 17
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMXOFF = 26
    VMXON = 27
    CR_ACCESS = 28
    DR_ACCESS = 29
    IO_INSTRUCTION = 30
    RDMSR = 31
    WRMSR = 32
    INVALID_GUEST_STATE = 33
    MSR_LOADING_FAILED = 34
    MWAIT = 36
    MONITOR_TRAP_FLAG = 37
    MONITOR = 39
    PAUSE = 40
    MACHINE_CHECK_AT_ENTRY = 41
    TPR_BELOW_THRESHOLD = 43
    APIC_ACCESS = 44
    VIRTUALIZED_EOI = 45
    GDTR_IDTR_ACCESS = 46
    LDTR_TR_ACCESS = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER = 52
    INVVPID = 53
    WBINVD = 54
    XSETBV = 55
    APIC_WRITE = 56
    RDRAND = 57
    INVPCID = 58
    VMFUNC = 59
    ENCLS = 60
    RDSEED = 61
    PML_FULL = 62
    XSAVES = 63
    XRSTORS = 64
    PCONFIG = 65
    SUB_PAGE_PERMISSION = 66
    UMWAIT = 67
    TPAUSE = 68
    LOADIWKEY = 69
    ENCLV = 70
    ENQCMD_PASID_TRANSLATION = 72
    ENQCMDS_PASID_TRANSLATION = 73
    BUS_LOCK = 74
    INSTRUCTION_TIMEOUT = 75
    SEAMCALL = 76
    TDCALL = 77
    RDMSRLIST = 78
    WRMSRLIST = 79


def reason_name(raw: int) -> str:
    """Name an exit-reason field, with a word when VM entry failed; an unassigned reason keeps its number."""
    number = raw & BASIC_REASON
    try:
        name = ExitReason(number).name
    except ValueError:
        name = f"REASON_{number}"
    return f"{name} (entry failed)" if raw & ENTRY_FAILURE else name
