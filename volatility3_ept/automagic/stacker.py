"""Puts a guest's physical memory where Volatility's operating-system stackers look for a physical layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from volatility3.framework import constants, interfaces
from volatility3.framework.layers import intel

from volatility3_ept.layers import discovery, guest, options, runs

if TYPE_CHECKING:
    from volatility3_ept.core.machines import Discovery
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)

#: Set by the selector when the plugin takes ``--guest`` itself.
HANDLED_BY_PLUGIN = f"{options.CONFIG_PATH}.handled_by_plugin"


class GuestStacker(interfaces.automagic.StackerLayerInterface):
    """Stacks the layer that ``--guest`` asks for; without the option it does nothing.

    Above every file format (their stackers have orders up to 20) and below every operating system (34 and more).
    """

    stack_order = 30

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the guest's layer.

        Raises:
            GuestError: ``--guest`` names no machine. It ends the program, because Volatility would go on with the
                host's memory if an ordinary exception told it.
        """
        wanted = context.config.get(f"{options.CONFIG_PATH}.guest", None)
        if wanted is None or context.config.get(HANDLED_BY_PLUGIN, False):
            return None
        if isinstance(context.layers[layer_name], (intel.Intel, runs.RunsLayer)):
            return None
        config = context.config.branch(options.CONFIG_PATH)
        discovery.check_syntax(wanted)
        if "=" in wanted:
            memory = discovery.open_capture(context, layer_name, config).memory
            return _guest_layer(context, layer_name, discovery.explicit(wanted, config), wanted, memory)
        capture = discovery.open_capture(context, layer_name, config)
        memory, found = capture.memory, capture.discover(config, progress_callback)
        if wanted.strip().lower() == discovery.HOST:
            return _host_layer(context, layer_name, found, memory)
        return _stack_machine(context, layer_name, found, wanted, memory)


def _stack_machine(
    context: interfaces.context.ContextInterface, layer_name: str, found: Discovery, wanted: str, memory: HostMemory
) -> guest.GuestPhysicalLayer:
    """Return the layer of a machine, with the layers of the machines that hold its tables below it."""
    machine = discovery.select(found, wanted)
    if machine.tables_in:
        below = _stack_machine(context, layer_name, found, machine.tables_in, memory)
        context.add_layer(below)
        layer_name, memory = below.name, below.memory
    slots = [str(slot) for slot in machine.recovery.slots] if machine.recovery else []
    return _guest_layer(context, layer_name, str(machine.root), machine.id, memory, slots)


def _guest_layer(
    context: interfaces.context.ContextInterface,
    base: str,
    root: str,
    machine_id: str,
    memory: HostMemory,
    slots: Sequence[str] = (),
) -> guest.GuestPhysicalLayer:
    from volatility3_ept.core.root import Root

    name = context.layers.free_layer_name("GuestPhysicalLayer")
    values: dict[str, Any] = {"base_layer": base, "root": root, "guest": machine_id}
    table = Root.parse(root).fingerprint(memory)
    if table:
        values["table"] = table
    if slots:
        values["slots"] = list(slots)
    path = _configure(context, name, values)
    vollog.info("Guest %s: %s over %s", machine_id, root, base)
    return guest.GuestPhysicalLayer(context, path, name)


def _host_layer(
    context: interfaces.context.ContextInterface, base: str, found: Discovery, memory: HostMemory
) -> guest.HostWithoutGuestsLayer:
    roots = [machine.root for machine in found.all() if not machine.tables_in]
    if not roots:
        vollog.warning("--guest host: no guest was found in this capture, so nothing is masked")
    name = context.layers.free_layer_name("HostWithoutGuestsLayer")
    values = {
        "base_layer": base,
        "roots": [str(root) for root in roots],
        "tables": [root.fingerprint(memory) for root in roots],
    }
    return guest.HostWithoutGuestsLayer(context, _configure(context, name, values), name)


def _configure(context: interfaces.context.ContextInterface, name: str, values: dict[str, Any]) -> str:
    path: str = interfaces.configuration.path_join("GuestStacker", name)
    for key, value in values.items():
        context.config[interfaces.configuration.path_join(path, key)] = value
    return path
