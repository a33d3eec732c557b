from __future__ import annotations

import pytest
from builders import control

from volatility3_ept.spec import vmcb
from volatility3_ept.spec.vmcb import SegmentAttributes


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0x00, "CR0_READ"),
        (0x13, "CR3_WRITE"),
        (0x27, "DR7_READ"),
        (0x37, "DR7_WRITE"),
        (0x4E, "EXCEPTION_14"),
        (0x60, "INTR"),
        (0x72, "CPUID"),
        (0x78, "HLT"),
        (0x7C, "MSR"),
        (0x80, "VMRUN"),
        (0x81, "VMMCALL"),
        (0x90, "CR0_WRITE_TRAP"),
        (0xA5, "BUS_LOCK"),
        (0x400, "NPF"),
        (0x403, "VMGEXIT"),
        (0xFFFF_FFFF_FFFF_FFFF, "INVALID"),
        (0xFFFF_FFFF, "INVALID"),
        (0xFFFF_FFFF_FFFF_FFFE, "BUSY"),
        (0x9999, "CODE_0x9999"),
    ],
)
def test_exit_codes(code: int, name: str) -> None:
    assert vmcb.exit_name(code) == name


def test_offsets_agree_with_the_manual() -> None:
    offsets = {name: offset for name, (offset, _, _) in control.VMCB_FIELDS.items()}
    assert (offsets["asid"], offsets["tlb_control"], offsets["ncr3"]) == (vmcb.GUEST_ASID, vmcb.TLB_CONTROL, vmcb.N_CR3)
    assert (offsets["nested"], offsets["vmsa"]) == (vmcb.NP_SEV_CONTROL, vmcb.VMSA_POINTER)
    assert (offsets["cpl"], offsets["efer"], offsets["cr4"]) == (vmcb.CPL, vmcb.EFER, vmcb.CR4)
    assert (offsets["cr0"], offsets["rflags"]) == (vmcb.CR0, vmcb.RFLAGS)


def test_long_mode_code_segment() -> None:
    code = SegmentAttributes(0xA9B)
    assert (code.type, code.dpl, code.is_code_or_data, code.is_present) == (0xB, 0, True, True)
    assert code.is_long and not code.is_default_32 and not code.has_reserved
    assert SegmentAttributes(0x109B).has_reserved


def test_intercepts_by_name() -> None:
    assert vmcb.intercept_names("INTERCEPT_MISC2", 0b11) == ("VMRUN", "VMMCALL")
    assert vmcb.intercept_names("INTERCEPT_MISC1", 0x8000_0000) == ("SHUTDOWN",)
