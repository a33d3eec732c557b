"""A layer that is a map: sorted runs of one address space over the layer below, looked up by bisection.

It derives from ``LinearlyMappedLayer`` and not from ``intel.Intel``: Volatility's operating-system stackers refuse to
stack on an Intel layer, in EPT bit 0 is *read* and not *present*, and ``Intel`` drops tables whose entries are equal.
"""

from __future__ import annotations

import collections
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from volatility3.framework import exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import linear

from volatility3_ept.layers import errors

if TYPE_CHECKING:
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)


class RunsLayer(linear.LinearlyMappedLayer):
    """Runs of one address space over the layer below. Addresses that no run holds are invalid, never zero."""

    # Volatility reads some keys of a layer's metadata as facts about the machine in it.
    _direct_metadata: ClassVar[dict[str, str]] = {"architecture": "Unknown", "os": "Unknown"}

    def __init__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        name: str,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Build the runs from the layer below; EptError when there are none."""
        super().__init__(context=context, config_path=config_path, name=name, metadata=metadata)
        self._base_layer: str = self.config["base_layer"]
        #: Address in this layer, length, address in the layer below.
        self._runs: HostMemory
        self.memory: HostMemory
        self._runs, self.memory = self._build()
        if not self.memory.starts.size:
            raise errors.GuestError(f"{self._what()} maps no page that the capture holds")

    @abstractmethod
    def _build(self) -> tuple[HostMemory, HostMemory]:
        """Return the runs onto the layer below (as source offsets), and the same memory over the capture."""

    @abstractmethod
    def _what(self) -> str:
        """Name the address space in an error message."""

    @property
    def dependencies(self) -> list[str]:
        """The one layer below."""
        return [self._base_layer]

    @property
    def metadata(self) -> Any:
        """This layer's own metadata only: what is known of the host must not show through (its DTB, its system)."""
        return interfaces.objects.ReadOnlyMapping(collections.ChainMap(self._metadata, dict(self._direct_metadata)))

    @property
    def minimum_address(self) -> int:
        """The lowest physical address, always 0."""
        return 0

    @property
    def maximum_address(self) -> int:
        """The highest physical address that is present."""
        return self.memory.top - 1

    def is_valid(self, offset: int, length: int = 1) -> bool:
        """Tell whether all bytes of a range are present."""
        return self._runs.holds(offset, length)

    def _gaps(self, offset: int, length: int) -> Iterable[int]:
        """Yield the first address of each gap in a range."""
        position, end = offset, offset + length
        for start, size, _, _, _ in self.mapping(offset, length, ignore_errors=True):
            if start > position:
                yield position
            position = start + size
        if position < end:
            yield position

    def mapping(
        self, offset: int, length: int, ignore_errors: bool = False
    ) -> Iterable[tuple[int, int, int, int, str]]:
        """Yield ``(offset, length, offset below, length, layer below)`` for the present parts of a range.

        Raises:
            InvalidAddressException: at the first address that is not present, unless ``ignore_errors``.
        """
        runs = self._runs
        end = offset + max(length, 1)
        index = max(int(runs.starts.searchsorted(offset, side="right")) - 1, 0)
        position = offset
        while index < runs.starts.size and position < end:
            start = int(runs.starts[index])
            stop = start + int(runs.lengths[index])
            index += 1
            if stop <= position:
                continue
            if start >= end:
                break
            if start > position and not ignore_errors:
                break
            low, high = max(start, position), min(stop, end)
            size = min(high - low, length)
            yield low, size, int(runs.offsets[index - 1]) + low - start, size, self._base_layer
            position = high
        if position < end and not ignore_errors:
            raise exceptions.InvalidAddressException(self.name, position, self._absent(position))

    def _absent(self, address: int) -> str:
        return f"{self._what()} holds no memory at {address:#x}"

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        """Return ``length`` bytes. Straight from the capture where every layer below is linear over a plain file."""
        data = self.memory.read(offset, length)
        if data is not None:
            return data
        if not pad:
            bad = next(iter(self._gaps(offset, length)), offset)
            raise exceptions.InvalidAddressException(self.name, bad, self._absent(bad))
        out = bytearray(length)
        for start, size, *_ in self.mapping(offset, length, ignore_errors=True):
            out[start - offset : start - offset + size] = self.memory.read(start, size) or bytes(size)
        return bytes(out)

    def _scan_iterator(
        self,
        scanner: interfaces.layers.ScannerInterface,
        sections: Iterable[tuple[int, int]],
        linear: bool = False,
    ) -> Iterable[interfaces.layers.IteratorValue]:
        """Yield chunks of what is present, whatever runs it lies in.

        Volatility's own iterator of linear layers gives each run to the scanner alone, and what reaches from one into
        the next is not found.
        """
        pieces = (item[:2] for start, size in sections for item in self.mapping(start, size, ignore_errors=True))
        return interfaces.layers.DataLayerInterface._scan_iterator(self, scanner, _joined(pieces))

    def write(self, offset: int, value: bytes) -> None:
        """Refuse: evidence is not altered."""
        vollog.warning("Layer %s is evidence and is never written", self.name)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """The layer below; what else is needed, the subclasses say."""
        return [requirements.TranslationLayerRequirement(name="base_layer", optional=False)]


def _joined(pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join ascending pieces ``(start, length)`` that touch."""
    begin = end = -1
    for start, size in pieces:
        if start != end:
            if end > begin:
                yield begin, end - begin
            begin = start
        end = start + size
    if end > begin:
        yield begin, end - begin
