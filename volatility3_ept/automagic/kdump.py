"""Opens makedumpfile's dumps where a machine in the capture is asked for, and nowhere else."""

from __future__ import annotations

from volatility3.framework import constants, interfaces

from volatility3_ept.automagic import stacker
from volatility3_ept.layers import kdump, options


class KdumpStacker(interfaces.automagic.StackerLayerInterface):
    """Stacks the layer of a dump on its file, with ``--guest`` or one of our plugins.

    Before the other file formats: Volatility's stacker for ELF cores would pass over a part of some dumps. Without
    either it does nothing: what Volatility says of such a file is then what it says without us.
    """

    stack_order = 9

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the layer; None for any other file.

        Raises:
            CaptureError: the dump cannot be read. It ends the program with the reason.
        """
        if options.wanted(context) is None and not context.config.get(stacker.HANDLED_BY_PLUGIN, False):
            return None
        return kdump.stack(context, layer_name)
