"""What a guest can plant beside the host's own tables: no page of another's may come back as its own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders.paging import EPT_4, PAGE
from builders.vmm import DATA, Guest, Host
from readers import READERS, memory_of

from volatility3_ept.core import backing, hosttables, leaves
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.spec import ia32e

LOW, HIGH = 0x7F12_3450_0000, 0x7F20_0000_3000


def mapping(guest: Guest) -> GuestMap:
    return leaves.traverse(memory_of(guest.host.ram), READERS[EPT_4], guest.slat.register)


@pytest.fixture
def pair() -> tuple[Guest, Guest]:
    """Two guests of one host, each with a process, and with a page that its EPT has lost."""
    host = Host()
    first, second = Guest(host, host.process()), Guest(host, host.process())
    first.back(0, LOW, 64, lost=(1, 2))
    second.back(0, HIGH, 64, lost=(3,))
    return first, second


def recovered(guest: Guest, other: Guest, *roots: int) -> backing.Recovery:
    return backing.recover(memory_of(guest.host.ram), mapping(guest), roots, others=[mapping(other)])


def frames(recovery: backing.Recovery) -> set[int]:
    return {hpa + at for _, length, hpa, _ in recovery.recovered.tolist() for at in range(0, length, PAGE)}


def test_a_page_of_another_guest_is_not_recovered(pair):
    """Tables of a process, forged or not, that put another guest's page into a gap of this one."""
    first, second = pair
    theirs = second.pages[5 * PAGE]
    first.vmm.put(LOW + PAGE, "PTE", theirs | DATA)
    found = recovered(first, second)
    assert theirs not in frames(found)
    assert frames(found) == {first.pages[2 * PAGE]}
    assert found.guest_map.to_hpa([PAGE]).tolist() == [-1]
    assert "0x1000 bytes lie in frames of another guest, open to writing: left out" in found.notes
    again = backing.again(memory_of(first.host.ram), mapping(first), found.slots, others=[mapping(second)])
    assert frames(again) == frames(found)


def test_a_page_that_guests_share_by_right_is_recovered(pair):
    """KSM merges equal pages: every process maps them, none may write."""
    first, second = pair
    shared = second.pages[5 * PAGE]
    first.vmm.put(LOW + PAGE, "PTE", shared | DATA & ~2)
    found = recovered(first, second)
    assert found.guest_map.to_hpa([PAGE]).tolist() == [shared]
    assert not any("another guest" in note for note in found.notes)


def test_only_the_part_of_a_stretch_that_is_anothers_is_left_out(pair):
    first, second = pair
    theirs = second.pages[5 * PAGE]
    first.vmm.put(LOW + PAGE, "PTE", theirs - PAGE | DATA)
    first.vmm.put(LOW + 2 * PAGE, "PTE", theirs | DATA)
    assert {theirs - PAGE, theirs}.isdisjoint(frames(recovered(first, second)))


def test_tables_in_a_guests_memory_are_no_process_of_the_host(pair):
    """The attacker knows everything: its pages' frames, the kernel's table, the victim's frames."""
    first, second = pair
    ram = first.host.ram
    own = [first.pages[gpa] for gpa in (8 * PAGE, 9 * PAGE, 10 * PAGE, 11 * PAGE)]
    for page in own:
        ram.write(page, bytes(PAGE))
    for above, below in itertools.pairwise(own):
        ram.write_entry(above, below | 0x67)
    for index in (511, 273):
        ram.write_entry(own[0] + 8 * index, ram.read_entry(first.vmm.root + 8 * index))
    for number, gpa in enumerate(sorted(first.pages)):
        ram.write_entry(own[3] + 8 * number, first.pages[gpa] | DATA)
    for number in range(100, 164):
        ram.write_entry(own[3] + 8 * number, second.pages[(number - 100) * PAGE] | DATA)
    found = recovered(first, second, own[0])
    assert found.root == first.vmm.root
    assert frames(found) == {first.pages[PAGE], first.pages[2 * PAGE]}


def test_a_record_of_slots_in_a_guests_memory_is_not_read(pair):
    """It would stretch the guest over all that its process maps."""
    first, second = pair
    page = first.pages[20 * PAGE]
    record = [0, 1 << 20, 0, 0, 0, *[0xFFFF_8880_0123_4000] * 4, LOW, 1 << 32]
    for number, word in enumerate(record):
        first.host.ram.write_entry(page + 0x1C8 + 8 * number, word)
    assert not any(slot.confirmed for slot in recovered(first, second).slots)


def test_a_guest_whose_every_frame_is_one_frame_has_no_monitor():
    """512 addresses, one page: no frame says where it belongs, and nothing is guessed."""
    host = Host()
    guest = Guest(host, host.process())
    page = host.ram.allocate()
    for number in range(64):
        guest.slat.map(number * PAGE, page)
    guest.vmm.put(LOW, "PTE", page | DATA)
    found = backing.recover(memory_of(host.ram), mapping(guest), [guest.vmm.root])
    assert found.slots == ()
    assert found.notes[-1] == "the guest maps nothing that leads to its VMM"


def test_top_tables_by_the_thousand_do_not_hide_the_real_process(pair, monkeypatch):
    """They lie below the host's in nobody's memory, and share a kernel of their own."""
    monkeypatch.setattr(hosttables, "MAX_CANDIDATES", 60)
    first, second = pair
    ram = first.host.ram
    kernel = ram.allocate()
    ram._next, after = 0x1000, ram._next
    for number in range(200):
        root = ram.allocate()
        ram.write_entry(root, (0x1000 * (number + 1)) | 0x67)
        ram.write_entry(root + 8 * 511, kernel | 0x63)
    ram._next = after
    found = recovered(first, second)
    assert found.root == first.vmm.root
    assert any("pages look like top tables; 60 were compared" in note for note in found.notes)


def test_weighing_stops_when_too_many_tables_were_read(pair, monkeypatch):
    """The processes that come first are weighed, the others are not, and are known as such."""
    monkeypatch.setattr(hosttables, "MAX_TABLES_READ", 1)
    monkeypatch.setattr(hosttables, "GROUP", 1)
    first, second = pair
    frames_of_first = hosttables.Frames(*mapping(first).frame_ranges())
    roots = np.array([first.vmm.root, second.vmm.root] * 800, dtype=np.int64)
    weights = hosttables.weigh(memory_of(first.host.ram), ia32e.four_level(), roots, frames_of_first, lambda t: t > 0)
    assert weights[0] == 62 * PAGE
    assert weights[-1] == -1
