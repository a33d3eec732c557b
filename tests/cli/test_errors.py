"""What a user gets wrong ends with one clear line, and never with another machine's data."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import pytest
from cli import containers

STOCK = "linux.pslist"
#: Roots that the small capture cannot hold: above its end, and a page that is not a table.
NOWHERE, NO_TABLE = "eptp=0x1fffffff000", "eptp=0x2000"


def assert_refused(result, message: str) -> None:
    """One line of ours that holds the message (a list of machines may follow), no traceback, not one row."""
    assert result.status != 0
    assert "Traceback" not in result.err + result.out
    first, *rest = [line for line in result.err.splitlines() if line.strip()]
    assert first.startswith("volatility3_ept: ")
    assert message in first
    assert all(line.startswith("  --guest ") for line in rest), "more than one message"
    assert result.table == ""


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("memory.raw", os.urandom(20_000))


def writer(data: bytes):
    return lambda path: path.write_bytes(data)


ELF_PROGRAM = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHI", 2, 62, 1) + bytes(9000)
FILES = {
    "text": (writer(b"Dear analyst, the image is on the other disk.\n" * 400), "text"),
    "short-text": (writer(b"hello\n"), "less than one page"),
    "ten-bytes": (writer(b"0123456789"), "10 bytes: less than one page"),
    "empty": (writer(b""), "empty"),
    "zip": (write_zip, "ZIP archive"),
    "qcow2": (writer(b"QFI\xfb" + struct.pack(">I", 3) + bytes(20_000)), "qcow2"),
    "elf-program": (writer(ELF_PROGRAM), "not a core"),
    "kdump": (writer(b"KDUMP   " + struct.pack("<I", 6) + bytes(20_000)), "kdump"),
}


@pytest.fixture
def wrong_file(request, tmp_path) -> tuple[Path, str]:
    write, message = FILES[request.param]
    write(tmp_path / "capture")
    return tmp_path / "capture", message


@pytest.mark.parametrize("wrong_file", FILES, indirect=True)
def test_a_file_that_is_no_capture_is_named_as_what_it_is(vol, wrong_file):
    path, message = wrong_file
    assert_refused(vol("-f", path, "ept.scan"), message)


@pytest.mark.parametrize("wrong_file", ["text", "empty", "zip"], indirect=True)
def test_a_stock_plugin_with_guest_refuses_it_too(vol, wrong_file):
    path, message = wrong_file
    assert_refused(vol("-f", path, "--guest", "0", STOCK), message)


def test_a_file_that_does_not_exist_is_refused_by_vol_itself(vol, tmp_path):
    result = vol("-f", tmp_path / "nothing.raw", "ept.scan")
    assert result.status != 0
    assert "File does not exist" in result.err
    assert "Traceback" not in result.err
    assert result.table == ""


@pytest.fixture(scope="session")
def cut(host, tmp_path_factory) -> dict[str, Path]:
    """The small capture in several formats, each cut short."""
    folder = tmp_path_factory.mktemp("cut")
    whole = {"elf": containers.elf, "raw": containers.raw, "lime": containers.lime, "dmp": containers.crash_dump}
    paths = {name: write(host[0], folder) for name, write in whole.items()}
    for path in paths.values():
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - 0x2345])
    return paths


@pytest.mark.parametrize("kind", ["elf", "raw", "lime", "dmp"])
def test_a_truncated_capture_is_refused(vol, cut, kind):
    assert_refused(vol("-f", cut[kind], "ept.scan"), "truncated")


def test_a_stock_plugin_with_guest_refuses_a_truncated_capture_too(vol, cut):
    assert_refused(vol("-f", cut["elf"], "--guest", "0", STOCK), "truncated")


@pytest.mark.parametrize("kind", ["elf", "raw"])
def test_a_truncated_capture_can_be_used_on_request(vol, cut, kind):
    result = vol("-f", cut[kind], "--allow-truncated", "-r", "json", "ept.scan").check()
    assert {row["Machine"] for row in result.json} == {"0", "1"}


GUESTS = {
    "99": "no such machine",
    "0.7": "no such machine",
    "banana": "give an id that ept.scan prints",
    "-1": "give an id that ept.scan prints",
    "": "give an id that ept.scan prints",
    "eptp=": "not a number",
    "eptp=banana": "not a number",
    "eptp=0x10005e,levels=9": "9 levels",
    "cr3=0x1000": "not a root",
    NOWHERE: "not in the capture",
    NO_TABLE: "maps no page",
}


WALKS = {
    "gpa-word": (["--guest", "0", "--gpa", "banana"], "--gpa banana: not a number"),
    "gpa-negative": (["--guest", "0", "--gpa=-1"], "--gpa -1"),
    "gpa-too-wide": (["--guest", "0", "--gpa", "0x10000000000000"], "at most 52 bits"),
    "gva-word": (["--guest", "0", "--gva", "banana"], "--gva banana: not a number"),
    "gpa-of-no-guest": (["--gpa", "0x1000"], "add --guest with one of: 0, 1"),
    "gpa-and-gva": (["--guest", "0", "--gpa", "0x1000", "--gva", "0x1000"], "give one of them"),
    "cr3-alone": (["--guest", "0", "--cr3", "0x1000"], "--cr3 goes with --gva"),
    "vcpu-9": (["--guest", "0", "--gva", "0x1000", "--vcpu", "9"], "--vcpu 9: machine 0 has 1"),
    "two-roots": (["--guest", "0", "--eptp", "0x10005e"], "and --guest 0: give one of them"),
    "root-nowhere": (["--eptp", "0x1fffffff000"], "not in the capture"),
    "root-word": (["--eptp", "banana"], "not a number"),
    "host": (["--guest", "host"], "name a machine"),
    "maxphyaddr": (["--maxphyaddr", "99"], "--maxphyaddr 99"),
}


@pytest.fixture(scope="module", autouse=True)
def _all_at_once(vol, small):
    runs = [("-f", small, f"--guest={guest}", "banners") for guest in GUESTS]
    runs += [("-f", small, "ept.walk", *options) for options, _ in WALKS.values()]
    vol.prepare(*runs)


@pytest.mark.parametrize("guest", GUESTS)
def test_a_wrong_guest_never_falls_back_to_the_host(vol, small, guest):
    assert_refused(vol("-f", small, f"--guest={guest}", "banners"), GUESTS[guest])


@pytest.mark.parametrize("guest", ["99", "0.7"])
def test_a_wrong_guest_is_answered_with_the_guests_there_are(vol, small, host, guest):
    result = vol("-f", small, f"--guest={guest}", "banners")
    for number, machine in enumerate(host[1]):
        assert f"--guest {number}" in result.err
        assert f"{machine.root:#x}" in result.err


@pytest.mark.parametrize("plugin", ["ept.walk", "ept.vmcs", "ept.scan"])
def test_our_plugins_refuse_a_wrong_guest(vol, small, plugin):
    """The option of the plugin is another one than that of ``vol``: both must refuse."""
    assert_refused(vol("-f", small, plugin, "--guest", "99"), "--guest 99: no such machine")


@pytest.mark.parametrize("case", WALKS)
def test_options_of_walk(vol, small, case):
    options, message = WALKS[case]
    assert_refused(vol("-f", small, "ept.walk", *options), message)


@pytest.mark.parametrize("plugin", ["ept.scan", "ept.vmcs", "banners"])
def test_a_physical_address_width_that_no_processor_has(vol, small, plugin):
    assert_refused(vol("-f", small, "--maxphyaddr", "99", "--guest", "0", plugin), "--maxphyaddr 99")


@pytest.mark.parametrize("guest", ["99", NOWHERE])
def test_no_process_of_a_real_host_is_shown_for_a_wrong_guest(pslist, guest):
    assert_refused(pslist.refused(guest), guest)
