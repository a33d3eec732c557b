from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from builders import control

from volatility3_ept.core import layouts
from volatility3_ept.core.layouts import Layout, load_layouts, vmcb_layout, vmsa_layout
from volatility3_ept.spec import vmcs_fields
from volatility3_ept.spec.vmcs import AccessRightsFormat

SYMBOLS = Path(layouts.__file__).resolve().parents[2] / "symbols"
TABLES = sorted(SYMBOLS.glob("*/*.json"))
BY_NAME = {layout.name: layout for layout in load_layouts()}
#: The layouts that the builder writes too, by its names.
BUILT = {
    "haswell": "intel_haswell",
    "nehalem": "intel_nehalem",
    "westmere": "intel_westmere",
    "penryn": "intel_penryn",
    "kvm": "kvm_vmcs12",
    "kvm_3x": "kvm_vmcs12_3x",
    "bochs_2_7": "bochs_2_7",
    "bochs_3_0": "bochs_3_0",
    "bochs_2026": "bochs_2026",
    "xen": "xen_vvmcs",
}


@pytest.mark.parametrize(
    ("name", "revision_ids", "ar_format", "size", "is_software"),
    [
        ("intel_penryn", {0xD}, "rotate32", 0x800, False),
        ("intel_nehalem", {0xE, 0x10}, "rotate32", 0x400, False),
        ("intel_westmere", {0xF}, "rotate32", 0x400, False),
        ("intel_haswell", {0x12, 0x4, 0x13}, "pack16", 0x400, False),
        ("bochs_2_7", {0x2B, 0x4}, "rotate32", 0x1000, False),
        ("bochs_3_0", {0x2B, 0x4}, "rotate32", 0x1000, False),
        ("bochs_2026", {0x2B, 0x4}, "rotate32", 0x1000, False),
        ("kvm_vmcs12", {0x11E57ED0}, "plain32", 0x1000, True),
        ("kvm_vmcs12_3x", {0x11E57ED0}, "plain32", 0x1000, True),
        ("hyperv_evmcs", {1}, "plain32", 0x1000, True),
        ("vmware_nested", {1}, "plain32", 0x1000, True),
        ("virtualbox_vvmcs", {0x40000001}, "plain32", 0x1000, True),
        ("xen_vvmcs", {0x40000001, 0xDA0400}, "plain32", 0x1000, True),
        ("acrn_vmcs12", {0x15407E12}, "plain32", 0x1000, True),
    ],
)
def test_layouts_there_are(name: str, revision_ids: set[int], ar_format: str, size: int, is_software: bool) -> None:
    layout = BY_NAME[name]
    assert layout.revision_ids == revision_ids
    assert layout.ar_format is AccessRightsFormat(ar_format)
    assert (layout.size, layout.is_software) == (size, is_software)
    assert layout.provenance["sources"] and layout.provenance["provenance"] in ("measured", "derived", "source code")


def test_no_layout_is_left_out() -> None:
    assert len(BY_NAME) == len(list((SYMBOLS / "vmcs").glob("*.json"))) == 14


def test_only_xen_may_carry_any_identifier() -> None:
    assert [layout.name for layout in load_layouts() if layout.any_revision_id] == ["xen_vvmcs"]


@pytest.mark.parametrize("layout", [*load_layouts(), vmcb_layout(), vmsa_layout()], ids=lambda layout: layout.name)
def test_fields_are_aligned_and_do_not_overlap(layout: Layout) -> None:
    placed = sorted((field.offset, field.size, name) for name, field in layout.fields.items())
    for (offset, size, name), (following, _, other) in itertools.pairwise(placed):
        assert offset + size <= following, f"{name} runs into {other}"
    for offset, size, name in placed:
        assert size not in (2, 4, 8) or offset % size == 0, f"{name} is not aligned"
        assert offset + size <= layout.size, f"{name} lies past the structure"


@pytest.mark.parametrize("layout", load_layouts(), ids=lambda layout: layout.name)
def test_sizes_are_those_of_the_encodings(layout: Layout) -> None:
    packed = layout.ar_format is AccessRightsFormat.PACK16
    for name, field in layout.fields.items():
        known = vmcs_fields.BY_NAME.get(name)
        if known is not None and not (packed and name.endswith("_ACCESS_RIGHTS")):
            # Some formats give a 16-bit field the room of a wider one, never less.
            assert field.size >= known.width.size_bytes, name
    assert len(layout.encodings) >= 100


