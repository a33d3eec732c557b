"""The captures are the ones the manifest describes, and small enough to live in git."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import elfcore
import manifest
import verify

TESTDATA = Path(__file__).resolve().parents[2] / "testdata"
CAPTURES: dict[str, dict[str, Any]] = tomllib.loads((TESTDATA / "manifest.toml").read_text())["captures"]
COMMITTED = [name for name, entry in CAPTURES.items() if entry["committed"]]

#: GitHub refuses files of 100 MB and more.
LARGEST_COMMITTED_FILE = 95_000_000


@pytest.fixture(
    params=[pytest.param(name, marks=[] if name in COMMITTED else [pytest.mark.corpus]) for name in CAPTURES]
)
def capture(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each entry whose file is there; a committed file has to be."""
    entry = CAPTURES[request.param]
    if not entry["committed"] and not (TESTDATA / entry["file"]).exists():
        pytest.skip(f"{entry['file']} is not built; run testdata/generate/build.py {request.param}")
    return entry


def test_a_capture_of_each_vendor_is_committed():
    assert {CAPTURES[name]["slat"] for name in COMMITTED} >= {"ept", "npt"}


def test_the_file_is_the_one_described(capture):
    path = TESTDATA / capture["file"]
    assert (path.stat().st_size, manifest.file_sha256(path)) == (capture["size"], capture["sha256"])


def test_the_memory_in_the_file_is_the_one_captured(capture):
    with (TESTDATA / capture["file"]).open("rb") as elf:
        segments = elfcore.read_segments(elf)
        assert elfcore.raw_sha256(elf) == capture["memory_sha256"]
    assert segments[-1].hpa + segments[-1].size == capture["memory_size"]


def test_the_truth_holds(capture):
    directory = (TESTDATA / capture["truth"]).parent
    results = {result["guest"]: result for result in verify.check(directory)}
    assert [name for name, result in results.items() if not verify.is_sound(result)] == []
    for guest in capture.get("guests", []):
        result = results[guest["name"]]
        counts = (result["pages"], result["mapped"], result["absent from the SLAT"])
        assert counts == (guest["pages_present"], guest["pages_mapped"], guest["pages_absent"])


def test_the_truth_names_files_that_exist(capture):
    truth_path = TESTDATA / capture["truth"]
    truth = json.loads(truth_path.read_text())
    assert truth["schema"] == 1
    for guest in truth["guests"]:
        with gzip.open(truth_path.parent / guest["pages_file"], "rt") as lines:
            assert sum(not line.startswith("#") for line in lines) == guest["pages_present"]
    for level in (truth["host"], *truth["guests"]):
        assert "console" not in level or (truth_path.parent / level["console"]).exists()


@pytest.mark.parametrize("name", COMMITTED)
def test_every_committed_file_fits_into_git(name):
    directory = (TESTDATA / CAPTURES[name]["file"]).parent
    too_big = [path.name for path in directory.iterdir() if path.stat().st_size >= LARGEST_COMMITTED_FILE]
    assert too_big == []


@pytest.mark.parametrize("name", COMMITTED)
def test_the_symbols_of_a_committed_capture_are_there(name):
    for symbols in CAPTURES[name]["symbols"]:
        assert (TESTDATA / symbols).exists()


def test_writing_the_manifest_changes_nothing():
    assert manifest.dump(CAPTURES) == (TESTDATA / "manifest.toml").read_text()
