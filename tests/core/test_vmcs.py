from __future__ import annotations

import struct

import numpy as np
import pytest
from builders import control, recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volatility3_ept.core import vmcs
from volatility3_ept.core.control import ControlStructure, Criterion, Verdict
from volatility3_ept.core.layouts import load_layouts

LAYOUTS = {
    "haswell": "intel_haswell",
    "nehalem": "intel_nehalem",
    "westmere": "intel_westmere",
    "kvm": "kvm_vmcs12",
    "kvm_3x": "kvm_vmcs12_3x",
    "bochs_2_7": "bochs_2_7",
    "bochs_3_0": "bochs_3_0",
    "bochs_2026": "bochs_2026",
    "xen": "xen_vvmcs",
    "xen_4_2": "xen_vvmcs",
}
HPA = 0x7000


def words(*pages: bytes) -> np.ndarray:
    return np.frombuffer(b"".join(pages), dtype="<u8").reshape(-1, 512)


def found(page: bytes) -> bool:
    return bool(vmcs.candidates(words(page))[0])


def examined(page: bytes, **limits: object) -> ControlStructure:
    structure = vmcs.examine(page, HPA, **limits)  # type: ignore[arg-type]
    assert structure is not None
    return structure


def criterion(structure: ControlStructure, name: str) -> Criterion:
    return next(item for item in structure.evidence if item.name == name)


def is_machine(page: bytes) -> bool:
    structure = vmcs.examine(page, HPA)
    return found(page) and structure is not None and structure.verdict is not Verdict.REJECTED


@pytest.mark.parametrize("built", sorted(LAYOUTS))
def test_a_vmcs_of_each_layout_is_found_and_decoded(built: str) -> None:
    page = control.vmcs(built, eptp=0x1A_B05E)
    structure = examined(page)
    assert found(page)
    assert (structure.kind, structure.layout, structure.hpa) == ("VMCS", LAYOUTS[built], HPA)
    assert structure.verdict is Verdict.LIKELY, structure.explain()
    assert not structure.failed, structure.explain()
    assert (structure.root_raw, structure.root_hpa, structure.levels) == (0x1A_B05E, 0x1A_B000, 4)
    assert structure.vpid_or_asid == 3
    assert structure.guest_cr3 == 0x0261_0001
    assert (structure.host_cr3, structure.host_rip) == (0x0123_4003, 0xFFFF_FFFF_C065_02DE)
    assert structure.fields.get("GUEST_CS_ACCESS_RIGHTS", 0xA09B) == 0xA09B


def test_the_vmcs_of_a_running_kvm() -> None:
    page = recorded.page(recorded.KVM_VMCS)
    structure = examined(page, physical_top=256 << 20)
    assert found(page)
    assert (structure.layout, structure.revision_id) == ("bochs_3_0", 0x2B)
    assert structure.verdict is Verdict.LIKELY and not structure.failed, structure.explain()
    assert (structure.root_raw, structure.levels, structure.vpid_or_asid) == (0xFAD_F05E, 4, 1)
    fields = structure.fields
    assert (fields["GUEST_CR0"], fields["GUEST_CR3"]) == (0x8005_0033, 0x1E3_E005)
    assert fields["GUEST_RSP"] == 0xFFFF_FFFF_8D40_3E90
    assert fields["GUEST_GDTR_BASE"] == 0xFFFF_FE00_0000_1000
    assert fields["GUEST_CS_ACCESS_RIGHTS"] == 0xA09B
    # What the guest sees of CR4 is the read shadow where the mask says so: it has no VMXE, the real register has.
    mask = fields["CR4_GUEST_HOST_MASK"]
    assert fields["CR4_READ_SHADOW"] & mask | fields["GUEST_CR4"] & ~mask == 0x37_0EB0
    # KVM does not load EFER through this VMCS, and the field holds an old value (the guest's is 0xd01).
    assert fields["GUEST_IA32_EFER"] == 0x500 and criterion(structure, "guest EFER").held is None


@pytest.mark.parametrize("name", ["acrn_vmcs12", "hyperv_evmcs", "virtualbox_vvmcs", "vmware_nested"])
def test_formats_that_the_builder_does_not_write(name: str) -> None:
    """Two pairs share an identifier (VMware and Hyper-V, VirtualBox and Xen 4.2); content tells them apart."""
    layout = next(layout for layout in load_layouts() if layout.name == name)
    page = bytearray(struct.pack("<I", max(layout.revision_ids)).ljust(4096, b"\0"))
    for field, value in control.DEFAULTS.items():
        place = layout.encodings.get(control.ENCODINGS[field])
        if place is not None:
            page[place.offset : place.offset + place.size] = value.to_bytes(place.size, "little")
    structure = examined(bytes(page))
    assert found(bytes(page))
    assert (structure.layout, structure.verdict, structure.root_hpa) == (name, Verdict.LIKELY, 0x10_0000)


