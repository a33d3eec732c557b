"""From Volatility's layers to :class:`~volatility3_ept.core.memory.HostMemory`.

Whatever file format was stacked (raw, LiME, ELF core, VMware, crash dump, AVML, QEMU, kdump, a compressed file), the
algorithms want one thing: which physical addresses are present, and their bytes. Linear formats over a plain file
become segments over a read-only memory map; anything that decodes is read through the layer.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING
from urllib import parse, request

from volatility3.framework import exceptions, interfaces
from volatility3.framework.layers import intel, linear, physical

from volatility3_ept.layers import errors, runs
from volatility3_ept.spec import bits

if TYPE_CHECKING:
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.layers import kdump

vollog = logging.getLogger(__name__)

#: Files that people hand over by mistake. A capture of one of these kinds does not exist.
_NOT_A_CAPTURE = {
    b"PK\x03\x04": "a ZIP archive",
    b"%PDF": "a PDF document",
    b"QFI\xfb": "a qcow2 disk image",
    b"KDMV": "a VMDK disk image",
    b"vhdxfile": "a VHDX disk image",
    b"conectix": "a VHD disk image",
    b"\x28\xb5\x2f\xfd": "Zstandard-compressed data: decompress it first (zstd -d)",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"MZ": "a Windows program",
    b"SQLite format 3": "an SQLite database",
}

#: Captures in a format that Volatility knows not, or could not open this time: their bytes are not memory.
_NOT_OPENED = {
    b"KDUMP   ": "a compressed kdump, and KdumpStacker is not among the stackers",
    b"makedumpfile": "a flattened file of makedumpfile that holds no compressed kdump; rearrange it: makedumpfile -R",
    b"LibvirtQemud": "a libvirt save file; dump with virsh dump --memory-only",
    b"QEVM": "a QEMU migration stream that Volatility cannot read",
    b"AVML": "an AVML file that Volatility cannot read; it needs the snappy library (Debian: libsnappy1v5)",
    b"EMiL": "a LiME file that Volatility cannot read",
    b"PAGEDU": "a Windows crash dump of a kind that Volatility cannot read",
}


def physical_layer(context: interfaces.context.ContextInterface, layer_name: str) -> str:
    """Return the name of the physical layer below ``layer_name``.

    Volatility may satisfy a plugin's layer with the kernel's virtual address space. A guest's physical layer is
    physical too: a plugin that runs inside a guest stays inside it.
    """
    layer = context.layers[layer_name]
    while isinstance(layer, intel.Intel):
        layer = context.layers[layer.config["memory_layer"]]
    return layer.name


def host_memory(
    context: interfaces.context.ContextInterface, layer_name: str, allow_truncated: bool = False
) -> HostMemory:
    """Return the memory that a physical layer holds.

    Raises:
        CaptureError: the file is empty, cannot be a capture, or ends before what its headers declare (unless
            ``allow_truncated``); the message is one line that a user can act on.
    """
    from volatility3_ept.layers import kdump

    layer = context.layers[layer_name]
    if isinstance(layer, runs.RunsLayer):
        return layer.memory
    if isinstance(layer, kdump.KdumpLayer):
        return _whole_dump(layer, allow_truncated)
    chain = [layer]
    while isinstance(chain[-1], linear.LinearlyMappedLayer) and len(chain[-1].dependencies) == 1:
        below = context.layers[chain[-1].dependencies[0]]
        if isinstance(below, runs.RunsLayer):
            return _compose([*chain], below.memory)[0]
        chain.append(below)
    base = _base_memory(chain[-1])
    is_raw = not isinstance(layer, interfaces.layers.TranslationLayerInterface)
    _refuse_non_capture(base, is_raw=is_raw, allow_truncated=allow_truncated)
    memory, declared = _compose(chain[:-1], base)
    if memory.size < declared and not allow_truncated:
        raise errors.CaptureError(
            f"the capture is truncated: its headers declare {declared:,} bytes of memory, the file holds "
            f"{memory.size:,}; add --allow-truncated to use what is there"
        )
    return memory


def _whole_dump(layer: kdump.KdumpLayer, allow_truncated: bool) -> HostMemory:
    if layer.dump.incomplete and not allow_truncated:
        lost = (
            f"{layer.dump.missing:,} pages that it should hold are not in it" if layer.dump.missing else "by its marks"
        )
        raise errors.CaptureError(
            f"the capture is truncated: it is an incomplete dump ({lost}); add --allow-truncated to use what is there"
        )
    return layer.memory


def _compose(chain: list[interfaces.layers.DataLayerInterface], base: HostMemory) -> tuple[HostMemory, int]:
    """Compose linear layers, the top one first, over ``base``; returns the memory and the bytes that they declare."""
    import numpy as np

    memory, declared = base, base.size
    for layer in reversed(chain):
        length = layer.maximum_address + 1
        rows = [
            (start, size, target) for start, size, target, _, _ in layer.mapping(0, length, ignore_errors=True) if size
        ]
        # A live dump of Xen holds fewer pages than it announced, and numbers the rest ~0: no address.
        real = [row for row in rows if row[0] < _PHYSICAL_END]
        if len(real) < len(rows):
            vollog.warning("%s: %d ranges have no physical address", type(layer).__name__, len(rows) - len(real))
        table = np.array(real, dtype=np.int64).reshape(-1, 3)
        declared = int(table[:, 1].sum())
        memory = memory.remap(table[:, 0], table[:, 1], table[:, 2])
    return memory, declared


def _base_memory(layer: interfaces.layers.DataLayerInterface) -> HostMemory:
    """Return the memory of the lowest layer: a mapped file where that gives the same bytes, else the layer's reads."""
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.core.source import FileSource, ReaderSource

    if isinstance(layer, physical.FileLayer):
        path = plain_file(layer)
        if layer.maximum_address < 0:
            raise errors.CaptureError("the file is empty: no capture")
        if path is not None:
            return HostMemory.from_segments(FileSource(path), [(0, layer.maximum_address + 1, 0)])
    source = ReaderSource(_LayerReader(layer))
    try:
        low, high = layer.minimum_address, layer.maximum_address + 1
    except ValueError:  # Volatility's segmented layers have no addresses when they have no segments.
        raise errors.CaptureError(f"Volatility's {type(layer).__name__} found no memory in the capture") from None
    if isinstance(layer, interfaces.layers.TranslationLayerInterface):
        segments = [(start, size, start) for start, size, *_ in layer.mapping(low, high - low, ignore_errors=True)]
        return HostMemory.from_segments(source, segments)
    return HostMemory.from_segments(source, [(low, high - low, low)])


