"""Layout inference: real control structures in layouts that no table has, machines built by hand, and look-alikes."""

from __future__ import annotations

import functools
import itertools
import random
import struct
from collections import Counter

import captures
import infer_table
import numpy as np
import pytest
from builders import control, layouts, machine
from builders.kernels import HOST_KERNEL, Hypervisor
from builders.machine import KERNEL
from builders.paging import EPT_5, LEGACY, PAGE, GuestRam, HostRam, Tables
from readers import memory_of

from volatility3_ept.core import infer, infer_view, isf, limits, roots, vmcs_checks
from volatility3_ept.core import layouts as package_layouts
from volatility3_ept.core.infer import Certainty, KnownRoot
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT, Root
from volatility3_ept.spec.vmcs import AccessRightsFormat

ID = infer_table.UNKNOWN_ID
KNOWN = [name for name in layouts.known() if name not in infer_table.LEFT_OUT]
#: Fields that the tables of these two do not have: nobody has measured them, so the pages written lack them too.
THIN = ("intel_westmere", "vmware_nested", "kvm_vmcs12_3x")
CR3S = ("EPTP", "GUEST_CR3", "HOST_CR3")


def known_roots(memory: HostMemory, *eptps: int) -> list[KnownRoot]:
    found = []
    for eptp in eptps:
        root = Root(EPT, eptp).resolved(memory)
        found.append(KnownRoot.of(memory, root, root.traverse(memory)))
    return found


def inferred(ram: HostRam, pages: dict[int, bytes], *eptps: int) -> infer.Inferred:
    memory = memory_of(ram)
    return infer.infer(pages, known_roots(memory, *eptps), memory)


def wrong(result: infer.Inferred, layout: layouts.Layout) -> dict[str, str]:
    return {n: a for n, a in infer_table.compare(result, layout).items() if a == "certain wrong"}


def one_machine(layout: layouts.Layout, **changed: int) -> tuple[HostRam, dict[int, bytes], machine.Guest]:
    ram = HostRam()
    host = Hypervisor(ram)
    guest = host.guest()
    address = ram.allocate()
    ram.write(address, layout.write(ID, host.vmcs(guest, **changed)))
    return ram, {address: bytes(ram.page(address))}, guest


@pytest.mark.parametrize("name", layouts.known())
def test_the_rules_are_those_of_the_known_layouts(name):
    """The enlightened VMCS breaks some, and is the counter-example."""
    rules = layouts.EVERYWHERE
    if name.startswith("intel") and name != "intel_penryn":
        rules += layouts.PROCESSORS
    fields = layouts.known()[name].fields
    broken = set()
    for names in layouts.rows(rules):
        for first, second in itertools.pairwise(names):
            if first in fields and second in fields and fields[second][0] - fields[first][0] != fields[first][1]:
                broken.add(first)
    assert broken == ({"GUEST_DR7", "GUEST_RSP", "GUEST_RIP", "HOST_RSP"} if name.startswith("hyperv") else set())


# Real captures


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("capture", ["kvm-ept", pytest.param("ept-two", marks=pytest.mark.corpus)])
def test_a_real_vmcs_in_a_known_layout_under_an_unknown_id(capture, name):
    captures.get(capture)
    layout = layouts.known()[name]
    result = infer_table.inferred(infer_table.host(capture), layout)
    answers = infer_table.compare(result, layout)
    assert "certain wrong" not in answers.values(), wrong(result, layout)
    assert {answers[field] for field in CR3S} == {"certain right"}
    if not name.startswith("hyperv") and name not in THIN:
        rest = {field for field, answer in answers.items() if answer != "certain right"}
        assert rest <= {"EXIT_REASON"}


def test_the_enlightened_vmcs_breaks_the_rules_and_stays_unknown_there():
    layout = layouts.known()["hyperv_evmcs"]
    answers = infer_table.compare(infer_table.inferred(infer_table.host("kvm-ept"), layout), layout)
    broken = (
        "GUEST_RSP",
        "GUEST_RIP",
        "HOST_RSP",
        "HOST_RIP",
        "PIN_BASED_EXEC_CONTROLS",
        "SECONDARY_PROC_EXEC_CONTROLS",
    )
    assert {answers[field] for field in broken} == {"unknown"}


