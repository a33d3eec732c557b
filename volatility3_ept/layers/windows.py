"""A Windows guest's virtual address space as a Volatility layer, built from what its vCPUs' registers lead to.

Volatility looks for a table that maps itself, in the ranges of physical memory where machines of its test images had
one. A guest's may lie elsewhere (volatility3 issue 1282), and where a guest runs guests of its own, the first table
that is met need not be its own.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces
from volatility3.framework.automagic import windows as vol_windows
from volatility3.framework.layers import intel

from volatility3_ept.layers import errors, virtual

if TYPE_CHECKING:
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.core.pe import Image
    from volatility3_ept.core.windows import Kernel
    from volatility3_ept.layers.guest import GuestPhysicalLayer

vollog = logging.getLogger(__name__)


class WindowsIntelLA57(intel.WindowsIntel32e):
    """5-level paging of Windows (ntkrla57): 57-bit virtual addresses."""

    _maxvirtaddr = 57
    _structure = [("page map layer 5", 9, False), *intel.Intel32e._structure]  # noqa: RUF012  (as the class above has it)


_CLASSES = {
    "32-bit": intel.WindowsIntel,
    "PAE": intel.WindowsIntelPAE,
    "4-level": intel.WindowsIntel32e,
    "5-level": WindowsIntelLA57,
}


def kernel(layer: GuestPhysicalLayer) -> Kernel | None:
    """Return the Windows kernel of a guest: by its vCPUs' registers, else by the page tables that lead to its image.

    Raises:
        GuestError: the layer's configuration is damaged.
    """
    from volatility3_ept.core import windows
    from volatility3_ept.core.guestcpu import Registers

    try:
        states = [Registers.parse(text) for text in layer.config.get("vcpus", None) or ()]
    except ValueError as error:
        raise errors.GuestError(f"guest {layer.config.get('guest', '?')}: {error}") from error
    space = virtual.decision(layer).space
    roots = [space.cr3] if space is not None and space.mode is not None else []
    return windows.find(layer.memory, space.mode if space else None, roots, states)


def virtual_layer(
    context: interfaces.context.ContextInterface, base: GuestPhysicalLayer, found: Kernel
) -> intel.Intel | None:
    """Return the layer of a kernel's address space over the guest's physical layer; None where no page tables map it.

    It is not yet added to the context. Its ``kernel_virtual_offset`` is that of the kernel, as Volatility writes it.
    """
    space = found.space
    if space is None or found.base is None:
        return None
    kind: type[intel.Intel] = _CLASSES[space.fmt.name]
    name = context.layers.free_layer_name("GuestWindowsLayer")
    path = interfaces.configuration.path_join("GuestWindowsStacker", name)
    values: dict[str, Any] = {
        "memory_layer": base.name,
        "page_map_offset": space.fmt.root_hpa(space.cr3),
        "kernel_virtual_offset": space.plain(found.base),
    }
    for key, value in values.items():
        context.config[interfaces.configuration.path_join(path, key)] = value
    return kind(context, path, name, metadata={"os": "Windows"})


def image_at(layer: intel.Intel, base: int) -> Image | None:
    """Return the identity of the image at an address of a virtual layer; None where there is none."""
    from volatility3_ept.core import pe

    return pe.identify(functools.partial(_read, layer, base))


def _read(layer: intel.Intel, base: int, rva: int, length: int) -> bytes | None:
    if not layer.is_valid(base + rva, length):
        return None
    data: bytes = layer.read(base + rva, length)
    return data


def misleading(memory: HostMemory, found: Kernel) -> int | None:
    """Return the first top table that Volatility's own search would take, where it leads to another kernel or to none.

    None where it would take none, or one that maps this kernel.
    """
    from volatility3_ept.core import wintables

    space = found.space
    if space is None or found.base is None or space.fmt.name != "4-level":
        return None
    for other in wintables.spaces(memory, space.fmt, _searched()):
        same = other.read(found.base, 2) == b"MZ" and other.physical(found.base) == found.gpa
        return None if same else space.fmt.root_hpa(other.cr3)
    return None


def _searched() -> list[tuple[int, int]]:
    """Return the ranges in which Volatility looks for the top table of a 64-bit Windows, in its order."""
    return [
        section
        for _, tests, sections in vol_windows.WindowsIntelStacker.test_sets
        if any(isinstance(test, vol_windows.DtbSelfRef64bit) for test in tests)
        for section in sections
    ]
