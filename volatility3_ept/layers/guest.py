"""The layers that stand for a machine in the host's memory.

:class:`GuestPhysicalLayer` is a guest's physical memory; :class:`HostWithoutGuestsLayer` is the host's, with every
guest's pages masked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from volatility3.framework import interfaces
from volatility3.framework.configuration import requirements

from volatility3_ept.layers import errors, host, runs

if TYPE_CHECKING:
    from volatility3_ept.core.backing import Recovery
    from volatility3_ept.core.gpamap import GuestMap
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.core.root import Root

vollog = logging.getLogger(__name__)


class GuestPhysicalLayer(runs.RunsLayer):
    """The physical memory of one guest: its EPT or NPT over the layer that holds the tables and the frames.

    Configuration: ``base_layer``; ``root``, a text in the form of :class:`~volatility3_ept.core.root.Root`; ``table``,
    a hash of its top table, so that a saved configuration cannot be applied to another capture; ``slots``, where the
    VMM's address space holds the pages that EPT or NPT lacks, and ``others``, the roots of other guests, whose pages
    are never among them; ``guest``, the id under which ``ept.scan`` printed the machine; ``vcpus`` and ``top_table``,
    what is known of its virtual memory (:mod:`.virtual`).
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
            others = [Root.parse(text) for text in self.config.get("others", None) or ()]
        except RootError as error:
            raise errors.GuestError(str(error)) from error
        _check_table(self.root, below, self.config.get("table", None))
        slots = self.config.get("slots", None) or ()
        maps = [root.traverse(below) for root in others]
        self.guest_map = _recovered(self._what(), below, self.root, slots, maps).guest_map
        identity = HostMemory(below.source, below.starts, below.lengths, below.starts)
        return self.guest_map.memory(identity), self.guest_map.memory(below)

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
            requirements.ListRequirement(
                name="others", description="Roots of the other guests", element_type=str, optional=True
            ),
            requirements.StringRequirement(name="guest", description="Id of the machine", optional=True),
            requirements.ListRequirement(
                name="vcpus", description="Registers of its vCPUs", element_type=str, optional=True
            ),
            requirements.StringRequirement(
                name="top_table", description="Its own page tables, where a search found them", optional=True
            ),
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


def _recovered(
    what: str, below: HostMemory, root: Root, slots: Iterable[str], others: Sequence[GuestMap] = ()
) -> Recovery:
    """Return what a root maps, with the pages that it lacks and its VMM has, where the VMM's slots are known."""
    from volatility3_ept.core import backing
    from volatility3_ept.core.slots import Slot

    try:
        known = [Slot.parse(text) for text in slots]
    except ValueError as error:
        raise errors.GuestError(f"{what}: {error}") from error
    mapped = root.traverse(below)
    for note in mapped.findings.notes:
        vollog.warning("%s: %s", what, note)
    recovery = backing.again(below, mapped, known, root.format.key_bits, others)
    for note in recovery.notes:
        vollog.info("%s: %s", what, note)
    return recovery


class HostWithoutGuestsLayer(runs.RunsLayer):
    """The host's physical memory without the pages of its guests: their kernels cannot be taken for the host's.

    Configuration: ``base_layer``; ``roots``, the roots of the guests that are masked; ``tables``, hashes of their top
    tables; ``slots``, one text per root, the memory slots of its VMM with commas between, for the pages that EPT or
    NPT lacks. What is masked and what is not, :mod:`~volatility3_ept.core.mask` says.
    """

    def _what(self) -> str:
        return "the host without its guests"

    def _build(self) -> tuple[HostMemory, HostMemory]:
        from volatility3_ept.core import mask
        from volatility3_ept.core.memory import HostMemory
        from volatility3_ept.core.root import Root

        below = host.host_memory(self.context, self._base_layer, allow_truncated=True)
        found = []
        for text, table, slots in zip(self.config["roots"], self._each("tables"), self._each("slots"), strict=True):
            root = Root.parse(text)
            _check_table(root, below, table)
            found.append(_recovered(f"{self._what()}: {text}", below, root, slots.split(",") if slots else ()))
        starts, lengths = mask.without(
            below,
            [recovery.guest_map for recovery in found],
            [mask.read_only(recovery.guest_map, recovery.read_only) for recovery in found],
        )
        identity = HostMemory(below.source, below.starts, below.lengths, below.starts)
        return identity.remap(starts, lengths, starts), below.remap(starts, lengths, starts)

    def _each(self, name: str) -> list[str | None]:
        """Return the values of an option that has one for each root; GuestError when it has fewer or more."""
        count = len(self.config["roots"])
        values = self.config.get(name, None) or [None] * count
        if len(values) != count:
            raise errors.GuestError(f"{self._what()}: {len(values)} {name} for {count} roots in the configuration")
        return list(values)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """The layer below and the roots of the guests."""
        return [
            *super().get_requirements(),
            requirements.ListRequirement(name="roots", description="Roots of the masked guests", element_type=str),
            requirements.ListRequirement(
                name="tables", description="Hashes of the roots' tables", element_type=str, optional=True
            ),
            requirements.ListRequirement(
                name="slots", description="Memory slots in each VMM's address space", element_type=str, optional=True
            ),
        ]
