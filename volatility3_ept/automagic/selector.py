"""``--guest``: the option, and the two checks that keep it honest.

Volatility shows the requirements of every automagic as options of ``vol``. :class:`GuestSelector` runs before every
other automagic and refuses what cannot be; :class:`GuestGuard` runs after all of them and refuses a result that does
not come from the machine that was asked for. In between :class:`~.stacker.GuestStacker` stacks the layer. Without the
option all three do nothing.
"""

from __future__ import annotations

from typing import Any

from volatility3 import framework
from volatility3.framework import constants, interfaces

from volatility3_ept.automagic import linux, missing, stacker, windows
from volatility3_ept.layers import discovery, errors, guest, options, runs

_STACKERS = "automagic.LayerStacker.stackers"
#: Where a layer of Volatility keeps the names of its page files' layers (``--single-swap-locations``).
_SWAP = "swap_layers"
#: How the names of the stackers of a system begin (volatility3.framework.automagic).
_OF_SYSTEM = {"linux": "LinuxIntel", "windows": "WindowsIntel", "darwin": "MacIntel"}


class GuestSelector(interfaces.automagic.AutomagicInterface):
    """Takes ``--guest`` and checks it before any layer is built."""

    # Before ConstructionMagic (0), which builds the layers of a configuration, and LayerStacker (10).
    priority = -10

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """The options that ``vol`` shows."""
        return [
            options.SharedString(name="guest", description=options.GUEST_HELP, optional=True),
            *options.shared(),
        ]

    def __call__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        requirement: interfaces.configuration.RequirementInterface,
        progress_callback: constants.ProgressCallback = None,
    ) -> list[Any] | None:
        """Prepare the stackers; GuestError when the option cannot be obeyed."""
        if any(isinstance(item, options.GuestRequirement) for item in requirement.requirements.values()):
            # One of our own plugins: it works on the host's physical memory and chooses the machine itself.
            context.config[stacker.HANDLED_BY_PLUGIN] = True
            context.config[_STACKERS] = _names_below(stacker.GuestStacker.stack_order)
            return None
        wanted = options.wanted(context)
        if wanted is None:
            return None
        discovery.check_syntax(wanted)
        plugin_path = interfaces.configuration.path_join(config_path, requirement.name)
        _refuse_other_layers(context.config.branch(plugin_path), wanted)
        chosen = context.config.get(_STACKERS, None)
        if chosen and stacker.GuestStacker.__name__ not in chosen:
            context.config[_STACKERS] = [*chosen, stacker.GuestStacker.__name__]
        return None


class GuestGuard(interfaces.automagic.AutomagicInterface):
    """Last of all: with ``--guest``, no layer may be in use that does not stand on the guest's."""

    priority = 10_000

    def __call__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        requirement: interfaces.configuration.RequirementInterface,
        progress_callback: constants.ProgressCallback = None,
    ) -> list[Any] | None:
        """Raise GuestError when a plugin would read another machine than the one that was asked for."""
        wanted = options.wanted(context)
        if wanted is None or context.config.get(stacker.HANDLED_BY_PLUGIN, False):
            return None
        used = {name for layer in context.layers for name in context.layers[layer].dependencies}
        used |= _swap_layers(context)
        for name in context.layers:
            if name not in used and not _stands_on_guest(context, name):
                raise errors.GuestError(
                    f"--guest {wanted}: layer {name} ({type(context.layers[name]).__name__}) is not that machine's; "
                    "refusing to show another machine's data"
                )
        _refuse_without_symbols(context, config_path, requirement, wanted)
        return None


def _refuse_without_symbols(
    context: interfaces.context.ContextInterface,
    config_path: str,
    requirement: interfaces.configuration.RequirementInterface,
    wanted: str,
) -> None:
    """Raise GuestError, which says what is missing, where the plugin's kernel was not found or is not the guest's."""
    chosen = missing.recall(wanted)
    if chosen is None:
        return
    # A plugin that runs others (timeliner, volshell) leaves out those that are for another system, and goes on.
    is_command = interfaces.configuration.CONFIG_SEPARATOR not in config_path
    if is_command and missing.kernels(context, config_path, requirement):
        raise errors.GuestError(missing.message(chosen, _system_of(context)))
    wrong = linux.check(context, chosen) or windows.check(context, chosen)
    if wrong is not None:
        raise errors.GuestError(f"--guest {wanted}: {wrong}")


def _system_of(context: interfaces.context.ContextInterface) -> str:
    """Return the system that the plugin is for, by the stackers that Volatility chose for it; empty for any."""
    names = context.config.get(_STACKERS, None) or []
    held = [system for system, mark in _OF_SYSTEM.items() if any(name.startswith(mark) for name in names)]
    return held[0] if len(held) == 1 else ""


def _swap_layers(context: interfaces.context.ContextInterface) -> set[str]:
    """Return the layers of page files that the guest's own layers read: they are files, and in no one's memory."""
    first = f"{_SWAP}{interfaces.configuration.CONFIG_SEPARATOR}"
    return {
        str(value)
        for name in context.layers
        if _stands_on_guest(context, name)
        for key, value in context.layers[name].config.items()
        if key.startswith(first)
    }


def _stands_on_guest(context: interfaces.context.ContextInterface, name: str) -> bool:
    layer = context.layers[name]
    return isinstance(layer, runs.RunsLayer) or any(_stands_on_guest(context, below) for below in layer.dependencies)


def _names_below(order: int) -> list[str]:
    """Return the names of the file-format stackers: an operating system on the host's memory is not asked for."""
    stackers = framework.class_subclasses(interfaces.automagic.StackerLayerInterface)
    return [item.__name__ for item in stackers if item.stack_order < order]


def _refuse_other_layers(config: interfaces.configuration.HierarchicalDict, wanted: str) -> None:
    """Raise GuestError when a loaded configuration (``-c``) already names layers, and not this machine's."""
    classes = [key for key in config if key.rpartition(".")[2] == "class" and "layers." in str(config[key])]
    ours = [
        key.removesuffix("class") for key in classes if str(config[key]).endswith(guest.GuestPhysicalLayer.__name__)
    ]
    # Below the layer of a nested guest stands its parent's: the upper one is the machine that a plugin would read.
    upper = [path for path in ours if not any(path != other and path.startswith(other) for other in ours)]
    guests = [config.get(f"{path}guest", None) for path in upper]
    if classes and (not guests or any(held != wanted for held in guests)):
        held = "the host or another machine"
        if guests:
            root = config.get(f"{upper[0]}root", "an unknown root")
            held = f"the guest at {root}, without an id" if guests[0] is None else f"guest {guests[0]}"
        raise errors.GuestError(
            f"--guest {wanted}: the configuration given with -c describes {held}; use one of the two"
        )
