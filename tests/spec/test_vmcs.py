from __future__ import annotations

import pytest

from volatility3_ept.spec import vmcs, vmcs_exits, vmcs_fields
from volatility3_ept.spec.vmcs import AccessRights, AccessRightsFormat
from volatility3_ept.spec.vmcs_fields import FieldType, Width


@pytest.mark.parametrize(
    ("name", "encoding", "size_bytes"),
    [
        ("VPID", 0x0000, 2),
        ("GUEST_ES_SELECTOR", 0x0800, 2),
        ("GUEST_TR_SELECTOR", 0x080E, 2),
        ("GUEST_INTERRUPT_STATUS", 0x0810, 2),
        ("HOST_TR_SELECTOR", 0x0C0C, 2),
        ("IO_BITMAP_A", 0x2000, 8),
        ("MSR_BITMAP", 0x2004, 8),
        ("EPTP", 0x201A, 8),
        ("EPTP_LIST_ADDR", 0x2024, 8),
        ("SHARED_EPTP", 0x203C, 8),
        ("IA32_SPEC_CTRL_MASK", 0x204A, 8),
        ("GUEST_PHYSICAL_ADDRESS", 0x2400, 8),
        ("VMCS_LINK_POINTER", 0x2800, 8),
        ("GUEST_PDPTE3", 0x2810, 8),
        ("HOST_IA32_EFER", 0x2C02, 8),
        ("PIN_BASED_EXEC_CONTROLS", 0x4000, 4),
        ("SECONDARY_PROC_EXEC_CONTROLS", 0x401E, 4),
        ("EXIT_REASON", 0x4402, 4),
        ("GUEST_ACTIVITY_STATE", 0x4826, 4),
        ("VMX_PREEMPTION_TIMER_VALUE", 0x482E, 4),
        ("HOST_IA32_SYSENTER_CS", 0x4C00, 4),
        ("CR3_TARGET_VALUE3", 0x600E, 8),
        ("EXIT_QUALIFICATION", 0x6400, 8),
        ("GUEST_CR3", 0x6802, 8),
        ("GUEST_RIP", 0x681E, 8),
        ("HOST_CR4", 0x6C04, 8),
        ("HOST_RIP", 0x6C16, 8),
    ],
)
def test_encodings_of_the_manual(name: str, encoding: int, size_bytes: int) -> None:
    field = vmcs_fields.BY_NAME[name]
    assert (field.encoding, field.width.size_bytes) == (encoding, size_bytes)
    assert vmcs_fields.BY_ENCODING[encoding] is field


def test_every_encoding_decodes_to_its_own_parts() -> None:
    assert len(vmcs_fields.FIELDS) == len(vmcs_fields.BY_NAME) == len(vmcs_fields.BY_ENCODING) == 181
    for field in vmcs_fields.FIELDS:
        parts = vmcs_fields.decode_encoding(field.encoding)
        assert (parts.width, parts.type, parts.index, parts.is_high) == (field.width, field.type, field.index, False)


def test_the_high_half_of_a_64_bit_field() -> None:
    parts = vmcs_fields.decode_encoding(0x201B)
    assert (parts.width, parts.type, parts.index, parts.is_high) == (Width.BITS_64, FieldType.CONTROL, 0xD, True)


@pytest.mark.parametrize("encoding", [0x1000, 0x8000, 0x1_0000, 0x4001, 0x6C01, -1])
def test_reserved_bits_of_an_encoding_are_refused(encoding: int) -> None:
    with pytest.raises(ValueError, match=r"encoding|high half"):
        vmcs_fields.decode_encoding(encoding)


@pytest.mark.parametrize(
    ("form", "stored", "rights"),
    [
        (AccessRightsFormat.PLAIN32, 0x0000_A09B, 0xA09B),
        (AccessRightsFormat.PLAIN32, 0x0001_0000, 0x1_0000),
        (AccessRightsFormat.ROTATE32, 0x00A0_9B00, 0xA09B),  # CS of a guest in a Bochs capture
        (AccessRightsFormat.ROTATE32, 0x0000_8B00, 0x8B),
        (AccessRightsFormat.ROTATE32, 0x0100_0000, 0x1_0000),
        (AccessRightsFormat.ROTATE32, 0x0000_009B, 0x9B00_0000),
        (AccessRightsFormat.PACK16, 0xA09B, 0xA09B),
        (AccessRightsFormat.PACK16, 0x0800, 0x1_0000),  # the unusable bit lives in bit 11
        (AccessRightsFormat.PACK16, 0x0F8B, 0x1_008B),
    ],
)
def test_stored_access_rights(form: AccessRightsFormat, stored: int, rights: int) -> None:
    assert form.unpack(stored) == rights


def test_fields_of_access_rights() -> None:
    code = AccessRights(0xA0FB)
    assert (code.type, code.dpl, code.is_code_or_data, code.is_present, code.is_long) == (0xB, 3, True, True, True)
    assert not code.is_unusable and not code.has_reserved
    assert AccessRights(0x1_0000).is_unusable
    assert AccessRights(0x100).has_reserved and AccessRights(0x2_0000).has_reserved


@pytest.mark.parametrize(
    ("field", "least"),
    [
        ("PIN_BASED_EXEC_CONTROLS", 0x16),
        ("PROC_BASED_EXEC_CONTROLS", 0x0400_6172),
        ("VM_EXIT_CONTROLS", 0x0003_6DFB),
        ("VM_ENTRY_CONTROLS", 0x0000_11FB),
    ],
)
def test_the_least_controls_that_a_processor_accepts(field: str, least: int) -> None:
    rule = vmcs.CONTROL_RULES[field]
    assert rule.holds(least)
    for number in range(32):
        if least >> number & 1:
            assert not rule.holds(least & ~(1 << number)), f"bit {number} must be one"


@pytest.mark.parametrize("field", ["PIN_BASED_EXEC_CONTROLS", "PROC_BASED_EXEC_CONTROLS", "VM_ENTRY_CONTROLS"])
def test_all_ones_are_not_controls(field: str) -> None:
    assert not vmcs.CONTROL_RULES[field].holds(0xFFFF_FFFF)


@pytest.mark.parametrize("field", list(vmcs.CONTROL_RULES))
def test_named_controls_and_fixed_bits_do_not_contradict(field: str) -> None:
    rule = vmcs.CONTROL_RULES[field]
    for flag in vmcs.CONTROL_FLAGS[field]:
        assert not flag & rule.must_be_zero, flag
        assert rule.holds(rule.must_be_one | flag)


def test_control_names() -> None:
    assert vmcs.control_names("SECONDARY_PROC_EXEC_CONTROLS", 0xA2) == (
        "ENABLE_EPT",
        "ENABLE_VPID",
        "UNRESTRICTED_GUEST",
    )


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (0, "EXCEPTION_OR_NMI"),
        (12, "HLT"),
        (48, "EPT_VIOLATION"),
        (49, "EPT_MISCONFIGURATION"),
        (0x8000_0021, "INVALID_GUEST_STATE (entry failed)"),
        (35, "REASON_35"),
    ],
)
def test_exit_reasons(raw: int, name: str) -> None:
    assert vmcs_exits.reason_name(raw) == name
