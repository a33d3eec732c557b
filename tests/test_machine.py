"""Guest-virtual memory from Python: the address space that stands for a machine, a vCPU's, or one that CR3 names."""

from __future__ import annotations

import contextlib

import pytest
from builders import spaces
from builders.paging import EPT_4, PAGE, Tables
from cli import containers

import volatility3_ept
from volatility3_ept import api
from volatility3_ept.core.walk import Walk
from volatility3_ept.machine import Machine
from volatility3_ept.spec.paging import Access


@pytest.fixture
def opened(tmp_path):
    """Opens a built guest as a machine."""
    with contextlib.ExitStack() as stack:

        def open_(space: spaces.Space) -> Machine:
            capture = stack.enter_context(volatility3_ept.open(containers.lime(space.ram, tmp_path)))
            return capture.machine("0")

        yield open_


@pytest.mark.parametrize("name", spaces.GUESTS)
def test_virtual_memory_in_every_mode(opened, name):
    space = spaces.GUESTS[name](EPT_4)
    guest = opened(space)
    for gva, data in space.pages.items():
        assert guest.read_virtual(gva, PAGE) == data
        found = guest.translate(gva=gva + 5)
        assert space.ram.page(found.hpa)[:16] == data[:16]
        assert found.reason == "mapped"
    for gva in space.absent:
        with pytest.raises(api.MissingMemoryError) as caught:
            guest.read_virtual(gva, 1)
        assert caught.value.address == gva
        assert guest.read_virtual(gva, 2, fill=b"?") == b"??"
        assert guest.translate(gva=gva).hpa is None


def test_an_address_of_the_kernel_goes_through_its_half_and_a_users_through_the_users(opened):
    pair = spaces.kpti()
    guest = opened(pair.space)
    assert guest.address_space.space.user_cr3 == pair.space.registers["cr3"]
    assert first_table(guest.walk_virtual(spaces.KERNEL)) == pair.kernel.root
    assert first_table(guest.walk_virtual(0x40_0000)) == pair.user.root
    assert Access.EXECUTE in guest.translate(gva=0x40_0000).access
    assert Access.EXECUTE not in guest.translate(gva=0x40_0000, cr3=pair.kernel.root).access


def test_the_half_that_is_asked_for_is_the_one_that_is_used(opened):
    pair = spaces.kpti()
    guest = opened(pair.space)
    assert guest.translate(gva=spaces.KERNEL, cr3=pair.user.root).gpa is None
    assert guest.translate(gva=spaces.KERNEL, vcpu=0).gpa is not None


def first_table(walk) -> int:
    return walk.references[0].gpa & ~0xFFF


def test_the_pdptes_of_a_vcpu_are_not_those_of_another_address_space(opened):
    space = spaces.pae()
    other = Tables(space.guest, spaces.PAE)
    space.page(other, 0xC010_0000)
    guest = opened(space)
    assert guest.read_virtual(0xC010_0000, PAGE, cr3=other.root) == space.pages[0xC010_0000]
    assert guest.translate(gva=0xC010_0000).gpa != guest.translate(gva=0xC010_0000, cr3=other.root).gpa
    assert guest.translate(gva=0xC010_1000, cr3=other.root).gpa is None


def test_without_paging_there_is_nothing_to_walk(opened):
    guest = opened(spaces.protected())
    assert guest.address_space.space.mode is None
    with pytest.raises(LookupError, match="paging is off"):
        guest.walk_virtual(0x5000)
    assert isinstance(guest.walk(0x5000), Walk)


def test_tables_in_which_nothing_translates_are_walked_all_the_same(opened):
    """The walk says why; no other address space is put in their place."""
    space = spaces.four_level()
    root = space.registers["cr3"] & ~0xFFF
    for index in range(512):
        space.guest.write_entry(root + 8 * index, 0)
    guest = opened(space)
    assert guest.address_space.space is None
    assert guest.translate(gva=spaces.KERNEL).reason == f"guest: the PML4E at {root + 8 * 511:#x}"


def test_a_vcpu_of_its_own(opened):
    space = spaces.four_level()
    small = Tables(space.guest, spaces.LONG_4)
    small.map(0x40_0000, space.guest.allocate(), bits=0x65)
    space.vcpu(cr3=small.root, rip=0x40_0000)
    guest = opened(space)
    number = next(i for i, vcpu in enumerate(guest.vcpus) if vcpu.guest_cr3 == small.root)
    assert guest.translate(gva=spaces.KERNEL, vcpu=number).gpa is None
    assert guest.translate(gva=spaces.KERNEL).gpa is not None
    for wrong in (-1, 2):
        with pytest.raises(LookupError, match="2 vCPUs"):
            guest.translate(gva=0, vcpu=wrong)


def test_a_root_that_was_given_has_no_address_space(tmp_path):
    space = spaces.four_level()
    with volatility3_ept.open(containers.lime(space.ram, tmp_path)) as capture:
        guest = capture.machine(space.root)
        assert guest.address_space.space is None
        with pytest.raises(LookupError, match="give cr3"):
            guest.read_virtual(spaces.KERNEL, 8)
        assert guest.read_virtual(spaces.KERNEL, PAGE, cr3=space.registers["cr3"]) == space.pages[spaces.KERNEL]
