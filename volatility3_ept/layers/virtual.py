"""A guest's virtual address space as a Volatility layer: from its vCPUs' registers, whatever its system is.

The layers derive from Volatility's own, so that every plugin takes them for what they are. They add what those lack:
large pages of which the guest has a part only, PSE-36, PAE's PDPTE registers, LA57, and paging that is off. All of
their state is in their configuration: one that was saved gives the same layer without a search.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from volatility3.framework import exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import intel

from volatility3_ept.layers import errors
from volatility3_ept.spec import bits, ia32e, paging

if TYPE_CHECKING:
    from volatility3_ept.core.guestvirtual import AddressSpace, Decision
    from volatility3_ept.core.machines import Machine
    from volatility3_ept.layers.guest import GuestPhysicalLayer

vollog = logging.getLogger(__name__)

_PSE = ia32e.legacy()


class GuestMixin(intel.Intel):
    """For large pages of which the guest's memory holds a part: Volatility leaves out the whole page in a scan.

    ``key_bits`` in the configuration are bits of an entry that are no address: the C-bit of an encrypted guest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the configuration: addresses end below the lowest key bit."""
        super().__init__(*args, **kwargs)
        keys = int(self.config.get("key_bits", None) or 0)
        if keys:
            self._maxphyaddr = (keys & -keys).bit_length() - 1

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Those of Volatility's layer, and the key bits."""
        keys = requirements.IntRequirement(name="key_bits", description="Entry bits that are no address", optional=True)
        return [*super().get_requirements(), keys]

    def _mapping(
        self, offset: int, length: int, ignore_errors: bool = False
    ) -> Iterable[tuple[int, int, int, int, str]]:
        """Yield the parts of each page that the layer below holds; arguments and errors as in the class above."""
        if length == 0:
            yield from super()._mapping(offset, length, ignore_errors)
            return
        below, end = self._context.layers[self._base_layer], offset + length
        while offset < end:
            try:
                target, page_size, name = self._translate(offset)
            except exceptions.PagedInvalidAddressException as error:
                if not ignore_errors:
                    raise
                offset = (offset >> error.invalid_bits) + 1 << error.invalid_bits
                continue
            size = min(page_size - offset % page_size, end - offset)
            for start, part, *_ in below.mapping(target, size, ignore_errors):
                yield offset + start - target, part, start, part, name
            offset += size


class GuestIntel(GuestMixin, intel.Intel):
    """32-bit paging with CR4.PSE off: bit 7 of a directory entry means nothing."""

    _structure = [("page directory", 10, False), ("page table", 10, False)]  # noqa: RUF012  (as the class above has it)


class GuestIntelPSE(GuestMixin, intel.Intel):
    """32-bit paging as a processor with PSE-36 does it: a 4M page may lie above 4 GiB."""

    def _translate(self, offset: int) -> tuple[int, int, str]:
        """Return the address below, the size of the page, and the layer below."""
        entry, position = self._translate_entry(offset & self.page_mask)
        if position < bits.PAGE_SHIFT or not self._page_is_valid(entry):
            found: tuple[int, int, str] = super()._translate(offset)
            return found
        level = _PSE.levels[0]
        if _PSE.misconfigured(entry, level):
            raise exceptions.PagedInvalidAddressException(
                self.name, offset, position + 1, entry, f"Reserved bits are set in page entry {entry:#x}"
            )
        return _PSE.frame(entry, level) | offset & (level.page_size - 1), level.page_size, self._base_layer


class GuestIntelPAE(GuestMixin, intel.IntelPAE):
    """PAE paging with the four PDPTEs in the configuration, as the processor holds them in registers.

    Memory at CR3 is not looked at: it may hold something else by now, and it is 32 bytes, not the page that the class
    above reads.
    """

    _maxphyaddr = 52
    _tables = (("page directory", 9, True), ("page table", 9, False))

    @functools.lru_cache(maxsize=1024)  # noqa: B019  (as the class above)
    def _translate_entry(self, page_address: int) -> tuple[int, int]:
        """Return the last entry of a walk, and how many bits of the address it leaves open, less one."""
        address = page_address & self.address_mask
        entry, left = int(self.config["pdptes"][address >> 30 & 3]), 30
        for name, size, may_be_page in self._tables:
            address_mask = paging.FRAME & (1 << self._maxphyaddr) - 1
            table = self._get_valid_table(entry & address_mask) if self._page_is_valid(entry) else None
            if table is None:
                raise exceptions.PagedInvalidAddressException(
                    self.name, page_address, left, entry, f"Page Fault at entry {entry:#x} in table {name}"
                )
            left -= size
            index = address >> left & (1 << size) - 1
            (entry,) = struct.unpack_from(self._entry_format, table, index * self._entry_size)
            if may_be_page and entry & paging.LARGE_PAGE:
                return entry & ~bits.field(left - 1, bits.PAGE_SHIFT), left - 1
        return entry, left - 1

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Those of Volatility's layer, and the PDPTEs."""
        return [
            *super().get_requirements(),
            requirements.ListRequirement(
                name="pdptes", description="The four PDPTEs of the vCPU", element_type=int, min_elements=4
            ),
        ]


