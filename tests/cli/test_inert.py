"""Without ``--guest`` nothing changes: every run is compared with a Volatility that does not have our package."""

from __future__ import annotations

import shutil
from pathlib import Path

import captures
import pytest
import volatility3
from cli import running


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> running.Volatility:
    """A Volatility with the same files, except for our plugins: nothing of our package is ever imported."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(
        Path(volatility3.__file__).parent, folder / "volatility3", ignore=shutil.ignore_patterns("ept", "__pycache__")
    )
    home = tmp_path_factory.mktemp("plain-home")
    return running.Volatility(home, running.entry_point(), {"PYTHONPATH": str(folder)})


def test_the_other_volatility_really_lacks_our_package(plain, vol):
    ours, theirs = vol("-h").check().out, plain("-h").check().out
    assert "ept.scan" in ours and "--guest" in ours
    assert "ept.scan" not in theirs and "--guest" not in theirs


@pytest.mark.parametrize("plugin", ["banners", "layerwriter"])
def test_plugins_on_the_physical_layer(vol, plain, small, tmp_path, plugin):
    found = []
    for name, run in (("ours", vol), ("plain", plain)):
        folder = tmp_path / name
        folder.mkdir()
        result = run("-f", small, "-o", folder, "--save-config", folder / "saved.json", plugin).check()
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        found.append((result.out, files))
    assert found[0] == found[1]
    assert "saved.json" in found[0][1]


def test_the_process_list_of_a_real_host(pslist, plain, real, tmp_path):
    run, config = pslist()
    same = tmp_path / "plain.json"
    result = plain("-s", captures.SYMBOLS, "-f", real.path, "--save-config", same, "linux.pslist").check()
    assert run.out == result.out
    assert config.read_text() == same.read_text()
    assert '"kernel.layer_name.class": "volatility3.framework.layers.intel.' in same.read_text()


def test_an_operating_system_that_is_not_known_fails_as_before(vol, plain, small):
    ours, theirs = (run("-f", small, "linux.pslist") for run in (vol, plain))
    assert (ours.status, ours.out, ours.err) == (theirs.status, theirs.out, theirs.err)
    assert ours.status != 0
