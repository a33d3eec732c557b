"""The layers that Volatility reads guests through."""

from __future__ import annotations

import copy
import pickle

import pytest
import volatility
from builders import machine, paging
from builders.machine import Guest
from builders.paging import PAGE, GuestRam, HostRam, stamp
from hypothesis import given, settings
from hypothesis import strategies as st
from volatility3.framework import exceptions
from volatility3.framework.layers import intel, scanners

from volatility3_ept.layers import errors
from volatility3_ept.layers.guest import GuestPhysicalLayer


def stamped(shape: paging.Shape = paging.EPT_4) -> tuple[HostRam, paging.Tables]:
    """A guest whose every page holds its own addresses, with a hole at page 5."""
    ram = HostRam()
    tables = paging.Tables(ram, shape)
    tables.back([page * PAGE for page in range(12) if page != 5])
    return ram, tables


def root_text(tables: paging.Tables) -> str:
    return f"{'eptp' if 'EPT' in tables.shape.name else 'ncr3'}={tables.register:#x},levels={len(tables.shape.rungs)}"


@pytest.fixture(params=[paging.EPT_4, paging.EPT_5, paging.NPT_4, paging.NPT_5], ids=lambda shape: shape.name)
def layer(request, tmp_path) -> GuestPhysicalLayer:
    ram, tables = stamped(request.param)
    return volatility.guest_layer(volatility.lime_context(ram, tmp_path / "host.lime"), root_text(tables))


def test_every_page_reads_as_its_own_address(layer):
    for page in range(12):
        if page != 5:
            assert layer.read(page * PAGE, PAGE) == stamp(page * PAGE)


def test_a_read_across_frames_is_one_piece(layer):
    assert layer.read(PAGE - 8, 16) == (PAGE - 8).to_bytes(8, "little") + PAGE.to_bytes(8, "little")


@pytest.mark.parametrize(("offset", "length", "bad"), [
    (5 * PAGE, 1, 5 * PAGE), (4 * PAGE, 2 * PAGE, 5 * PAGE), (5 * PAGE + 7, 4, 5 * PAGE + 7), (12 * PAGE, 1, 12 * PAGE),
])  # fmt: skip
def test_an_absent_page_is_an_error_that_names_its_first_address_and_never_zeros(layer, offset, length, bad):
    with pytest.raises(exceptions.InvalidAddressException) as error:
        layer.read(offset, length)
    assert error.value.invalid_address == bad


def test_padding_is_asked_for_explicitly(layer):
    data = layer.read(4 * PAGE, 3 * PAGE, pad=True)
    assert data == stamp(4 * PAGE) + bytes(PAGE) + stamp(6 * PAGE)


@pytest.mark.parametrize(("offset", "length", "valid"), [
    (0, 1, True), (0, 5 * PAGE, True), (0, 5 * PAGE + 1, False), (5 * PAGE, 1, False), (6 * PAGE, 6 * PAGE, True),
    (12 * PAGE, 1, False), (12 * PAGE - 1, 2, False), (1 << 50, 1, False),
])  # fmt: skip
def test_validity_is_that_of_the_whole_range(layer, offset, length, valid):
    assert layer.is_valid(offset, length) is valid


def test_translate_gives_the_frame_in_the_layer_below(layer):
    offset, below = layer.translate(3 * PAGE + 0x123)
    assert layer.context.layers[below].read(offset, 1) == layer.read(3 * PAGE + 0x123, 1)
    assert layer.translate(5 * PAGE, ignore_errors=True) == (None, None)


def test_scanning_finds_what_is_there_and_skips_the_hole(layer):
    needle = stamp(7 * PAGE)[0x800:0x820]
    found = list(layer.scan(layer.context, scanners.BytesScanner(needle)))
    assert found == [7 * PAGE + 0x800]


def test_scanning_finds_what_reaches_from_one_frame_into_the_next(layer):
    """The frames are no neighbours in the host."""
    needle = stamp(7 * PAGE)[-8:] + stamp(8 * PAGE)[:8]
    found = list(layer.scan(layer.context, scanners.BytesScanner(needle)))
    assert found == [8 * PAGE - 8]
    across_the_hole = stamp(4 * PAGE)[-8:] + stamp(6 * PAGE)[:8]
    assert list(layer.scan(layer.context, scanners.BytesScanner(across_the_hole))) == []


@pytest.mark.parametrize("size", [PAGE, 3 * PAGE + 8])
def test_scanning_in_small_chunks_finds_each_match_once(layer, size):
    scanner = scanners.BytesScanner(b"\x00\x00\x00")
    scanner.chunk_size, scanner.overlap = size, 16
    whole = list(layer.scan(layer.context, scanners.BytesScanner(b"\x00\x00\x00")))
    assert sorted(layer.scan(layer.context, scanner)) == sorted(whole)


def test_nothing_of_the_host_shows_through_the_metadata(tmp_path):
    """Volatility merges the metadata of all layers below: the host's page table would be taken for the guest's."""
    ram, tables = stamped()
    context = volatility.lime_context(ram, tmp_path / "host.lime")
    context.layers["base"]._direct_metadata = {"os": "Windows", "architecture": "Intel64", "page_map_offset": 0x1AB000}
    layer = volatility.guest_layer(context, root_text(tables))
    assert dict(layer.metadata) == {"os": "Unknown", "architecture": "Unknown"}


