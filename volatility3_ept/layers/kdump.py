"""The layer of a makedumpfile dump: what a crashed Linux host leaves, and Volatility does not open.

A compressed dump: where the dumped pages lie is read by :mod:`volatility3_ept.core.kdump`. Pages that are stored as
they are, or with zlib (``makedumpfile -c``, QEMU's ``dump-guest-memory -z``), need nothing else; lzo, snappy and zstd
are read by drgn, an optional extra of this package that brings libkdumpfile.

An ELF core whose segments are longer in memory than in the file (``makedumpfile -E``): Volatility passes over these.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from volatility3.framework import exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import physical

from volatility3_ept.layers import errors, host
from volatility3_ept.spec import bits

if TYPE_CHECKING:
    from volatility3_ept.core.kdump import Kdump
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)

EXTRA = "pip install 'volatility3-ept[kdump]'"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A dump: its memory; what it lacks, for a person; how many pages ought to be in the file and are not."""

    memory: HostMemory
    lacks: str
    missing: int
    incomplete: bool


class KdumpLayer(interfaces.layers.TranslationLayerInterface):
    """Physical memory from a dump. What makedumpfile left out is an invalid address, never zeros.

    Configuration: ``base_layer``, the dump's file.
    """

    _direct_metadata: ClassVar[dict[str, str]] = {"architecture": "Unknown", "os": "Unknown"}

    def __init__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        name: str,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Open the dump; CaptureError when it cannot be read, or needs a package that is not there."""
        super().__init__(context=context, config_path=config_path, name=name, metadata=metadata)
        self._base_layer: str = self.config["base_layer"]
        path = host.plain_file(context.layers[self._base_layer])
        if path is None:
            raise errors.CaptureError("the capture is a compressed kdump within another compressed file: unpack it")
        stat = path.stat()
        self.dump = _opened(path, stat.st_size, stat.st_mtime_ns)
        self.memory = self.dump.memory

    @property
    def dependencies(self) -> list[str]:
        """The file."""
        return [self._base_layer]

    @property
    def minimum_address(self) -> int:
        """The lowest physical address, always 0."""
        return 0

    @property
    def maximum_address(self) -> int:
        """The highest physical address that is present."""
        return self.memory.top - 1

    def is_valid(self, offset: int, length: int = 1) -> bool:
        """Tell whether all bytes of a range were dumped."""
        return self.memory.holds(offset, length)

    def mapping(
        self, offset: int, length: int, ignore_errors: bool = False
    ) -> Iterable[tuple[int, int, int, int, str]]:
        """Yield the present parts of a range.

        What a page is below, compressed, has neither its length nor an order: both addresses are the page's own.

        Raises:
            InvalidAddressException: at the first address that was not dumped, unless ``ignore_errors``.
        """
        position, end = offset, offset + max(length, 1)
        starts, lengths = self.memory.starts, self.memory.lengths
        for index in range(max(int(starts.searchsorted(offset, side="right")) - 1, 0), starts.size):
            low, high = max(int(starts[index]), position), min(int(starts[index] + lengths[index]), end)
            if low >= end:
                break
            if high <= low:
                continue
            if low > position and not ignore_errors:
                break
            size = min(high - low, length)
            yield low, size, low, size, self._base_layer
            position = high
        if position < end and not ignore_errors:
            raise exceptions.InvalidAddressException(self.name, position, f"{position:#x} is not in the dump")

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        """Return ``length`` bytes of physical memory; with ``pad``, zeros stand for what is not there.

        Raises:
            InvalidAddressException: a byte is not there, unless ``pad``.
        """
        data = self.memory.read(offset, length)
        if data is not None:
            return data
        if not pad:
            list(self.mapping(offset, length))  # Raises where the address was not dumped.
            raise exceptions.InvalidAddressException(self.name, offset, f"the dump is damaged at {offset:#x}")
        out = bytearray(length)
        for start, size, *_ in self.mapping(offset, length, ignore_errors=True):
            out[start - offset : start - offset + size] = self.memory.read(start, size) or bytes(size)
        return bytes(out)

    def write(self, offset: int, data: bytes) -> None:
        """Refuse: evidence is not altered."""
        vollog.warning("Layer %s is evidence and is never written", self.name)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """The file."""
        return [requirements.TranslationLayerRequirement(name="base_layer", optional=False)]


def stack(context: interfaces.context.ContextInterface, layer_name: str) -> KdumpLayer | None:
    """Return the layer of a dump on the layer of its file; None for any other file.

    Raises:
        CaptureError: the dump cannot be read.
    """
    from volatility3_ept.core import kdump

    base = context.layers[layer_name]
    if not isinstance(base, physical.FileLayer) or base.maximum_address + 1 < kdump.HEAD:
        return None
    if not kdump.recognised(base.read(0, kdump.HEAD)) and not _is_cut_core(base):
        return None
    name = context.layers.free_layer_name("KdumpLayer")
    path = interfaces.configuration.path_join("KdumpStacker", name)
    context.config[interfaces.configuration.path_join(path, "base_layer")] = layer_name
    return KdumpLayer(context, path, name)


def _is_cut_core(base: physical.FileLayer) -> bool:
    """Tell whether a file is an ELF core whose segments Volatility would pass over."""
    from volatility3_ept.core import containers

    path = host.plain_file(base)
    return path is not None and containers.left_out(path) > 0


@functools.lru_cache(4)
def _opened(path: Path, size: int, changed: int) -> Opened:
    """Open a file once, however often Volatility builds its layers anew."""
    from volatility3_ept.core import containers

    opened = _core(path) if containers.left_out(path) else _compressed(path)
    if not opened.memory.starts.size:
        raise errors.CaptureError("the capture is a dump of makedumpfile that holds no page of memory")
    if opened.lacks:
        vollog.warning("The capture is a dump of makedumpfile: %s", opened.lacks)
    return opened


def _core(path: Path) -> Opened:
    from volatility3_ept.core import containers
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.core.source import FileSource

    held = containers.read(path)
    if held is None:
        raise errors.CaptureError("the capture is an ELF core of makedumpfile whose segments overlap")
    memory = HostMemory.from_segments(FileSource(path), [(s.start, s.length, s.offset) for s in held.segments])
    size = bits.size_name(containers.left_out(path))
    lacks = f"{size} of memory were left out when it was made: outside the capture"
    return Opened(memory, lacks, held.missing >> bits.PAGE_SHIFT, held.missing > 0)


def _compressed(path: Path) -> Opened:
    from volatility3_ept.core import kdump

    try:
        dump = kdump.read(path)
    except kdump.KdumpError as error:
        raise errors.CaptureError(f"the capture is a compressed kdump that cannot be read: {error}") from None
    return Opened(_memory(path, dump), dump.describe(), dump.unwritten, dump.incomplete)


def _memory(path: Path, dump: Kdump) -> HostMemory:
    from volatility3_ept.core import kdumppages
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.core.source import ReaderSource

    others = dump.methods - kdumppages.METHODS
    if not others or not dump.starts.size:
        return kdumppages.memory(dump)
    reader = _drgn(path, ", ".join(sorted(others)))
    reader.check(int(dump.starts[0]))
    return HostMemory(ReaderSource(reader), dump.starts, dump.lengths, dump.starts)


class _DrgnReader:
    """Reads physical memory through drgn, whichever way it is compressed. Callable as a source's reader."""

    def __init__(self, path: Path, method: str) -> None:
        self._path, self._method = path, method
        self._lock = threading.Lock()
        try:
            drgn = importlib.import_module("drgn")
        except ImportError:
            drgn = None
        if drgn is None or not drgn._with_libkdumpfile:
            lacks = "drgn, which is not installed" if drgn is None else "a drgn that was built with libkdumpfile"
            raise errors.CaptureError(
                f"the capture is a compressed kdump whose pages are compressed with {method}: reading them needs "
                f"{lacks} ({EXTRA})"
            )
        # Says that a flattened file would be faster if it were not flattened.
        logging.getLogger("drgn").setLevel(logging.ERROR)
        self._fault = drgn.FaultError
        self._program = drgn.Program()
        try:
            self._program.set_core_dump(path)
        except Exception as error:  # drgn raises it as it is for what libkdumpfile refuses.
            self._refuse(error)

    def __reduce__(self) -> tuple[object, ...]:
        """Open the file again in another process."""
        return _drgn, (self._path, self._method)

    def __call__(self, address: int, length: int) -> bytes | None:
        """Return bytes at a physical address, or None."""
        if address < 0:
            return None
        try:
            with self._lock:
                data: bytes = self._program.read(address, length, True)
        except self._fault:
            return None
        return data

    def check(self, address: int) -> None:
        """Read a page that is known to be there: CaptureError with drgn's reason when it cannot."""
        try:
            self._program.read(address, 4096, True)
        except self._fault as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        raise errors.CaptureError(
            f"the capture is a compressed kdump (pages compressed with {self._method}) that drgn cannot read: "
            f"{str(error)!a}"
        ) from None


@functools.lru_cache(4)
def _drgn(path: Path, method: str) -> _DrgnReader:
    return _DrgnReader(path, method)