class GuestIntel32e(GuestMixin, intel.Intel32e):
    """4-level paging."""


class GuestIntelLA57(GuestIntel32e):
    """5-level paging: 57-bit virtual addresses."""

    _maxvirtaddr = 57
    _structure = [("page map layer 5", 9, False), *intel.Intel32e._structure]  # noqa: RUF012


class GuestUnpaged(GuestMixin, intel.Intel):
    """Paging is off: the first 4 GiB of guest-physical memory, at their own addresses.

    An Intel layer all the same, so that plugins for virtual memory take it and no system's stacker looks again at it.
    """

    def _translate_entry(self, page_address: int) -> tuple[int, int]:
        """Return a present entry for the page itself."""
        return page_address & self.address_mask & self.page_mask | ia32e.PRESENT, bits.PAGE_SHIFT - 1

    def _translate(self, offset: int) -> tuple[int, int, str]:
        """Return the same address, in a page that is all there is."""
        return offset & self.address_mask, 1 << self._maxvirtaddr, self._base_layer


_CLASSES = {
    "32-bit": GuestIntelPSE,
    "PAE": GuestIntelPAE,
    "4-level": GuestIntel32e,
    "5-level": GuestIntelLA57,
}


def described(machine: Machine) -> dict[str, Any]:
    """Return what the configuration of a guest's physical layer says of its virtual memory."""
    from volatility3_ept.core import guestvirtual

    values: dict[str, Any] = {}
    if machine.vcpus:
        values["vcpus"] = [str(state) for state in guestvirtual.states(machine)]
    found = guestvirtual.found(machine)
    if found:
        values["top_table"] = f"{found[0].name}:{found[0].root_hpa(found[1]):#x}"
    return values


def decision(layer: GuestPhysicalLayer) -> Decision:
    """Return the address space that stands for the guest of a layer, or why there is none.

    Raises:
        GuestError: the configuration does not hold what :func:`described` wrote.
    """
    from volatility3_ept.core import guestvirtual
    from volatility3_ept.core.guestcpu import Registers

    try:
        states = [Registers.parse(text) for text in layer.config.get("vcpus", None) or ()]
        found = _top_table(layer.config.get("top_table", None))
    except ValueError as error:
        raise errors.GuestError(f"guest {layer.config.get('guest', '?')}: {error}") from error
    return guestvirtual.decide(layer.memory, states, found)


def _top_table(text: str | None) -> tuple[ia32e.Ia32Format, int] | None:
    if text is None:
        return None
    name, _, address = text.partition(":")
    modes = {mode.name: mode for mode in (ia32e.four_level(), ia32e.five_level(), ia32e.pae(), ia32e.legacy())}
    if name not in modes:
        raise ValueError(f"{text!r} names no paging mode")
    return modes[name], int(address, 16)


def virtual_layer(
    context: interfaces.context.ContextInterface, base: GuestPhysicalLayer, space: AddressSpace
) -> intel.Intel:
    """Return the layer of an address space over the guest's physical layer. It is not yet added to the context."""
    name = context.layers.free_layer_name("GuestVirtualLayer")
    path = interfaces.configuration.path_join("GuestVirtualStacker", name)
    for key, value in _values(base, space).items():
        context.config[interfaces.configuration.path_join(path, key)] = value
    return _class(space)(context, path, name, metadata={"os": "Unknown"})


def _class(space: AddressSpace) -> type[intel.Intel]:
    if space.mode is None:
        return GuestUnpaged
    if space.mode.name == "32-bit" and not space.mode.levels[0].may_be_leaf:
        return GuestIntel
    return _CLASSES[space.mode.name]


def _values(base: GuestPhysicalLayer, space: AddressSpace) -> Mapping[str, Any]:
    values: dict[str, Any] = {"memory_layer": base.name, "page_map_offset": space.root}
    pdptes = space.pdptes(base.memory)
    if pdptes:
        values["pdptes"] = list(pdptes)
    if space.mode and space.mode.key_bits:
        values["key_bits"] = space.mode.key_bits
    return values
