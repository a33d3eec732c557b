"""Recovery against hosts that the builder wrote, and against the real captures' ground truth."""

from __future__ import annotations

import gzip
import time

import captures
import discovered
import hypothesis
import numpy as np
import pytest
from builders import paging, vmm
from builders.paging import EPT_4, NPT_4, PAGE, Tables
from builders.vmm import CODE, DATA, NX, USER_4, USER_5, Guest, Host
from hypothesis import strategies as st
from readers import READERS, memory_of

from volatility3_ept.core import backing, hosttables, leaves, search, slots
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.dialect import State

M2, G1, G4 = 0x20_0000, 0x4000_0000, 0x1_0000_0000
LOW, HIGH = 0x7F12_3450_0000, 0x7F20_0000_3000
HVA = 0x7F00_0000_0000


@pytest.fixture
def guest():
    """A guest with two slots: 64 pages at 0, 32 at 4G, each at a distance of its own; three pages are lost."""
    host = Host()
    guest = Guest(host, host.process())
    guest.back(0, LOW, 64, lost=(1, 2, 40))
    guest.back(G4, HIGH, 32, lost=(7,))
    return guest


def mapping(guest: Guest, below: HostMemory) -> GuestMap:
    return leaves.traverse(below, READERS[guest.slat.shape], guest.slat.register)


def recovered(guest: Guest, *roots: int, others: tuple[Guest, ...] = (), **options) -> backing.Recovery:
    below = memory_of(guest.host.ram)
    maps = [mapping(other, below) for other in others]
    return backing.recover(below, mapping(guest, below), roots, others=maps, **options)


def pages(rows):
    """Stretches as page addresses, with the third column running along."""
    return {gpa + at: row[0] + at for gpa, length, *row in rows.tolist() for at in range(0, length, PAGE)}


def lacking(rows):
    return {gpa + at for gpa, length, *_ in rows.tolist() for at in range(0, length, PAGE)}


def layout(recovery):
    return [(slot.gpa, slot.length, slot.hva) for slot in recovery.slots]


def assert_complete(guest: Guest, recovery: backing.Recovery):
    """Every page of the truth is in the new map at its frame, and nothing else is."""
    gpas = np.array(sorted(guest.pages))
    assert recovery.guest_map.to_hpa(gpas).tolist() == [guest.pages[gpa] for gpa in gpas.tolist()]
    assert recovery.guest_map.mapped_bytes == len(guest.pages) * PAGE
    assert len(recovery.conflicts) == 0


def test_lost_pages_come_back_from_the_process_that_has_them(guest):
    found = recovered(guest)
    assert layout(found) == [(0, 64 * PAGE, LOW), (G4, 32 * PAGE, HIGH)]
    assert {slot.root for slot in found.slots} == {guest.vmm.root} == {found.root}
    assert [slot.matched for slot in found.slots] == [61 * PAGE, 31 * PAGE]
    lost = {gpa: guest.pages[gpa] for gpa in (PAGE, 2 * PAGE, 40 * PAGE, G4 + 7 * PAGE)}
    assert pages(found.recovered) == lost
    assert found.recovered_bytes == 4 * PAGE
    assert_complete(guest, found)
    below = memory_of(guest.host.ram)
    memory = found.guest_map.memory(below)
    assert all(memory.read(gpa, PAGE) == paging.stamp(gpa) for gpa in guest.pages)


def test_a_recovered_run_says_so_and_gives_the_guest_no_access(guest):
    runs = [run for run in recovered(guest).guest_map.runs() if run.state is State.RECOVERED]
    assert sorted(run.gpa for run in runs) == [PAGE, 2 * PAGE, 40 * PAGE, G4 + 7 * PAGE]
    assert {(run.access, run.page_size) for run in runs} == {(0, PAGE)}


@pytest.mark.parametrize("shape", [EPT_4, NPT_4], ids=["EPT", "NPT"])
@pytest.mark.parametrize("user", [USER_4, USER_5], ids=["4 levels", "5 levels"])
def test_a_host_of_either_depth(shape, user):
    host = Host(user)
    guest = Guest(host, host.process(), Tables(host.ram, shape))
    # Above 2^47 only five levels reach.
    base = LOW if user is USER_4 else 0x12_3456_0000_0000
    guest.back(0, base, 48, lost=(3, 4))
    found = recovered(guest)
    assert layout(found) == [(0, 48 * PAGE, base)]
    assert_complete(guest, found)


