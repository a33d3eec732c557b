"""Puts a guest's physical memory where Volatility's operating-system stackers look for a physical layer."""

from __future__ import annotations

from volatility3.framework import constants, interfaces
from volatility3.framework.layers import intel

from volatility3_ept.automagic import missing
from volatility3_ept.layers import discovery, options, runs, stacking

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
        wanted = options.wanted(context)
        if wanted is None or context.config.get(HANDLED_BY_PLUGIN, False):
            return None
        if isinstance(context.layers[layer_name], (intel.Intel, runs.RunsLayer)):
            return None
        config = context.config.branch(options.CONFIG_PATH)
        discovery.check_syntax(wanted)
        if "=" in wanted:
            memory = discovery.open_capture(context, layer_name, config).memory
            layer = stacking.guest_layer(
                context, layer_name, discovery.explicit(wanted, config, memory), wanted, memory
            )
            missing.remember(missing.Guest(wanted, layer.memory))
            return layer
        capture = discovery.open_capture(context, layer_name, config)
        memory, found = capture.memory, capture.discover(config, progress_callback)
        if wanted.strip().lower() == discovery.HOST:
            host = stacking.host_layer(context, layer_name, found, memory)
            missing.remember(missing.Guest(wanted, host.memory))
            return host
        machine = discovery.select(found, wanted)
        missing.remember(missing.Guest(wanted, machine.memory, machine))
        return stacking.machine_layer(context, layer_name, found, wanted, memory)