@pytest.mark.parametrize("name", ["intel_nehalem", "intel_westmere, completed", "intel_haswell"])
def test_each_family_of_processors_is_found_by_the_rules_of_the_others(name):
    every = {**layouts.known(), "intel_westmere, completed": layouts.whole_westmere()}
    result = infer_table.inferred(infer_table.host("kvm-ept"), every[name])
    answers = infer_table.compare(result, every[name])
    assert Counter(answers.values()) == {"certain right": len(answers) - 1, "likely right": 1}
    assert answers["EXIT_REASON"] == "likely right"
    assert result.segment_stride == (16 if name == "intel_haswell" else 24)


def random_run(capture: str, layout: layouts.Layout) -> None:
    result = infer_table.inferred(infer_table.host(capture), layout)
    answers = infer_table.compare(result, layout)
    assert not wrong(result, layout)
    assert {answers[field] for field in CR3S} == {"certain right"}, layout.name


@pytest.mark.parametrize("layout", infer_table.random_layouts(20), ids=lambda item: item.name)
def test_random_layouts(layout):
    random_run("kvm-ept", layout)


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["kvm-ept", pytest.param("ept-two", marks=pytest.mark.corpus)])
def test_two_hundred_random_layouts(capture):
    captures.get(capture)
    for layout in infer_table.random_layouts(200):
        random_run(capture, layout)


def stale_run(seed: int) -> None:
    """Guest fields that were not written back, and fields of no interest that hold anything."""
    layout = infer_table.random_layout(seed)
    result = infer_table.damaged(infer_table.host("kvm-ept"), layout, seed)
    assert not wrong(result, layout), layout.name


@pytest.mark.parametrize("seed", range(10))
def test_stale_fields_are_never_placed_elsewhere_for_certain(seed):
    stale_run(seed)


@pytest.mark.slow
def test_stale_fields_in_many_layouts():
    for seed in range(300):
        stale_run(seed)


def test_candidates_in_a_capture_are_its_vmcss_and_nothing_else():
    where = infer_table.host("kvm-ept")
    groups = infer.candidate_pages(where.memory, where.roots)
    assert {identifier: set(pages) for identifier, pages in groups.pages.items()} == {0x2B: set(where.values)}
    assert groups.notes == []


@pytest.mark.corpus
@pytest.mark.parametrize("name", infer_table.NATIVE)
def test_the_vmcss_of_every_capture_as_they_are(name):
    """Found and read without a table; the table that fits is Bochs', and it has no certain field elsewhere."""
    captures.get(name)
    where = infer_table.host(name)
    (pages,) = infer.candidate_pages(where.memory, where.roots).pages.values()
    assert set(pages) == set(where.values)
    (result,) = infer.infer_all(pages, where.roots, where.memory)
    native = next(table for table in package_layouts.load_layouts() if table.name == infer_table.NATIVE[name])
    assert infer.agreement(result, native) == (len(result.known()), 0)
    assert len(result.known()) > 60


@pytest.mark.corpus
def test_a_real_vmcs12_in_kvms_own_memory():
    """KVM keeps the VMCS of the inner guest in its heap, and the page in the middle guest's memory is empty then.

    Its EPTP is an address of the middle guest, whose memory holds the page tables of its host state, too.
    """
    captures.get("ept-nested")
    where = infer_table.host("ept-nested")
    middle = max(where.roots, key=lambda root: root.memory.size)
    found = [item for item in roots.find(middle.memory) if item.root.kind == EPT]
    known = [KnownRoot.of(middle.memory, item.root, item.guest_map) for item in found]
    groups = infer.candidate_pages(where.memory, known)
    assert list(groups.pages) == [0x11E57ED0]
    result = infer.infer(groups.pages[0x11E57ED0], known, middle.memory)
    table = next(item for item in package_layouts.load_layouts() if item.name == "kvm_vmcs12")
    assert infer.agreement(result, table) == (len(result.known()), 0)
    assert {"EPTP", "GUEST_CR3", "GUEST_RIP", "HOST_CR3", "HOST_RIP"} <= result.known().keys()