def test_host_cr3_is_tried_first_and_its_low_bits_are_ignored(guest):
    # No other root shares this kernel half: only the register leads there.
    guest.host.ram.write(guest.host.init_mm.root + 8 * vmm.KERNEL, bytes(8))
    assert recovered(guest).root is None
    assert recovered(guest, guest.vmm.root | 0x7).root == guest.vmm.root


def test_a_host_cr3_that_is_another_process_does_not_mislead(guest):
    other = guest.host.process()
    other.map(HVA, guest.host.ram.allocate())
    assert_complete(guest, recovered(guest, other.root, 0, 0xFFFF_FFFF_F000))


def test_page_table_isolation_gives_one_address_space_two_roots(guest):
    twin = guest.host.twin(guest.vmm)
    found = recovered(guest)
    assert_complete(guest, found)
    assert found.root in (guest.vmm.root, twin)


def test_the_encryption_bit_of_the_host_is_no_address(guest):
    for process in (guest.vmm, guest.host.init_mm):
        guest.host.encrypt(process, 1 << 47)
    assert recovered(guest).root is None
    assert_complete(guest, recovered(guest, key_bits=1 << 47))


@pytest.mark.parametrize("inverted", [True, False], ids=["inverted", "before L1TF"])
def test_prot_none_pages_are_resident(guest, inverted):
    hidden = (1, 5, 40)
    for number in hidden:
        hpa = guest.pages[number * PAGE]
        guest.vmm.put(LOW + number * PAGE, "PTE", vmm.protnone(hpa, inverted=inverted))
    found = recovered(guest)
    assert_complete(guest, found)
    assert found.protected == 2 * PAGE


@pytest.mark.parametrize(
    ("size", "how"),
    [(M2, "present"), (M2, "PROT_NONE"), (M2, "splitting"), (G1, "present"), (G1, "PROT_NONE")],
)
def test_large_pages_of_the_host(size, how):
    host = Host()
    guest = Guest(host, host.process())
    hpa = guest.large(size, HVA, size, in_slat=range(8, 500))
    guest.slat.map(2 * size - PAGE, hpa + size - PAGE)
    guest.slat.map(size, hpa)
    entries = {"present": hpa | DATA | 0x80, "PROT_NONE": vmm.protnone(hpa, size), "splitting": vmm.splitting(hpa)}
    guest.vmm.put(HVA, "PDE" if size == M2 else "PDPTE", entries[how])
    found = recovered(guest)
    assert layout(found) == [(size, size, HVA)]
    assert found.guest_map.to_hpa(np.arange(size, 2 * size, PAGE)).tolist() == list(range(hpa, hpa + size, PAGE))
    assert found.recovered_bytes == size - 494 * PAGE
    assert found.protected == (0 if how == "present" else found.recovered_bytes)


def test_a_large_page_that_straddles_the_end_of_a_slot_gives_nothing_beyond(guest):
    """The real captures: one 2M page backs 0 to 2M, and the slot ends at 640K."""
    guest.large(0x1000_0000, HVA, M2, in_slat=range(0x90))
    found = recovered(guest)
    assert layout(found)[1] == (0x1000_0000, 0x90 * PAGE, HVA)


def test_what_is_not_resident_is_named_and_not_recovered(guest):
    ram = guest.host.ram
    old = ram.allocate()
    top_of_memory = ram.allocate()
    entries = {
        1: vmm.swap(0, 0x1234),
        2: vmm.swap(1, 0x55, low=0xE),
        40: vmm.migrating(old),
        10: vmm.swap(31, 1),
        11: vmm.migrating(top_of_memory + 0x100 * PAGE, kind=27),
        12: 0,
    }
    for number, entry in entries.items():
        guest.vmm.put(LOW + number * PAGE, "PTE", entry)
        guest.slat.put(number * PAGE, "PTE", 0)
    found = recovered(guest)
    assert found.swapped.tolist() == [[PAGE, 2 * PAGE, LOW + PAGE]]
    assert found.migrating.tolist() == [[40 * PAGE, PAGE, old, LOW + 40 * PAGE]]
    assert found.elsewhere.tolist() == [[10 * PAGE, 2 * PAGE, LOW + 10 * PAGE]]
    assert found.never_backed.tolist() == [[12 * PAGE, PAGE]]
    assert lacking(found.recovered) == {G4 + 7 * PAGE}


