"""The targets: a function of bytes each, the modules that it is about, and where its first inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fuzz import files, hosts, monitors, seeds, structures, tables, texts

Function = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """One thing to fuzz. ``modules`` are named below ``volatility3_ept``; coverage is counted in them.

    ``tries`` are the inputs of the test run: as many as take some seconds.
    """

    function: Function
    modules: tuple[str, ...]
    tries: int
    seeds: Callable[[], Iterable[bytes]] = seeds.none


_WALK = ("core.walk", "spec.ept", "spec.npt", "spec.ia32e", "spec.paging", "spec.dialect")
_SEARCH = ("core.search", "core.scan", "core.roots", "core.tables", "core.descent", "core.likeness", "core.claims",
           "core.candidate", "core.kinship")  # fmt: skip

TARGETS = {
    "walk": Target(tables.walk, _WALK, 2000, seeds.hierarchies),
    "flatten": Target(
        tables.flatten, ("core.leaves", "core.gpamap", "core.memory", "core.mask"), 800, seeds.hierarchies
    ),
    "nested": Target(tables.two_dimensions, ("core.nested", "core.walk", "core.root"), 400),
    "vmcs": Target(
        structures.vmcs_page,
        ("core.vmcs", "core.vmcs_checks", "core.anchors", "spec.vmcs", "spec.vmcs_exits", "spec.describe"),
        250,
        seeds.vmcs_pages,
    ),
    "vmcb": Target(
        structures.vmcb_page, ("core.vmcb", "core.vmcb_checks", "spec.vmcb", "core.guestcpu"), 600, seeds.vmcb_pages
    ),
    "infer": Target(
        monitors.inferred,
        (
            "core.infer",
            "core.infer_anchors",
            "core.infer_model",
            "core.infer_prior",
            "core.infer_segments",
            "core.infer_state",
            "core.infer_tables",
            "core.infer_view",
            "core.isf",
        ),
        30,
    ),
    "recover": Target(
        monitors.recovered,
        ("core.backing", "core.hosttables", "core.slots", "core.slotpages", "core.memslots", "spec.linux_pte"),
        120,
    ),
    "hostile": Target(hosts.hostile_guest, _SEARCH, 30),
    "damaged": Target(hosts.damaged_host, (*_SEARCH, "core.structural"), 30),
    "audit": Target(
        hosts.audited,
        (
            "core.audit",
            "core.audit_bytes",
            "core.audit_entries",
            "core.audit_exposure",
            "core.audit_finding",
            "core.audit_frames",
            "core.audit_kernel",
            "core.audit_rights",
            "core.audit_thin",
            "core.audit_views",
        ),
        150,
    ),
    "identify": Target(hosts.identified, ("core.identify",), 500),
    "root": Target(texts.roots, ("core.root",), 3000, seeds.root_texts),
    "slot": Target(texts.slots, ("core.slots",), 3000),
    "registers": Target(texts.registers, ("core.guestcpu",), 3000),
    "index": Target(texts.index, ("core.index", "core.structural", "core.unknown"), 200),
    "isf": Target(texts.tables, ("core.layouts", "core.structural"), 1000),
    "config": Target(texts.configuration, ("layers.guest", "layers.runs"), 200),
    "container": Target(files.container, ("core.containers",), 1500, seeds.headers),
    "kdump": Target(files.dump, ("core.kdump", "core.kdumppages", "core.flattened"), 300),
    "pe": Target(files.image, ("core.pe", "core.rsds"), 300),
    "note": Target(files.note, ("export.vmcoreinfo",), 500),
    "core": Target(files.core, ("export.elf", "export.cpu"), 200),
}
