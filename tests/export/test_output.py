"""A file is there when it is whole, or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from volatility3_ept.export.output import Output, OutputError

ROOT = Path(__file__).parents[2]


def test_a_published_file_holds_what_was_written_and_its_holes(tmp_path):
    with Output(tmp_path, "image") as file:
        file.write(b"abc")
        file.skip(5)
        file.write(b"d")
        file.skip(2)
        file.publish()
    assert (tmp_path / "image").read_bytes() == b"abc" + bytes(5) + b"d" + bytes(2)
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_error_or_an_interrupt(tmp_path, error):
    with pytest.raises(error), Output(tmp_path, "image") as file:
        file.write(b"abc")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_nothing_is_left_when_the_process_is_told_to_end(tmp_path, name):
    code = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it.
from volatility3_ept.export.output import Output
with Output(pathlib.Path({str(tmp_path)!r}), "image") as file, Output(file.path.parent, "beside"):
    file.write(b"abc")
    print("writing", flush=True)
    time.sleep(60)
"""
    number = getattr(signal, name)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    assert process.stdout.readline() == b"writing\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(number)
    assert process.wait(30) in (128 + number, -number)
    assert list(tmp_path.iterdir()) == []


def test_the_handlers_of_a_program_are_its_own_and_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Output(tmp_path, "image"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before
    own = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Output(tmp_path, "image"):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, own)


def test_while_it_is_written_no_file_has_the_name(tmp_path):
    with Output(tmp_path, "image") as file:
        file.write(b"abc")
        assert not (tmp_path / "image").exists()
        assert [path.parent for path in tmp_path.rglob("*")] == [tmp_path]


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing"])
def test_what_exists_is_not_touched(tmp_path, kind):
    path = tmp_path / "image"
    {"file": lambda: path.write_text("mine"), "folder": path.mkdir}.get(
        kind, lambda: path.symlink_to(tmp_path / "nothing")
    )()
    with pytest.raises(OutputError, match="exists already"):
        Output(tmp_path, "image")
    assert not (tmp_path / "nothing").exists()
    assert kind != "file" or path.read_text() == "mine"


def test_a_file_that_appears_meanwhile_is_not_touched(tmp_path):
    with pytest.raises(OutputError, match="File exists"), Output(tmp_path, "image") as file:
        (tmp_path / "image").write_text("another's")
        file.publish()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("image", "another's")]


def test_it_is_replaced_on_request_and_only_when_the_new_one_is_whole(tmp_path):
    (tmp_path / "image").write_text("old")
    with pytest.raises(ValueError, match="stop"), Output(tmp_path, "image", overwrite=True) as file:
        file.write(b"half")
        raise ValueError("stop")
    assert (tmp_path / "image").read_text() == "old"
    with Output(tmp_path, "image", overwrite=True) as file:
        file.write(b"new")
        file.publish()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("image", "new")]


def test_overwriting_a_link_replaces_the_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "image").symlink_to("precious")
    with Output(tmp_path, "image", overwrite=True) as file:
        file.write(b"new")
        file.publish()
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "image").is_symlink()


def test_a_file_system_without_second_names_gets_the_file_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with Output(tmp_path, "image") as file:
        file.write(b"abc")
        file.publish()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("image", b"abc")]


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "link"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError) as raised, Output(tmp_path, "image") as file:
        file.write(b"abc")
        file.publish()
    assert "No space left on device" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"), Output(tmp_path / "nowhere", "image"):
        pass


def test_only_the_owner_can_read_a_guest_s_memory(tmp_path):
    with Output(tmp_path, "image") as file:
        file.publish()
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600