# Machines built by hand


@pytest.mark.parametrize("name", ["intel_haswell", "intel_nehalem", "kvm_vmcs12", "xen_vvmcs"])
def test_two_machines_with_several_vcpus(name):
    layout = layouts.known()[name]
    ram = HostRam()
    host = Hypervisor(ram)
    guests = [host.guest(), host.guest()]
    pages = {}
    for guest in guests:
        for cpu in range(3):
            address = ram.allocate()
            ram.write(address, layout.write(ID, host.vmcs(guest, cpu)))
            pages[address] = bytes(ram.page(address))
    memory = memory_of(ram)
    known = known_roots(memory, *(guest.root for guest in guests))
    groups = infer.candidate_pages(memory, known)
    assert groups.pages == {ID: pages}
    result = infer.infer(groups.pages[ID], known, memory)
    answers = infer_table.compare(result, layout)
    assert {f for f, a in answers.items() if a != "certain right"} <= {"EXIT_REASON"}, result.explain()
    assert result.pages == tuple(pages)


@pytest.mark.parametrize("name", ["haswell", "nehalem", "westmere", "kvm", "xen", "bochs_2_7", "bochs_3_0"])
def test_the_pages_of_the_other_builder(name):
    """Literal offsets instead of the tables; what that builder leaves out stays unknown."""
    ram = HostRam()
    host = Hypervisor(ram)
    guest = host.guest()
    pages = {}
    for cpu in range(2):
        values = {"host_cr3": host.tables.register, "host_rip": HOST_KERNEL + 0x80, "host_rsp": HOST_KERNEL + 0x1800}
        near = {
            "host_gs_base": HOST_KERNEL + 0x5000,
            "host_gdtr_base": HOST_KERNEL + 0x2000,
            "guest_rsp": KERNEL + 0x1800,
        }
        page = control.vmcs(name, revision=ID, eptp=guest.root, guest_cr3=guest.own.register, vpid=cpu + 1, **values,
                            **near, host_tr_base=HOST_KERNEL + 0x4000, host_idtr_base=HOST_KERNEL + 0x3000)  # fmt: skip
        # The builder has no DR7, SYSENTER and bases of the guest: without them too little of the guest translates.
        bare = bytearray(page)
        struct.pack_into("<QQQ", bare, 0xFE0, KERNEL + 0x2000, KERNEL + 0x3000, KERNEL + 0x100)
        pages[ram.allocate()] = bytes(bare)
    result = inferred(ram, pages, guest.root)
    offsets = control.offsets(name)
    found = {field: item.offset for field, item in result.known().items()}
    assert (found["EPTP"], found["GUEST_CR3"], found["HOST_CR3"]) == tuple(
        offsets[field] for field in ("eptp", "guest_cr3", "host_cr3")
    )
    assert found["HOST_RIP"] == offsets["host_rip"]


def test_a_guest_that_never_ran():
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    (address,) = pages
    empty = {name: 0 for name in layout.fields if name.startswith("GUEST_")}
    host_values = layout.read(pages[address])
    result = inferred(ram, {address: layout.write(ID, {**host_values, **empty})}, guest.root)
    assert result.known()["EPTP"].offset == 0x140
    assert result.known()["HOST_CR3"].offset == 0x330
    assert result.fields["GUEST_CR3"].certainty is Certainty.UNKNOWN
    assert not wrong(result, layout)


def test_a_vcpu_that_never_ran_beside_one_that_did():
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    (address,) = pages
    values = layout.read(pages[address])
    pages[ram.allocate()] = layout.write(ID, {n: 0 if n.startswith("GUEST_") else v for n, v in values.items()})
    result = inferred(ram, pages, guest.root)
    assert (result.known()["GUEST_CR3"].offset, result.known()["GUEST_RIP"].offset) == (0x210, 0x1D8)
    assert not wrong(result, layout)


def test_with_paging_off_the_guests_registers_are_only_likely():
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout, GUEST_CR0=0x6000_0030, GUEST_CR3=0, GUEST_CR4=0x2000, GUEST_IA32_EFER=0)
    result = inferred(ram, pages, guest.root)
    assert result.fields["GUEST_CR3"].certainty is Certainty.LIKELY
    assert result.known()["EPTP"].offset == 0x140
    assert not wrong(result, layout)


