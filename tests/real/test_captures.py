"""The real captures against their ground truth: exactly their guests, every page, no page invented."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import captures
import pytest
import volatility
from volatility3.framework.layers import elf

from volatility3_ept.core import guestcpu, machines, nested, search, walk
from volatility3_ept.layers import host
from volatility3_ept.spec.paging import Outcome

PAGE = 4096
#: Bytes of the instructions by which these guests went to sleep: HLT, on AMD also WRMSR to the timer (exit code 0x7C).
LEFT_BY = {"VMCS": 1, 0x78: 1, 0x7C: 2}


def open_capture(capture: captures.Capture):
    """Return the capture's physical memory, through Volatility's own ELF layer."""
    context = volatility.file_context(capture.path)
    context.config["core.base_layer"] = "base"
    context.add_layer(elf.Elf64Layer(context, "core", "core"))
    return host.host_memory(context, "core")


@pytest.fixture(scope="module", params=captures.every())
def capture(request) -> captures.Capture:
    return captures.get(request.param)


@pytest.fixture(scope="module")
def memory(capture):
    return open_capture(capture)


@pytest.fixture(scope="module")
def found(memory):
    return search.discover(memory)


def host_guests(capture: captures.Capture) -> list[captures.GuestTruth]:
    """The guests that the host itself runs."""
    return [guest for guest in capture.guests if guest.facts["parent"] == "host"]


def machine_of(capture: captures.Capture, guest: captures.GuestTruth, found) -> machines.Machine:
    """Return the machine whose root the emulated processor held for this guest."""
    roots = {
        int(item["slat_root"], 0) & ~0xFFF
        for item in capture.truth["control_structures"]
        if item.get("guest") == guest.facts["name"] and "slat_root" in item
    }
    (machine,) = [m for m in found.machines if {m.root.address, *(view.root.address for view in m.views)} & roots]
    return machine


def test_exactly_the_guests_are_found(capture, found):
    expected = host_guests(capture)
    assert len(found.machines) == len(expected)
    for guest in expected:
        machine = machine_of(capture, guest, found)
        assert machine.root.kind == capture.truth["slat"].upper()
        assert guest.facts["kernel"] in machine.system


def test_every_vcpu_is_found_at_its_address(capture, found):
    for guest in host_guests(capture):
        where = {
            int(item["hpa"], 0)
            for item in capture.truth["control_structures"]
            if item.get("guest") == guest.facts["name"] and item["kind"] in ("vmcs", "vmcb")
            and item.get("role") == "current"
        }  # fmt: skip
        assert {vcpu.hpa for vcpu in machine_of(capture, guest, found).vcpus} == where


def test_every_page_that_hardware_would_reach_equals_the_truth(capture, memory, found, record_property, capsys):
    for guest in host_guests(capture):
        machine = machine_of(capture, guest, found)
        mapped = machine.guest_map.memory(memory)
        count: Counter[str] = Counter()
        for gpa, (frame, digest) in guest.pages.items():
            data = mapped.read(gpa, PAGE)
            if data is None:
                count["not in EPT/NPT"] += 1
            elif hashlib.sha256(data).hexdigest() != digest:
                count["wrong"] += 1
            elif int(machine.guest_map.to_hpa([gpa])[0]) != frame * PAGE:
                count["other frame"] += 1
            else:
                count["equal"] += 1
        invented = [
            gpa
            for run in machine.guest_map.runs()
            for gpa in range(run.gpa, run.gpa + run.length, PAGE)
            if gpa not in guest.pages
        ]
        with capsys.disabled():
            print(f"\n{capture.name} {guest.facts['name']}: {dict(count)}, invented {len(invented)}", end="")
        record_property(guest.facts["name"], json.dumps(count))
        in_slots = [gpa for gpa in invented if any(_holds(slot, gpa) for slot in guest.facts["memslots"])]
        assert not in_slots, "mapped, inside a memory slot, and not in the VMM: invented"
        if not guest.facts["running"]:
            assert count["wrong"] == count["other frame"] == 0
        assert count["equal"] >= 0.9 * len(guest.pages)


def _holds(slot: dict[str, str], gpa: int) -> bool:
    return int(slot["gpa"], 0) <= gpa < int(slot["gpa"], 0) + int(slot["size"], 0)


def test_mmio_markers_are_no_memory(capture, memory, found):
    for machine in found.machines:
        markers = machine.guest_map.findings.mmio
        for gpa, _, _ in markers.tolist():
            assert machine.memory.read(gpa, 1) is None
            assert machine.root.walk(memory, gpa).outcome is Outcome.MMIO
    if host_guests(capture):
        assert any(len(m.guest_map.findings.mmio) for m in found.machines), "KVM leaves markers in each of these"


def test_the_registers_of_a_stopped_guest_are_those_that_kvm_gave(capture, found):
    for guest in host_guests(capture):
        if guest.facts["running"]:
            continue
        vcpus = {vcpu.hpa: vcpu for vcpu in machine_of(capture, guest, found).vcpus}
        for item in capture.truth["control_structures"]:
            if item.get("guest") != guest.facts["name"] or item.get("role") != "current":
                continue
            vcpu = vcpus[int(item["hpa"], 0)]
            state = guestcpu.registers(vcpu)
            (given,) = [row for row in guest.facts["registers"] if row["vcpu"] == item["vcpu"]]
            truth = {name: int(value, 0) for name, value in given.items() if isinstance(value, str)}
            assert (state.cr3, state.rsp) == (truth["cr3"], truth["rsp"])
            assert state.gs_base == truth["gs_base"]
            # VMCS and VMCB hold the RIP of the instruction that left the guest; KVM reports the one behind it.
            assert truth["rip"] - state.rip in (0, LEFT_BY[vcpu.fields.get("EXITCODE", "VMCS")])


def test_kernel_symbols_are_where_kallsyms_says_through_both_dimensions(capture, memory, found):
    for guest in host_guests(capture):
        machine = machine_of(capture, guest, found)
        state = guestcpu.registers(machine.vcpus[0])
        banner = int(guest.facts["kallsyms"]["linux_banner"], 0)
        result = nested.walk(memory, machine.root, machine.memory, machine.paging, state.cr3, banner)
        assert result.outcome is Outcome.MAPPED
        assert memory.read(result.hpa, 14) == b"Linux version "
        assert [ref.gpa for ref in result.references[:-1]] == [
            step.entry_address for step in walk.walk(machine.memory, machine.paging, state.cr3, banner).steps
        ]


def test_traversal_equals_the_walk_of_every_page(capture, memory, found):
    """The fast path against the reference, on every 31st page of each real hierarchy."""
    for machine in found.machines:
        for run in machine.guest_map.runs():
            for gpa in range(run.gpa, run.gpa + run.length, 31 * PAGE):
                one = machine.root.walk(memory, gpa)
                assert one.outcome is Outcome.MAPPED
                assert (one.target, one.access, one.page_size) == (run.hpa + gpa - run.gpa, run.access, run.page_size)
