"""Read and write ``testdata/manifest.toml``, the list of captures.

The standard library reads TOML but does not write it; the subset used here
(strings, numbers, booleans, lists of those, one table per capture and an array
of tables for its guests) takes a page.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTDATA = Path(__file__).resolve().parents[1]
MANIFEST = TESTDATA / "manifest.toml"

HEADER = """\
# Memory images of hosts that run virtual machines, with what is known about each.
# Read docs/captures.md for the fields, the ground truth and how to make them again.
# `file` and `truth` are relative to this file. An image that is not committed is
# absent until `python testdata/generate/build.py NAME` has made it; its hash is the
# hash of the last one made.
"""


def load(path: Path = MANIFEST) -> dict[str, dict[str, Any]]:
    """Return the entries by name; an absent file has none."""
    if not path.exists():
        return {}
    captures: dict[str, dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8")).get("captures", {})
    return captures


def dump(captures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of a manifest: committed captures first, then by name."""
    lines = [HEADER]
    for name, entry in sorted(captures.items(), key=lambda item: (not item[1]["committed"], item[0])):
        guests = entry.get("guests", [])
        lines.append(f"[captures.{name}]")
        lines += [f"{key} = {_value(value)}" for key, value in entry.items() if key != "guests"]
        for guest in guests:
            lines.append(f"\n[[captures.{name}.guests]]")
            lines += [f"{key} = {_value(value)}" for key, value in guest.items()]
        lines.append("")
    return "\n".join(lines)


def update(name: str, entry: Mapping[str, Any], path: Path = MANIFEST) -> None:
    """Add or replace one entry."""
    captures = load(path)
    captures[name] = dict(entry)
    path.write_text(dump(captures), encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, (bool, int, str)):
        return json.dumps(value, ensure_ascii=False)  # for these JSON and TOML agree
    raise TypeError(f"no TOML for {value!r}")