def test_a_32_bit_guest():
    ram = HostRam()
    host = Hypervisor(ram)
    guest = host.guest()
    own = Tables(GuestRam(ram, guest.placed, 30), LEGACY)
    for number in range(4):
        own.map(0xC100_0000 + PAGE * number, own.ram.allocate())
    low = {f"GUEST_{n}": 0xC100_0000 + PAGE * i for i, n in enumerate(("RIP", "RSP", "GDTR_BASE", "IDTR_BASE"))}
    wide = ("GUEST_GS_BASE", "GUEST_TR_BASE", "GUEST_IA32_SYSENTER_ESP", "GUEST_IA32_SYSENTER_EIP", "GUEST_IA32_EFER")
    layout = layouts.known()["intel_haswell"]
    changed = {**dict.fromkeys(wide, 0), **low, "GUEST_CR3": own.register, "GUEST_CR4": 0x2010}
    pages = {ram.allocate(): layout.write(ID, host.vmcs(guest, **changed))}
    result = inferred(ram, pages, guest.root)
    assert (result.known()["GUEST_CR3"].offset, result.known()["GUEST_RIP"].offset) == (0x210, 0x1D8)
    assert not wrong(result, layout)


def test_a_link_to_a_shadow_vmcs():
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    (address,) = pages
    shadow = ram.allocate()
    ram.write(shadow, (ID | 1 << 31).to_bytes(4, "little"))
    page = layout.write(ID, {**layout.read(pages[address]), "VMCS_LINK_POINTER": shadow})
    assert inferred(ram, {address: page}, guest.root).known()["VMCS_LINK_POINTER"].offset == 0xF8


def test_a_guest_cr3_that_reads_like_the_eptp():
    """A guest that knows its root can load the same number into CR3: the place must not be taken for the EPTP's."""
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    (address,) = pages
    values = layout.read(pages[address])
    result = inferred(ram, {address: layout.write(ID, {**values, "GUEST_CR3": values["EPTP"]})}, guest.root)
    assert not wrong(result, layout)
    assert result.fields["EPTP"].offset in (None, 0x140)


def test_two_places_that_name_the_root_leave_the_eptp_open_and_the_rest_known():
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout, VM_FUNCTION_CONTROLS=0)
    (address,) = pages
    values = layout.read(pages[address])
    result = inferred(ram, {address: layout.write(ID, {**values, "IO_RCX": values["EPTP"]})}, guest.root)
    assert result.fields["EPTP"].certainty is Certainty.UNKNOWN
    assert result.known()["GUEST_CR3"].offset == 0x210


def test_registers_that_a_guest_forges_in_an_io_instruction_are_not_its_control_registers():
    """RCX, RSI, RDI of the last INS or OUTS lie in a row, and hold what the guest likes: its CR0, CR3, CR4 twice."""
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    (address,) = pages
    values = layout.read(pages[address])
    forged = dict(zip(("IO_RCX", "IO_RSI", "IO_RDI"), (values[f"GUEST_CR{n}"] for n in (0, 3, 4)), strict=True))
    result = inferred(ram, {address: layout.write(ID, {**values, **forged})}, guest.root)
    assert result.fields["GUEST_CR3"].certainty is Certainty.UNKNOWN
    assert result.known()["HOST_CR3"].offset == 0x330
    assert not wrong(result, layout)


def test_an_ept_of_five_levels():
    ram = HostRam()
    host = Hypervisor(ram)
    guest = host.guest(shape=EPT_5)
    layout = layouts.known()["intel_haswell"]
    result = inferred(ram, {ram.allocate(): layout.write(ID, host.vmcs(guest))}, guest.root)
    assert Counter(infer_table.compare(result, layout).values()) == {"certain right": 70, "likely right": 1}