def test_a_large_page_on_its_way_is_migrating_as_a_whole(guest):
    hpa = guest.host.ram.reserve(M2)
    guest.host.ram.page(hpa + M2)
    guest.back(M2, HVA, 4)
    guest.back(3 * M2, HVA + 2 * M2, 4)
    guest.vmm.put(HVA + M2, "PDE", vmm.migrating(hpa))
    found = recovered(guest)
    assert found.migrating.tolist() == [[2 * M2, M2, hpa, HVA + M2]]


def test_a_table_of_the_host_that_is_not_in_the_capture_says_nothing(guest):
    """Unreadable is not absent: what it would have held was never called unbacked."""
    for number in range(0x2000, 0x2400):
        if number % 0x200 in (0, 0x1FF):
            guest.back(number * PAGE, HVA + number * PAGE)
    guest.host.ram.drop(guest.vmm.entry_address(HVA + 0x2200 * PAGE, "PTE"))
    guest.back(0x2400 * PAGE, HVA + 0x2400 * PAGE)
    found = recovered(guest)
    assert found.unreadable.tolist() == [[0x2201 * PAGE, 0x1FE * PAGE]]
    assert found.never_backed.tolist() == [[0x2001 * PAGE, 0x1FE * PAGE]]


def test_what_epts_own_page_says_wins_over_a_swap_entry(guest):
    guest.vmm.put(LOW + 9 * PAGE, "PTE", vmm.swap(0, 99))
    assert len(recovered(guest).swapped) == 0


def test_where_the_tables_disagree_ept_wins_and_it_is_said(guest):
    wrong = guest.host.ram.allocate()
    guest.vmm.map(LOW + 9 * PAGE, wrong)
    found = recovered(guest)
    assert found.conflicts.tolist() == [[9 * PAGE, PAGE, guest.pages[9 * PAGE], wrong]]
    assert found.guest_map.to_hpa(np.array([9 * PAGE])).tolist() == [guest.pages[9 * PAGE]]
    assert any("wins" in note for note in found.notes)


def test_two_guests_of_one_process_do_not_mix(guest):
    other = Guest(guest.host, guest.vmm)
    other.back(0, HVA, 64, lost=(1, 33))
    other.back(G4, LOW + 64 * PAGE, 32, lost=(3,))
    for each in (guest, other):
        assert_complete(each, recovered(each))


def test_two_processes_with_a_guest_each(guest):
    other = Guest(guest.host, guest.host.process())
    other.back(0, LOW, 64, lost=(1, 2))
    first, second = recovered(guest), recovered(other)
    assert (first.root, second.root) == (guest.vmm.root, other.vmm.root)
    assert_complete(guest, first)
    assert_complete(other, second)


def test_one_slot_that_the_process_maps_twice(guest):
    """QEMU and its own helper thread's view; a memory file mapped again for migration."""
    for number in range(64):
        guest.vmm.map(HVA + number * PAGE, guest.pages[number * PAGE])
    found = recovered(guest)
    assert_complete(guest, found)
    assert layout(found)[0] in [(0, 64 * PAGE, LOW), (0, 64 * PAGE, HVA)]


def test_firmware_that_the_guest_sees_at_two_places(guest):
    """A BIOS below 1M and below 4G: one mapping of the process, two slots; both have pages that EPT lacks."""
    rom = HVA
    for number in range(16):
        hpa = guest.host.ram.allocate()
        guest.page(0xF_0000 + number * PAGE, rom + number * PAGE, hpa, in_slat=number != 5)
        guest.pages[0xFFFF_0000 + number * PAGE] = hpa
        if number in (0, 15):
            guest.slat.map(0xFFFF_0000 + number * PAGE, hpa)
    found = recovered(guest)
    assert (0xF_0000, 16 * PAGE, rom) in layout(found)
    assert (0xFFFF_0000, 16 * PAGE, rom) in layout(found)
    assert_complete(guest, found)


def test_decoys(guest):
    """Other processes that map frames of the guest: some, scattered; all memory at a constant place; and the kernel."""
    ram = guest.host.ram
    scattered = guest.host.process()
    for number, hpa in enumerate(list(guest.pages.values())[::2]):
        scattered.map(HVA + 0x10 * number * PAGE, hpa)
    device = guest.host.process()
    for hpa in range(0, max(ram.pages), PAGE):
        device.map(HVA + hpa, hpa)
    guest.host.map_everything()
    found = recovered(guest)
    assert found.root == guest.vmm.root
    assert_complete(guest, found)


