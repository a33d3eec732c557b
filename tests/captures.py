"""The real captures in ``testdata``, with their ground truth, for every test that needs one."""

from __future__ import annotations

import functools
import gzip
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTDATA = Path(__file__).parents[1] / "testdata"
SYMBOLS = TESTDATA / "symbols"
PAGE = 4096


@dataclass(frozen=True)
class GuestTruth:
    """What is known of one guest, from sources that are independent of EPT and NPT."""

    folder: Path
    facts: dict[str, Any]

    @functools.cached_property
    def pages(self) -> dict[int, tuple[int, str]]:
        """Guest-physical address of each page present in the VMM: host frame number, SHA-256."""
        with gzip.open(self.folder / self.facts["pages_file"], "rt") as lines:
            rows = (line.split("\t") for line in lines if not line.startswith("#"))
            return {int(gpa, 0): (int(frame, 0), digest.strip()) for gpa, frame, digest in rows}

    @property
    def registers(self) -> dict[str, Any]:
        """Registers of the first vCPU."""
        registers: dict[str, Any] = self.facts["registers"][0]
        return registers

    @property
    def processes(self) -> set[tuple[int, str]]:
        """PID and name of each process."""
        return {(p["pid"], p["comm"]) for p in self.facts["processes"]}


@dataclass(frozen=True)
class Capture:
    """One image of a host, and the truth about it."""

    name: str
    entry: dict[str, Any]

    @property
    def path(self) -> Path:
        """The image, which ``vol -f`` opens directly."""
        return TESTDATA / self.entry["file"]

    @functools.cached_property
    def truth(self) -> dict[str, Any]:
        """The ground truth of the host and of its control structures."""
        truth: dict[str, Any] = json.loads((TESTDATA / self.entry["truth"]).read_text())
        return truth

    @functools.cached_property
    def guests(self) -> list[GuestTruth]:
        """The guests of the host."""
        return [GuestTruth(self.path.parent, facts) for facts in self.truth["guests"]]

    @property
    def host_processes(self) -> set[tuple[int, str]]:
        """PID and name of each process of the host."""
        return {(p["pid"], p["comm"]) for p in self.truth["host"]["processes"]}

    def page(self, hpa: int) -> bytes:
        """Return a host page, read from the image by this loader's own ELF reader."""
        for start, size, offset in self._segments:
            if start <= hpa < start + size:
                with self.path.open("rb") as file:
                    file.seek(offset + hpa - start)
                    return file.read(PAGE)
        raise LookupError(f"{hpa:#x} is not in {self.name}")

    def hpa(self, offset: int) -> int:
        """Return the lowest host-physical address of a byte of the file; identical pages share one."""
        return min(start + offset - at for start, size, at in self._segments if at <= offset < at + size)

    @functools.cached_property
    def _segments(self) -> list[tuple[int, int, int]]:
        with self.path.open("rb") as file:
            header = file.read(64)
            (offset,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(offset)
            table = file.read(size * count)
        rows = [struct.unpack_from("<IIQQQQQQ", table, i * size) for i in range(count)]
        return [(row[4], row[5], row[2]) for row in rows if row[0] == 1]


@functools.cache
def manifest() -> dict[str, Capture]:
    """Return every capture that the manifest names, absent ones too."""
    entries = tomllib.loads((TESTDATA / "manifest.toml").read_text())["captures"]
    return {name: Capture(name, entry) for name, entry in entries.items()}


def committed(guests: int | None = None) -> list[str]:
    """Return the names of the captures that are in git; with ``guests``, of those that hold so many, nested or not."""
    held = {name: capture.entry for name, capture in manifest().items() if capture.entry["committed"]}
    return [name for name, entry in held.items() if guests is None or len(entry.get("guests", ())) == guests]


def get(name: str) -> Capture:
    """Return a capture; skip the test, with the command that makes it, where it is absent."""
    capture = manifest()[name]
    if not capture.path.exists():
        pytest.skip(f"capture {name} is absent: python testdata/generate/build.py {name}")
    return capture


def every() -> list[Any]:
    """Return all captures as test parameters; those that are not in git carry the marker ``corpus``."""
    return [
        pytest.param(name, marks=() if capture.entry["committed"] else pytest.mark.corpus, id=name)
        for name, capture in manifest().items()
    ]
