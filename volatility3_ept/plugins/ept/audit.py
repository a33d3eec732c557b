"""``ept.audit``: hooks, split views, aliases, exposed pages of the host, hypervisors that do not belong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

import volatility3_ept.automagic  # noqa: F401  (registers --guest)
from volatility3_ept.layers import disassembly, discovery, errors, hostkernel, opening, options, target
from volatility3_ept.layers.hints import Bytes

if TYPE_CHECKING:
    from volatility3_ept.core.audit_finding import Audit as Result
    from volatility3_ept.core.audit_finding import Finding
    from volatility3_ept.core.audit_host import HostKernel
    from volatility3_ept.core.machines import Discovery

vollog = logging.getLogger(__name__)


class Audit(options.SharedOptions, interfaces.plugins.PluginInterface):
    """Shows what EPT and NPT give away: hidden hooks, split views, aliased frames, exposed pages, thin hypervisors.

    One row per finding, the gravest of each machine first. Findings of severity info are benign by all that is known.
    docs/audit has a page for each kind. With --diff, what changed until a second capture of the same host.
    """

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Options of the plugin."""
        return [
            *options.plugin_requirements(),
            requirements.StringRequirement(
                name="diff",
                description="A later capture of the same host (a path): show what changed in EPT and NPT until then",
                optional=True,
            ),
            requirements.ChoiceRequirement(
                choices=["info", "low", "medium", "high"],
                name="severity",
                description="The least severity to show",
                default="info",
                optional=True,
            ),
            requirements.BooleanRequirement(
                name="no_host_check",
                description="Do not look for the host's own kernel and its modules (faster)",
                optional=True,
            ),
        ]

    def run(self) -> renderers.TreeGrid:
        """Return one row per finding."""
        if target.given_root(self.config) is not None:
            raise errors.GuestError("ept.audit works on the machines that it finds: name one by its id")
        capture = discovery.open_capture(self.context, self.config["primary"], self.config)
        found = capture.discover(self.config, self._progress_callback)
        chosen = self._chosen(found)
        if self.config.get("diff", None) is None:
            rows = self._audit(capture, found, chosen)
        else:
            rows = self._diff(capture, found, chosen)
        columns = [
            ("Machine", str),
            ("Kind", str),
            ("Severity", str),
            ("GPA", format_hints.Hex),
            ("Size", Bytes),
            ("HPA", format_hints.Hex),
            ("Evidence", str),
            ("Benign cause", str),
        ]
        return renderers.TreeGrid(columns, self._generator(rows))

    def _chosen(self, found: Discovery) -> list[str] | None:
        wanted = self.config.get("guest", None)
        if wanted is None:
            return None
        discovery.check_syntax(wanted)
        if wanted.strip().lower() == discovery.HOST:
            raise errors.GuestError("--guest host: the host itself has no EPT or NPT here; name a machine")
        return [discovery.select(found, wanted).id]

    def _audit(self, capture: discovery.Opened, found: Discovery, chosen: list[str] | None) -> list[Finding]:
        from volatility3_ept.core import audit, scan

        hosts: dict[str, HostKernel] = {}
        if found.machines and not self.config.get("no_host_check", False):
            hosts = hostkernel.find(
                self.context, self.config["primary"], found, capture.memory, self._progress_callback
            )
        progress = self._progress_callback or scan.silent
        result = audit.audit(found, capture.memory, chosen, disassembly.disassembler(), hosts, progress)
        return self._told(result)

    def _diff(self, capture: discovery.Opened, found: Discovery, chosen: list[str] | None) -> list[Finding]:
        from volatility3_ept.core import audit_diff

        path = Path(self.config["diff"])
        if path.is_dir():
            raise errors.EptError(f"--diff {path}: it is a folder")
        try:
            later = opening.memory(path, bool(self.config.get("allow_truncated", False)))
        except OSError as error:
            raise errors.EptError(f"--diff {path}: {error.strerror or error}") from None
        second = discovery.Opened(later, None).discover(self.config, self._progress_callback)
        result = audit_diff.compare((found, capture.memory), (second, later), disassembly.disassembler())
        return [row for row in self._told(result) if chosen is None or row.machine in chosen]

    def _told(self, result: Result) -> list[Finding]:
        for note in result.notes:
            vollog.warning("%s", note)
        return list(result.findings)

    def _generator(self, rows: list[Finding]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        from volatility3_ept.core.audit_finding import Severity

        none = renderers.NotApplicableValue()
        least = Severity[str(self.config.get("severity", None) or "info").upper()]
        for row in rows:
            if row.severity >= least:
                yield (
                    0,
                    (
                        row.machine,
                        str(row.kind),
                        str(row.severity),
                        none if row.gpa is None else format_hints.Hex(row.gpa),
                        Bytes(row.length),
                        none if row.hpa is None else format_hints.Hex(row.hpa),
                        row.evidence,
                        row.benign,
                    ),
                )
