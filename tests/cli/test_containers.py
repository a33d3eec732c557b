"""The same machines are found whatever the capture is wrapped in."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from cli import containers


def has_snappy() -> bool:
    """Tell whether Volatility finds the library that it needs to read AVML."""
    try:
        ctypes.CDLL("libsnappy.so.1")
    except OSError:
        return False
    return True


NEEDS_SNAPPY = pytest.mark.skipif(not has_snappy(), reason="no libsnappy (Debian: libsnappy1v5)")
FORMATS = [
    pytest.param(wrap.__name__, id=wrap.__name__, marks=NEEDS_SNAPPY if wrap is containers.avml else ())
    for wrap in containers.FORMATS
]


@pytest.fixture(scope="module")
def files(host, tmp_path_factory) -> dict[str, Path]:
    """The small host in every format."""
    return {wrap.__name__: wrap(host[0], tmp_path_factory.mktemp(wrap.__name__)) for wrap in containers.FORMATS}


@pytest.fixture(scope="module", autouse=True)
def _all_at_once(vol, files):
    runs = []
    for path in files.values():
        runs.append(("-f", path, "-r", "json", "ept.scan"))
        runs.append(("-f", path, "-o", path.parent, "--guest", "0", "layerwriter"))
    vol.prepare(*runs)


@pytest.mark.parametrize("name", FORMATS)
def test_scan_finds_the_same_machines(vol, small, files, name):
    expected = vol("-f", small, "-r", "json", "ept.scan").check().json
    assert [row["Machine"] for row in expected] == ["0", "1"]
    assert vol("-f", files[name], "-r", "json", "ept.scan").check().json == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_guest_reads_the_same_bytes(vol, files, host, name):
    """What the guest's layer reads through the format is what was put into the guest's pages."""
    folder = files[name].parent
    vol("-f", files[name], "-o", folder, "--guest", "0", "layerwriter").check()
    ram, (guest, _) = host
    expected = b"".join(bytes(ram.page(guest.placed[gpa])) for gpa in sorted(guest.placed))
    assert (folder / "memory_layer.raw").read_bytes() == expected


@pytest.mark.skipif(has_snappy(), reason="libsnappy is there")
def test_without_snappy_an_avml_file_is_refused_with_the_reason(vol, files):
    result = vol("-f", files["avml"], "-r", "json", "ept.scan")
    assert result.status != 0
    assert "snappy" in result.err.splitlines()[-1]
    assert result.table == ""
