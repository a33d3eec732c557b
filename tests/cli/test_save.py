"""``ept.scan --save``: one configuration per machine, which ``vol -c`` takes without any search."""

from __future__ import annotations

import json

import captures
import pytest


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
