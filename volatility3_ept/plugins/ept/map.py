"""``ept.map``: what became of every page of a guest, as ranges that add up, and as a page to look at."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

import volatility3_ept.automagic  # noqa: F401  (registers --guest)
from volatility3_ept.layers import discovery, errors, folder, options, target
from volatility3_ept.layers.hints import Bytes

if TYPE_CHECKING:
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.core.portrait import Part, Portrait

vollog = logging.getLogger(__name__)

Row = tuple[int, tuple[Any, ...]]


class Map(options.SharedOptions, interfaces.plugins.PluginInterface):
    """Shows what became of every guest-physical page: mapped, recovered, a device's, never backed, or out of reach.

    Each machine's row holds all addresses below the top of its memory, the rows below it the total of each fate, and
    below these the ranges. Shares are of the guest's memory: devices and holes have none.
    """

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Options of the plugin."""
        switch = requirements.BooleanRequirement
        return [
            *options.plugin_requirements(),
            switch(name="totals", description="Only the totals, no ranges", default=False, optional=True),
            requirements.StringRequirement(
                name="html",
                description="Also write one self-contained HTML page with this name into the folder of -o",
                optional=True,
            ),
            switch(name="overwrite", description="Replace the page if it exists already", default=False, optional=True),
        ]

    def run(self) -> renderers.TreeGrid:
        """Return totals and ranges. The page is written first: an error then stands alone."""
        where = None
        if self.config.get("html", None) is not None:
            where = folder.output(self) / folder.plain_name(self.config["html"], "--html")
            self._check(where)
        capture = discovery.open_capture(self.context, self.config["primary"], self.config)
        shown = self._portraits(capture)
        if not shown:
            vollog.warning("No virtual machine was found in this capture")
        if where is not None:
            self._write(where, capture.memory, shown)
        columns = [
            ("Machine", str),
            ("Fate", str),
            ("GPA", format_hints.Hex),
            ("Size", Bytes),
            ("Share %", float),
            ("HPA", format_hints.Hex),
            ("Detail", str),
        ]
        return renderers.TreeGrid(columns, self._generator(shown))

    def _portraits(self, capture: discovery.Opened) -> list[Portrait]:
        from volatility3_ept.core import lineage, portrait

        chosen = target.targets(capture, self.config, self._progress_callback)
        found = next((item.found for item in chosen), None)
        if found is None:
            lines = [lineage.alone(item.id, item.guest_map, item.below) for item in chosen]
        else:
            lines = lineage.lines(found, capture.memory)
        return portrait.portraits(lines, capture.memory, [item.id for item in chosen])

    def _generator(self, shown: list[Portrait]) -> Iterator[Row]:
        from volatility3_ept.core import portrait

        none = renderers.NotApplicableValue()
        for item in shown:
            totals, memory = item.coverage.totals(), item.memory
            text = "; ".join([item.summary(), *item.confidential, *portrait.shared_text(item.shared)])
            top = item.coverage.top
            yield 0, (item.id, "all below the top", format_hints.Hex(0), Bytes(top), none, none, text)
            parts = [] if self.config["totals"] else list(item.parts())
            for fate, size in totals.items():
                if not size:
                    continue
                part = round(100 * size / memory, 3) if fate not in portrait.NO_MEMORY else none
                count = f"{item.coverage.count(fate)} ranges" if item.coverage.count(fate) > 1 else "1 range"
                yield 1, (item.id, str(fate), none, Bytes(size), part, none, count)
                yield from (_range(item.id, each, memory) for each in parts if each.fate is fate)

    def _check(self, where: Path) -> None:
        from volatility3_ept.export.output import Output, OutputError

        try:
            Output(where.parent, where.name, bool(self.config["overwrite"]))
        except OutputError as error:
            raise errors.EptError(f"--html {where.name}: {error}") from None

    def _write(self, where: Path, memory: HostMemory, shown: list[Portrait]) -> None:
        from volatility3_ept.export import html
        from volatility3_ept.export.output import Output, OutputError

        text = html.render(self._capture_name(), memory, shown)
        try:
            with Output(where.parent, where.name, bool(self.config["overwrite"])) as file:
                file.write(text.encode())
                file.publish()
        except OutputError as error:
            raise errors.EptError(f"--html {where.name}: {error}") from None

    def _capture_name(self) -> str:
        """Return the name of the file that the memory comes from."""
        layer = self.context.layers[self.config["primary"]]
        while layer.dependencies:
            layer = self.context.layers[layer.dependencies[0]]
        return str(getattr(layer, "location", "") or layer.name).rpartition("/")[2]


def _range(machine: str, part: Part, memory: int) -> Row:
    from volatility3_ept.core import portrait

    none = renderers.NotApplicableValue()
    share = round(100 * part.length / memory, 3) if part.fate not in portrait.NO_MEMORY else none
    hpa = none if part.hpa is None else format_hints.Hex(part.hpa)
    detail = f"{part.runs} runs in the host" if part.runs > 1 else ""
    return 2, (machine, str(part.fate), format_hints.Hex(part.gpa), Bytes(part.length), share, hpa, detail)
