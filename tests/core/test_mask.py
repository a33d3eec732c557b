"""What of a host's memory is its guests', and what remains when that is taken away."""

from __future__ import annotations

import numpy as np
import pytest
from builders.paging import PAGE
from builders.vmm import NX, Guest, Host
from readers import READERS, memory_of

from volatility3_ept.core import backing, leaves, mask
from volatility3_ept.core.memory import HostMemory

LOW, READ_ONLY = 0x7F12_3450_0000, NX | 0x25


@pytest.fixture
def guest():
    """A guest of 32 pages, 3 of which EPT has lost: two of its own, and the host's zero page.

    The zero page also stands at another address, where EPT maps it; so does a page that KSM has merged, with content.
    """
    host = Host()
    guest = Guest(host, host.process())
    guest.back(0, LOW, 28, lost=(3, 4))
    zero, merged = host.ram.allocate(), host.ram.allocate()
    host.ram.write(merged, b"merged" * 100)
    for number, hpa, lost in ((28, zero, True), (29, zero, False), (30, merged, True), (31, merged, False)):
        gpa = number * PAGE
        guest.vmm.put(LOW + gpa, "PTE", hpa | READ_ONLY)
        guest.slat.put(gpa, "PTE", 0 if lost else hpa | 0x35)
        guest.pages[gpa] = hpa
    guest.zero, guest.merged = zero, merged
    return guest


def masked(guest: Guest, recover: bool = True) -> tuple[HostMemory, set[int]]:
    """The host's memory, and the pages of it that remain."""
    below = memory_of(guest.host.ram)
    mapped = leaves.traverse(below, READERS[guest.slat.shape], guest.slat.register)
    found = backing.recover(below, mapped) if recover else backing.Recovery(mapped)
    starts, lengths = mask.without(below, [found.guest_map], [mask.read_only(found.guest_map, found.read_only)])
    return below, {page for at, size in zip(starts, lengths, strict=True) for page in range(at, at + size, PAGE)}


def test_all_pages_of_the_guest_are_gone_but_the_hosts_zero_page(guest):
    below, left = masked(guest)
    held = {page for at, size in zip(below.starts, below.lengths, strict=True) for page in range(at, at + size, PAGE)}
    assert held - left == set(guest.pages.values()) - {guest.zero}
    assert guest.merged not in left, "the guest's kernel may lie in a merged page"


def test_without_recovery_the_lost_pages_remain(guest):
    _, left = masked(guest, recover=False)
    assert left & set(guest.pages.values()) == {guest.pages[3 * PAGE], guest.pages[4 * PAGE], guest.zero}


def test_a_page_of_zeros_that_the_vmm_may_write_is_the_guests(guest):
    own = guest.pages[3 * PAGE]
    guest.host.ram.write(own, bytes(PAGE))
    assert own not in masked(guest)[1]


def test_what_the_vmm_may_not_write_is_told_from_its_own(guest):
    below = memory_of(guest.host.ram)
    mapped = leaves.traverse(below, READERS[guest.slat.shape], guest.slat.register)
    found = backing.recover(below, mapped)
    assert found.recovered_bytes == 4 * PAGE
    assert {gpa + at for gpa, size, *_ in found.read_only.tolist() for at in range(0, size, PAGE)} == {
        28 * PAGE,
        30 * PAGE,
    }


@pytest.mark.parametrize("data", [0, 1])
def test_zero_pages_are_those_of_which_every_byte_is_zero(data):
    pages = bytearray(8 * PAGE)
    for number in (1, 4):
        pages[number * PAGE + (data and PAGE - 1)] = 1
    memory = HostMemory.from_bytes(bytes(pages))
    starts, ends = mask.zero_pages(memory, (np.array([0, 4 * PAGE]), np.array([3 * PAGE, 20 * PAGE])))
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [
        (0, PAGE), (2 * PAGE, 3 * PAGE), (5 * PAGE, 8 * PAGE)
    ]  # fmt: skip
