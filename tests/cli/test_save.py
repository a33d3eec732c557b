"""``ept.scan --save``: one configuration per machine, which ``vol -c`` takes without any search."""

from __future__ import annotations

import json

import captures
import pytest
from builders import layouts
from core import test_unknown

from volatility3_ept.core import layouts as package_layouts


@pytest.fixture(scope="module")
def saved(vol, real, tmp_path_factory):
    """The folder of -o, with the configurations of a real capture in ``cfg``."""
    folder = tmp_path_factory.mktemp("out")
    options = ("-s", captures.SYMBOLS, "-o", folder, "-f", real.path)
    vol(*options, "ept.scan", "--no-host-check", "--save", "cfg").check()
    return folder


def test_one_configuration_per_machine(saved):
    assert [path.name for path in (saved / "cfg").iterdir()] == ["guest-0.json"]
    values = json.loads((saved / "cfg" / "guest-0.json").read_text())
    assert values["primary.class"] == "volatility3_ept.layers.guest.GuestPhysicalLayer"
    assert values["kernel.layer_name.memory_layer.root"] == values["primary.root"]


def test_plugins_of_a_system_and_plugins_of_none_run_from_it(vol, saved):
    config = saved / "cfg" / "guest-0.json"
    rows = vol("-s", captures.SYMBOLS, "-c", config, "linux.pslist").check().rows[1:]
    assert {(int(row[1]), row[4]) for row in rows} >= {(84, "guest_marker_a"), (86, "guest_db_server")}
    assert not {row[4] for row in rows} & {"vmm", "host_marker_a"}
    banners = vol("-s", captures.SYMBOLS, "-c", config, "banners").check().rows[1:]
    assert banners


@pytest.mark.parametrize(
    ("name", "words"), [("./cfg", "exists already"), ("../elsewhere", "outside the output folder")]
)
def test_nothing_is_replaced_and_nothing_written_elsewhere(vol, saved, real, name, words):
    before = (saved / "cfg" / "guest-0.json").read_bytes()
    result = vol("-s", captures.SYMBOLS, "-o", saved, "-f", real.path, "ept.scan", "--no-host-check", "--save", name)
    assert result.status == 1
    assert words in result.err
    assert "Traceback" not in result.err
    assert (saved / "cfg" / "guest-0.json").read_bytes() == before
    assert not (saved.parent / "elsewhere").exists()


def test_an_inferred_layout_is_written_as_a_table_that_volatility_loads(vol, tmp_path):
    ram, _, _ = test_unknown.host(layouts.processor(1))
    path = tmp_path / "host.lime"
    path.write_bytes(ram.lime())
    rows = vol("-o", tmp_path, "-f", path, "-r", "json", "ept.vmcs", "--save-layouts", "tables").check().json
    (table,) = (tmp_path / "tables").iterdir()
    assert table.stem == next(row["Structure"] for row in rows).partition("(")[2].rstrip(")")
    layout = package_layouts.parse_isf(table.stem, table.read_text())
    assert layout.fields["EPTP"].offset == layouts.processor(1).fields["EPTP"][0]


def test_without_an_unknown_processor_there_is_no_layout_to_save(vol, real, tmp_path):
    result = vol("-o", tmp_path, "-f", real.path, "ept.vmcs", "--save-layouts", "tables")
    assert result.status == 1
    assert "no layout had to be inferred" in result.err
    assert list(tmp_path.iterdir()) == []
