"""``ept.carve`` as a user runs it: the files, the rows, and what happens when something is in the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import captures
import pytest
from builders import paging
from builders.machine import Guest
from builders.paging import HostRam
from cli import containers, running
from export import images

COLUMNS = ["Machine", "File", "Format", "Bytes", "Present", "Holes", "SHA-256"]


@pytest.fixture
def carve(vol, small, tmp_path):
    """Run ``ept.carve`` on the small host with a folder of its own."""

    def run(*options: str, folder: Path = tmp_path, host: Path = small) -> running.Result:
        return vol("-f", host, "-o", folder, "-r", "json", "ept.carve", *options)

    return run


def refused(result: running.Result, message: str) -> None:
    """One line of ours, exit status 1, no row."""
    assert result.status == 1
    (line,) = [line for line in result.err.splitlines() if line.strip() and not line.startswith(running.BANNER)]
    assert line.startswith("volatility3_ept: ")
    assert message in line
    assert "Traceback" not in result.err + result.out
    assert not result.table


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("format_", ["raw", "padded", "lime", "elf"])
def test_every_machine_becomes_a_file_with_a_manifest(carve, host, tmp_path, format_):
    rows = carve("--format", format_).check().json
    suffix = ".raw" if format_ == "padded" else f".{format_}"
    assert names(tmp_path) == [f"guest-{n}{suffix}{extra}" for n in (0, 1) for extra in ("", ".json")]
    assert [row["Machine"] for row in rows] == ["0", "1"]
    for row, guest in zip(rows, host[1], strict=True):
        assert set(row) == {*COLUMNS, "__children"}
        path = Path(row["File"])
        assert path.parent == tmp_path
        assert row["Bytes"] == path.stat().st_size
        assert row["SHA-256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert row["Present"] == len(guest.placed) * 4096
        expected = b"".join(bytes(guest.ram.below.page(hpa)) for _, hpa in sorted(guest.placed.items()))
        if format_ in ("lime", "elf"):
            ranges = images.lime(path) if format_ == "lime" else images.elf(path)[0]
            assert b"".join(ranges[gpa] for gpa in sorted(ranges)) == expected
        else:
            assert path.read_bytes() == expected


def test_elf_is_the_default_and_holds_a_note_of_each_vcpu(carve, tmp_path):
    (row,) = carve("--guest", "1").check().json
    assert row["Format"] == "elf"
    notes = images.elf(tmp_path / "guest-1.elf")[1]
    assert [(name, kind, len(body)) for name, kind, body in notes] == [(b"CORE", 1, 336), (b"QEMU", 0, 432)]


def test_a_root_that_the_user_gives(carve, host, tmp_path):
    root = host[1][0].root
    (row,) = carve("--guest", f"eptp={root:#x}", "--format", "lime").check().json
    assert names(tmp_path) == [f"guest-ept-{root:x}.lime", f"guest-ept-{root:x}.lime.json"]
    assert row["Present"] == len(host[1][0].placed) * 4096


def test_a_range(carve, tmp_path):
    (row,) = carve("--guest", "0", "--format", "raw", "--start", "0x1000", "--length", "0x3000").check().json
    assert Path(row["File"]).name == "guest-0-0x1000-0x4000.raw"
    assert row["Bytes"] == 0x3000


def test_a_machine_with_nothing_there_does_not_keep_the_others_from_being_written(vol, tmp_path):
    """Of two guests only one reaches so far."""
    ram = HostRam()
    for pages in (32, 64):
        Guest(ram, paging.EPT_4, pages).vcpu()
    path = containers.elf(ram, tmp_path)
    (tmp_path / "out").mkdir()
    result = vol("-f", path, "-o", tmp_path / "out", "-r", "json", "ept.carve", "--start", "0x28000").check()
    (row,) = result.json
    assert names(tmp_path / "out") == [Path(row["File"]).name, Path(row["File"]).name + ".json"]
    assert row["Present"] == 0x40000 - 0x28000
    assert "is not written: no page of it is present there" in result.err


def test_a_second_machine_that_does_not_fit_leaves_the_first_one_whole(vol, tmp_path):
    ram = HostRam()
    for pages in (32, 512):
        Guest(ram, paging.EPT_4, pages).vcpu()
    path = containers.elf(ram, tmp_path)
    (tmp_path / "out").mkdir()
    # Enough for the files of Volatility itself.
    full = running.Volatility(vol.home, ["sh", "-c", 'ulimit -f 1400; exec "$@"', "sh", *vol.start])
    result = full("-f", path, "-o", tmp_path / "out", "ept.carve", "--format", "lime")
    refused(result, "File too large; nothing of it is left; written before that: guest-0.lime")
    assert names(tmp_path / "out") == ["guest-0.lime", "guest-0.lime.json"]


def test_the_manifest_names_the_source_and_nothing_of_this_run(carve, small, tmp_path):
    carve("--guest", "0").check()
    text = (tmp_path / "guest-0.elf.json").read_text()
    said = json.loads(text)
    assert said["source"] == {"file": small.name, "bytes": small.stat().st_size}
    assert said["machine"]["id"] == "0"
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", ["guest-1.elf", "guest-1.elf.json"])
def test_an_existing_file_is_refused_before_anything_is_written(carve, tmp_path, name):
    (tmp_path / name).write_text("mine")
    refused(carve(), "exists already")
    assert (names(tmp_path), (tmp_path / name).read_text()) == ([name], "mine")


def test_overwrite(vol, small, carve, tmp_path):
    (tmp_path / "guest-0.elf").write_text("old")
    carve("--guest", "0", "--overwrite").check()
    assert (tmp_path / "guest-0.elf").read_bytes()[:4] == b"\x7fELF"


def test_without_hashes(carve, tmp_path):
    (row,) = carve("--guest", "0", "--no-hash").check().json
    assert row["SHA-256"] is None
    assert json.loads((tmp_path / "guest-0.elf.json").read_text())["image"]["sha256"] is None


def test_a_folder_that_is_a_file(carve, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(carve(folder=tmp_path / "file"), "File exists")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(carve, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(carve(folder=tmp_path / "locked"), "Permission denied")


def test_a_folder_in_which_nobody_can_create_a_file(carve):
    """Root too, unlike in one without the right to write."""
    if not Path("/proc/self/fdinfo").is_dir():
        pytest.skip("no /proc")
    refused(carve(folder=Path("/proc/self/fdinfo")), "guest-0.elf")


OPTIONS = {
    "no such guest": (["--guest", "99"], "no such machine"),
    "start": (["--start", "banana"], "--start banana: not a number"),
    "length": (["--length", "0"], "--length 0"),
    "nothing there": (["--guest", "0", "--start", "0x40000000"], "no page of this machine"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_cannot_be(carve, tmp_path, case):
    options, message = OPTIONS[case]
    result = carve(*options)
    assert result.status == 1
    assert message in result.err
    assert "Traceback" not in result.err
    assert names(tmp_path) == []


@pytest.mark.parametrize("format_", ["lime", *(pytest.param(word, marks=pytest.mark.slow) for word in ("elf", "raw"))])
def test_a_disk_that_is_too_small(vol, real, tmp_path, format_):
    """A limit on the size of files stands for the disk: writing fails in the middle, or at once where the size does."""
    if shutil.which("sh") is None:
        pytest.skip("no shell")
    limited = running.Volatility(vol.home, ["sh", "-c", 'ulimit -f 40000; exec "$@"', "sh", *vol.start])
    result = limited("-f", real.path, "-o", tmp_path, "ept.carve", "--guest", "0", "--format", format_)
    refused(result, f"guest-0.{format_}: File too large; nothing of it is left")
    assert names(tmp_path) == []


@pytest.mark.slow
def test_volatility_shows_the_same_processes_in_the_image(vol, real, pslist, tmp_path):
    """Through ``--guest`` in the host's image, and in the guest's own."""
    vol("-f", real.path, "-o", tmp_path, "ept.carve", "--guest", "0").check()
    done = vol("-s", captures.SYMBOLS, "-f", tmp_path / "guest-0.elf", "linux.pslist").check()
    assert done.rows == pslist("0")[0].check().rows
    assert {(int(row[1]), row[4]) for row in done.rows[1:]} >= {(1, "init"), (2, "kthreadd")}
