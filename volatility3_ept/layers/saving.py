"""A configuration per machine: ``vol -c guest-0.json linux.pslist`` needs no search and no stacking.

Each holds the guest's physical layer twice: as ``primary``, for plugins that want any layer, and below the kernel's
virtual layer (``kernel.layer_name``), for plugins of an operating system that was recognised. Where none was,
``primary`` is the virtual layer that its vCPUs give, if they give one, over the physical one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from volatility3.framework import constants, interfaces
from volatility3.framework.layers import intel

from volatility3_ept.layers import host, stacking, virtual

if TYPE_CHECKING:
    from volatility3_ept.core.machines import Discovery
    from volatility3_ept.core.memory import HostMemory


def configuration(
    context: interfaces.context.ContextInterface,
    layer_name: str,
    memory: HostMemory,
    found: Discovery,
    machine_id: str,
    progress: constants.ProgressCallback = None,
) -> str:
    """Return the configuration of a machine as JSON. ``memory`` is that of the physical layer below ``layer_name``."""
    copy = stacking.copied(context)
    layer = stacking.machine_layer(copy, host.physical_layer(context, layer_name), found, machine_id, memory)
    copy.add_layer(layer)
    top = stacking.with_system(copy, layer.name, progress)
    values = _under("primary", top if isinstance(top, virtual.GuestMixin) else layer)
    if isinstance(top, intel.Intel) and not isinstance(top, virtual.GuestMixin):
        values |= _under("kernel.layer_name", top)
    return json.dumps(values, sort_keys=True, indent=2) + "\n"


def _under(prefix: str, layer: interfaces.layers.DataLayerInterface) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in dict(layer.build_configuration()).items()}
