"""The layers that stand for a machine in the host's memory.

:class:`GuestPhysicalLayer` is a guest's physical memory; :class:`HostWithoutGuestsLayer` is the host's, with every
guest's pages masked.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from volatility3.framework import interfaces
from volatility3.framework.configuration import requirements

from volatility3_ept.layers import errors, host, runs

if TYPE_CHECKING:
    from volatility3_ept.core.gpamap import GuestMap
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.core.root import Root

vollog = logging.getLogger(__name__)


class GuestPhysicalLayer(runs.RunsLayer):
    """The physical memory of one guest: its EPT or NPT over the layer that holds the tables and the frames.

    Configuration: ``base_layer``; ``root``, a text in the form of :class:`~volatility3_ept.core.root.Root`; ``table``,
    a hash of its top table, so that a saved configuration cannot be applied to another capture; ``slots``, where the
    VMM's address space holds the pages that EPT or NPT lacks; ``guest``, the id under which ``ept.scan`` printed the
    machine.
    """

    guest_map: GuestMap
    root: Root

    def _what(self) -> str:
        return f"guest {self.config.get('guest', '?')} ({self.config['root']})"

    def _build(self) -> tuple[HostMemory, HostMemory]:
        from volatility3_ept.core.memory import HostMemory
        from volatility3_ept.core.root import Root, RootError

        below = host.host_memory(self.context, self._base_layer, allow_truncated=True)
        try:
            self.root = Root.parse(self.config["root"])
        except RootError as error:
            raise errors.GuestError(str(error)) from error
        _check_table(self.root, below, self.config.get("table", None))
        self.guest_map = self._with_recovered(below, self.root.traverse(below))
        for note in self.guest_map.findings.notes:
            vollog.warning("%s: %s", self._what(), note)
        identity = HostMemory(below.source, below.starts, below.lengths, below.starts)
        return self.guest_map.memory(identity), self.guest_map.memory(below)

    def _with_recovered(self, below: HostMemory, mapped: GuestMap) -> GuestMap:
        """Add the pages that EPT or NPT lacks and the VMM has, where the configuration names its slots."""
        from volatility3_ept.core import backing
        from volatility3_ept.core.slots import Slot

        try:
            known = [Slot.parse(text) for text in self.config.get("slots", None) or []]
        except ValueError as error:
            raise errors.GuestError(f"{self._what()}: {error}") from error
        return backing.again(below, mapped, known, self.root.format.key_bits).guest_map

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """The layer below, the root, and where its VMM keeps what the tables lack."""
        return [
            *super().get_requirements(),
            requirements.StringRequirement(name="root", description="EPT or NPT root, as --guest takes it"),
            requirements.StringRequirement(name="table", description="Hash of the root's table", optional=True),
            requirements.ListRequirement(
                name="slots", description="Memory slots in the VMM's address space", element_type=str, optional=True
            ),
            requirements.StringRequirement(name="guest", description="Id of the machine", optional=True),
        ]


def _check_table(root: Root, below: HostMemory, expected: str | None) -> None:
    """Raise GuestError when a root's table is not in the capture, or not the one that a configuration was made from."""
    found = root.fingerprint(below)
    if not found:
        raise errors.GuestError(f"root {root}: the table at {root.address:#x} is not in the capture")
    if expected is not None and expected != found:
        raise errors.GuestError(
            f"root {root}: the table at {root.address:#x} is not the one that this configuration was made from; "
            "is it another capture?"
        )


class HostWithoutGuestsLayer(runs.RunsLayer):
    """The host's physical memory without the pages of its guests: their kernels cannot be taken for the host's.

    Configuration: ``base_layer``; ``roots``, the roots of the guests that are masked; ``tables``, hashes of their top
    tables.
    """

    def _what(self) -> str:
        return "the host without its guests"

    def _build(self) -> tuple[HostMemory, HostMemory]:
        from volatility3_ept.core import mask
        from volatility3_ept.core.memory import HostMemory
        from volatility3_ept.core.root import Root

        below = host.host_memory(self.context, self._base_layer, allow_truncated=True)
        roots = [Root.parse(text) for text in self.config["roots"]]
        for root, table in zip(roots, self.config.get("tables", None) or [None] * len(roots), strict=True):
            _check_table(root, below, table)
        maps = [root.traverse(below) for root in roots]
        starts, lengths = mask.without(below, maps)
        identity = HostMemory(below.source, below.starts, below.lengths, below.starts)
        return identity.remap(starts, lengths, starts), below.remap(starts, lengths, starts)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """The layer below and the roots of the guests."""
        return [
            *super().get_requirements(),
            requirements.ListRequirement(name="roots", description="Roots of the masked guests", element_type=str),
            requirements.ListRequirement(
                name="tables", description="Hashes of the roots' tables", element_type=str, optional=True
            ),
        ]
