"""``--save-config`` and ``-c`` bring a machine back, and never another one than the one asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def processes(result) -> set[tuple[int, str]]:
    """Return PID and name of each process that ``linux.pslist`` shows."""
    titles, *rows = result.check().rows
    return {(int(row[titles.index("PID")]), row[titles.index("COMM")]) for row in rows}


def by_kernel_name(known: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """Take the work that /proc shows behind a worker's name off: the kernel does not store it in ``comm``."""
    return {(pid, name.partition("-")[0] if name.startswith("kworker/") else name) for pid, name in known}


@pytest.mark.parametrize("guest", ["0", "host"])
def test_linux_pslist_shows_the_machines_processes_and_its_configuration_brings_them_back(pslist, real, guest):
    expected = by_kernel_name(real.host_processes if guest == "host" else real.guests[0].processes)
    run, config = pslist(guest)
    # The list was read inside the machine, a moment before the capture: a process may have started since.
    assert expected <= processes(run)
    assert len(processes(run) - expected) <= 2
    assert pslist.again(config).check().out == run.out


def test_host_and_guest_are_told_apart(pslist):
    assert pslist("0")[0].out != pslist("host")[0].out
    assert pslist("host")[0].rows == pslist()[0].rows


@pytest.fixture(scope="module")
def saved(vol, small, tmp_path_factory) -> dict[str, Path]:
    """Configurations of ``banners`` in each guest, in the masked host, and in the host (without the option)."""
    folder = tmp_path_factory.mktemp("configurations")
    paths = {name: folder / f"{name}.json" for name in ("0", "1", "host", "plain")}
    for name, path in paths.items():
        options = [] if name == "plain" else ["--guest", name]
        vol("-f", small, *options, "--save-config", path, "banners").check()
    return paths


@pytest.mark.parametrize("name", ["0", "1", "host", "plain"])
def test_a_configuration_alone_is_enough(vol, small, saved, name):
    options = [] if name == "plain" else ["--guest", name]
    expected = vol("-f", small, *options, "banners").check().out
    assert vol("-c", saved[name], "banners").check().out == expected


def test_a_configuration_and_the_same_guest_agree(vol, small, saved):
    expected = vol("-f", small, "--guest", "1", "banners").check().out
    assert vol("-c", saved["1"], "--guest", "1", "banners").check().out == expected


def test_a_configuration_names_the_root_so_that_no_search_is_needed(saved, host):
    config = json.loads(saved["1"].read_text())
    (layer,) = [key.rpartition(".")[0] for key, value in config.items() if str(value).endswith("GuestPhysicalLayer")]
    assert config[f"{layer}.guest"] == "1"
    assert config[f"{layer}.root"].startswith(f"ncr3={host[1][1].root:#x}")


@pytest.mark.parametrize(
    ("held", "asked"), [("0", "1"), ("0", "99"), ("0", "host"), ("plain", "0"), ("host", "0"), ("plain", "host")]
)
def test_a_configuration_and_another_machine_are_refused(vol, saved, held, asked):
    result = vol("-c", saved[held], "--guest", asked, "banners")
    assert result.status != 0
    assert f"--guest {asked}: the configuration given with -c describes" in result.err
    assert "Traceback" not in result.err
    assert result.table == ""
