"""Volatility's own tools on the memory of a guest whose system nobody knows."""

from __future__ import annotations

import captures
import pytest
from builders.machine import BANNER, KERNEL
from cli import running


@pytest.fixture(scope="session")
def volshell(vol) -> running.Volatility:
    return running.Volatility(vol.home, running.command("volshell", "volatility3.cli.volshell"))


def test_volshell_starts_on_the_guests_virtual_memory_with_the_physical_below(volshell, small):
    typed = (
        "layer = self.context.layers[self.current_layer]\n"
        f"print('HERE', type(layer).__name__, layer.read({KERNEL:#x}, 13))\n"
        "below = self.context.layers[layer.config['memory_layer']]\n"
        "print('BELOW', type(below).__name__, below.read(0x1000, 13))\n"
        "quit()\n"
    )
    result = volshell("-f", small, "--guest", "1", text=typed).check()
    assert f"HERE GuestIntel32e {BANNER[:13]!r}" in result.out
    assert f"BELOW GuestPhysicalLayer {BANNER[:13]!r}" in result.out


def test_volshell_refuses_a_wrong_guest(volshell, small):
    result = volshell("-f", small, "--guest", "99", text="quit()\n")
    assert result.status != 0
    assert "--guest 99: no such machine" in result.err
    assert ">>>" not in result.out


@pytest.mark.parametrize("guest", ["0", "1"])
def test_banners_are_found_at_guest_physical_addresses(vol, small, host, guest):
    rows = vol("-f", small, "--guest", guest, "banners").check().rows
    machine = host[1][int(guest)]
    assert [row[0] for row in rows[1:]] == [f"{machine.kernel_gpa:#x}"]


def test_guest_host_hides_the_guests(vol, small):
    assert len(vol("-f", small, "banners").check().rows) == 3
    assert len(vol("-f", small, "--guest", "host", "banners").check().rows) == 1


PATTERNS = {
    "regexscan.RegExScan": ["--pattern", "Linux version"],
    "yarascan.YaraScan": ["--yara-string", "Linux version"],
}


@pytest.mark.parametrize("plugin", PATTERNS)
def test_a_plugin_for_virtual_memory_reads_the_guests(vol, small, plugin):
    """No system's stacker took this guest: the registers of its vCPU give the address space."""
    result = vol("-f", small, "-r", "json", "--guest", "0", plugin, *PATTERNS[plugin])
    if "invalid choice" in result.err:
        pytest.skip(f"Volatility cannot load {plugin} here")
    assert [row["Offset"] for row in result.check().json] == [KERNEL & (1 << 48) - 1]


def test_nor_does_it_read_the_hosts_for_want_of_one(vol, small, host):
    """A root that was given says nothing of a vCPU: there is no virtual memory, and none of the host may serve."""
    root = f"eptp={host[1][0].root:#x}"
    result = vol("-f", small, "--guest", root, "regexscan.RegExScan", *PATTERNS["regexscan.RegExScan"])
    assert result.status != 0
    assert "Linux version" not in result.out


@pytest.mark.parametrize("plugin", ["linux.pslist", "windows.pslist"])
def test_a_plugin_that_needs_a_known_system_says_so_and_shows_no_row(vol, small, plugin):
    """These ask Volatility for a kernel's layer. There is none in this guest, and none of the host may serve."""
    result = vol("-f", small, "--guest", "0", plugin)
    assert result.status != 0
    assert "--guest 0: " in result.err
    assert "Traceback" not in result.err
    assert "Linux version" not in result.out


@pytest.mark.slow
def test_regexscan_in_a_known_guest_reads_that_guest(vol, real):
    options = ["-s", captures.SYMBOLS, "-f", real.path, "--guest", "0"]
    rows = vol(*options, "regexscan.RegExScan", "--pattern", "Linux version 6.1.0-53").check().rows
    assert len(rows) > 1