def test_penryn_has_no_ept_and_so_no_root() -> None:
    structure = examined(control.vmcs("penryn"))
    assert (structure.layout, structure.verdict) == ("intel_penryn", Verdict.LIKELY)
    assert (structure.root_hpa, structure.levels, structure.has_root) == (0, 0, False)


@pytest.mark.parametrize("revision", [0x02, 0x13, 0x15, 0x3F])
@pytest.mark.parametrize("built", ["haswell", "nehalem", "westmere"])
def test_an_unknown_identifier_does_not_hide_a_known_layout(built: str, revision: int) -> None:
    page = control.vmcs(built, revision=revision)
    assert found(page)
    assert (examined(page).layout, examined(page).verdict) == (LAYOUTS[built], Verdict.LIKELY)


@pytest.mark.parametrize("revision", [0x04, 0x10, 0x12, 0x99])
def test_xen_shows_the_identifier_of_the_processor_below(revision: int) -> None:
    page = control.vmcs("xen", revision=revision)
    assert found(page)
    assert (examined(page).layout, examined(page).verdict) == ("xen_vvmcs", Verdict.LIKELY)


@pytest.mark.parametrize("built", ["bochs_2_7", "bochs_3_0", "bochs_2026"])
def test_bochs_models_of_newer_processors_report_4(built: str) -> None:
    page = control.vmcs(built, revision=4)
    assert found(page) and examined(page).layout == built


@pytest.mark.parametrize(
    ("eptp", "levels"),
    [
        (0x10_001E, 4),
        (0x10_005E, 4),  # accessed and dirty flags, as KVM sets it: one peer refuses bits 11:6
        (0x10_00DE, 4),  # supervisor shadow stacks
        (0x10_0026, 5),
        (0x10_0066, 5),
        (0x10_0018, 4),  # uncached
        (0xF_FFFF_FFFF_F05E, 4),  # a MAXPHYADDR of 52: one peer stops at 40
    ],
)
def test_every_shape_of_an_eptp(eptp: int, levels: int) -> None:
    page = control.vmcs(eptp=eptp)
    structure = examined(page)
    assert found(page)
    assert (structure.verdict, structure.levels) == (Verdict.LIKELY, levels)
    assert structure.root_hpa == eptp & 0xF_FFFF_FFFF_F000
    assert criterion(structure, "EPTP").held


@pytest.mark.parametrize("eptp", [0, 0x10_005D, 0x10_0056, 0x10_015E, 0x8010_0000_0000_005E, 0x5E])
def test_an_impossible_eptp_costs_the_verdict(eptp: int) -> None:
    structure = examined(control.vmcs(eptp=eptp))
    assert structure.verdict is Verdict.POSSIBLE
    assert criterion(structure, "EPTP").held is False


def test_maxphyaddr_bounds_the_eptp() -> None:
    page = control.vmcs(eptp=1 << 45 | 0x5E)
    assert criterion(examined(page, maxphyaddr=46), "EPTP").held
    assert criterion(examined(page, maxphyaddr=45), "EPTP").held is False


@pytest.mark.parametrize(
    "extra", [1 << 12, 1 << 23, 1 << 24, 1 << 25, 1 << 32], ids=["LA57", "CET", "PKS", "UINTR", "FRED"]
)
def test_guests_and_hosts_with_newer_cr4_bits(extra: int) -> None:
    """Stock vmscan reports none of them: its mask of reserved CR4 bits is older than they are."""
    page = control.vmcs(guest_cr4=0x37_26B0 | extra, host_cr4=0x37_26F0 | extra)
    assert found(page)
    assert not examined(page).failed


def test_a_57_bit_host_address_is_canonical_only_under_la57() -> None:
    rip = 0xFF12_3456_7890_1234
    assert criterion(examined(control.vmcs(host_rip=rip, host_cr4=0x37_36F0)), "host RIP").held
    assert criterion(examined(control.vmcs(host_rip=rip)), "host RIP").held is False


