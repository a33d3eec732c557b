"""The ELF core writer: what goes in is what Volatility and a plain reader get out."""

from __future__ import annotations

import hashlib
import io
import random
import struct
from pathlib import Path

import elfcore
import pytest
import verify
from volatility3.framework import contexts, exceptions
from volatility3.framework.layers import elf, physical

PAGE = elfcore.PAGE_SIZE


def distinct(number: int) -> bytes:
    """A page like no other: its own number, over and over."""
    return struct.pack("<Q", number + 1) * 512


def pack(
    raw: bytes, regions: list[elfcore.Region] | None = None, min_run: int = 2, extent: int = 256
) -> tuple[bytes, list]:
    """Return the file and its segments, as read back from the file."""
    out = io.BytesIO()
    elfcore.write(io.BytesIO(raw), out, regions or [elfcore.Region(0, 0, len(raw))], min_run, extent)
    return out.getvalue(), elfcore.read_segments(out)


def open_layer(path: Path) -> elf.Elf64Layer:
    """The file as ``vol -f`` sees it."""
    context = contexts.Context()
    context.config["file.location"] = path.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["elf.base_layer"] = "file"
    layer = elf.Elf64Layer(context, "elf", "elf")
    context.add_layer(layer)
    return layer


RAM = {
    "one page": distinct(0),
    "all distinct": b"".join(distinct(i) for i in range(40)),
    "all zero": bytes(40 * PAGE),
    "zeroes longer than an extent": bytes((2 * elfcore.DEFAULT_EXTENT + 3) * PAGE) + distinct(1),
    "poison between": b"".join(distinct(i) for i in range(5)) + b"\xcc" * 30 * PAGE + distinct(7) + b"\xcc" * 9 * PAGE,
    "a stretch twice": b"".join(distinct(i) for i in [*range(20), 77, *range(3, 12), 99, *range(15, 20)]),
    "a stretch that runs into poison": b"".join(
        distinct(i) for i in [0, 1, 2, 5, 5, 5, 5, 0, 1, 2, 5, 5, 8, 2, 5, 5, 5, 5, 5, 5]
    ),
}


@pytest.mark.parametrize("min_run", [1, 2, 5, 1000])
@pytest.mark.parametrize("raw", RAM.values(), ids=RAM)
def test_volatility_reads_back_every_byte(tmp_path, raw, min_run):
    path = tmp_path / "host.elf"
    path.write_bytes(pack(raw, min_run=min_run)[0])
    layer = open_layer(path)
    assert layer.maximum_address == len(raw) - 1
    assert layer.read(0, len(raw)) == raw
    with path.open("rb") as stream:
        assert elfcore.raw_sha256(stream) == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("seed", range(20))
def test_random_memory_reads_back(tmp_path, seed):
    choice = random.Random(seed)
    raw = b"".join(distinct(choice.choice([0, 0, 0, 1, 1, choice.randrange(60)])) for _ in range(300))
    path = tmp_path / "host.elf"
    path.write_bytes(pack(raw, min_run=choice.choice([1, 2, 3, 16]))[0])
    memory = verify.Memory(path)
    assert b"".join(memory.page(hpa) or b"" for hpa in range(0, len(raw), PAGE)) == raw


def test_segments_are_sorted_whole_pages_and_do_not_overlap():
    _, segments = pack(RAM["poison between"])
    position = 0
    for segment in segments:
        assert segment.hpa == position
        assert (segment.offset % PAGE, segment.size % PAGE) == (0, 0)
        position += segment.size


def test_zero_pages_are_shared_but_not_holes():
    raw = bytes(100 * PAGE) + distinct(1) + bytes(100 * PAGE)
    data, segments = pack(raw)
    assert len(data) == PAGE * (1 + 100 + 1)  # headers, one extent, one page
    assert sum(segment.size for segment in segments) == len(raw)


def test_a_short_extent_stores_less_and_costs_segments():
    raw = bytes(100 * PAGE) + distinct(1)
    data, segments = pack(raw, extent=10)
    assert len(data) == PAGE * (1 + 10 + 1)
    assert len(segments) == 10  # the last one runs on into the page after it


def test_a_repeated_stretch_is_stored_once():
    raw = b"".join(distinct(i) for i in range(50)) * 2
    data, segments = pack(raw)
    assert (len(data), len(segments)) == (PAGE * 51, 2)


def test_runs_shorter_than_asked_cost_space_and_no_segment():
    raw = distinct(0) + bytes(3 * PAGE) + distinct(1) + bytes(3 * PAGE)
    assert len(pack(raw, min_run=4)[1]) == 1


def test_addresses_between_regions_are_holes(tmp_path):
    """RAM below and above the hole under 4 GiB, back to back in the raw file."""
    raw = distinct(0) + distinct(1)
    path = tmp_path / "host.elf"
    path.write_bytes(pack(raw, [elfcore.Region(0, 0, PAGE), elfcore.Region(1 << 32, PAGE, PAGE)])[0])
    layer = open_layer(path)
    assert layer.read(1 << 32, PAGE) == distinct(1)
    assert not layer.is_valid(PAGE)
    with pytest.raises(exceptions.InvalidAddressException):
        layer.read(PAGE, 8)
    assert verify.Memory(path).page(PAGE) is None


def test_a_region_of_broken_pages_is_refused():
    with pytest.raises(ValueError, match="whole pages"):
        pack(bytes(PAGE + 1))


def test_more_segments_than_the_header_can_count_are_refused():
    segment = elfcore.Segment(0, 0, PAGE)
    assert len(elfcore.headers([segment] * elfcore.MAX_SEGMENTS)) % PAGE == 0
    with pytest.raises(elfcore.TooManySegmentsError):
        elfcore.headers([segment] * (elfcore.MAX_SEGMENTS + 1))


def test_the_same_memory_gives_the_same_file():
    assert pack(RAM["a stretch twice"])[0] == pack(RAM["a stretch twice"])[0]


def test_the_command_packs_and_checks(tmp_path, capsys):
    (tmp_path / "host.raw").write_bytes(RAM["poison between"])
    assert elfcore.main([str(tmp_path / "host.raw"), str(tmp_path / "host.elf")]) == 0
    assert hashlib.sha256(RAM["poison between"]).hexdigest() in capsys.readouterr().out
