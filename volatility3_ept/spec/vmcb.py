"""The VMCB: where its fields are, what its words mean and what VMRUN refuses.

Sources: AMD64 Architecture Programmer's Manual Vol. 2, "Secure Virtual Machine" ("Canonicalization and
Consistency Checks", "Nested Paging") and appendix "Layout of VMCB"; Linux ``arch/x86/include/asm/svm.h``; Xen
``arch/x86/include/asm/hvm/svm/vmcb.h``. The VMCB is architectural: these offsets hold on every processor. The
whole table is ``symbols/svm/amd_vmcb.json``; here are the fields that decisions are made on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from volatility3_ept.spec.bits import bit, field
from volatility3_ept.spec.segments import SegmentBits

# Control area: byte offsets in the page.
INTERCEPT_MISC2: Final = 0x10
GUEST_ASID: Final = 0x58
TLB_CONTROL: Final = 0x5C
NP_SEV_CONTROL: Final = 0x90
EVENTINJ: Final = 0xA8
N_CR3: Final = 0xB0
VMSA_POINTER: Final = 0x108
#: State save area; nothing of the guest's in one with encrypted state.
SAVE_AREA: Final = 0x400
CPL: Final = 0x4CB
EFER: Final = 0x4D0
CR4: Final = 0x548
CR0: Final = 0x558
RFLAGS: Final = 0x570

#: Byte ranges that the manual reserves (MBZ) and that no processor or known hypervisor has a use for: start,
#: end.
RESERVED_CONTROL: Final = ((0x18, 0x3C), (0x5E, 0x60), (0x148, 0x3E0))
RESERVED_SAVE: Final = ((0x4A0, 0x4CA), (0x4CC, 0x4D0), (0x580, 0x5D8))

TLB_CONTROLS: Final = {0: "nothing", 1: "flush all", 3: "flush this guest", 7: "flush this guest, non-global"}
#: ASIDs are 32 bits in the VMCB, but CPUID Fn8000_000A_EBX has reported no more than 2^15 of them.
MAX_ASID: Final = 0xFFFF


class NestedControl(IntFlag):
    """The qword at 90H."""

    NP_ENABLE = bit(0)
    SEV = bit(1)
    SEV_ES = bit(2)
    GUEST_MODE_EXECUTE_TRAP = bit(3)
    SUPERVISOR_SHADOW_STACK = bit(4)
    TRANSPARENT_ENCRYPTION = bit(5)
    READ_ONLY_GUEST_TABLES = bit(6)
    INVLPGB_ENABLE = bit(7)


#: A guest whose registers are encrypted: the three controls that this takes together.
ENCRYPTED_STATE: Final = int(NestedControl.NP_ENABLE | NestedControl.SEV | NestedControl.SEV_ES)
#: SEV_FEATURES bit 0, SNPActive, in the VMSA (3B0H), and GUEST_SEV_FEATURES of the VMCB (140H), which repeats them.
SNP_ACTIVE: Final = bit(0)


class SevFeatures(IntFlag):
    """SEV_FEATURES, 3B0H in the VMSA, and GUEST_SEV_FEATURES, 140H in the VMCB."""

    SNP_ACTIVE = SNP_ACTIVE
    VTOM = bit(1)
    REFLECT_VC = bit(2)
    RESTRICTED_INJECTION = bit(3)
    ALTERNATE_INJECTION = bit(4)
    DEBUG_SWAP = bit(5)
    SECURE_TSC = bit(9)


class Misc1(IntFlag):
    """Intercept word 3, at 0CH."""

    INTR = bit(0)
    NMI = bit(1)
    SMI = bit(2)
    INIT = bit(3)
    VINTR = bit(4)
    CR0_SEL_WRITE = bit(5)
    IDTR_READ = bit(6)
    GDTR_READ = bit(7)
    LDTR_READ = bit(8)
    TR_READ = bit(9)
    IDTR_WRITE = bit(10)
    GDTR_WRITE = bit(11)
    LDTR_WRITE = bit(12)
    TR_WRITE = bit(13)
    RDTSC = bit(14)
    RDPMC = bit(15)
    PUSHF = bit(16)
    POPF = bit(17)
    CPUID = bit(18)
    RSM = bit(19)
    IRET = bit(20)
    SWINT = bit(21)
    INVD = bit(22)
    PAUSE = bit(23)
    HLT = bit(24)
    INVLPG = bit(25)
    INVLPGA = bit(26)
    IOIO = bit(27)
    MSR = bit(28)
    TASK_SWITCH = bit(29)
    FERR_FREEZE = bit(30)
    SHUTDOWN = bit(31)


class Misc2(IntFlag):
    """Intercept word 4, at 10H. VMRUN refuses to run a guest that may itself run VMRUN."""

    VMRUN = bit(0)
    VMMCALL = bit(1)
    VMLOAD = bit(2)
    VMSAVE = bit(3)
    STGI = bit(4)
    CLGI = bit(5)
    SKINIT = bit(6)
    RDTSCP = bit(7)
    ICEBP = bit(8)
    WBINVD = bit(9)
    MONITOR = bit(10)
    MWAIT = bit(11)
    MWAIT_ARMED = bit(12)
    XSETBV = bit(13)
    RDPRU = bit(14)
    EFER_WRITE_TRAP = bit(15)


class Misc3(IntFlag):
    """Intercept word 5, at 14H."""

    INVLPGB = bit(0)
    INVLPGB_ILLEGAL = bit(1)
    INVPCID = bit(2)
    MCOMMIT = bit(3)
    TLBSYNC = bit(4)
    BUS_LOCK = bit(5)
    IDLE_HLT = bit(6)


INTERCEPTS: Final[dict[str, type[IntFlag]]] = {
    "INTERCEPT_MISC1": Misc1,
    "INTERCEPT_MISC2": Misc2,
    "INTERCEPT_MISC3": Misc3,
}


def intercept_names(word: str, value: int) -> tuple[str, ...]:
    """Name the intercepts that are on in one of the words of ``INTERCEPTS``, lowest bit first."""
    return tuple(flag.name or "" for flag in INTERCEPTS[word] if value & flag)


class _Code(IntEnum):
    """Exit codes that are not one of a numbered row (control registers, debug registers, exceptions)."""

    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MWAIT_ARMED = 0x8C
    XSETBV = 0x8D
    RDPRU = 0x8E
    EFER_WRITE_TRAP = 0x8F
    INVLPGB = 0xA0
    INVLPGB_ILLEGAL = 0xA1
    INVPCID = 0xA2
    MCOMMIT = 0xA3
    TLBSYNC = 0xA4
    BUS_LOCK = 0xA5
    IDLE_HLT = 0xA6
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_NOACCEL = 0x402
    VMGEXIT = 0x403


#: Exit codes that are negative numbers; the field is 64 bits wide, old processors wrote only 32 of them.
_NEGATIVE_CODES: Final = {-1: "INVALID", -2: "BUSY", -3: "IDLE_REQUIRED", -4: "INVALID_PMC"}
_ROWS: Final = ((0x00, "CR{}_READ"), (0x10, "CR{}_WRITE"), (0x20, "DR{}_READ"), (0x30, "DR{}_WRITE"))


def exit_name(code: int) -> str:
    """Name an EXITCODE; an unassigned code keeps its number."""
    for negative, name in _NEGATIVE_CODES.items():
        if code in (negative & field(63, 0), negative & field(31, 0)):
            return name
    for first, pattern in _ROWS:
        if first <= code < first + 16:
            return pattern.format(code - first)
    if 0x40 <= code < 0x60:
        return f"EXCEPTION_{code - 0x40}"
    if 0x90 <= code < 0xA0:
        return f"CR{code - 0x90}_WRITE_TRAP"
    return _Code(code).name if code in _Code._value2member_map_ else f"CODE_{code:#x}"


@dataclass(frozen=True)
class SegmentAttributes(SegmentBits):
    """The 12 attribute bits of a segment in the save area: descriptor bits 55:52 and 47:40 put together."""

    @property
    def is_long(self) -> bool:
        """Bit 9, L: 64-bit code."""
        return bool(self.raw & bit(9))

    @property
    def is_default_32(self) -> bool:
        """Bit 10, D/B."""
        return bool(self.raw & bit(10))

    @property
    def has_reserved(self) -> bool:
        """Tell whether bits 15:12 are set."""
        return bool(self.raw & 0xF000)
