"""Options that ``vol`` itself and our plugins share.

``vol --guest 0 ept.walk`` and ``vol ept.walk --guest 0`` must mean the same. argparse parses the plugin's options into
a fresh namespace and copies it over the main one, so a plugin's default would erase what was given before its name.
These requirements therefore have argparse's SUPPRESS as default: not given means not set.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from volatility3.framework import interfaces
from volatility3.framework.configuration import requirements

from volatility3_ept.layers import errors

CONFIG_PATH = "automagic.GuestSelector"


def wanted(context: interfaces.context.ContextInterface) -> str | None:
    """Return what ``--guest`` before the plugin's name asks for; None where it was not given."""
    given: str | None = context.config.get(f"{CONFIG_PATH}.guest", None)
    return given


class _Shared:
    """Mixin: no default on the command line."""

    @property
    def default(self) -> Any:
        """Tell argparse to leave the option out of the namespace when it is not given."""
        return argparse.SUPPRESS


class SharedString(_Shared, requirements.StringRequirement):
    """A text option."""


class SharedInt(_Shared, requirements.IntRequirement):
    """A number."""


class SharedBoolean(_Shared, requirements.BooleanRequirement):
    """A switch."""


class GuestRequirement(SharedString):
    """``--guest`` of one of our plugins: it chooses the machine itself, no layer is stacked for it."""


GUEST_HELP = (
    "Machine to work in: an id that ept.scan prints (0, 0.1), a root (eptp=0x..., ncr3=0x...[,levels=5]), "
    "or host: the host without the memory of its guests"
)


class SharedOptions:
    """Mixin for our plugins, before PluginInterface: an option that was not given is None, as everywhere else."""

    config: Any
    get_requirements: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Let Volatility fill in its defaults, then take argparse's marker out again.

        GuestError when an option that takes several values was given more than once.
        """
        super().__init__(*args, **kwargs)
        for item in self.get_requirements():
            if isinstance(item, requirements.ListRequirement):
                _given_once(item.name, self.config.get(item.name, None) or [])
        for name in list(self.config):
            if self.config[name] == argparse.SUPPRESS:
                self.config[name] = None


def _given_once(name: str, values: list[Any]) -> None:
    """Refuse a list option that the command line holds twice: argparse would drop the first one's values in silence."""
    option = f"--{name.replace('_', '-')}"
    words = [word for argument in sys.argv for word in argument.split("=", 1)]
    # Where the values do not come from this command line, it says nothing of them.
    if words.count(option) > 1 and {str(value) for value in values} <= set(words):
        raise errors.GuestError(f"{option} was given more than once; give all its values behind one: {option} A B C")


def shared() -> list[interfaces.configuration.RequirementInterface]:
    """Return the options beside ``--guest`` that say how a capture is to be read."""
    return [
        SharedInt(
            name="maxphyaddr",
            description="Physical-address width of the host's processor in bits (MAXPHYADDR); else derived",
            optional=True,
        ),
        SharedBoolean(
            name="no_recovery",
            description="Only what EPT or NPT maps: no pages from the memory of the virtual machine monitor",
            optional=True,
        ),
        SharedBoolean(
            name="allow_truncated",
            description="Work on a capture that ends before what its headers declare",
            optional=True,
        ),
    ]


def plugin_requirements() -> list[interfaces.configuration.RequirementInterface]:
    """Return what each of our plugins needs: the host's physical layer, ``--guest``, and the shared options."""
    return [
        requirements.TranslationLayerRequirement(name="primary", description="Physical memory of the host"),
        GuestRequirement(name="guest", description=GUEST_HELP, optional=True),
        *shared(),
    ]
