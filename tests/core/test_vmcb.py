from __future__ import annotations

import struct

import numpy as np
import pytest
from builders import control, recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volatility3_ept.core import vmcb
from volatility3_ept.core.control import ControlStructure, Criterion, Verdict

HPA = 0xFA1_4000


def words(*pages: bytes) -> np.ndarray:
    return np.frombuffer(b"".join(pages), dtype="<u8").reshape(-1, 512)


def found(page: bytes) -> bool:
    return bool(vmcb.candidates(words(page))[0])


def examined(page: bytes, **limits: object) -> ControlStructure:
    structure = vmcb.examine(page, HPA, **limits)  # type: ignore[arg-type]
    assert structure is not None
    return structure


def criterion(structure: ControlStructure, name: str) -> Criterion:
    return next(item for item in structure.evidence if item.name == name)


def test_a_vmcb_is_found_and_decoded() -> None:
    structure = examined(control.vmcb())
    assert found(control.vmcb())
    assert (structure.kind, structure.hpa, structure.revision_id) == ("VMCB", HPA, None)
    assert structure.verdict is Verdict.LIKELY and not structure.failed, structure.explain()
    assert (structure.root_raw, structure.root_hpa, structure.levels) == (0x2A1_7000, 0x2A1_7000, 0)
    assert (structure.vpid_or_asid, structure.guest_cr3) == (1, 0x1E3_A000)
    assert (structure.host_cr3, structure.host_rip) == (None, None)


def test_the_vmcb_of_a_running_kvm() -> None:
    page = recorded.page(recorded.KVM_VMCB)
    structure = examined(page, physical_top=256 << 20)
    assert found(page)
    assert structure.verdict is Verdict.LIKELY and not structure.failed, structure.explain()
    assert (structure.root_hpa, structure.vpid_or_asid) == (0x2A1_7000, 1)
    fields = structure.fields
    assert (fields["CR0"], fields["CR3"], fields["CR4"]) == (0x8005_0033, 0x1E3_A000, 0x35_06B0)
    # SVME is the hypervisor's own addition to the guest's EFER.
    assert fields["EFER"] == 0xD01 | 1 << 12
    assert (fields["RSP"], fields["GS_BASE"]) == (0xFFFF_FFFF_9C20_3E90, 0xFFFF_8A2B_0000_0000)


@pytest.mark.parametrize(
    "values",
    [
        {"tlb_control": 1},
        {"tlb_control": 3},
        {"tlb_control": 7},
        {"asid": 0x7FFF},
        {"cr4": 0x35_16B0},  # LA57
        {"cr4": 0xB5_06B0},  # CET
        {"cpl": 3, "cs_attributes": 0xAFB},
        {"efer": 0x1000, "cr0": 0x6000_0010, "cr4": 0, "cs_attributes": 0x9B, "rflags": 2},  # after reset
        {"efer": 0x1500, "cr0": 0x8001_0033, "cr4": 0x20, "cs_attributes": 0xC9B},  # compatibility mode
        {"event_injection": 0x8000_030E},
        {"exit_code": 0x400},
        {"nested": 0b1001},  # guest-mode execute trap
        {"efer": 0x20_1D01},  # automatic IBRS
    ],
    ids=str,
)
def test_guests_of_every_sort_are_found(values: dict[str, int]) -> None:
    page = control.vmcb(**values)
    assert found(page)
    assert not examined(page).failed, examined(page).explain()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"ncr3": 0x2A1_7123}, "nCR3"),
        ({"ncr3": 0}, "nCR3"),
        ({"tlb_control": 2}, "TLB control"),
        ({"cr0": 0xA005_0033}, "CR0 and CR4"),
        ({"cr4": 1 << 40}, "CR0 and CR4"),
        ({"dr6": 1 << 32}, "DR6 and DR7"),
        ({"rflags": 0}, "RFLAGS"),
        ({"cpl": 4}, "CPL"),
        ({"cs_attributes": 0xEFFF}, "segments"),
        ({"cs_attributes": 0xE9B}, "long mode"),
        ({"efer": 0xD01}, "EFER"),
        ({"event_injection": 0x8000_0700}, "event injection"),
        ({"exit_code": 0x1234}, "exit code"),
        ({"nested": 0}, "nested paging"),
    ],
    ids=str,
)
def test_what_vmrun_or_reason_refuses_is_named(values: dict[str, int], name: str) -> None:
    structure = examined(control.vmcb(**values))
    assert name in [item.name for item in structure.failed]


@pytest.mark.parametrize("values", [{"asid": 0}, {"intercept_misc2": 0x6E7E}], ids=str)
def test_a_vmcb_that_vmrun_would_refuse_is_not_likely(values: dict[str, int]) -> None:
    page = control.vmcb(**values)
    assert not found(page)
    assert examined(page).verdict is Verdict.POSSIBLE


def test_a_guest_with_shadow_paging_has_no_root() -> None:
    structure = examined(control.vmcb(nested=0))
    assert (structure.root_raw, structure.root_hpa, structure.has_root) == (0, 0, False)


