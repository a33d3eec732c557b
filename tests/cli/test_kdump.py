"""Dumps that the real makedumpfile wrote: the same machines, the same rows, and what is missing is said."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import captures
import pytest
from builders.paging import PAGE
from cli import containers, running, vmcore

from volatility3_ept.core import kdump

#: Hides an installed drgn.
WITHOUT_DRGN = """
import sys

sys.modules["drgn"] = None
"""


@pytest.fixture(scope="module")
def dumps(host, tmp_path_factory):
    """Make dumps of the small host, each once."""
    folder = tmp_path_factory.mktemp("dumps")
    given = vmcore.elf(folder / "vmcore", host[0].runs(), vmcore.NOTHING)

    @functools.cache
    def make(*options: str) -> Path:
        return vmcore.makedumpfile(given, folder / ("dump" + "".join(options)), *options)

    return make


OPTIONS = pytest.mark.parametrize("options", [("-c", "-d", "1"), ("-d", "0"), ("-c", "-d", "1", "-F")], ids=" ".join)


@OPTIONS
def test_scan_finds_the_same_machines_in_a_dump(vol, small, dumps, options):
    expected = vol("-f", small, "-r", "json", "ept.scan").check().json
    found = vol("-f", dumps(*options), "-r", "json", "ept.scan").check()
    assert found.json == expected and len(expected) == 2
    assert "makedumpfile" not in found.err  # Nothing is missing.


@OPTIONS
def test_a_dump_holds_every_page(host, dumps, options):
    dump = kdump.read(dumps(*options))
    assert (dump.dumped, dump.excluded, dump.unwritten) == (len(host[0].pages), 0, 0)
    starts, lengths = dump.starts.tolist(), dump.lengths.tolist()
    assert list(zip(starts, lengths, strict=True)) == [(start, len(data)) for start, data in host[0].runs()]


def test_a_flattened_elf_dump_says_what_to_do(vol, dumps):
    result = vol("-f", dumps("-E", "-d", "0", "-F"), "ept.scan")
    assert result.status != 0
    assert "makedumpfile -R" in result.err.splitlines()[-1]


def test_an_elf_dump_without_some_pages_is_opened(vol, small, host, tmp_path):
    """Volatility passes over segments that are longer in memory than in the file."""
    path = containers.elf(host[0], tmp_path)
    data = bytearray(path.read_bytes())
    first, *_ = (at for at in range(64, 64 + 56 * 3, 56) if struct.unpack_from("<Q", data, at + 32)[0] > 0x1000)
    struct.pack_into("<Q", data, first + 40, struct.unpack_from("<Q", data, first + 40)[0] + 5 * PAGE)
    path.write_bytes(data)
    found = vol("-f", path, "-r", "json", "ept.scan").check()
    assert found.json == vol("-f", small, "-r", "json", "ept.scan").check().json
    assert "20K of memory were left out when it was made: outside the capture" in found.err


def test_pages_that_were_left_out_are_counted_and_outside_the_capture(vol, host, tmp_path):
    ram, (guest, _) = host
    gpa, hpa = next((gpa, hpa) for gpa, hpa in guest.placed.items() if not any(ram.page(hpa)))
    path = tmp_path / "host.kdump"
    path.write_bytes(containers.kdump_file(ram, [hpa], level=16))
    found = vol("-f", path, "-r", "json", "ept.walk", "--guest", "0", "--gpa", hex(gpa)).check()
    assert "outside the capture" in found.json[-1]["Result"]
    assert f": 1 of {len(ram.pages)} pages of memory (4K) were left out when it was made" in found.err


def test_a_dump_that_was_cut_is_refused_and_used_when_told(vol, host, tmp_path):
    path = tmp_path / "cut.kdump"
    path.write_bytes(containers.kdump_file(host[0])[:-20])
    refused = vol("-f", path, "-r", "json", "ept.scan")
    assert refused.status != 0
    assert "--allow-truncated" in refused.err.splitlines()[-1]
    allowed = vol("-f", path, "-r", "json", "--allow-truncated", "ept.scan").check()
    # The page that is missing is the VMCB of the other: a machine less is why it must be asked for.
    assert [row["Kind"] for row in allowed.json] == ["EPT"]
    assert "the data of 1 pages that it should hold is not in the file" in allowed.err


def test_without_guest_a_dump_is_what_volatility_makes_of_it(vol, host, tmp_path):
    """Bytes of a file of no known format: nothing of ours opens it."""
    path = containers.kdump(host[0], tmp_path)
    vol("-f", path, "-o", tmp_path, "layerwriter").check()
    assert (tmp_path / "primary.raw").read_bytes() == path.read_bytes()


def test_other_compressions_name_the_extra_that_reads_them(host, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DRGN)
    vol = running.Volatility(tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    data = bytearray(containers.kdump_file(host[0]))
    struct.pack_into("<I", data, 4 * PAGE + 12, 2)
    path = tmp_path / "lzo.kdump"
    path.write_bytes(data)
    for args in (["ept.scan"], ["--guest", "0", "banners"]):
        result = vol("-f", path, *args)
        last = result.err.splitlines()[-1]
        assert result.status != 0 and result.table == ""
        assert "lzo" in last and "pip install 'volatility3-ept[kdump]'" in last


def test_a_kind_that_is_not_read_is_refused_with_the_reason(vol, host, tmp_path):
    path = tmp_path / "part.kdump"
    path.write_bytes(containers.kdump_file(host[0], split=1))
    result = vol("-f", path, "--guest", "0", "banners")
    assert result.status != 0
    assert "--reassemble" in result.err.splitlines()[-1]


@pytest.fixture(scope="module")
def real_dumps(real, tmp_path_factory):
    """Make dumps of the real capture, each once."""
    folder = tmp_path_factory.mktemp("real-dumps")

    @functools.cache
    def given() -> Path:
        return vmcore.from_capture(real.path, folder / "vmcore")

    @functools.cache
    def make(*options: str) -> Path:
        path = vmcore.makedumpfile(given(), folder / ("dump" + "".join(options)), *options)
        if "-l" in options:
            pytest.importorskip("drgn", reason="no drgn (pip install drgn)")
        return path

    return make


#: Levels 1 and 16 leave out zeros and free pages.
COMPRESSED = [("-c", "-d", "17"), ("-l", "-d", "17"), ("-p", "-d", "1")]


@pytest.mark.slow
@pytest.mark.parametrize("options", [*COMPRESSED, ("-E", "-d", "17")], ids=" ".join)
def test_a_guest_in_a_dump_has_the_processes_that_it_has_in_the_capture(vol, pslist, real_dumps, options, tmp_path):
    """A guest's memory belongs to a process: at these levels it is dumped."""
    expected, _ = pslist("0")
    dump, config = real_dumps(*options), tmp_path / "saved.json"
    run = vol("-s", captures.SYMBOLS, "-f", dump, "--guest", "0", "--save-config", config, "linux.pslist").check()
    assert run.rows == expected.rows
    assert len(run.rows) > 10
    assert vol("-s", captures.SYMBOLS, "-c", config, "linux.pslist").check().rows == expected.rows


