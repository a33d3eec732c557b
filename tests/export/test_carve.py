"""A machine as a file of each kind: every byte where it belongs, and the same file every time."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import threading
import tracemalloc

import numpy as np
import pytest
from export import images

from volatility3_ept.core.coverage import Coverage
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource, ReaderSource
from volatility3_ept.export import carve, elf, plan
from volatility3_ept.export.output import OutputError
from volatility3_ept.export.plan import Format

PAGE = 4096
FORMATS = list(Format)
HIGH = 1 << 26


def image(memory: HostMemory, top: int | None = None, **options) -> carve.Image:
    end = memory.top if top is None else top
    covered = Coverage(np.array([0]), np.array([end]), np.array([0], dtype=np.int8))
    return carve.Image("guest-0", memory, covered, about={"id": "0"}, **options)


@pytest.fixture(scope="module")
def guest() -> HostMemory:
    """Pages at 0, 1 (zero), 2, then a hole, one at 16, and one high up: in another order in the capture."""
    body = b"".join(bytes([n]) * PAGE for n in (5, 4, 3, 0, 1))
    places = [(HIGH, PAGE, 0), (16 * PAGE, PAGE, PAGE), (2 * PAGE, PAGE, 2 * PAGE), (PAGE, PAGE, 3 * PAGE)]
    return HostMemory.from_segments(FileSource(body), [*places, (0, PAGE, 4 * PAGE)])


RANGES = {0: b"\1" * PAGE + bytes(PAGE) + b"\3" * PAGE, 16 * PAGE: b"\4" * PAGE, HIGH: b"\5" * PAGE}
LOW = b"\1" * PAGE + bytes(PAGE) + b"\3" * PAGE + bytes(13 * PAGE) + b"\4" * PAGE


def test_lime_holds_the_present_ranges(guest, tmp_path):
    assert images.lime(carve.carve(image(guest), tmp_path, Format.LIME).path) == RANGES


def test_elf_holds_the_present_ranges(guest, tmp_path):
    assert images.elf(carve.carve(image(guest), tmp_path, Format.ELF).path) == (RANGES, [])


def test_raw_holds_each_byte_at_its_address_and_its_holes_take_no_disk(guest, tmp_path):
    done = carve.carve(image(guest, (HIGH) + 9 * PAGE), tmp_path, Format.RAW)
    with done.path.open("rb") as file:
        assert file.read(20 * PAGE) == LOW.ljust(20 * PAGE, b"\0")
        file.seek(HIGH)
        assert file.read() == b"\5" * PAGE + bytes(8 * PAGE)
    assert done.path.stat().st_blocks * 512 <= 5 * PAGE
    assert images.extents(done.path) == [(0, PAGE), (2 * PAGE, 3 * PAGE), (16 * PAGE, 17 * PAGE), (HIGH, (HIGH) + PAGE)]


def test_padded_is_the_same_with_its_zeros_written(guest, tmp_path):
    part = image(guest, stop=17 * PAGE)
    done = carve.carve(part, tmp_path, Format.PADDED)
    assert done.path.read_bytes() == LOW
    assert done.path.stat().st_blocks * 512 >= len(LOW)
    assert carve.carve(dataclasses.replace(part, name="sparse"), tmp_path, Format.RAW).sha256 == done.sha256


def test_addresses_beyond_four_gigabytes(tmp_path):
    high = HostMemory.from_bytes(b"x" * PAGE, 1 << 40)
    assert images.lime(carve.carve(image(high), tmp_path, Format.LIME).path) == {1 << 40: b"x" * PAGE}
    assert images.elf(carve.carve(image(high), tmp_path, Format.ELF).path)[0] == {1 << 40: b"x" * PAGE}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_range(guest, tmp_path, format_):
    done = carve.carve(image(guest, start=PAGE + 16, stop=17 * PAGE - 16), tmp_path, format_)
    inner = {PAGE + 16: bytes(PAGE - 16) + b"\3" * PAGE, 16 * PAGE: b"\4" * (PAGE - 16)}
    if format_ is Format.LIME:
        assert images.lime(done.path) == inner
    elif format_ is Format.ELF:
        assert images.elf(done.path)[0] == inner
    else:
        assert done.path.read_bytes() == LOW[PAGE + 16 : -16]


@pytest.mark.parametrize("format_", FORMATS)
def test_the_rows_and_the_manifest_say_what_the_file_is(guest, tmp_path, format_):
    source = {"file": "host.raw", "bytes": 5}
    done = carve.carve(image(guest, (HIGH) + 9 * PAGE), tmp_path, format_, source=source, memory_sum=True)
    said = json.loads(done.manifest.read_text())
    with done.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    assert said["image"]["sha256"] == done.sha256 == digest.hexdigest()
    assert said["image"]["bytes"] == done.size == done.path.stat().st_size
    assert said["memory"]["sha256"] == hashlib.sha256(b"".join(RANGES[start] for start in sorted(RANGES))).hexdigest()
    assert said["memory"]["present"] == [[f"{start:#x}", len(data)] for start, data in RANGES.items()]
    assert (done.present, done.present + done.holes) == (5 * PAGE, (HIGH) + 9 * PAGE)
    assert said["source"] == {"file": "host.raw", "bytes": 5}
    assert said["coverage"]["totals"]["mapped"] == (HIGH) + 9 * PAGE


@pytest.mark.parametrize("format_", FORMATS)
def test_two_runs_write_the_same_bytes(guest, tmp_path, format_):
    written = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        done = carve.carve(image(guest, stop=20 * PAGE), tmp_path / folder, format_)
        written.append((done.path.read_bytes(), done.manifest.read_bytes()))
    assert written[0] == written[1]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("which", [0, 1], ids=["image", "manifest"])
def test_an_existing_file_stays_and_nothing_is_written_beside_it(guest, tmp_path, format_, which):
    name = carve.names(image(guest), format_)[which]
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        carve.carve(image(guest, stop=20 * PAGE), tmp_path, format_)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]
    carve.carve(image(guest, stop=20 * PAGE), tmp_path, format_, overwrite=True)
    assert (tmp_path / name).read_bytes() != b"mine"


def test_an_interrupt_leaves_nothing_and_ends_the_threads(guest, tmp_path):
    def interrupt(percent: float, text: str) -> None:
        if percent > 50:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        carve.carve(image(guest, stop=20 * PAGE), tmp_path, Format.LIME, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


@pytest.mark.parametrize("format_", FORMATS)
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(guest, tmp_path, monkeypatch, format_):
    calls, pwrite = [], os.pwrite

    def filling(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(OutputError, match=r"guest-0\.\w+: No space left on device"):
        carve.carve(image(guest, stop=20 * PAGE), tmp_path, format_)
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_fit_is_refused_before_the_disk_is_full(guest, tmp_path):
    """A padded image of a guest whose tables map a page at the end of the address space."""
    with pytest.raises(OutputError, match=r"2048T are needed and .* free"):
        carve.carve(image(guest, 1 << 51), tmp_path, Format.PADDED)
    assert list(tmp_path.iterdir()) == []


def test_holes_without_end_are_not_hashed(guest, tmp_path):
    try:
        done = carve.carve(image(guest, 1 << 43), tmp_path, Format.RAW)
    except OutputError as error:
        assert "File too large" in str(error)
        assert list(tmp_path.iterdir()) == []
    else:
        assert done.sha256 is None
        assert json.loads(done.manifest.read_text())["image"]["sha256"] is None


@pytest.mark.parametrize("format_", [Format.RAW, Format.LIME])
def test_the_memory_that_carving_takes_does_not_grow_with_the_guest(tmp_path, format_):
    """Every page of a guest of 96 MiB lies elsewhere in the capture."""
    count = 96 << 8
    with (tmp_path / "host").open("wb") as file:
        file.truncate(count * PAGE)
        for page in range(0, count, 64):
            file.seek(page * PAGE)
            file.write(b"used")
    places = np.random.default_rng(1).permutation(count) * PAGE
    starts = np.arange(count) * PAGE
    held = HostMemory(FileSource(tmp_path / "host"), starts, np.full(count, PAGE), places)
    tracemalloc.start()
    done = carve.carve(image(held), tmp_path, format_)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done.present == count * PAGE
    assert peak < 16 << 20


def test_without_sums(guest, tmp_path):
    done = carve.carve(image(guest), tmp_path, Format.LIME, sums=False)
    said = json.loads(done.manifest.read_text())
    assert done.sha256 is said["image"]["sha256"] is said["memory"]["sha256"] is None
    assert images.lime(done.path) == RANGES


def test_the_sum_of_the_memory_is_computed_on_request_alone(guest, tmp_path):
    done = carve.carve(image(guest), tmp_path, Format.LIME)
    said = json.loads(done.manifest.read_text())
    assert done.sha256 == said["image"]["sha256"] is not None
    assert said["memory"]["sha256"] is None


def test_a_machine_without_a_page_there(guest, tmp_path):
    with pytest.raises(OutputError, match="no page of this machine"):
        carve.carve(image(guest, start=17 * PAGE, stop=18 * PAGE), tmp_path)


def test_pages_that_cannot_be_read_are_zeros_and_the_manifest_names_them(tmp_path):
    def reader(offset: int, length: int) -> bytes | None:
        return None if offset < 2 * PAGE and offset + length > PAGE else b"x" * length

    held = HostMemory.from_segments(ReaderSource(reader), [(0, 4 * PAGE, 0)])
    done = carve.carve(image(held), tmp_path, Format.LIME)
    assert images.lime(done.path) == {0: b"x" * PAGE + bytes(PAGE) + b"x" * 2 * PAGE}
    assert json.loads(done.manifest.read_text())["memory"]["unreadable"] == [["0x1000", PAGE]]
    assert done.unreadable == PAGE


@pytest.mark.parametrize("count", [65_533, 65_534, 65_535, 70_000])
def test_an_elf_of_more_stretches_than_its_header_can_count(count, tmp_path):
    present = [(number * 8192, 4) for number in range(count)]
    (tmp_path / "many").write_bytes(elf.front(b"\5\0\0\0\0\0\0\0\1\0\0\0QEMU\0\0\0\0", present) + b"page" * count)
    memory, notes = images.elf(tmp_path / "many")
    assert memory == {start: b"page" for start, _ in present}
    assert notes == [(b"QEMU", 1, b"")]
    assert elf.is_beyond_old_readers(present) == (count >= 65_534)


@pytest.mark.parametrize(
    ("machine", "start", "stop", "expected"),
    [
        ("0.1", 0, None, "guest-0.1"),
        ("0", 0x1000, None, "guest-0-0x1000-end"),
        ("0", 0, 0x2000, "guest-0-0x0-0x2000"),
        ("../../etc/passwd\n", 0, None, "guest-......etc.passwd."),
    ],
)
def test_names(machine, start, stop, expected):
    assert carve.file_name(machine, start, stop) == expected


def test_suffixes():
    assert [plan.Format(word).suffix for word in ("raw", "padded", "lime", "elf")] == [".raw", ".raw", ".lime", ".elf"]
