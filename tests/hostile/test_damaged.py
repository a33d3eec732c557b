"""Captures cut, flipped, emptied, shifted, holed or smeared: no crash, and no page that is silently another's.

The oracle is the ground truth of the real captures (``oracle.py``).
"""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from builders import damage
from builders.paging import PAGE
from hostile import oracle

import volatility3_ept
from volatility3_ept.api import CaptureError

NAMES = pytest.mark.parametrize("name", oracle.NAMES)
SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])


@pytest.fixture
def known(name) -> oracle.Truth:
    return oracle.truth(name)


@NAMES
def test_the_oracle_finds_nothing_wrong_with_a_whole_capture(known):
    _, found = oracle.searched(known.data, known.segments)
    assert oracle.assert_true_or_stated(found, known) >= 0.99 * known.pages[0].size


# Flipped bits.


def table_places(known: oracle.Truth) -> list[tuple[int, int]]:
    return [(damage.offset_of(known.segments, table), PAGE) for level in known.tables for table in level]


@NAMES
@SEEDS
def test_flipped_bits_in_the_tables(known, seed):
    """An entry may now lead to another's page: the host's own tables then disagree, and the result says so."""
    data = bytearray(known.data)
    used = [
        (at + 8 * n, 8) for at, _ in table_places(known) for n in range(512) if any(data[at + 8 * n : at + 8 * n + 8])
    ]
    damage.flipped(data, used, seed, 40)
    _, found = oracle.searched(data, known.segments)
    equal = oracle.assert_true_or_stated(found, known)
    if found.machines:
        assert equal > 0


@NAMES
@SEEDS
def test_flipped_bits_in_the_control_structure(known, seed):
    data = bytearray(known.data)
    damage.flipped(data, [(damage.offset_of(known.segments, known.structure), PAGE)], seed, 64)
    _, found = oracle.searched(data, known.segments)
    assert oracle.guest_of(found, known) is not None, "the page tables give it away"
    assert oracle.assert_true_or_stated(found, known) >= 0.99 * known.pages[0].size


@NAMES
def test_flipped_bits_everywhere(known):
    """A thousand in a hundred megabytes: pages are damaged, none changes its owner in silence."""
    data = bytearray(known.data)
    damage.flipped(data, [(offset, length) for _, length, offset in known.segments], 7, 1000)
    _, found = oracle.searched(data, known.segments)
    # Many pages of the guest are one page in the file: a single bit damages them all.
    assert oracle.assert_true_or_stated(found, known) >= 0.7 * known.pages[0].size


@NAMES
@SEEDS
def test_flipped_bits_in_the_headers_of_the_file(known, seed, tmp_path):
    """Either the file is no capture, or truncated, or what is found lies where the headers say: never a traceback."""
    data = bytearray(known.data)
    damage.flipped(data, [(0, 64 + 56 * len(known.segments))], seed, 3)
    opened(tmp_path, data)


# Zeros and holes.


@NAMES
@SEEDS
def test_stretches_of_zeros(known, seed):
    data = bytearray(known.data)
    damage.emptied(data, 16 * PAGE, seed, 100, first=PAGE)
    _, found = oracle.searched(data, known.segments)
    oracle.assert_true_or_stated(found, known)


@NAMES
@pytest.mark.parametrize("level", range(4))
def test_a_table_of_each_level_that_is_missing(known, level):
    """Unreadable is not absent: the map names the table that the capture lacks."""
    gone = random.Random(level).choice(known.tables[level])
    _, found = oracle.searched(known.data, damage.without(known.segments, [gone]))
    oracle.assert_true_or_stated(found, known)
    machine = oracle.guest_of(found, known)
    if level > 1:
        assert machine is not None
        assert gone in machine.guest_map.findings.unreadable[:, 2]
    else:
        # Nothing can be reached without it: no machine, and the candidate says what it lacks.
        assert machine is None
        details = [item.detail for candidate in found.rejected for item in candidate.evidence]
        assert any("is not in the capture" in text or "1 tables unreadable" in text for text in details)


@pytest.mark.slow
@NAMES
def test_every_second_page_is_missing(known):
    pages = [page for start, length, _ in known.segments for page in range(start, start + length, 2 * PAGE)]
    _, found = oracle.searched(known.data, damage.without(known.segments, pages))
    oracle.assert_true_or_stated(found, known)


@NAMES
def test_a_table_full_of_zeros(known):
    """Zeros are entries that are not present: what the monitor's process still maps comes back from there."""
    data = bytearray(known.data)
    gone = known.tables[3][0]
    at = damage.offset_of(known.segments, gone)
    data[at : at + PAGE] = bytes(PAGE)
    _, found = oracle.searched(data, known.segments)
    oracle.assert_true_or_stated(found, known)