def test_a_guest_with_encrypted_state_is_judged_by_its_control_area() -> None:
    page = control.sev_es_vmcb()
    structure = examined(page)
    assert found(page) and structure.verdict is Verdict.LIKELY, structure.explain()
    assert criterion(structure, "VMSA").held
    assert criterion(structure, "EFER").held is None
    assert structure.root_hpa == 0x2A1_7000


def test_an_encrypted_guest_needs_its_save_area() -> None:
    assert not found(control.sev_es_vmcb(vmsa=0))
    assert criterion(examined(control.sev_es_vmcb(vmsa=0)), "VMSA").held is False


@pytest.mark.parametrize("number", [47, 51])
def test_the_memory_encryption_bit_of_the_host_is_not_part_of_the_root(number: int) -> None:
    page = control.vmcb(ncr3=1 << number | 0x2A1_7000)
    structure = examined(page, physical_top=1 << 32)
    assert found(page)
    assert (structure.root_raw, structure.root_hpa) == (1 << number | 0x2A1_7000, 0x2A1_7000)


def test_the_root_is_looked_up() -> None:
    page = control.vmcb()
    assert criterion(examined(page), "NPT root").held is None
    assert criterion(examined(page, present=lambda hpa: hpa == 0x2A1_7000), "NPT root").held is True
    assert criterion(examined(page, present=lambda hpa: False), "NPT root").held is False
    assert criterion(examined(page, physical_top=0x10_0000), "NPT root").held is False


def test_a_vmcb_of_a_guest_hypervisor_is_kept_though_its_root_lies_elsewhere() -> None:
    """In the host's memory its nCR3 means nothing; only the guest's own space can tell."""
    structure = examined(control.vmcb(ncr3=0x8000_0000), physical_top=0x1000_0000)
    assert structure.verdict is Verdict.LIKELY
    assert [item.name for item in structure.failed] == ["NPT root"]


@pytest.mark.parametrize(
    "page",
    [
        bytes(4096),
        b"\xff" * 4096,
        control.host_save_area(),
        control.xen_host_vmcb(),
        control.vmcs(),
        control.vmcs("xen"),
        control.vmxon(),
        bytes(16) + control.vmcb()[:-16],
        control.vmcb()[0x400:] + control.vmcb()[:0x400],
        struct.pack("<Q", 1) * 512,
        struct.pack("<512Q", *range(512)),
    ],
    ids=["zero", "ones", "hsave", "xen-host", "vmcs", "xen-vvmcs", "vmxon", "copy-off-page", "swapped", "one", "count"],
)
def test_what_is_no_vmcb(page: bytes) -> None:
    assert not found(page)
    structure = vmcb.examine(page, HPA)
    assert structure is None or structure.verdict is not Verdict.LIKELY


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1))
def test_random_pages_are_not_vmcbs(seed: int) -> None:
    assert not found(np.random.default_rng(seed).bytes(4096))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sparse=st.dictionaries(st.integers(0, 511), st.integers(0, 2**64 - 1), max_size=40))
def test_no_page_makes_the_account_fail(sparse: dict[int, int]) -> None:
    page = bytearray(control.vmcb())
    for index, value in sparse.items():
        struct.pack_into("<Q", page, index * 8, value)
    structure = vmcb.examine(bytes(page), HPA)
    assert structure is None or 0.0 <= structure.score <= 1.0


def test_a_block_of_pages_is_judged_page_by_page() -> None:
    pages = [bytes(4096), control.vmcb(), control.host_save_area(), control.sev_es_vmcb(), control.vmcs()]
    assert vmcb.candidates(words(*pages)).tolist() == [False, True, False, True, False]


def test_an_unaligned_view_gives_the_same_answer() -> None:
    raw = b"\0" * 5 + control.vmcb() + bytes(4096)
    view = np.frombuffer(raw, dtype="<u8", offset=5, count=1024).reshape(-1, 512)
    assert vmcb.candidates(view).tolist() == [True, False]
    assert examined(view[0].tobytes()) == vmcb.examine(view[0], HPA)


@pytest.mark.parametrize("offset", [0x18, 0x20, 0x2F, 0x37, 0x38, 0x3B, 0x5E, 0x5F])
def test_reserved_bytes_keep_a_page_out(offset: int) -> None:
    page = bytearray(control.vmcb())
    page[offset] = 1
    assert not found(bytes(page))


@pytest.mark.parametrize(
    "values", [{"tlb_control": 2}, {"tlb_control": 8}, {"asid": 0x1_0001}, {"efer": 0xD01}], ids=str
)
def test_values_that_vmrun_never_sees_keep_a_page_out(values: dict[str, int]) -> None:
    assert not found(control.vmcb(**values))


def test_erap_control_is_not_a_reserved_byte() -> None:
    page = bytearray(control.vmcb())
    page[0x5D] = 1
    assert found(bytes(page))
