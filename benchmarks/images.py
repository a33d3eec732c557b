"""Writes the memory of a test builder to disk in the forms that the tools under comparison open."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from builders.paging import HostRam  # noqa: E402

#: A host whose memory ends below this is written as a raw image, any other as LiME.
RAW_LIMIT = 256 << 20


def write(ram: HostRam, folder: Path, name: str) -> Path:
    """Write a raw image, or a LiME file where the memory lies too high for one; return its path."""
    if max(ram.pages) < RAW_LIMIT:
        path = folder / f"{name}.raw"
        path.write_bytes(ram.image())
    else:
        path = folder / f"{name}.lime"
        path.write_bytes(ram.lime())
    return path


def write_ranges(ram: HostRam, folder: Path, name: str) -> Path:
    """Write each range of memory as ``NAME.dram_ADDRESS``, which CHIPSEC maps at that address; return the base name."""
    for address, data in ram.runs():
        (folder / f"{name}.dram_{address:x}").write_bytes(data)
    return folder / name