def test_a_vmcs_with_a_shadow_is_found() -> None:
    """VMCS shadowing puts a page address into the link pointer; peers want it to be ~0."""
    page = control.vmcs(link=0x0345_6000)
    assert found(page)
    assert "0x3456000" in criterion(examined(page), "link pointer").detail
    assert examined(page).verdict is Verdict.LIKELY


def test_a_shadow_vmcs_is_told_by_bit_31() -> None:
    page = control.vmcs(revision=0x8000_0012)
    structure = examined(page)
    assert found(page)
    assert (structure.is_shadow, structure.revision_id) == (True, 0x12)
    assert not examined(control.vmcs()).is_shadow


@pytest.mark.parametrize(("built", "offset"), [("kvm", 0x78), ("kvm_3x", 0x70)])
def test_the_two_forms_of_vmcs12_share_an_identifier(built: str, offset: int) -> None:
    page = control.vmcs(built, eptp=0x77_705E)
    assert struct.unpack_from("<Q", page, offset) == (0x77_705E,)
    assert examined(page).root_hpa == 0x77_7000


@pytest.mark.parametrize("built", sorted(LAYOUTS))
def test_a_vmcs_that_never_ran_is_found(built: str) -> None:
    page = control.never_launched(built)
    structure = examined(page)
    assert found(page) and structure.verdict is Verdict.LIKELY
    assert structure.layout == LAYOUTS[built]
    assert criterion(structure, "guest RFLAGS").held is None


@pytest.mark.parametrize("stale", [("link",), ("pin", "proc"), ("host_cr3", "host_rip", "host_cr0")], ids="-".join)
def test_some_stale_fields_do_not_hide_a_vmcs(stale: tuple[str, ...]) -> None:
    page = control.vmcs(**dict.fromkeys(stale, 0))
    structure = examined(page)
    assert found(page) and structure.verdict is not Verdict.REJECTED
    assert structure.failed and structure.root_hpa == 0x10_0000


def test_the_efer_of_a_guest_is_judged_only_when_entry_loads_it() -> None:
    """KVM leaves an old value in the field on processors where it switches EFER otherwise."""
    loads = control.vmcs(guest_efer=0x100)
    assert criterion(examined(loads), "guest EFER").held is False
    keeps = control.vmcs(guest_efer=0x100, entry=0x53FF)
    assert criterion(examined(keeps), "guest EFER").held is None


def test_a_vmcs_without_ept_says_so() -> None:
    structure = examined(control.vmcs(proc2=0x0012_14ED))
    assert criterion(structure, "EPT enabled").held is False


@pytest.mark.parametrize(("abort", "held"), [(0, True), (1, True), (6, True), (0xD00, False)])
def test_abort_indicators(abort: int, held: bool) -> None:
    page = control.vmcs(abort=abort)
    assert found(page)
    assert criterion(examined(page), "abort indicator").held is held


def test_the_root_is_looked_up() -> None:
    page = control.vmcs(eptp=0x20_005E)
    assert criterion(examined(page), "EPT root").held is None
    assert criterion(examined(page, present=lambda hpa: hpa == 0x20_0000), "EPT root").held is True
    assert criterion(examined(page, present=lambda hpa: False), "EPT root").held is False
    assert criterion(examined(page, physical_top=0x20_0000), "EPT root").held is False


def test_the_root_of_a_nested_format_may_lie_in_another_address_space() -> None:
    structure = examined(control.vmcs("kvm", eptp=0x20_005E), physical_top=0x10_0000)
    assert criterion(structure, "EPT root").held is None
    assert structure.verdict is Verdict.LIKELY


@pytest.mark.parametrize(
    "page",
    [
        bytes(4096),
        b"\xff" * 4096,
        control.vmxon(0x12),
        control.vmxon(0x2B),
        control.vmxon(0x11E57ED0),
        control.vmxon(0x04),
        control.vmcb(),
        control.sev_es_vmcb(),
        control.host_save_area(),
        struct.pack("<Q", 4) * 512,
        struct.pack("<Q", 0x10_0000_0000_005E) * 512,
        struct.pack("<Q", 0x1000_0007) * 512,
        struct.pack("<512Q", *range(1, 513)),
        control.vmcs()[8:] + bytes(8),
    ],
    ids=[
        "zero",
        "ones",
        "vmxon-haswell",
        "vmxon-bochs",
        "vmxon-kvm",
        "vmxon-skylake",
        "vmcb",
        "sev-es",
        "hsave",
        "four",
        "eptps",
        "ptes",
        "count",
        "shifted",
    ],
)
def test_what_is_no_vmcs(page: bytes) -> None:
    assert not found(page)
    assert not is_machine(page)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    revision=st.sampled_from([0x2, 0x4, 0xE, 0xF, 0x10, 0x12, 0x2B, 0x1, 0x40000001, 0x11E57ED0, 0x15407E12]),
)
def test_random_pages_are_not_machines(seed: int, revision: int) -> None:
    page = bytearray(np.random.default_rng(seed).bytes(4096))
    struct.pack_into("<II", page, 0, revision, 0)
    assert not is_machine(bytes(page))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sparse=st.dictionaries(st.integers(0, 511), st.integers(0, 2**64 - 1), max_size=40))
