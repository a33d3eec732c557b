"""A capture's physical memory without a plugin: Volatility's file formats alone, for :mod:`volatility3_ept.api`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from volatility3 import framework
from volatility3.framework import contexts, interfaces, layers
from volatility3.framework.automagic import stacker
from volatility3.framework.layers import physical

from volatility3_ept.layers import host, kdump

if TYPE_CHECKING:
    from volatility3_ept.core.memory import HostMemory

#: Operating-system stackers have higher orders than every file format's.
_FIRST_OS_ORDER = 31


def memory(path: Path, allow_truncated: bool = False) -> HostMemory:
    """Return the memory of a file in any format that Volatility knows, or a compressed kdump.

    Raises:
        OSError: the file cannot be read.
        CaptureError: it is no capture, or not a whole one.
    """
    context = contexts.Context()
    framework.import_files(layers)  # Makes the stackers known.
    context.config["file.location"] = path.resolve(strict=True).as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    chosen = sorted(
        (
            item
            for item in framework.class_subclasses(interfaces.automagic.StackerLayerInterface)
            if item.stack_order < _FIRST_OS_ORDER
        ),
        key=lambda item: item.stack_order,
    )
    dump = kdump.stack(context, "file")
    if dump is not None:
        context.add_layer(dump)
        return host.host_memory(context, dump.name, allow_truncated)
    top = stacker.LayerStacker.stack_layer(context, "file", chosen)[0]
    return host.host_memory(context, top, allow_truncated)