def test_the_layer_is_not_an_intel_layer(layer):
    """Volatility's operating-system stackers refuse to stack on one."""
    assert not isinstance(layer, intel.Intel)


def test_writing_is_refused(layer):
    before = layer.read(0, 16)
    layer.write(0, b"tampered")
    assert layer.read(0, 16) == before


def test_copies_share_the_map_and_pickles_read_the_same(layer, tmp_path):
    twin = copy.deepcopy(layer.context).layers["guest"]
    assert twin.memory is layer.memory
    assert pickle.loads(pickle.dumps(layer.memory)).read(3 * PAGE, PAGE) == stamp(3 * PAGE)


def test_a_decoding_layer_below_gives_the_same_bytes_as_a_plain_file():
    ram, tables = stamped()
    layer = volatility.guest_layer(volatility.buffer_context(ram.image()), root_text(tables))
    assert layer.read(3 * PAGE, PAGE) == stamp(3 * PAGE)


def test_the_guest_of_a_guest_composes_layer_on_layer(tmp_path):
    ram = HostRam()
    outer = paging.Tables(ram, paging.EPT_4)
    placed = outer.back([page * PAGE for page in range(40)])
    inside = GuestRam(ram, placed)
    inside.allocate()  # Page 0 heads no hierarchy: a root register of 0 means none.
    inner = paging.Tables(inside, paging.NPT_4)
    inner.back([page * PAGE for page in range(8)])
    context = volatility.lime_context(ram, tmp_path / "host.lime")
    volatility.guest_layer(context, root_text(outer), name="outer")
    layer = volatility.guest_layer(context, root_text(inner), base="outer")
    assert layer.read(6 * PAGE, PAGE) == stamp(6 * PAGE)
    assert layer.translate(6 * PAGE)[1] == "outer"


@pytest.mark.parametrize(("root", "words"), [
    ("eptp=0x7fff0000", "not in the capture"), ("eptp=0x20005e", "maps no page"), ("banana", "not a root"),
], ids=["outside", "no table", "nonsense"])  # fmt: skip
def test_a_wrong_root_ends_the_program_with_one_line(tmp_path, root, words):
    ram, _ = stamped()
    ram.write(0x20_0000, b"text" * 1024)
    context = volatility.lime_context(ram, tmp_path / "host.lime")
    with pytest.raises(errors.GuestError, match=words) as error:
        volatility.guest_layer(context, root)
    assert isinstance(error.value, SystemExit), "Volatility swallows an Exception and goes on with the host"
    assert "\n" not in error.value.message


def test_a_configuration_of_another_capture_is_refused(tmp_path):
    ram, tables = stamped()
    context = volatility.lime_context(ram, tmp_path / "host.lime")
    context.config["guest.table"] = "0123456789abcdef"
    with pytest.raises(errors.GuestError, match="another capture"):
        volatility.guest_layer(context, root_text(tables))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    pages=st.sets(st.integers(0, 30), min_size=1, max_size=20),
    offset=st.integers(0, 31 * PAGE),
    length=st.integers(1, 6 * PAGE),
)
def test_mapping_and_reading_agree_with_a_page_by_page_reference(pages, offset, length):
    ram = HostRam()
    tables = paging.Tables(ram, paging.EPT_4)
    tables.back([page * PAGE for page in pages])
    layer = volatility.guest_layer(volatility.buffer_context(ram.image()), root_text(tables))
    wanted = [address for address in range(offset, offset + length) if address // PAGE in pages]
    pieces = list(layer.mapping(offset, length, ignore_errors=True))
    covered = [address for start, size, *_ in pieces for address in range(start, start + size)]
    assert covered == wanted
    reference = b"".join(stamp(p * PAGE) if p in pages else bytes(PAGE) for p in range(40))[offset : offset + length]
    assert layer.read(offset, length, pad=True) == reference
    assert layer.is_valid(offset, length) is (len(wanted) == length)


def test_the_host_without_its_guests_lacks_exactly_their_frames(tmp_path):
    ram, guests = machine.host(paging.EPT_4, paging.NPT_4)
    context = volatility.lime_context(ram, tmp_path / "host.lime")
    layer = volatility.masked_layer(context, [f"eptp={guests[0].root:#x}", f"ncr3={guests[1].root:#x}"])
    frames = {hpa for guest in guests for hpa in guest.placed.values()}
    for address in ram.pages:
        assert layer.is_valid(address, PAGE) is (address not in frames)
    other = next(a for a in ram.pages if a not in frames)
    assert layer.read(other, PAGE) == bytes(ram.pages[other])


def test_a_banner_in_a_guest_is_not_met_through_the_mask(tmp_path):
    ram = HostRam()
    guest = Guest(ram)
    context = volatility.lime_context(ram, tmp_path / "host.lime")
    scanner = scanners.BytesScanner(b"Linux version")
    assert list(context.layers["base"].scan(context, scanner)) == [guest.placed[guest.kernel_gpa]]
    layer = volatility.masked_layer(context, [f"eptp={guest.root:#x}"])
    assert list(layer.scan(context, scanner)) == []