def test_a_helper_that_maps_only_one_slot_is_not_preferred(guest):
    helper = guest.host.process()
    for number in range(64):
        helper.map(HVA + number * PAGE, guest.pages[number * PAGE])
    assert recovered(guest).root == guest.vmm.root


def test_shared_frames_do_not_disturb(guest):
    """KSM and the zero page: one frame at many guest pages and at many places of every process."""
    ram = guest.host.ram
    zero, merged = ram.allocate(), ram.allocate()
    for number in range(3, 30):
        guest.page(number * PAGE, LOW + number * PAGE, zero, in_slat=number % 9 != 0)
    for number in (50, 51, 52):
        guest.page(number * PAGE, LOW + number * PAGE, merged, in_slat=number != 51)
    for process in (guest.vmm, guest.host.process()):
        for number in range(600):
            process.map(HVA + number * PAGE, merged if number % 7 == 0 else zero)
    found = recovered(guest)
    assert layout(found) == [(0, 64 * PAGE, LOW), (G4, 32 * PAGE, HIGH)]
    assert_complete(guest, found)
    assert any("over and over" in note for note in found.notes)


def test_a_marker_ends_a_slot(guest):
    """Device memory between two slots of one distance: the process may well have a page there."""
    for number in (0x1000, 0x1100):
        guest.back(number * PAGE, LOW + number * PAGE, 8)
    guest.slat.put(0x1080 * PAGE, "PTE", 0x1080 * PAGE | 0x6)
    guest.vmm.map(LOW + 0x1081 * PAGE, guest.host.ram.allocate())
    found = recovered(guest)
    assert [gpa for gpa, _, _ in layout(found)] == [0, 0x1000 * PAGE, 0x1100 * PAGE, G4]
    assert_complete(guest, found)


def test_the_legacy_video_window_is_memory_only_where_ept_says_so(guest):
    guest.back(0x9F * PAGE, LOW + 0x9F * PAGE)
    guest.back(0x100 * PAGE, LOW + 0x100 * PAGE, 8)
    secret = guest.host.ram.allocate()
    guest.vmm.map(LOW + 0xA5 * PAGE, secret)
    assert_complete(guest, recovered(guest))
    guest.back(0xB8 * PAGE, LOW + 0xB8 * PAGE)
    assert recovered(guest).guest_map.to_hpa(np.array([0xA5 * PAGE])).tolist() == [secret]


def test_another_slot_in_between_is_not_crossed(guest):
    """Two slots of one distance, and between them in the process a third one, which the guest sees elsewhere."""
    for number in (0x1000, 0x1300):
        guest.back(number * PAGE, LOW + number * PAGE, 8)
    guest.back(0x900_0000, LOW + 0x1200 * PAGE, 64, lost=(7,))
    found = recovered(guest)
    assert [gpa for gpa, _, _ in layout(found)] == [0, 0x1000 * PAGE, 0x1300 * PAGE, 0x900_0000, G4]
    assert_complete(guest, found)


def test_a_slot_whose_pages_mostly_disagree_is_not_believed(guest):
    """Two frames match by accident at one distance; what lies between them in the process is not the guest's."""
    start = 0x1000 * PAGE
    guest.back(start, HVA, 7)
    for number in range(1, 6):
        guest.vmm.map(HVA + number * PAGE, guest.host.ram.allocate())
    del guest.pages[start + 3 * PAGE]
    guest.slat.put(start + 3 * PAGE, "PTE", 0)
    found = recovered(guest)
    assert [gpa for gpa, _, _ in layout(found)] == [0, G4]
    assert_complete(guest, found)
    assert any("not believed" in note for note in found.notes)


def test_a_page_closed_to_user_mode_is_not_the_vmms(guest):
    guest.vmm.map(LOW + PAGE, guest.pages.pop(PAGE), bits=NX | 0x63)
    found = recovered(guest)
    assert_complete(guest, found)
    assert lacking(found.never_backed) == {PAGE}