class _LayerReader:
    """Reads a layer, answering None where the layer raises. A class, because Volatility pickles what layers hold."""

    def __init__(self, layer: interfaces.layers.DataLayerInterface) -> None:
        self._layer = layer

    def __call__(self, offset: int, length: int) -> bytes | None:
        try:
            return self._layer.read(offset, length)
        except exceptions.InvalidAddressException:
            return None


def plain_file(layer: physical.FileLayer) -> Path | None:
    """Return the path of a layer that is a plain, uncompressed local file; None for anything else."""
    url = parse.urlparse(layer.location)
    if url.scheme != "file":
        return None
    path = Path(request.url2pathname(url.path))
    # Volatility decompresses some files as it opens them: then the size, or the first bytes, differ.
    if not path.is_file() or path.stat().st_size != layer.maximum_address + 1:
        return None
    with path.open("rb") as file:
        head = file.read(4096)
    return path if head and head == layer.read(0, len(head)) else None


def _refuse_non_capture(base: HostMemory, is_raw: bool, allow_truncated: bool) -> None:
    """Raise CaptureError for a file that cannot hold physical memory. Raw: no format layer took it."""
    from volatility3_ept.core import containers

    size = base.size
    head = base.read(0, min(size, 4096)) or b""
    if head.startswith(b"\x7fELF") and is_raw and head[16:18] == _ET_CORE:
        raise errors.CaptureError("the capture is an ELF core in which Volatility found no memory")
    if head.startswith(b"\x7fELF") and head[16:18] != _ET_CORE:
        raise errors.CaptureError("this is no capture but an ELF file that is not a core")
    if not is_raw:
        return
    if size < 4096:
        raise errors.CaptureError(f"{size} bytes: less than one page, this is no capture")
    for magic, what in _NOT_A_CAPTURE.items():
        if head.startswith(magic):
            raise errors.CaptureError(f"this is no capture but {what}")
    for magic, what in _NOT_OPENED.items():
        if head.startswith(magic):
            raise errors.CaptureError(f"the capture is {what}")
    if containers.is_text(base.read, size):
        raise errors.CaptureError("this is no capture but text")
    if size % 4096 and not allow_truncated:
        raise errors.CaptureError(
            f"the capture ends in the middle of a page ({size:,} bytes): it seems truncated; "
            "add --allow-truncated to use what is there"
        )


_PHYSICAL_END = 1 << bits.MAX_PHYSICAL_BITS
_ET_CORE = (4).to_bytes(2, "little")
