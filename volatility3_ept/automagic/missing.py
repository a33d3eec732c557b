"""What to say when a plugin needs a guest's kernel and its symbols are not there.

Volatility's own stackers fail without a word: the user reads of unsatisfied requirements, of files and of layers. Here
the guest is asked what it runs, and one message names exactly what is missing. Each system has an explainer in
:data:`EXPLAINERS`; this module knows when to ask, and never which system it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from volatility3.framework import interfaces
from volatility3.framework.configuration import requirements

if TYPE_CHECKING:
    from volatility3_ept.core.identify import Identity
    from volatility3_ept.core.machines import Machine
    from volatility3_ept.core.memory import HostMemory


@dataclass(frozen=True)
class Guest:
    """The guest that ``--guest`` chose. ``machine`` is None where a root was given and nothing was searched."""

    wanted: str
    memory: HostMemory
    machine: Machine | None = None

    def identity(self) -> Identity:
        """Return what runs in it, from its memory and, where they are known, its page tables."""
        from volatility3_ept.core import identify

        machine = self.machine
        if machine is None:
            return identify.identify(self.memory)
        return identify.identify(self.memory, machine.paging, machine.spaces)

    def running(self) -> Identity | None:
        """Return the kernel that the guest's own page tables map and cannot write; None where they show none."""
        from volatility3_ept.core import identify

        machine = self.machine
        return identify.running(self.memory, machine.paging, machine.spaces) if machine else None


#: Returns the text that follows ``--guest N: `` for a guest of that system: what is missing, where it is to be put.
Explainer = Callable[[Guest, "Identity"], str]
#: By :attr:`Identity.family` (``linux``, ``windows``); a system without an explainer gets a plain sentence.
EXPLAINERS: dict[str, Explainer] = {}

#: How a plugin asks for a system's kernel: as a module, or, as older ones do, for its symbols alone.
_KERNELS = (requirements.ModuleRequirement, requirements.SymbolTableRequirement)
_SYSTEMS = {"linux": "Linux", "windows": "Windows", "darwin": "macOS"}

#: The guest that was stacked last: where no system can be stacked on it, Volatility drops its layer.
_last: list[Guest] = []


def remember(guest: Guest) -> None:
    """Note the guest whose layer is being stacked."""
    _last[:] = [guest]


def recall(wanted: str) -> Guest | None:
    """Return the guest that was stacked for ``--guest``, if one was."""
    return next((guest for guest in _last if guest.wanted == wanted), None)


def kernels(
    context: interfaces.context.ContextInterface,
    config_path: str,
    requirement: interfaces.configuration.RequirementInterface,
) -> bool:
    """Tell whether a kernel module that the plugin requires stayed without a layer or symbols."""
    path = interfaces.configuration.path_join(config_path, requirement.name)
    return any(
        isinstance(item, _KERNELS) and not item.optional and item.unsatisfied(context, path)
        for item in requirement.requirements.values()
    )


def message(guest: Guest, asked: str = "") -> str:
    """Return the one message. ``asked`` is the system that the plugin is for, where it is known."""
    found = guest.identity()
    head = f"--guest {guest.wanted}: "
    if asked and found.family and found.family != asked:
        runs = "runs" if found.is_certain else "seems to run"
        return f"{head}this plugin is for {_SYSTEMS.get(asked, asked)}, and the guest {runs} {found.name} ({found.why})"
    explain = EXPLAINERS.get(found.family)
    if explain is not None:
        return head + explain(guest, found)
    secret = "".join(f"\n  {note}" for note in guest.machine.confidential) if guest.machine else ""
    return f"{head}no kernel that Volatility has symbols for was found: {found.name} ({found.why}){secret}"