def test_only_the_lower_half_of_an_address_space_is_read(guest):
    upper = 0xFFFF_8000_0000_0000
    for gpa, hpa in guest.pages.items():
        guest.vmm.map(upper + gpa, hpa)
    chunks = hosttables.flatten(
        memory_of(guest.host.ram), ia32e.four_level(), guest.vmm.root, lambda tables: tables > 0
    )
    hvas = np.concatenate([chunk.hvas for chunk in chunks])
    assert sorted(hvas.tolist()) == [LOW + n * PAGE for n in range(64)] + [HIGH + n * PAGE for n in range(32)]


def test_code_within_a_slot_is_the_processs_own(guest):
    for number in (1, 2):
        guest.vmm.map(LOW + number * PAGE, guest.pages.pop(number * PAGE), bits=CODE)
    found = recovered(guest)
    assert_complete(guest, found)
    assert any("another mapping" in note for note in found.notes)
    assert lacking(found.never_backed) == set()


def test_tables_that_the_guest_forges_in_its_own_memory_are_not_followed(guest):
    """A guest writes top tables with the host's kernel half, whose lower half offers its pages with a host page."""
    ram, host = guest.host.ram, guest.host
    secret = ram.allocate()
    for number in range(4):
        ram.write(guest.pages[(20 + number) * PAGE], bytes(PAGE))
        fake = host.process(root=guest.pages[(20 + number) * PAGE])
        for gpa, hpa in guest.pages.items():
            fake.map(HVA + number * 64 * G1 + gpa, secret if gpa == PAGE else hpa)
    # Better than the VMM's, of which two pages were swapped out.
    for number in (30, 31):
        guest.vmm.put(LOW + number * PAGE, "PTE", vmm.swap(0, number))
    found = recovered(guest)
    assert found.root == guest.vmm.root
    assert_complete(guest, found)


def test_what_another_guest_forges_is_not_followed_either(guest):
    """It knows this guest's frames, say, and writes tables that map them all, and a host page where one is lost."""
    other = Guest(guest.host, guest.host.process())
    other.back(0, HVA, 64)
    ram, secret = guest.host.ram, guest.host.ram.allocate()
    own = iter(list(other.pages.values()))

    def of_its_own():
        ram.write(page := next(own), bytes(PAGE))
        return page

    allocate, ram.allocate = ram.allocate, of_its_own
    fake = guest.host.process(root=of_its_own())
    for gpa, hpa in guest.pages.items():
        fake.map(HVA + gpa, secret if gpa == PAGE else hpa)
    ram.allocate = allocate
    for number in (30, 31):
        guest.vmm.put(LOW + number * PAGE, "PTE", vmm.swap(0, number))
    assert recovered(guest).root == fake.root
    found = recovered(guest, others=(other,))
    assert found.root == guest.vmm.root
    assert_complete(guest, found)


def test_tables_that_name_each_other_end(guest):
    """Every entry of four tables leads to the next one, the last to the first."""
    ram = guest.host.ram
    loop = [ram.allocate() for _ in range(4)]
    for here, there in zip(loop, loop[1:] + loop[:1], strict=True):
        ram.write(here, (there | 0x67).to_bytes(8, "little") * 512)
    bad = guest.host.process()
    for index in range(256):
        ram.write_entry(bad.root + 8 * index, loop[0] | 0x67)
    assert_complete(guest, recovered(guest))


def test_too_many_tables_are_weighed_in_halves(guest, monkeypatch):
    monkeypatch.setattr(hosttables, "MAX_TABLES", 8)
    for _ in range(12):
        other = guest.host.process()
        for number in range(3):
            other.map(HVA + number * G1, guest.host.ram.allocate())
    assert_complete(guest, recovered(guest))


def test_what_is_cut_short_is_noted(guest, monkeypatch):
    monkeypatch.setattr(hosttables, "MAX_TABLES_ALONE", 1)
    assert any("too many tables" in note for note in recovered(guest).notes)
    monkeypatch.undo()
    monkeypatch.setattr(hosttables, "MAX_CANDIDATES", 1)
    for _ in range(3):
        guest.host.process()
    notes = recovered(guest).notes
    assert any("look like top tables" in note for note in notes)
    monkeypatch.undo()
    monkeypatch.setattr(hosttables, "MAX_ROOTS", 1)
    guest.host.process().map(HVA, guest.host.ram.allocate())
    assert any("2 address spaces; 1 were looked into" in note for note in recovered(guest).notes)
    monkeypatch.setattr(slots, "MAX_SLOTS", 1)
    monkeypatch.setattr(hosttables, "MAX_ROOTS", 9)
    assert any("more than 1 slots" in note for note in recovered(guest).notes)


