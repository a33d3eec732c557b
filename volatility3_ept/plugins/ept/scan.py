"""``ept.scan``: which virtual machines live in this host image."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

import volatility3_ept.automagic  # noqa: F401  (registers --guest)
from volatility3_ept.layers import discovery, folder, hostcheck, options, saving
from volatility3_ept.layers.hints import Bytes

if TYPE_CHECKING:
    from volatility3_ept.core.machines import Discovery, Machine
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)


class Scan(options.SharedOptions, interfaces.plugins.PluginInterface):
    """Finds the virtual machines in a host's memory: one row per machine, nested ones below their parent."""

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Options of the plugin."""
        return [
            *options.plugin_requirements(),
            requirements.BooleanRequirement(
                name="no_host_check",
                description="Do not check which kernel Volatility takes for the host's (faster)",
                optional=True,
            ),
            requirements.StringRequirement(
                name="save",
                description="Folder (within -o) for one configuration per machine, for vol -c without any search",
                optional=True,
            ),
            requirements.BooleanRequirement(
                name="overwrite", description="Replace configurations that exist already", optional=True
            ),
        ]

    def _generator(
        self, shown: list[Machine], memory: HostMemory, found: Discovery
    ) -> Iterator[tuple[int, tuple[Any, ...]]]:
        from volatility3_ept.core import hyperv

        base = shown[0].depth if shown else 0
        for machine in shown:
            role = hyperv.role(machine, found, memory)
            evidence = [
                *_evidence(machine, memory, found),
                *(f"+ role: {text}" for text in (role.evidence if role else ())),
            ]
            yield (
                machine.depth - base,
                (
                    machine.id,
                    machine.root.kind,
                    format_hints.Hex(machine.root.raw),
                    machine.root.levels,
                    len(machine.vcpus),
                    Bytes(machine.guest_map.mapped_bytes),
                    f"{machine.system}, {role.name}" if role else machine.system,
                    machine.found_by,
                    "; ".join(evidence),
                ),
            )

    def _save(self, memory: HostMemory, found: Discovery, shown: list[Machine], name: str) -> None:
        """Write one configuration for each machine that is shown; EptError with one line when that is not possible."""
        from volatility3_ept.export import output

        texts = {
            f"guest-{machine.id}.json": saving.configuration(
                self.context, self.config["primary"], memory, found, machine.id, self._progress_callback
            )
            for machine in shown
        }
        overwrite = bool(self.config.get("overwrite", False))
        folder.fill(self, name, "--save", lambda path: output.write_texts(path, texts, overwrite), output.OutputError)

    def run(self) -> renderers.TreeGrid:
        """Return one row per machine. The search comes first: an error then stands alone, without a table's head."""
        capture = discovery.open_capture(self.context, self.config["primary"], self.config)
        found = capture.discover(self.config, self._progress_callback)
        wanted = self.config.get("guest", None)
        shown = found.all() if wanted is None else list(discovery.select(found, wanted).tree())
        if not shown:
            vollog.warning("No virtual machine was found in %d pages (-vv shows what was not believed)", found.pages)
        elif not self.config.get("no_host_check", False):
            hostcheck.warn(self.context, self.config["primary"], found, self._progress_callback)
        if self.config.get("save", None) is not None:
            self._save(capture.memory, found, shown, self.config["save"])
        columns = [
            ("Machine", str),
            ("Kind", str),
            ("Root", format_hints.Hex),
            ("Levels", int),
            ("vCPUs", int),
            ("Mapped", Bytes),
            ("OS", str),
            ("Found by", str),
            ("Evidence", str),
        ]
        return renderers.TreeGrid(columns, self._generator(shown, capture.memory, found))


def _evidence(machine: Machine, memory: HostMemory, found: Discovery) -> Iterator[str]:
    """Yield the criteria of a machine, what became of its memory, and its further views."""
    from volatility3_ept.core import coverage, portrait

    yield from map(str, machine.evidence)
    parent = found.find(machine.tables_in) if machine.tables_in else None
    covered = coverage.account(machine.guest_map, parent.memory if parent else memory, machine.recovery)
    yield f"? memory: {portrait.summary(covered.totals())}"
    yield from (f"? also mapped by: {view}" for view in machine.views)
