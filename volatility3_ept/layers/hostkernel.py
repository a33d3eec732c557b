"""The kernel that a hypervisor runs in, as Volatility's symbols describe it: where its own code and data are.

Linux only. Of a kernel's image those stretches count that are never freed: what is needed at boot alone goes back to
the page allocator, and may be a guest's a moment later. Symbols: Linux ``include/asm-generic/sections.h`` and
``arch/x86/kernel/vmlinux.lds.S``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from volatility3.framework import constants, contexts, exceptions, interfaces
from volatility3.framework.layers import intel

from volatility3_ept.layers import host, hostcheck, runs, stacking

if TYPE_CHECKING:
    from volatility3_ept.core.audit_host import HostKernel, Part
    from volatility3_ept.core.machines import Discovery
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)

#: The name under which the kernel's own image is listed, beside its modules.
KERNEL = "kernel"
#: First and last symbol of the stretches of the image that stay.
_KEPT = (("_text", "_etext"), ("__start_rodata", "__end_rodata"), ("_sdata", "_edata"), ("__bss_start", "__bss_stop"))
#: Within them, what does not stay (``mem_encrypt_free_decrypted_mem``), or is mapped into guests on purpose: pages of
#: a guest that nobody has written are the zero page.
_FREED: Final[tuple[tuple[str, str | int], ...]] = (
    ("__start_bss_decrypted", "__end_bss_decrypted"),
    ("empty_zero_page", 1 << 12),
)
_MODULE_MEMORY = ("MOD_TEXT", "MOD_DATA", "MOD_RODATA", "MOD_RO_AFTER_INIT")
#: A list of modules that is longer was damaged, or made to be endless.
MAX_MODULES = 4096


def find(
    context: interfaces.context.ContextInterface,
    layer_name: str,
    found: Discovery,
    memory: HostMemory,
    progress: constants.ProgressCallback = None,
) -> dict[str, HostKernel]:
    """Return the kernels below the machines of a capture, by the id of the machine that each runs in (empty: the host).

    A kernel without symbols, or of another system, is left out.
    """
    base = host.physical_layer(context, layer_name)
    if isinstance(context.layers[base], runs.RunsLayer):
        return {}
    kernels = {}
    for space in dict.fromkeys(machine.tables_in for machine in found.all()):
        guests = [machine for machine in found.all() if machine.tables_in == space]
        for copy, physical in _below(context, base, found, space, memory):
            layer = stacking.with_system(copy, physical, progress)
            if not isinstance(layer, intel.Intel):
                break
            if not hostcheck.misled(copy, layer, guests):
                kernel = _kernel(copy, layer)
                kernels.update({} if kernel is None else {space: kernel})
                break
    return kernels


def _below(
    context: interfaces.context.ContextInterface, base: str, found: Discovery, space: str, memory: HostMemory
) -> Iterator[tuple[interfaces.context.ContextInterface, str]]:
    """Yield the physical layers to look for a kernel in, each in a context of its own.

    The host's as it is, and, where that led to a guest's kernel, without its guests' memory.
    """
    copy = stacking.copied(context)
    if space:
        physical = stacking.machine_layer(copy, base, found, space, memory)
        copy.add_layer(physical)
        yield copy, physical.name
        return
    yield copy, base
    copy = stacking.copied(context)
    masked = stacking.host_layer(copy, base, found, memory)
    copy.add_layer(masked)
    yield copy, masked.name


def _kernel(context: interfaces.context.ContextInterface, layer: intel.Intel) -> HostKernel | None:
    """Return the Linux kernel of a layer; None where its symbols are not there."""
    from volatility3_ept.core.audit_host import HostKernel

    shift = layer.config.get("kernel_virtual_offset", None)
    table = next((name for name in context.symbol_space if "linux_banner" in context.symbol_space[name].symbols), None)
    if shift is None or table is None:
        return None
    kernel = contexts.Module.create(context, KERNEL, layer.name, offset=shift, symbol_table_name=table)
    try:
        parts = (*_image(kernel, layer.address_mask), *_modules(kernel, layer.address_mask))
    except (exceptions.InvalidAddressException, exceptions.SymbolError, AttributeError) as error:
        # A list that cannot be read to its end is no list: what is missing in it would be called foreign.
        vollog.warning("The kernel's list of modules cannot be read: %s", error)
        return None
    levels = 5 if layer.address_mask >> 48 else 4
    return HostKernel(int(layer.config["page_map_offset"]), levels, parts)


def _image(kernel: interfaces.context.ModuleInterface, mask: int) -> Iterator[Part]:
    """Yield the stretches of the kernel's image that stay."""
    from volatility3_ept.core.audit_host import Part

    freed = sorted(filter(None, (_between(kernel, first, last, mask) for first, last in _FREED)))
    for first, last in _KEPT:
        whole = _between(kernel, first, last, mask)
        if whole is None:
            continue
        start, end = whole
        for low, high in freed:
            if start < high and low < end:
                if start < low:
                    yield Part(KERNEL, start, low)
                start = high
        if start < end:
            yield Part(KERNEL, start, end)


def _between(
    kernel: interfaces.context.ModuleInterface, first: str, last: str | int, mask: int
) -> tuple[int, int] | None:
    """Return the addresses from one symbol to another, or as many bytes; None where the kernel lacks them."""
    if not kernel.has_symbol(first) or (isinstance(last, str) and not kernel.has_symbol(last)):
        return None
    start = kernel.get_absolute_symbol_address(first) & mask
    end = start + last if isinstance(last, int) else kernel.get_absolute_symbol_address(last) & mask
    return (start, end) if start < end else None


def _modules(kernel: interfaces.context.ModuleInterface, mask: int) -> Iterator[Part]:
    """Yield the memory of each module in the kernel's list, without what was freed after it had started."""
    from volatility3_ept.core.audit_host import Part

    modules = kernel.object_from_symbol(symbol_name="modules")
    for number, module in enumerate(modules.to_list(f"{kernel.symbol_table_name}!module", "list")):
        if number == MAX_MODULES:
            raise exceptions.InvalidAddressException(kernel.layer_name, 0, f"more than {MAX_MODULES} modules")
        name = "".join(letter for letter in module.get_name() or "?" if letter.isprintable())
        if module.has_member("mem"):  # Since Linux 6.4.
            kinds = module.mod_mem_type
            pieces = [(int(m.base), int(m.size)) for m in (module.mem[kinds[kind]] for kind in _MODULE_MEMORY)]
        else:
            pieces = [(int(module.get_module_base()), int(module.get_core_size()))]
        for base, size in pieces:
            if size:
                yield Part(name, base & mask, (base & mask) + size)