def test_two_layouts_under_one_id_are_told_apart():
    """As Bochs 2.7 and 3.0, or KVM's vmcs12 of 2012 and of today."""
    ram = HostRam()
    host = Hypervisor(ram)
    guest = host.guest()
    both = [layouts.known()[name] for name in ("bochs_2_7", "bochs_3_0")]
    pages = {ram.allocate(): layout.write(ID, host.vmcs(guest, cpu)) for layout in both for cpu in range(2)}
    memory = memory_of(ram)
    results = infer.infer_all(pages, known_roots(memory, guest.root), memory)
    assert [item.known()["EPTP"].offset for item in results] == [0x478, 0x278]
    assert [item.pages for item in results] == [tuple(pages)[:2], tuple(pages)[2:]]
    assert not any(wrong(item, layout) for item, layout in zip(results, both, strict=True))


# Look-alikes


def test_look_alikes_are_no_candidates():
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    noise = random.Random(1)
    for page in (control.vmxon(ID), noise.randbytes(PAGE), struct.pack("<IIQ", 5, 0, guest.root).ljust(PAGE, b"\0")):
        ram.write(ram.allocate(), page)
    memory = memory_of(ram)
    assert infer.candidate_pages(memory, known_roots(memory, guest.root)).pages == {ID: pages}
    assert infer.candidate_pages(memory, []).pages == {}


def test_a_page_in_a_guest_is_no_candidate():
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    guest.ram.write(guest.ram.allocate(), next(iter(pages.values())))
    memory = memory_of(ram)
    assert infer.candidate_pages(memory, known_roots(memory, guest.root)).pages == {ID: pages}


def test_a_forged_root_that_maps_the_host_hides_nothing():
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    own = ram.allocate()
    memory = memory_of(ram)
    everything = (np.array([0], dtype=np.int64), np.array([memory.top], dtype=np.int64))
    forged = KnownRoot(own, memory, everything)
    assert infer.candidate_pages(memory, [*known_roots(memory, guest.root), forged]).pages == {ID: pages}


def test_nothing_is_known_of_a_page_with_an_eptp_and_control_words_alone():
    """KVM's own ``struct vcpu_vmx`` holds a copy of the control words."""
    ram, _, guest = one_machine(layouts.known()["intel_haswell"])
    words = struct.pack("<IIQ5I", ID, 0, guest.root, 0x7F, 0xB5A0_6DFA, 0x12_14EF, 0x2F_FFFF, 0xD3FF)
    result = inferred(ram, {ram.allocate(): words.ljust(PAGE, b"\0")}, guest.root)
    assert not result.known(Certainty.LIKELY)
    assert not result.is_control_structure


def test_forged_pages_under_the_same_id_are_left_out():
    """A file in the host's page cache is not in the guest's memory, and a guest may have written it."""
    layout = layouts.known()["intel_haswell"]
    ram, pages, guest = one_machine(layout)
    noise = random.Random(2)
    words = struct.pack("<5I", 0x7F, 0xB5A0_6DFA, 0x12_14EF, 0x2F_FFFF, 0xD3FF)
    for number in range(20):
        forged = bytearray(noise.randbytes(PAGE))
        forged[:8] = struct.pack("<II", ID, 0)
        at = 0x140 if number % 2 else 0x400
        forged[at : at + 8] = struct.pack("<Q", guest.root)
        forged[0x800 : 0x800 + len(words)] = words
        pages[ram.allocate()] = bytes(forged)
    result = inferred(ram, pages, guest.root)
    assert result.pages == (next(iter(pages)),)
    assert Counter(infer_table.compare(result, layout).values())["certain right"] >= 65
    assert "20 pages of the same revision id do not agree and were left out" in result.notes


def test_a_flood_of_candidates_is_bounded_and_said():
    _, pages, guest = one_machine(layouts.known()["intel_haswell"])
    page = bytearray(next(iter(pages.values())))
    below = HostMemory.from_bytes(b"".join(bytes(page) for _ in range(infer.MAX_PAGES + 6)))
    empty = np.empty(0, dtype=np.int64)
    root = KnownRoot(guest.tables.root, below, (empty, empty))
    groups = infer.candidate_pages(below, [root])
    assert len(groups.pages[ID]) == infer.MAX_PAGES
    assert groups.notes == [f"6 more pages of revision id {ID:#x} were not read"]


