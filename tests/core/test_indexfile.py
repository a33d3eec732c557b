"""Where indexes are kept, and what makes one belong to a capture."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from volatility3.framework import constants

from volatility3_ept.core import indexfile
from volatility3_ept.core.index import Index
from volatility3_ept.core.memory import HostMemory

OPTIONS = {"maxphyaddr": 52, "recovery": True}


@pytest.fixture
def capture(tmp_path) -> Path:
    path = tmp_path / "host.raw"
    path.write_bytes(os.urandom(1 << 20))
    return path


def key(path: Path, options=OPTIONS) -> str:
    return indexfile.key(path, HostMemory.from_file(path), options)


def test_the_folder_is_volatilitys():
    assert os.path.realpath(indexfile.folder()) == os.path.realpath(constants.CACHE_PATH)


def test_the_same_file_has_the_same_key(capture):
    assert key(capture) == key(capture)


def test_other_options_have_another_key(capture):
    assert key(capture) != key(capture, {**OPTIONS, "recovery": False})


def test_a_changed_file_has_another_key_even_with_its_old_times(capture):
    before, stat = key(capture), capture.stat()
    with capture.open("r+b") as file:
        file.write(b"changed")
    os.utime(capture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert key(capture) != before


def test_a_kept_index_comes_back_for_its_own_key_alone(tmp_path):
    index = Index(structures=(0x1000,), pages=7)
    indexfile.save(tmp_path / "new", "a" * 64, index)
    assert indexfile.load(tmp_path / "new", "a" * 64) == index
    assert indexfile.load(tmp_path / "new", "a" * 63 + "b") is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"ept_index_{'a' * 40}.cache"]
