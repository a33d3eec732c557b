"""``ept.owner``: whose memory is this address of the host?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

import volatility3_ept.automagic  # noqa: F401  (registers --guest)
from volatility3_ept.layers import discovery, errors, options, target
from volatility3_ept.layers.hints import Bytes

if TYPE_CHECKING:
    from volatility3_ept.core.memory import HostMemory, Int64
    from volatility3_ept.core.owner import Answer, Owners

_SOURCES = ("hpa", "offset", "from_file", "offsets_from_file")


class Owner(options.SharedOptions, interfaces.plugins.PluginInterface):
    """Tells which machines hold a page of the host, and at which guest-physical address; or what else the page is.

    The way from a hit of a scanner in the host's image to the guest it is in: --hpa takes addresses as Volatility's
    scanners print them (yarascan on the physical layer), --offset what yara or grep say of the file.
    """

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Options of the plugin."""
        many, text = requirements.ListRequirement, requirements.StringRequirement
        return [
            *options.plugin_requirements(),
            many(
                name="hpa",
                description="Host-physical addresses (0x for hexadecimal)",
                element_type=str,
                min_elements=1,
                optional=True,
            ),
            many(
                name="offset",
                description="Offsets in the capture file, as yara and grep print them",
                element_type=str,
                min_elements=1,
                optional=True,
            ),
            text(name="length", description="Bytes from each address on (1 if not given)", optional=True),
            text(
                name="from_file",
                description="File with one host-physical address at the beginning of each line",
                optional=True,
            ),
            text(
                name="offsets_from_file",
                description="The same with offsets in the capture file (the output of yara -s)",
                optional=True,
            ),
        ]

    def run(self) -> renderers.TreeGrid:
        """Return one row per stretch of memory that one machine holds."""
        given = [name for name in _SOURCES if self.config.get(name, None)]
        if len(given) != 1:
            choices = ", ".join(f"--{name.replace('_', '-')}" for name in _SOURCES)
            raise errors.GuestError(f"ept.owner answers questions: give one of {choices}")
        asked = self._questions(given[0])
        length = target.number(self.config.get("length", None) or "1", "--length", 52)
        if not length:
            raise errors.GuestError("--length 0: give at least one byte")
        capture = discovery.open_capture(self.context, self.config["primary"], self.config)
        by_offset = "offset" in given[0]
        if by_offset:
            self._check_offsets(capture.memory)
        owners = self._owners(capture)
        answers = owners.at_offsets(asked, length) if by_offset else owners.ask(asked, length)
        columns = [
            ("Asked", format_hints.Hex),
            ("HPA", format_hints.Hex),
            ("Length", Bytes),
            ("Machine", str),
            ("GPA", format_hints.Hex),
            ("Through", str),
            ("How", str),
            ("Access", str),
            ("Detail", str),
        ]
        return renderers.TreeGrid(columns, self._generator(asked.tolist(), answers))

    def _questions(self, name: str) -> Int64:
        import numpy as np

        from volatility3_ept.core import owner

        given = self.config[name]
        option = f"--{name.replace('_', '-')}"
        if not name.endswith("file"):
            return np.array([target.number(text, option, 52) for text in given], dtype=np.int64)
        try:
            with Path(given).open(encoding="utf-8", errors="replace") as lines:
                return owner.addresses(lines)
        except OSError as error:
            raise errors.EptError(f"{option} {given}: {error.strerror}") from None
        except ValueError as error:
            raise errors.EptError(f"{option} {given}, {error}") from None

    def _check_offsets(self, memory: HostMemory) -> None:
        from volatility3_ept.core.source import FileSource

        if not isinstance(memory.source, FileSource):
            raise errors.CaptureError(
                "the memory of this capture does not lie in its file as it is: offsets name nothing; use --hpa"
            )

    def _owners(self, capture: discovery.Opened) -> Owners:
        from volatility3_ept.core import lineage
        from volatility3_ept.core.owner import Owners

        chosen = target.targets(capture, self.config, self._progress_callback)
        found = next((item.found for item in chosen), None)
        if found is None:
            lines = [lineage.alone(item.id, item.guest_map, item.below) for item in chosen]
        else:
            lines = lineage.lines(found, capture.memory)
        named = self.config.get("guest", None) is not None
        return Owners(capture.memory, lines, [item.id for item in chosen] if named else None)

    def _generator(self, asked: list[int], answers: Iterator[Answer]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        none = renderers.NotApplicableValue()
        for item in answers:
            through = ", ".join(f"{address:#x} of {name}" for name, address in item.through)
            yield (
                0,
                (
                    format_hints.Hex(asked[item.asked]),
                    format_hints.Hex(item.hpa) if item.length else none,
                    Bytes(item.length) if item.length else none,
                    item.machine or none,
                    none if item.gpa is None else format_hints.Hex(item.gpa),
                    through or none,
                    str(item.how),
                    item.access.letters() if item.gpa is not None else none,
                    item.detail,
                ),
            )
