"""Gives a guest whose system nobody recognises a virtual address space all the same."""

from __future__ import annotations

import logging
from typing import ClassVar

from volatility3.framework import constants, interfaces

from volatility3_ept.layers import guest, virtual

vollog = logging.getLogger(__name__)


class GuestVirtualStacker(interfaces.automagic.StackerLayerInterface):
    """Stacks the address space of the guest's vCPUs on its physical memory, after every system's stacker has passed.

    Only on the layer that ``--guest`` put there. Not for the plugins of a system: these need its own layer, with its
    kernel's symbols, and must say so where there is none.
    """

    stack_order = 100
    exclusion_list: ClassVar[list[str]] = ["windows", "linux", "mac"]

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the virtual layer; None, with the reason in the log, where the vCPUs do not give one.

        Raises:
            GuestError: the configuration of the guest's layer is damaged.
        """
        layer = context.layers[layer_name]
        if not isinstance(layer, guest.GuestPhysicalLayer):
            return None
        found = virtual.decision(layer)
        what = f"guest {layer.config.get('guest', '?')}"
        if found.space is None:
            vollog.warning("%s has no virtual address space: %s", what, found)
            return None
        vollog.info("%s, virtual address space: %s", what, found)
        return virtual.virtual_layer(context, layer, found.space)