def test_pages_that_ask_for_endless_translations_come_to_an_end(monkeypatch):
    """With the budget spent a second place for a field may have been missed: nothing may be certain then."""
    monkeypatch.setattr(infer_view.Space, "__init__", functools.partialmethod(_small_space))
    ram, pages, guest = one_machine(layouts.known()["intel_haswell"])
    result = inferred(ram, pages, guest.root)
    assert not result.known(Certainty.LIKELY)
    assert result.notes == ("the pages ask for more translations of addresses than are made",)


def _small_space(space: infer_view.Space, memory: HostMemory) -> None:
    space.memory, space.left, space._known = memory, 10, {}


def test_random_pages_never_raise():
    noise = random.Random(3)
    ram, _, guest = one_machine(layouts.known()["intel_haswell"])
    memory = memory_of(ram)
    known = known_roots(memory, guest.root)
    for _ in range(20):
        page = bytearray(noise.randbytes(PAGE))
        for offset in range(0, PAGE, 64):
            page[offset : offset + 8] = struct.pack("<Q", noise.choice((*layouts.ODD, guest.root, KERNEL, HOST_KERNEL)))
        result = infer.infer({0x1000: bytes(page)}, known, memory)
        assert not result.known()
    assert not infer.infer({}, known, memory).known()
    assert not infer.infer({0x1000: bytes(PAGE)}, [], memory).known()


# What becomes of a layout


def test_an_inferred_layout_is_a_table_that_reads_back():
    layout = layouts.known()["intel_nehalem"]
    ram, pages, guest = one_machine(layout)
    result = inferred(ram, pages, guest.root)
    table = package_layouts.parse_isf("mine", isf.to_isf(result))
    assert table.fields == infer.layout(result).fields
    assert (table.revision_ids, table.ar_format) == (frozenset({ID}), AccessRightsFormat.ROTATE32)
    assert "EXIT_REASON" not in table.fields
    likely = package_layouts.parse_isf("mine", isf.to_isf(result, Certainty.LIKELY))
    assert likely.fields["EXIT_REASON"].offset == 0x16C
    assert likely.provenance["likely"] == ["EXIT_REASON"]


def test_an_inferred_table_loads_into_volatility(tmp_path):
    contexts = pytest.importorskip("volatility3.framework.contexts")
    from volatility3.framework.symbols import intermed

    ram, pages, guest = one_machine(layouts.known()["intel_haswell"])
    path = tmp_path / "inferred.json"
    path.write_text(isf.to_isf(inferred(ram, pages, guest.root), date="2026-01-01T00:00:00"))
    table = intermed.IntermediateSymbolTable(contexts.Context(), "test", "inferred", path.as_uri())
    assert table.get_type("_VMCS").relative_child_offset("EPTP") == 0x140
    assert table.get_symbol("revision_id").constant_data == str(ID).encode()


def test_the_checks_of_known_layouts_hold_under_the_inferred_one():
    ram, pages, guest = one_machine(layouts.known()["intel_nehalem"])
    found = infer.layout(inferred(ram, pages, guest.root))
    (page,) = pages.values()
    values = found.read_all(page)
    for name in values:
        if name.endswith("_ACCESS_RIGHTS"):
            values[name] = found.ar_format.unpack(values[name])
    judged = vmcs_checks.judge(values, found, limits.Limits(physical_top=1 << 32))
    assert [item.name for item in judged if item.held is False] == []
    assert sum(item.held is True for item in judged) > 14


def test_an_inferred_layout_says_why():
    ram, pages, guest = one_machine(layouts.known()["intel_haswell"])
    text = inferred(ram, pages, guest.root).explain()
    assert "GUEST_CR3: 0x210 certain\n" in text
    assert "+ page tables at CR3: the guest's translate what the page holds of addresses, in 1 of 1" in text


def test_an_unknown_id_of_a_known_layout_is_recognised():
    ram, pages, guest = one_machine(layouts.known()["intel_haswell"])
    result = inferred(ram, pages, guest.root)
    counts = {item.name: infer.agreement(result, item) for item in package_layouts.load_layouts()}
    assert counts["intel_haswell"] == (len(result.known()), 0)
    assert [name for name, (_, elsewhere) in counts.items() if not elsewhere] == ["intel_haswell"]