def test_without_a_vmm_nothing_is_claimed(guest):
    guest.host.ram.write(guest.vmm.root, bytes(2048))
    found = recovered(guest)
    assert (found.root, found.slots, found.recovered_bytes) == (None, (), 0)
    assert found.notes[-1] == "none of 0 address spaces of the host maps this guest's frames"
    assert found.guest_map.mapped_bytes == 92 * PAGE


def test_a_guest_that_maps_nothing():
    host = Host()
    found = recovered(Guest(host, host.process()))
    assert (found.root, len(found.guest_map)) == (None, 0)
    assert "maps nothing" in found.notes[0]


def test_a_capture_without_memory():
    nothing = HostMemory.from_bytes(b"")
    one = np.array([0x1000], dtype=np.int64)
    assert backing.recover(nothing, GuestMap(one, one, one)).root is None


def test_frames_at_countless_distances_are_a_nested_guests(guest):
    """The outer VMM maps an inner guest's frames too: page by page elsewhere. Its slots would be invented."""
    inner = Tables(guest.host.ram, EPT_4)
    for number in range(60):
        inner.map(number * PAGE, guest.pages[(number * 37 % 61 + 3) % 64 * PAGE])
    below = memory_of(guest.host.ram)
    found = backing.recover(below, leaves.traverse(below, READERS[EPT_4], inner.register))
    assert found.slots == ()


@pytest.mark.parametrize("words", [8, 9, 10], ids=["before v4.7", "with page tracking", "one more"])
def test_kvms_own_record_gives_a_slot_its_bounds(guest, words):
    """EPT has lost the first and the last pages: votes alone do not reach there."""
    host = guest.host
    for number in (0, 62, 63):
        guest.slat.put(number * PAGE, "PTE", 0)
    host.record(0, 80 * PAGE, LOW, words, flags=1)
    alone, found = recovered(guest, confirm=False), recovered(guest)
    assert layout(alone)[0] == (3 * PAGE, 59 * PAGE, LOW + 3 * PAGE)
    assert layout(found)[0] == (0, 80 * PAGE, LOW)
    assert [slot.confirmed for slot in found.slots] == [True, False]
    assert_complete(guest, found)
    assert found.never_backed.tolist() == [[64 * PAGE, 16 * PAGE]]
    assert any("1 of 2 slots" in note for note in found.notes)


def test_records_part_what_one_distance_joins(guest):
    """Without a marker between them, two slots of one distance look like one."""
    guest.back(0x100 * PAGE, LOW + 0x100 * PAGE, 8)
    guest.vmm.map(LOW + 0x50 * PAGE, guest.host.ram.allocate())
    guest.host.record(0, 64 * PAGE, LOW)
    guest.host.record(0x100 * PAGE, 8 * PAGE, LOW + 0x100 * PAGE, number=2)
    found = recovered(guest)
    assert layout(found)[:2] == [(0, 64 * PAGE, LOW), (0x100 * PAGE, 8 * PAGE, LOW + 0x100 * PAGE)]
    assert_complete(guest, found)


def test_a_smaller_record_of_an_older_slot_is_passed_over(guest):
    guest.host.record(0, 16 * PAGE, LOW)
    guest.host.record(0, 64 * PAGE, LOW)
    guest.host.record(0, 512 * PAGE, LOW)
    assert layout(recovered(guest, confirm=True))[0] == (0, 64 * PAGE, LOW)


def false_record(host, what):
    at = host.record(0, 80 * PAGE, LOW)
    if what == "no pointers":
        host.ram.write(at + 40, bytes(32))
    elif what == "user pointers":
        host.ram.write_entry(at + 40, LOW)
    elif what == "odd flags":
        host.ram.write_entry(at + 80, 0x202)
    elif what == "no pages":
        host.ram.write_entry(at + 8, 0)
    elif what == "another distance":
        host.ram.write_entry(at, 1)


@pytest.mark.parametrize("what", ["no pointers", "user pointers", "odd flags", "no pages", "another distance"])
def test_words_that_are_no_record(guest, what):
    false_record(guest.host, what)
    assert layout(recovered(guest)) == layout(recovered(guest, confirm=False))