@pytest.mark.slow
@pytest.mark.parametrize("options", COMPRESSED, ids=" ".join)
def test_every_page_of_the_guest_is_in_the_dump(vol, real, real_dumps, options):
    found = vol("-f", real_dumps(*options), "-r", "json", "ept.scan", "--no-host-check").check()
    expected = vol("-f", real.path, "-r", "json", "ept.scan", "--no-host-check").check()
    assert found.json == expected.json
    assert ("were left out" in found.err) == ("17" in options)


@pytest.mark.slow
def test_zeros_that_an_elf_dump_leaves_out_are_not_known_to_be_zeros(vol, real, real_dumps):
    """An ELF dump says only that they were left out: not why."""
    root = vol("-f", real.path, "-r", "json", "ept.scan", "--no-host-check").check().json[0]["Root"]
    dump = real_dumps("-E", "-d", "17")
    rows = vol("-f", dump, "-r", "json", "--guest", f"eptp={root:#x}", "ept.map").check().json[0]["__children"]
    outside = sum(row["Size"] for row in rows if row["Fate"] == "outside the capture")
    zeros = real.guests[0].facts["pages_zero"] * PAGE
    assert 0 < outside <= zeros


@pytest.mark.slow
def test_level_31_keeps_the_tables_and_no_memory_of_the_guest(vol, real, real_dumps):
    """The level of most distributions leaves out the memory of processes, the VMM's with it."""
    (machine,) = vol("-f", real.path, "-r", "json", "ept.scan", "--no-host-check").check().json
    root = f"eptp={machine['Root']:#x}"
    dump = real_dumps("-c", "-d", "31")
    result = vol("-f", dump, "-r", "json", "--guest", root, "ept.map").check()
    fates: dict[str, int] = {}
    for row in result.json[0]["__children"]:
        fates[row["Fate"]] = fates.get(row["Fate"], 0) + row["Size"]
    assert fates["outside the capture"] == machine["Mapped"]
    assert "mapped" not in fates
    assert "the memory of processes, and that of guests with it" in result.err
    assert vol("-f", dump, "--guest", root, "banners").status != 0
    scan = vol("-f", dump, "-r", "json", "ept.scan").check()
    assert scan.json == []
    said = next(line for line in scan.err.splitlines() if "next to none of it is in the capture" in line)
    assert f"--guest {root}" in said


@pytest.mark.slow
@pytest.mark.parametrize("options", [("-c", "-d", "31"), ("-l", "-d", "31")], ids=" ".join)
def test_drgn_and_this_package_agree_on_every_page(real, real_dumps, options):
    """Which pages are there, by the bitmaps; what is in them, by the capture; both by another reader of the format."""
    drgn = pytest.importorskip("drgn", reason="no drgn (pip install drgn)")
    path = real_dumps(*options)
    program = drgn.Program()
    program.set_core_dump(path)
    from volatility3_ept.layers import opening

    memory = opening.memory(path)
    held = 0
    for address in range(0, real.truth["host"]["memory_bytes"], PAGE):
        ours = memory.read(address, PAGE)
        try:
            theirs = program.read(address, PAGE, True)
        except drgn.FaultError:
            theirs = None
        assert ours == theirs
        held += ours is not None
    assert held == kdump.read(path).dumped