# Smear: tables of another moment than the pages that they lead to.


@NAMES
def test_a_table_that_was_replaced_by_text(known):
    data = bytearray(known.data)
    for table in known.tables[3][:2]:
        at = damage.offset_of(known.segments, table)
        data[at : at + PAGE] = (b"The frame was given away before it was read. " * 100)[:PAGE]
    _, found = oracle.searched(data, known.segments)
    oracle.assert_true_or_stated(found, known)


@NAMES
def test_two_tables_in_each_others_place(known):
    """Another state of the same tables: every entry is sound, and leads to the wrong page."""
    data = bytearray(known.data)
    last = known.tables[3]
    first, second = (damage.offset_of(known.segments, table) for table in (last[0], last[-1]))
    one, other = data[first : first + PAGE], data[second : second + PAGE]
    data[first : first + PAGE], data[second : second + PAGE] = other, one
    _, found = oracle.searched(data, known.segments)
    oracle.assert_true_or_stated(found, known)


@NAMES
def test_an_entry_that_leads_to_a_page_of_the_host(known):
    """The tables are newer than the page: its frame is the host's by now, and the host's tables still say the old."""
    data = bytearray(known.data)
    gpas, _ = known.pages
    table = known.tables[3][0]
    at = damage.offset_of(known.segments, table)
    entries = np.frombuffer(bytes(data[at : at + PAGE]), dtype="<u8").copy()
    where = int(np.flatnonzero((entries & np.uint64(7)) != 0)[3])
    entries[where] = entries[where] & ~np.uint64(oracle.FRAME) | np.uint64(known.structure)
    data[at : at + PAGE] = entries.tobytes()
    _, found = oracle.searched(data, known.segments)
    oracle.assert_true_or_stated(found, known)
    machine = oracle.guest_of(found, known)
    assert machine is not None
    assert any("EPT or NPT wins" in note for note in machine.recovery.notes)
    assert gpas.size


# Shifts and cuts.


@NAMES
@pytest.mark.parametrize("shift", [1, 7, 512, 2048, 4095, PAGE, 3 * PAGE, 1 << 20])
def test_a_shifted_image_holds_no_machine_of_another_address(known, shift):
    """Every address in the tables is off by the shift: nothing that is read through them is right."""
    segments = [(start, length - shift, offset + shift) for start, length, offset in known.segments if length > shift]
    memory, found = oracle.searched(known.data, segments)
    assert found.machines == ()
    assert found.pages > 0
    assert memory.size


def opened(folder, data: bytes) -> volatility3_ept.Capture | None:
    """Open and search a file as a script does; None where it is refused, in one line."""
    path = folder / "host.img"
    path.write_bytes(data)
    result = None
    for allow in (False, True):
        try:
            result = volatility3_ept.open(path, allow_truncated=allow)
            assert isinstance(result.machines, list)
        except CaptureError as error:
            assert "\n" not in str(error)
    return result


CUTS = [0, 1, 16, 40, 63, 64, 65, 90, 119, 120, 200, 4095, 4096, 4097, 1 << 20, (1 << 20) + 77]


@pytest.mark.parametrize("size", CUTS)
def test_a_core_that_ends_in_its_headers_or_soon_after(size, tmp_path):
    known = oracle.truth("kvm-ept")
    opened(tmp_path, known.data[:size])


@NAMES
@pytest.mark.parametrize(("share", "odd"), [(0.25, 0), (0.5, 1234), (0.9, 0)])
def test_a_core_that_ends_in_the_middle(known, share, odd, tmp_path):
    """Refused; or, if that is allowed, what is there is the truth and the rest is not there."""
    size = int(len(known.data) * share) // PAGE * PAGE + odd
    path = tmp_path / "host.elf"
    path.write_bytes(known.data[:size])
    with pytest.raises(CaptureError, match="truncated"):
        volatility3_ept.open(path)
    with volatility3_ept.open(path, allow_truncated=True) as capture:
        found = capture.discovery
        oracle.assert_true_or_stated(found, known)
        machine = oracle.guest_of(found, known)
        if machine is not None:
            assert machine.memory.size < known.pages[0].size * PAGE


def test_a_program_header_that_declares_more_than_there_can_be(tmp_path):
    known = oracle.truth("kvm-ept")
    data = bytearray(known.data)
    for field, value in ((16, 1 << 63), (24, (1 << 64) - PAGE), (32, 1 << 62)):
        broken = bytearray(data)
        struct.pack_into("<Q", broken, 64 + 56 + field, value)
        opened(tmp_path, bytes(broken))
