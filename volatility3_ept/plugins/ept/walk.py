"""``ept.walk``: what a guest's EPT or NPT maps, and how one address gets there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

import volatility3_ept.automagic  # noqa: F401  (registers --guest)
from volatility3_ept.layers import discovery, errors, options, rows, target
from volatility3_ept.layers.hints import Bytes

if TYPE_CHECKING:
    from volatility3_ept.core.guestvirtual import AddressSpace
    from volatility3_ept.layers.target import Target
    from volatility3_ept.spec.ia32e import Ia32Format

vollog = logging.getLogger(__name__)

_MODES = {"32-bit": "legacy", "pae": "pae", "4-level": "four_level", "5-level": "five_level"}


class Walk(options.SharedOptions, interfaces.plugins.PluginInterface):
    """Walks EPT or NPT: every guest's ranges, or one address with every entry read, decoded, and why the walk ends.

    Without an address it lists what each guest's tables map. --gpa walks one guest-physical address; --gva walks a
    guest-virtual one in both dimensions, with all the references the processor would make.
    """

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Options of the plugin."""
        text = requirements.StringRequirement
        return [
            *options.plugin_requirements(),
            text(name="gpa", description="Guest-physical address to walk (0x for hexadecimal)", optional=True),
            text(name="gva", description="Guest-virtual address to walk in two dimensions", optional=True),
            text(name="cr3", description="CR3 for --gva; without it the vCPU's", optional=True),
            requirements.IntRequirement(
                name="vcpu",
                description="Number of the vCPU for --gva; else the one with most of a kernel",
                optional=True,
            ),
            requirements.ChoiceRequirement(
                choices=list(_MODES), name="paging", description="The guest's paging mode for --gva", optional=True
            ),
            text(name="eptp", description="EPT pointer to walk, instead of --guest", optional=True),
            text(name="ncr3", description="nCR3 to walk, instead of --guest", optional=True),
        ]

    def run(self) -> renderers.TreeGrid:
        """Return ranges, or the entries of one walk."""
        if self.config.get("gva", None) is not None:
            if self.config.get("gpa", None) is not None:
                raise errors.GuestError("--gpa and --gva: give one of them")
            return renderers.TreeGrid(rows.COLUMNS, iter(self._gva()))
        if self.config.get("cr3", None) is not None:
            raise errors.GuestError("--cr3 goes with --gva")
        if self.config.get("gpa", None) is not None:
            return renderers.TreeGrid(rows.COLUMNS, iter(self._gpa()))
        columns = [
            ("Machine", str),
            ("GPA", format_hints.Hex),
            ("Size", Bytes),
            ("HPA", format_hints.Hex),
            ("Access", str),
            ("Type", str),
            ("Page", Bytes),
            ("What", str),
        ]
        return renderers.TreeGrid(columns, self._ranges(self._targets()))

    def _targets(self) -> list[Target]:
        capture = discovery.open_capture(self.context, self.config["primary"], self.config)
        return target.targets(capture, self.config, self._progress_callback)

    def _ranges(self, found: list[Target]) -> Iterator[rows.Row]:
        from volatility3_ept.core import ranges

        for chosen in found:
            fmt = chosen.root.format
            for item in ranges.listing(chosen.guest_map, chosen.below):
                hpa = renderers.NotApplicableValue() if item.hpa is None else format_hints.Hex(item.hpa)
                page = renderers.NotApplicableValue() if not item.page_size else Bytes(item.page_size)
                kind = rows.memory_type(item.memory_type, fmt) if item.hpa is not None else ""
                access = item.access.letters() if item.hpa is not None else ""
                yield 0, (chosen.id, format_hints.Hex(item.gpa), Bytes(item.length), hpa, access, kind, page, item.what)

    def _gpa(self) -> list[rows.Row]:
        gpa = target.number(self.config["gpa"], "--gpa", 52)
        chosen = target.only(self._targets(), "--gpa")
        return list(rows.one_dimensional(chosen.root.walk(chosen.below, gpa), chosen.root.format))

    def _gva(self) -> list[rows.Row]:
        from volatility3_ept.core import nested

        gva = target.number(self.config["gva"], "--gva")
        chosen = target.only(self._targets(), "--gva")
        fmt, cr3 = self._tables(chosen, gva)
        walk = nested.walk(chosen.below, chosen.root, chosen.memory, fmt, cr3, gva)
        return list(rows.two_dimensional(walk, chosen.root.format, fmt))

    def _tables(self, chosen: Target, gva: int) -> tuple[Ia32Format, int]:
        """Return the paging mode and the CR3 for an address: what the options give, else what the vCPUs have."""
        from volatility3_ept.spec import ia32e

        given, cr3_text = self.config.get("paging", None), self.config.get("cr3", None)
        mode: Ia32Format | None = getattr(ia32e, _MODES[given])() if given is not None else None
        cr3 = target.number(cr3_text, "--cr3") if cr3_text is not None else None
        if mode is not None and cr3 is not None:
            return mode, cr3
        space = self._space(chosen)
        if cr3 is None:
            if space is None:
                raise errors.GuestError("--gva: no control structure of this machine gives CR3; give it with --cr3")
            if mode is not None:
                return mode, space.user_cr3 or space.cr3
            if space.mode is None:
                raise errors.GuestError(
                    "--gva: paging is off in this vCPU; its virtual addresses are guest-physical ones"
                )
            return space.at(gva)
        return (space.mode.from_memory if space and space.mode else ia32e.four_level()), cr3

    def _space(self, chosen: Target) -> AddressSpace | None:
        """Return the address space of the vCPU that was asked for, or the one that stands for the machine.

        Where nothing translates in it, its registers count all the same: the walk then says why. None for a root
        without control structures.
        """
        from volatility3_ept.core import guestvirtual

        if chosen.machine is None:
            return None
        states = guestvirtual.states(chosen.machine)
        number = self.config.get("vcpu", None)
        if number is None:
            found = guestvirtual.of_machine(chosen.machine)
        elif 0 <= number < len(states):
            found, states = guestvirtual.of_vcpu(chosen.memory, states[number]), states[number:]
        else:
            raise errors.GuestError(f"--vcpu {number}: machine {chosen.id} has {len(states)} (numbered from 0)")
        vollog.info("Machine %s: %s", chosen.id, found)
        return found.space or (guestvirtual.nominal(states[0]) if states else None)