@pytest.mark.parametrize("built", sorted(BUILT))
def test_offsets_agree_with_an_independent_table(built: str) -> None:
    by_encoding = BY_NAME[BUILT[built]].encodings
    theirs = {control.ENCODINGS[name]: offset for name, offset in control.offsets(built).items()}
    assert {encoding: by_encoding[encoding].offset for encoding in theirs} == theirs


@pytest.mark.parametrize("name", ["bochs_2_7", "bochs_3_0", "bochs_2026"])
def test_every_bochs_offset_follows_the_rule(name: str) -> None:
    counts = {"bochs_2_7": (64,) * 4, "bochs_3_0": (32, 80, 48, 48), "bochs_2026": (32, 84, 48, 48)}[name]
    for encoding, field in BY_NAME[name].encodings.items():
        width, kind, index = encoding >> 13, encoding >> 10 & 3, encoding & 0x3FF
        assert field.offset == 0x10 + 16 * sum(counts[:width]) + 4 * (counts[width] * kind + index)


def test_every_xen_offset_follows_the_rule() -> None:
    for encoding, field in BY_NAME["xen_vvmcs"].encodings.items():
        slot = (encoding >> 13) << 7 | (encoding >> 10 & 3) << 5 | encoding >> 1 & 0x1F
        assert field.offset == (0x1F8 if encoding == 0 else 8 * slot)


@pytest.mark.parametrize("name", ["intel_nehalem", "intel_westmere", "intel_haswell"])
def test_neighbours_that_every_processor_with_ept_keeps(name: str) -> None:
    fields = BY_NAME[name].fields
    assert fields["GUEST_PHYSICAL_ADDRESS"].offset == fields["EPTP"].offset + 8
    assert fields["SECONDARY_PROC_EXEC_CONTROLS"].offset == fields["PROC_BASED_EXEC_CONTROLS"].offset + 4
    assert fields["HOST_CR3"].offset == fields["HOST_CR0"].offset + 8
    assert fields["HOST_RIP"].offset == fields["HOST_RSP"].offset + 8
    assert fields["VMCS_LINK_POINTER"].offset == 0xF8


def test_the_vmcb_agrees_with_an_independent_table() -> None:
    ours = {(field.offset, field.size) for field in vmcb_layout().fields.values()}
    theirs = {(offset, size) for offset, size, _ in control.VMCB_FIELDS.values()}
    assert theirs <= ours


def test_layouts_are_read_once() -> None:
    assert load_layouts() is load_layouts()


def test_a_table_with_two_structures_is_refused() -> None:
    table = json.loads((SYMBOLS / "svm" / "amd_vmcb.json").read_text())
    table["user_types"]["_OTHER"] = {"kind": "struct", "size": 8, "fields": {}}
    with pytest.raises(ValueError, match="one structure expected, 2 found"):
        layouts.parse_isf("two", json.dumps(table))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_volatility_loads_the_table(path: Path) -> None:
    contexts = pytest.importorskip("volatility3.framework.contexts")
    intermed = pytest.importorskip("volatility3.framework.symbols.intermed")
    context = contexts.Context()
    table = intermed.IntermediateSymbolTable(context, "config", "table", path.as_uri())
    context.symbol_space.append(table)
    (type_name,) = json.loads(path.read_text())["user_types"]
    layout = layouts.parse_isf(path.stem, path.read_text())
    # Volatility's schema (checked where jsonschema is installed) allows no other key here.
    assert json.loads(path.read_text())["metadata"].keys() == {"format", "producer"}
    template = context.symbol_space.get_type(f"table!{type_name}")
    assert template.size == layout.size
    for name, field in layout.fields.items():
        assert template.relative_child_offset(name) == field.offset
        assert template.child_template(name).size == field.size
    found = {int(table.get_symbol(name).constant_data) for name in table.symbols if name.startswith("revision_id")}
    assert found == layout.revision_ids
    assert all(symbol.startswith("revision_id") for symbol in table.symbols)
