"""Where indexes are kept, and what makes one belong to a capture.

In Volatility's cache folder, as ``ept_index_*.cache``: ``vol --clear-cache`` removes them. The key holds everything
that could make a search come out differently: the file (path, inode, size, times of modification and change), a sample
of its pages, how the layers map it to physical memory, the options, and the code of this package.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from volatility3.framework import constants, interfaces
from volatility3.framework.layers import physical

import volatility3_ept
from volatility3_ept.layers import host

if TYPE_CHECKING:
    from volatility3_ept.core.index import Index
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)

#: Pages of the capture whose content goes into the key.
_SAMPLE = 64


def key(
    context: interfaces.context.ContextInterface, layer_name: str, memory: HostMemory, options: dict[str, object]
) -> str | None:
    """Return the key of a search; None where the capture is not a plain local file, whose changes could be missed."""
    path = _file(context, layer_name)
    if path is None:
        return None
    import numpy as np

    stat = path.stat()
    digest = hashlib.sha256()
    for table in (memory.starts, memory.lengths, memory.offsets):
        digest.update(np.ascontiguousarray(table).tobytes())
    for address in _sample(memory):
        digest.update(memory.read(address, 4096) or b"unreadable")
    identity = {
        "file": [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns],
        "memory": digest.hexdigest(),
        "options": options,
        "code": [volatility3_ept.__version__, _code()],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _file(context: interfaces.context.ContextInterface, layer_name: str) -> Path | None:
    """Return the plain file at the bottom of a chain of layers."""
    layer = context.layers[layer_name]
    while len(layer.dependencies) == 1:
        layer = context.layers[layer.dependencies[0]]
    return host.plain_file(layer) if isinstance(layer, physical.FileLayer) else None


def _sample(memory: HostMemory) -> list[int]:
    """Return addresses spread evenly over the present pages."""
    import numpy as np

    pages = np.cumsum(memory.lengths >> 12)
    if not pages.size or not pages[-1]:
        return []
    wanted = np.linspace(0, pages[-1] - 1, _SAMPLE).astype(np.int64)
    segment = np.searchsorted(pages, wanted, side="right")
    before = np.concatenate(([0], pages))[segment]
    chosen: list[int] = (memory.starts[segment] + ((wanted - before) << 12)).tolist()
    return chosen


def _code() -> list[list[object]]:
    """Return name, size and time of every file of the package: changed code never uses an older search."""
    root = Path(volatility3_ept.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json"))
    return [[str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _path(name: str) -> Path:
    return Path(constants.CACHE_PATH) / f"ept_index_{name[:40]}.cache"


def load(name: str) -> Index | None:
    """Return the kept index of a key, or None."""
    from volatility3_ept.core.index import Index

    try:
        text = _path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return Index.from_json(text, name)


def save(name: str, index: Index) -> None:
    """Keep an index: whole, or not at all. A cache that cannot be written costs time, not the result."""
    target = _path(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix="ept_index_", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(index.to_json(name))
        Path(temporary).replace(target)
    except OSError as error:
        vollog.info("The index of this capture could not be kept: %s", error)
