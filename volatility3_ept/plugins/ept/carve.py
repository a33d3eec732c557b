"""``ept.carve``: a guest as an image of its own, for any tool."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements

import volatility3_ept.automagic  # noqa: F401  (registers --guest)
from volatility3_ept.layers import discovery, errors, folder, options, target
from volatility3_ept.layers.hints import Bytes

if TYPE_CHECKING:
    from volatility3_ept.export.carve import Carved, Image

vollog = logging.getLogger(__name__)

_FORMATS = ["raw", "padded", "lime", "elf"]


class Carve(options.SharedOptions, interfaces.plugins.PluginInterface):
    """Writes guests as images of their own into the folder of -o: raw, LiME or ELF core, each with a manifest (JSON).

    Without --guest every machine is written, nested ones too. A file appears when it is whole, or not at all.
    """

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Options of the plugin."""
        text = requirements.StringRequirement
        return [
            *options.plugin_requirements(),
            requirements.ChoiceRequirement(
                choices=_FORMATS,
                name="format",
                description="raw: sparse file; padded: raw, holes written as zeros; lime; elf: core with registers",
                default="elf",
                optional=True,
            ),
            text(name="start", description="First guest-physical address to write (0x for hexadecimal)", optional=True),
            text(name="length", description="Bytes to write from there on", optional=True),
            requirements.BooleanRequirement(
                name="overwrite", description="Replace files that exist already", default=False, optional=True
            ),
            requirements.BooleanRequirement(
                name="no_hash", description="Compute no SHA-256 of the file (faster)", default=False, optional=True
            ),
            requirements.BooleanRequirement(
                name="hash_memory",
                description="Also compute the SHA-256 of the memory alone: the same for all formats",
                default=False,
                optional=True,
            ),
        ]

    def run(self) -> renderers.TreeGrid:
        """Write the images and return one row for each. All is written first: an error then stands alone."""
        columns = [
            ("Machine", str),
            ("File", str),
            ("Format", str),
            ("Bytes", Bytes),
            ("Present", Bytes),
            ("Holes", Bytes),
            ("SHA-256", str),
        ]
        return renderers.TreeGrid(columns, iter(list(self._carved())))

    def _carved(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        from volatility3_ept.export import carve, plan
        from volatility3_ept.export.output import OutputError

        base, format_, overwrite = self._folder(), plan.Format(self.config["format"]), bool(self.config["overwrite"])
        progress, sums = self._progress_callback, (not self.config["no_hash"], self.config["hash_memory"])
        start, stop = self._range()
        capture = discovery.open_capture(self.context, self.config["primary"], self.config)
        found = target.targets(capture, self.config, progress)
        if not found:
            raise errors.GuestError(
                "ept.carve: no machine was found in this capture; give a root with --guest eptp=0x..."
            )
        images = [(chosen.id, _image(chosen, start, stop)) for chosen in found]
        if len(images) > 1:
            images = _not_empty(images) or images
        written: list[str] = []
        try:
            for _, image in images:
                carve.check(image, base, format_, overwrite)
            for name, image in images:
                done = carve.carve(image, base, format_, overwrite, progress, self._source(), *sums)
                written.append(done.path.name)
                yield 0, _row(name, done)
        except OutputError as error:
            before = f"; written before that: {', '.join(written)}" if written else ""
            raise errors.EptError(f"{error}{before}") from None

    def _range(self) -> tuple[int, int | None]:
        """Return the addresses that --start and --length bound."""
        start, length = self.config.get("start", None), self.config.get("length", None)
        first = 0 if start is None else target.number(start, "--start", 52)
        if length is None:
            return first, None
        count = target.number(length, "--length", 52)
        if not count:
            raise errors.GuestError("--length 0: nothing to write")
        return first, first + count

    def _folder(self) -> Path:
        """Return the folder of ``-o``. Files are not written by Volatility's own class for that.

        It gives a half-written file its name when an error ends the writing, and another name where a file exists.
        """
        try:
            return folder.output(self)
        except OSError as error:
            raise errors.EptError(f"{error.filename}: {error.strerror}") from None

    def _source(self) -> dict[str, Any]:
        """Return name and size of the file that the memory comes from."""
        layer = self.context.layers[self.config["primary"]]
        while layer.dependencies:
            layer = self.context.layers[layer.dependencies[0]]
        location = str(getattr(layer, "location", "") or "")
        return {"file": location.rpartition("/")[2], "bytes": layer.maximum_address + 1}


def _not_empty(images: list[tuple[str, Image]]) -> list[tuple[str, Image]]:
    """Leave out machines of which nothing is present: the others are not to suffer from it."""
    for name, image in images:
        if not image.present:
            vollog.warning("Machine %s is not written: no page of it is present there", name)
    return [(name, image) for name, image in images if image.present]


def _image(chosen: target.Target, start: int, stop: int | None) -> Image:
    from volatility3_ept.core import coverage
    from volatility3_ept.export import carve

    if chosen.machine is not None:
        return carve.Image.of(chosen.machine, chosen.below, start, stop)
    covered = coverage.account(chosen.guest_map, chosen.below)
    name = carve.file_name(f"{chosen.root.kind.lower()}-{chosen.root.raw:x}", start, stop)
    return carve.Image(name, chosen.memory, covered, about={"root": chosen.id}, start=start, stop=stop)


def _row(machine: str, done: Carved) -> tuple[Any, ...]:
    digest = renderers.NotAvailableValue() if done.sha256 is None else done.sha256
    return (
        machine,
        str(done.path),
        str(done.format),
        Bytes(done.size),
        Bytes(done.present),
        Bytes(done.holes),
        digest,
    )