def stray(guest, number):
    """Let one guest page match by accident, elsewhere in the process, and not where it belongs."""
    guest.vmm.map(0x1000_0000 + number * 3 * PAGE, guest.pages[number * PAGE])
    guest.vmm.put(LOW + number * PAGE, "PTE", 0)


def test_a_stray_match_splits_a_slot_unless_a_record_joins_it(guest):
    stray(guest, 39)
    parted = recovered(guest)
    assert [gpa for gpa, _, _ in layout(parted)] == [0, 39 * PAGE, 41 * PAGE, G4]
    assert 40 * PAGE not in lacking(parted.recovered), "next to a match at another distance, nothing is certain"
    guest.host.record(0, 64 * PAGE, LOW)
    found = recovered(guest)
    assert layout(found) == [(0, 64 * PAGE, LOW), (G4, 32 * PAGE, HIGH)]
    assert_complete(guest, found)


def test_a_marker_within_a_record_keeps_the_slot_to_its_matches(guest):
    """A stale marker, or a stale record: what was matched on either side remains."""
    guest.back(0x100 * PAGE, LOW + 0x100 * PAGE, 8)
    guest.slat.put(0x90 * PAGE, "PTE", 0x90 * PAGE | 0x6)
    guest.host.record(0, 0x200 * PAGE, LOW)
    found = recovered(guest)
    assert [slot.confirmed for slot in found.slots] == [False] * 3
    assert_complete(guest, found)


def test_two_records_that_overlap_cannot_both_be_true(guest):
    guest.host.record(0, G4 + 32 * PAGE, LOW)
    guest.host.record(G4, 32 * PAGE, HIGH)
    found = recovered(guest)
    assert [slot.confirmed for slot in found.slots] == [True]
    assert found.slots[0].matched == 61 * PAGE


def test_a_record_that_the_guest_forges_is_not_read(guest):
    at = guest.host.record(0, 80 * PAGE, LOW)
    forged = bytes(guest.host.ram.page(at))
    guest.host.ram.write(at & -PAGE, bytes(PAGE))
    guest.host.ram.write(guest.pages[0], forged)
    assert not recovered(guest).slots[0].confirmed


