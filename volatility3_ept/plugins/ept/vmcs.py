"""``ept.vmcs``: the decoded control structures (VMCS and VMCB) of every vCPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

import volatility3_ept.automagic  # noqa: F401  (registers --guest)
from volatility3_ept.layers import discovery, errors, folder, options, target

if TYPE_CHECKING:
    from volatility3_ept.core.control import ControlStructure


class Vmcs(options.SharedOptions, interfaces.plugins.PluginInterface):
    """Shows the fields of each vCPU's VMCS or VMCB, decoded, with offset and raw value."""

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Options of the plugin."""
        return [
            *options.plugin_requirements(),
            requirements.ListRequirement(
                name="field",
                description="Only fields whose name contains one of these words (EPTP, CR3, RIP, ...)",
                element_type=str,
                optional=True,
            ),
            requirements.StringRequirement(
                name="save_layouts",
                description="Folder (within -o) for the inferred layouts of unknown processors, as ISF tables",
                optional=True,
            ),
            requirements.BooleanRequirement(
                name="all", description="Also fields that are zero", default=False, optional=True
            ),
        ]

    def run(self) -> renderers.TreeGrid:
        """Return one row per field."""
        capture = discovery.open_capture(self.context, self.config["primary"], self.config)
        columns = [
            ("Machine", str),
            ("vCPU", int),
            ("Structure", str),
            ("Address", format_hints.Hex),
            ("Held in", str),
            ("Field", str),
            ("Offset", format_hints.Hex),
            ("Raw", format_hints.Hex),
            ("Decoded", str),
        ]
        found = target.targets(capture, self.config, self._progress_callback)
        if self.config.get("save_layouts", None) is not None:
            self._save_layouts(found, self.config["save_layouts"])
        return renderers.TreeGrid(columns, self._generator(found))

    def _save_layouts(self, found: list[target.Target], name: str) -> None:
        """Write each layout that was inferred in this capture; EptError with one line when there is none."""
        from volatility3_ept.export import output

        inferred = {
            layout: text
            for item in found
            if item.found is not None
            for layout, (text, *_) in item.found.index.inferred.items()
        }
        if not inferred:
            raise errors.EptError(f"--save-layouts {name}: no layout had to be inferred in this capture")
        texts = {f"{layout}.json": text for layout, text in inferred.items()}
        folder.fill(self, name, "--save-layouts", lambda path: output.write_texts(path, texts), output.OutputError)

    def _generator(self, found: list[target.Target]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        words = [word.upper() for word in self.config.get("field", None) or []]
        for chosen in found:
            for number, vcpu in enumerate(chosen.machine.vcpus if chosen.machine else ()):
                fields = vcpu.table.fields if vcpu.table else {}
                for name, field in sorted(fields.items(), key=lambda item: item[1].offset):
                    value = vcpu.fields.get(name, 0)
                    if (words and not any(word in name for word in words)) or not (
                        value or words or self.config["all"]
                    ):
                        continue
                    yield (
                        0,
                        (
                            chosen.id,
                            number,
                            f"{vcpu.kind} ({vcpu.layout})",
                            format_hints.Hex(vcpu.hpa),
                            f"machine {vcpu.held_in}" if vcpu.held_in else "capture",
                            name,
                            format_hints.Hex(field.offset),
                            format_hints.Hex(field.read(vcpu.raw)),
                            _decoded(vcpu, name, value),
                        ),
                    )


def _decoded(vcpu: ControlStructure, name: str, value: int) -> str:
    """Say what a field means. The save area of an SEV-ES guest holds nothing of the guest's."""
    from volatility3_ept.spec import describe, vmcb

    if not vcpu.holds_registers and vcpu.table and vcpu.table.fields[name].offset >= vmcb.SAVE_AREA:
        return "not the guest's: its registers are in the encrypted VMSA"
    return describe.field(vcpu.kind, name, value)
