"""Control registers in a control structure: the bits that exist and the combinations that cannot be.

Sources: Intel SDM Vol. 3A, "Control Registers", "Extended Feature Enable Register", Vol. 3C, "Checks on Guest
Control Registers, Debug Registers, and MSRs"; AMD APM Vol. 2, "Canonicalization and Consistency Checks".
"""

from __future__ import annotations

from typing import Final

from volatility3_ept.spec.bits import bit, field

CR0_PE: Final = bit(0)
CR0_ET: Final = bit(4)
CR0_NE: Final = bit(5)
CR0_NW: Final = bit(29)
CR0_CD: Final = bit(30)
CR0_PG: Final = bit(31)
CR0_RESERVED: Final = field(63, 32) | field(28, 19) | bit(17) | field(15, 6)
#: Bits that VMX operation fixes to one in the host (IA32_VMX_CR0_FIXED0 of every processor seen).
CR0_VMX_FIXED: Final = CR0_PE | CR0_NE | CR0_PG

CR4_PAE: Final = bit(5)
CR4_LA57: Final = bit(12)
CR4_VMXE: Final = bit(13)
#: Bits that no processor defines. CET (23), PKS (24), UINTR (25), LASS (27), LAM (28) and FRED (32) are
#: defined.
CR4_RESERVED: Final = field(63, 33) | field(31, 29) | bit(26) | bit(15)

EFER_LME: Final = bit(8)
EFER_LMA: Final = bit(10)
EFER_SVME: Final = bit(12)
EFER_RESERVED: Final = field(63, 22) | bit(19) | bit(16) | bit(9) | field(7, 1)

RFLAGS_ONE: Final = bit(1)
RFLAGS_RESERVED: Final = field(63, 22) | bit(15) | bit(5) | bit(3)


def cr0_faults(value: int) -> tuple[str, ...]:
    """Say what no CR0 can hold; empty when all is well."""
    return _said(
        (value & CR0_RESERVED, "reserved bits"),
        (value & CR0_PG and not value & CR0_PE, "PG without PE"),
        (value & CR0_NW and not value & CR0_CD, "NW without CD"),
    )


def cr4_faults(value: int) -> tuple[str, ...]:
    """Say what no CR4 can hold; empty when all is well."""
    return _said((value & CR4_RESERVED, "reserved bits"))


def efer_faults(value: int) -> tuple[str, ...]:
    """Say what no EFER can hold; empty when all is well."""
    return _said(
        (value & EFER_RESERVED, "reserved bits"),
        (value & EFER_LMA and not value & EFER_LME, "LMA without LME"),
    )


def rflags_faults(value: int) -> tuple[str, ...]:
    """Say what no RFLAGS can hold; empty when all is well."""
    return _said((value & RFLAGS_RESERVED, "reserved bits"), (not value & RFLAGS_ONE, "bit 1 clear"))


def _said(*faults: tuple[int | bool, str]) -> tuple[str, ...]:
    return tuple(text for wrong, text in faults if wrong)
