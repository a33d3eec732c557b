"""Which kernel would Volatility take for the host's?

Its stackers search all of the physical memory. Where host and guest run the same kernel build, the first one they meet
may be the guest's, and a guest-physical page table is then read as a host-physical one: an empty or a wrong process
list, with exit status 0. ``--guest host`` cannot fall into this trap; ``ept.scan`` says when it is there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from volatility3.framework import constants, exceptions, interfaces
from volatility3.framework.layers import intel

from volatility3_ept.layers import host, runs, stacking

if TYPE_CHECKING:
    from volatility3_ept.core.machines import Discovery, Machine

vollog = logging.getLogger(__name__)


def warn(
    context: interfaces.context.ContextInterface,
    layer_name: str,
    found: Discovery,
    progress_callback: constants.ProgressCallback = None,
) -> bool:
    """Log a warning, and return True, when the kernel that Volatility would choose for the host lies in a guest."""
    base = host.physical_layer(context, layer_name)
    if isinstance(context.layers[base], runs.RunsLayer):
        return False
    copy = stacking.copied(context)
    layer = stacking.with_system(copy, base, progress_callback)
    if not isinstance(layer, intel.Intel):
        return False
    why = misled(copy, layer, found.machines)
    if why:
        vollog.warning(
            "The kernel that Volatility takes for the host's is a guest's, or damaged: %s. "
            "Use --guest host for the host's own processes",
            why,
        )
    return bool(why)


def misled(context: interfaces.context.ContextInterface, layer: intel.Intel, guests: Sequence[Machine]) -> str:
    """Say why the chosen kernel cannot be that of the hypervisor of these guests; empty when it can."""
    table = int(layer.config["page_map_offset"])
    owners = [machine.id for machine in guests if machine.guest_map.to_gpas(table)]
    if owners:
        return f"its page table at {table:#x} is in the memory of guest {owners[0]}"
    banner = _banner_address(context, layer)
    if banner is None:
        return ""
    # Addresses taken from a guest's kernel are guest-physical: as host-physical ones they lead nowhere, or elsewhere.
    try:
        text = layer.read(banner, len(_BANNER))
        frame, _ = layer.translate(banner)
    except exceptions.InvalidAddressException:
        text, frame = b"", None
    if text != _BANNER or frame is None:
        return f"its page table at {table:#x} does not lead to its own banner at {banner:#x}"
    owners = [machine.id for machine in guests if machine.guest_map.to_gpas(frame)]
    return f"its banner at {frame:#x} is in the memory of guest {owners[0]}" if owners else ""


_BANNER = b"Linux version "


def _banner_address(context: interfaces.context.ContextInterface, layer: intel.Intel) -> int | None:
    """Return where a chosen Linux kernel must have its banner; None for other systems."""
    shift = layer.config.get("kernel_virtual_offset", None)
    for name in context.symbol_space:
        table = context.symbol_space[name]
        if shift is not None and "linux_banner" in table.symbols:
            return int(table.get_symbol("linux_banner").address + shift) & layer.address_mask
    return None