@hypothesis.settings(max_examples=25, derandomize=True, deadline=None, database=None)
@hypothesis.given(st.data())
def test_any_layout_of_slots_comes_back(data):
    host = Host()
    guest = Guest(host, host.process())
    gpa, places = 0x100 * PAGE, [LOW, HIGH, HVA, 0x1000_0000]
    lost_all = {}
    for index in range(data.draw(st.integers(1, 4))):
        gpa += data.draw(st.integers(0, 600)) * PAGE
        count = data.draw(st.integers(8, 90))
        inner = data.draw(st.sets(st.integers(1, count - 2), max_size=count // 3))
        hva = places[index] + data.draw(st.integers(0, 0x1000)) * PAGE
        guest.back(gpa, hva, count, lost=tuple(inner))
        lost_all |= {gpa + at * PAGE: guest.pages[gpa + at * PAGE] for at in inner}
        gpa += count * PAGE
    found = recovered(guest)
    assert pages(found.recovered) == lost_all
    assert_complete(guest, found)


def test_inverse_layers_hold_every_alias_up_to_the_limit():
    gpas = np.arange(0, 9) * M2
    hpas = np.array([0, 0x1000, 0x1000, 0x3000, 0x3000, 0x3000, 0x3000, 0x3000, 0x8000])
    lengths = np.array([0x1000, 0x1000, 0x1000, *[0x1000] * 5, 0x3000])
    inverse = slots.Inverse.of(GuestMap(gpas, lengths, hpas))
    assert inverse.shared == 0x1000
    assert inverse.votes == 0x6000
    rows = {(s, e, g) for layer in inverse.layers for s, e, g in zip(*(c.tolist() for c in layer), strict=True)}
    assert rows == {(0, 0x1000, 0), (0x1000, 0x2000, M2), (0x1000, 0x2000, 2 * M2), (0x8000, 0xB000, 8 * M2)}
    assert inverse.frames.bytes_in(np.array([0, 0x1000, 0x2000, 0x9000]), PAGE).tolist() == [PAGE, PAGE, 0, PAGE]
    assert inverse.frames.bytes_in(np.array([0, 0x20_0000]), M2).tolist() == [0x5000, 0]


def test_a_large_guest_of_scattered_pages_is_matched_without_a_loop():
    """A gigabyte of 4K pages: seconds would mean a Python loop."""
    count = 1 << 18
    rng = np.random.default_rng(5)
    hpas = rng.permutation(count) * PAGE + G4
    gpas = np.arange(count) * PAGE
    guest_map = GuestMap(gpas, np.full(count, PAGE), hpas)
    chunks = (
        hosttables.Leaves(
            PAGE, gpas[at : at + M2] + HVA, hpas[at : at + M2], np.ones(min(M2, count), np.uint8), None, None
        )
        for at in range(0, count, M2)
    )
    start = time.perf_counter()
    found = slots.match(chunks, slots.Inverse.of(guest_map))
    assert time.perf_counter() - start < 3
    assert (found.bytes, found.distances.tolist()) == (count * PAGE, [HVA])


def machine_of(name, truth):
    """The machine that a guest's truth is about, and its resident pages: addresses and frames."""
    gpas = np.array(sorted(truth.pages))
    hpas = np.array([truth.pages[gpa][0] << 12 for gpa in gpas.tolist()])
    machine = max(discovered.guests(name), key=lambda m: int((m.guest_map.to_hpa(gpas) == hpas).sum()))
    return machine, gpas, hpas


def slots_of(truth):
    return sorted((int(s["gpa"], 0), int(s["size"], 0), int(s["hva"], 0)) for s in truth.facts["memslots"])


@pytest.mark.parametrize("name", captures.every())
def test_every_resident_page_of_a_real_guest(name):
    for truth in [truth for truth in captures.get(name).guests if truth.facts["level"] == 2]:
        machine, gpas, hpas = machine_of(name, truth)
        found = discovered.recovery(name, machine.id)
        assert found.guest_map.to_hpa(gpas).tolist() == hpas.tolist()
        assert lacking(found.recovered) == set(gpas[machine.guest_map.to_hpa(gpas) < 0].tolist())
        assert len(found.conflicts) == 0
        assert layout(found) == slots_of(truth)
        assert all(slot.confirmed for slot in found.slots)


def test_the_vmcs_of_a_real_guest_leads_to_its_vmm():
    below, discovery = discovered.capture("kvm-ept")
    (machine,) = discovery.machines
    cr3 = [vcpu.fields["HOST_CR3"] for vcpu in machine.vcpus]
    found = backing.recover(below, machine.guest_map, cr3)
    assert found.root == cr3[0] & ~0xFFF
    assert (found.recovered == discovered.recovery("kvm-ept", machine.id).recovered).all()


NESTED = [param for param in captures.every() if "nested" in param.id]


@pytest.mark.parametrize("name", NESTED)
def test_a_nested_guest_in_recovered_memory(name):
    """The middle guest's NPT lacks the pages around the inner tables: only with them the inner guest is found whole."""
    capture = captures.get(name)
    below, discovery = discovered.capture(name)
    outer = max(discovery.machines, key=lambda machine: machine.guest_map.mapped_bytes)
    middle = discovered.recovery(name, outer.id).guest_map.memory(below)
    (machine,) = search.discover(middle).machines
    found = backing.recover(middle, machine.guest_map)
    (truth,) = [truth for truth in capture.guests if truth.facts["level"] == 3]
    with gzip.open(truth.folder / truth.facts["pages_in_parent_file"], "rt") as lines:
        rows = [line.split("\t") for line in lines if not line.startswith("#")]
    gpas = np.array([int(row[0], 0) for row in rows])
    assert found.guest_map.to_hpa(gpas).tolist() == [int(row[1], 0) << 12 for row in rows]
    assert layout(found) == slots_of(truth)


@pytest.mark.parametrize("name", captures.committed(guests=1))
def test_the_committed_captures_lack_125_pages(name):
    below, discovery = discovered.capture(name)
    (machine,) = discovery.machines
    # What the page tables alone say; KVM's records agree (above).
    found = backing.recover(below, machine.guest_map, confirm=False)
    assert found.recovered_bytes == 125 * PAGE
    assert not any(slot.confirmed for slot in found.slots)
    assert layout(found) == slots_of(captures.get(name).guests[0])
    memory = found.guest_map.memory(below)
    assert any(memory.read(PAGE, PAGE))
    assert not any(memory.read(gpa, PAGE).strip(b"\0") for gpa in lacking(found.recovered) - {PAGE})
