"""Where indexes are kept, and what makes one belong to a capture.

As ``ept_index_*.cache`` in Volatility's cache folder: ``vol --clear-cache`` removes them. The key holds everything that
could make a search come out differently: the file (path, inode, size, times of modification and change), a sample of
its pages, which of its bytes are which physical memory, the options, and the code of this package.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import volatility3_ept
from volatility3_ept.core.index import Index
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec.bits import PAGE_SHIFT, PAGE_SIZE

#: Pages of the capture whose content goes into the key.
_SAMPLE = 64


def folder() -> Path:
    """Return Volatility's cache folder, its ``framework.constants.CACHE_PATH``, without importing it."""
    home = Path("~").expanduser()
    if sys.platform == "win32":
        return Path(os.path.realpath(Path(os.environ.get("APPDATA", home)) / "volatility3"))
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "volatility3"


def key(path: Path, memory: HostMemory, options: Mapping[str, object]) -> str:
    """Return the key of a search of the memory that a plain local file holds. OSError where it is gone."""
    stat = path.stat()
    digest = hashlib.sha256()
    for table in (memory.starts, memory.lengths, memory.offsets):
        digest.update(np.ascontiguousarray(table).tobytes())
    for address in _sample(memory):
        digest.update(memory.read(address, PAGE_SIZE) or b"unreadable")
    identity = {
        "file": [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns],
        "memory": digest.hexdigest(),
        "options": dict(options),
        "code": [volatility3_ept.__version__, _code()],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _sample(memory: HostMemory) -> list[int]:
    """Return addresses spread evenly over the present pages."""
    pages = np.cumsum(memory.lengths >> PAGE_SHIFT)
    if not pages.size or not pages[-1]:
        return []
    wanted = np.linspace(0, pages[-1] - 1, _SAMPLE).astype(np.int64)
    segment = np.searchsorted(pages, wanted, side="right")
    before = np.concatenate(([0], pages))[segment]
    chosen: list[int] = (memory.starts[segment] + ((wanted - before) << PAGE_SHIFT)).tolist()
    return chosen


def _code() -> list[list[object]]:
    """Return name, size and time of every file of the package: changed code never uses an older search."""
    root = Path(volatility3_ept.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json"))
    return [[str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _path(where: Path, name: str) -> Path:
    return where / f"ept_index_{name[:40]}.cache"


def load(where: Path, name: str) -> Index | None:
    """Return the kept index of a key, or None."""
    try:
        text = _path(where, name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return Index.from_json(text, name)


def save(where: Path, name: str, index: Index) -> None:
    """Keep an index: whole, or not at all. OSError where it cannot be: that costs time later, not the result."""
    target = _path(where, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix="ept_index_", suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(index.to_json(name))
    Path(temporary).replace(target)
