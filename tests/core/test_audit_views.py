"""Kind 2: two views of one machine."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
from audited import grave, results
from builders import hooks
from builders.hooks import Victim
from builders.paging import HostRam
from readers import memory_of

from volatility3_ept.core import audit, audit_finding, audit_views, hyperv, search
from volatility3_ept.core.audit_finding import Kind, Severity
from volatility3_ept.layers import disassembly
from volatility3_ept.spec import ia32e


@pytest.fixture
def victim() -> Victim:
    return Victim(HostRam())


def test_a_second_view_in_an_eptp_list_is_found_with_the_bytes_that_differ(victim):
    gpa = victim.code[5]
    hooks.second_view(victim, {gpa: (victim.shadow(gpa), None)})
    found = results(victim.ram, lambda code, address: [f"{len(code)} bytes at {address:#x}"])
    assert grave(found) == [(Kind.VIEW_FRAME, Severity.HIGH, gpa)]
    row = next(f for f in found if f.kind is Kind.VIEW_FRAME)
    assert "+0x40: 55488" in row.evidence
    assert f"16 bytes at {0xFFFF_FFFF_8100_5040:#x}" in row.evidence


def test_a_view_without_a_list_is_found_by_its_structure(victim):
    gpa = victim.code[5]
    hooks.second_view(victim, {gpa: (victim.frame(gpa), hooks.NO_EXECUTE)}, vmfunc=False)
    found = results(victim.ram)
    assert (Kind.VIEWS, Severity.INFO) in [(f.kind, f.severity) for f in found]
    assert (Kind.VIEW_RIGHTS, Severity.HIGH, gpa) in grave(found)


def test_a_list_that_vmfunc_may_not_use_is_no_list(victim):
    gpa = victim.code[5]
    hooks.second_view(victim, {gpa: (victim.shadow(gpa), None)})
    victim.ram.write_entry(victim.structure + 0x380, 0)
    assert all("EPTP list" not in f.evidence for f in results(victim.ram))


def test_a_list_full_of_roots_is_bounded(victim):
    """512 entries, each a hierarchy: the ones beyond the limit are counted."""
    hooks.second_view(victim, {})
    (page,) = struct.unpack("<Q", victim.ram.page(victim.structure)[0x388:0x390])
    for slot in range(2, 60):
        victim.ram.write_entry(page + 8 * slot, victim.ram.allocate() | 0x5E)
    memory = memory_of(victim.ram)
    result = audit.audit(search.discover(memory), memory)
    assert any("59 views; the first 32" in note for note in result.notes)
    assert grave(list(result.findings)) == []


def test_two_processors_with_an_ept_each(victim):
    """The views differ in one page; which of them comes first is told by their addresses."""
    gpa = victim.code[5]
    other = hooks.second_view(victim, {gpa: (victim.shadow(gpa), None)}, vmfunc=False)
    victim.guest.vcpu(eptp=other.register)
    found = results(victim.ram)
    assert (Kind.VIEW_FRAME, Severity.HIGH, gpa) in grave(found)
    assert any("a root of its own" in f.evidence for f in found if f.kind is Kind.VIEWS)


def test_vtl1_sees_what_vtl0_may_not_execute(victim, monkeypatch):
    """Rights that differ all over are what virtual trust levels are; frames that differ are not."""
    right, frame = victim.code[5], victim.code[6]
    hooks.second_view(
        victim, {right: (victim.frame(right), hooks.NO_EXECUTE), frame: (victim.shadow(frame), None)}, vmfunc=False
    )
    role = hyperv.Role("Hyper-V root partition, VTL1 (securekernel)", ("securekernel.pdb at GPA 0x5000",))
    monkeypatch.setattr(hyperv, "role", lambda machine, discovery, memory: role)
    found = results(victim.ram)
    assert (Kind.VIEW_RIGHTS, Severity.INFO, right) in [(f.kind, f.severity, f.gpa) for f in found]
    assert (Kind.VIEW_FRAME, Severity.HIGH, frame) in grave(found)


def test_the_differing_code_as_assembly(victim):
    """With iced-x86, as the plugin does it: a function's beginning became a jump."""
    pytest.importorskip("iced_x86")
    gpa = victim.code[5]
    hooks.second_view(victim, {gpa: (victim.shadow(gpa), None)})
    (row,) = [f for f in results(victim.ram, disassembly.disassembler()) if f.kind is Kind.VIEW_FRAME]
    assert "code: push rbp, mov rbp,rsp, nop" in row.evidence
    assert " | jmp " in row.evidence


def test_code_of_a_32_bit_kernel_is_read_as_such():
    """INC EAX is a prefix in 64-bit mode."""
    pytest.importorskip("iced_x86")
    disassemble = disassembly.disassembler()
    assert disassemble is not None
    assert disassemble(b"\x40", 0x1000, bits=32) == ["inc eax"]
    machine = SimpleNamespace(paging=ia32e.pae())
    assert audit_finding.fitted(disassemble, machine)(b"\x40", 0x1000) == ["inc eax"]


def test_more_stretches_than_are_compared_are_counted(victim, monkeypatch):
    monkeypatch.setattr(audit_views, "_MAX_COMPARED", 2)
    change = {gpa: (victim.frame(gpa), hooks.NO_EXECUTE) for gpa in victim.code[1:8:2]}
    hooks.second_view(victim, change)
    found = [f for f in results(victim.ram) if f.kind is Kind.VIEW_RIGHTS]
    assert [f.severity for f in found] == [Severity.HIGH, Severity.HIGH, Severity.LOW]
    assert "0x2000 more bytes" in found[-1].evidence