def test_no_page_makes_the_account_fail(sparse: dict[int, int]) -> None:
    page = bytearray(control.vmcs())
    for index, value in sparse.items():
        struct.pack_into("<Q", page, index * 8, value)
    structure = vmcs.examine(bytes(page), HPA)
    assert structure is None or 0.0 <= structure.score <= 1.0


def test_a_block_of_pages_is_judged_page_by_page() -> None:
    pages = [bytes(4096), control.vmcs(), control.vmxon(), control.vmcs("kvm"), control.vmcb(), control.vmcs("xen")]
    assert vmcs.candidates(words(*pages)).tolist() == [False, True, False, True, False, True]


def test_an_unaligned_view_gives_the_same_answer() -> None:
    raw = b"\0\0\0" + control.vmcs() + bytes(4096)
    view = np.frombuffer(raw, dtype="<u8", offset=3, count=1024).reshape(-1, 512)
    assert vmcs.candidates(view).tolist() == [True, False]
    assert examined(view[0].tobytes()) == vmcs.examine(view[0], HPA)


def test_no_pages_at_all() -> None:
    assert vmcs.candidates(np.zeros((0, 512), dtype="<u8")).tolist() == []


def test_the_account_reads_as_lines() -> None:
    text = examined(control.vmcs(link=0x123)).explain()
    assert text.splitlines()[0].startswith("VMCS at 0x7000, layout intel_haswell: likely, score 0.9")
    assert "  - link pointer: 0x123" in text.splitlines()


CONTROLS = ("pin", "proc", "exit", "entry")


@pytest.mark.parametrize("revision", [0x12, 0x8000_0012])
def test_with_a_known_identifier_half_of_the_anchors_suffice(revision: int) -> None:
    stale = dict.fromkeys(CONTROLS, 0)
    assert found(control.vmcs(revision=revision, link=0x0345_6000, **stale))
    assert not found(control.vmcs(revision=revision, link=0, **stale))
    assert not found(control.vmcs(revision=revision, link=1 << 60, **stale))


@pytest.mark.parametrize("eptp", [0x10_001E, 0x10_0018, 0x10_0066, 0x10_0020])
def test_without_one_two_may_be_wrong_but_never_the_eptp(eptp: int) -> None:
    assert found(control.vmcs(revision=0x77, eptp=eptp, pin=0, link=0))
    assert not found(control.vmcs(revision=0x77, eptp=eptp, pin=0, link=0, host_cr0=0))
    assert not found(control.vmcs(revision=0x77, eptp=eptp | 0x800))


def test_a_layout_with_few_anchors_still_needs_three() -> None:
    page = bytearray(struct.pack("<I", 1).ljust(4096, b"\0"))
    struct.pack_into("<Q", page, 0x70, 0x10_005E)
    struct.pack_into("<Q", page, 0x2E8, 2**64 - 1)
    assert not found(bytes(page))
    struct.pack_into("<Q", page, 0xA18, 0x8005_0033)
    assert found(bytes(page))


def test_a_page_with_little_of_a_vmcs_gets_no_account() -> None:
    nothing = dict.fromkeys(control.DEFAULTS, 0)
    page = control.vmcs(**{**nothing, "eptp": 0x10_005E, "link": 2**64 - 1, "pin": 0x16})
    assert vmcs.examine(page, HPA) is None


@pytest.mark.parametrize("values", [{"host_cs": 0x13}, {"host_cs": 0}, {"host_tr": 0x44}, {"host_ss": 0x2B}], ids=str)
def test_host_selectors_are_of_ring_0_and_the_gdt(values: dict[str, int]) -> None:
    assert criterion(examined(control.vmcs(**values)), "host selectors").held is False
