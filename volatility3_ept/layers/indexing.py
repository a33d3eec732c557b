"""The index of a capture that Volatility opened, kept by :mod:`~volatility3_ept.core.indexfile` in its cache folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from volatility3.framework import constants, interfaces
from volatility3.framework.layers import physical

from volatility3_ept.layers import host

if TYPE_CHECKING:
    from volatility3_ept.core.index import Index
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)


def key(
    context: interfaces.context.ContextInterface, layer_name: str, memory: HostMemory, options: dict[str, object]
) -> str | None:
    """Return the key of a search; None where the capture is not a plain local file, whose changes could be missed."""
    from volatility3_ept.core import indexfile

    path = _file(context, layer_name)
    return None if path is None else indexfile.key(path, memory, options)


def _file(context: interfaces.context.ContextInterface, layer_name: str) -> Path | None:
    """Return the plain file at the bottom of a chain of layers."""
    layer = context.layers[layer_name]
    while len(layer.dependencies) == 1:
        layer = context.layers[layer.dependencies[0]]
    return host.plain_file(layer) if isinstance(layer, physical.FileLayer) else None


def load(name: str) -> Index | None:
    """Return the kept index of a key, or None."""
    from volatility3_ept.core import indexfile

    return indexfile.load(Path(constants.CACHE_PATH), name)


def save(name: str, index: Index) -> None:
    """Keep an index. A cache that cannot be written costs time, not the result."""
    from volatility3_ept.core import indexfile

    try:
        indexfile.save(Path(constants.CACHE_PATH), name, index)
    except OSError as error:
        vollog.info("The index of this capture could not be kept: %s", error)
