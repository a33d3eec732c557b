"""Plugins for virtual memory in guests whose system nobody recognises, in every paging mode, on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import spaces
from builders.paging import PAGE
from cli import containers, running

PATTERN = ["regexscan.RegExScan", "--pattern", "<page at 0x[0-9a-f]+ "]
#: What an ordinary run looks at; the others take longer together than it may.
FEW = [("PAE", "EPT"), ("KPTI", "EPT"), ("5-level", "NPT")]
ALL = [(name, shape.name[:3]) for name in spaces.GUESTS for shape in spaces.SHAPES]
WIDTHS = {"4-level": 48, "5-level": 57, "KPTI": 48, "KPTI in 5 levels": 57, "KVA shadow": 48}


@dataclass
class Host:
    """A host with guests, as a LiME file, and ``vol`` on it."""

    path: Path
    guests: dict[tuple[str, str], spaces.Space]
    vol: running.Volatility

    def __call__(self, case: tuple[str, str], *args: str | Path) -> running.Result:
        """Run with ``--guest``."""
        return self.vol(*self.args(case, *args))

    def args(self, case: tuple[str, str], *args: str | Path) -> list[str | Path]:
        return ["-f", self.path, "--guest", str(list(self.guests).index(case)), *args]


def made(names, vol, folder) -> Host:
    ram, guests = spaces.host(names)
    return Host(containers.lime(ram, folder), guests, vol)


@pytest.fixture(scope="module")
def few(vol, tmp_path_factory) -> Host:
    host = made(FEW, vol, tmp_path_factory.mktemp("few"))
    vol.prepare(*[host.args(case, *PATTERN) for case in FEW])
    return host


@pytest.fixture(scope="module")
def every(vol, tmp_path_factory) -> Host:
    host = made(ALL, vol, tmp_path_factory.mktemp("every"))
    vol.prepare(*[host.args(case, *PATTERN) for case in ALL])
    return host


def check_scan(host: Host, case: tuple[str, str]) -> None:
    """Compare what the regular expression found with what was built, and each text with its own address."""
    rows = host(case, *PATTERN).check().rows[1:]
    mask = (1 << WIDTHS.get(case[0], 32)) - 1
    assert [int(row[0], 16) for row in rows] == sorted(gva & mask for gva in host.guests[case].pages)
    assert all(int(row[0], 16) == int(row[1].split()[2], 16) & mask for row in rows)


@pytest.mark.parametrize("case", FEW, ids="-".join)
def test_each_page_is_found_at_its_virtual_address(few, case):
    check_scan(few, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_each_page_is_found_at_its_virtual_address_in_every_mode(every, case):
    check_scan(every, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [("32-bit", "EPT"), ("PAE", "EPT"), ("protected", "NPT")], ids="-".join)
def test_yarascan_finds_the_same(every, case):
    result = every(case, "-r", "json", "yarascan.YaraScan", "--yara-string", "<page at")
    if "invalid choice" in result.err:
        pytest.skip("Volatility cannot load yarascan here")
    assert [row["Offset"] for row in result.check().json] == sorted(every.guests[case].pages)


def test_a_configuration_gives_the_layer_again_and_no_other_guest(few, vol, tmp_path):
    case, saved = FEW[0], tmp_path / "guest.json"
    few(case, "--save-config", saved, *PATTERN).check()
    values = json.loads(saved.read_text())
    assert values["primary.class"] == "volatility3_ept.layers.virtual.GuestIntelPAE"
    assert values["primary.pdptes"] == list(few.guests[case].pdptes)
    assert vol("-c", saved, *PATTERN).check().out == few(case, *PATTERN).out
    assert "describes guest 0" in vol("-c", saved, "--guest", "1", *PATTERN).err


@pytest.mark.slow
def test_a_configuration_of_scan_has_it_too(few, vol, tmp_path):
    vol("-f", few.path, "-o", tmp_path, "ept.scan", "--no-host-check", "--save", "cfg").check()
    for number, case in enumerate(FEW):
        assert vol("-c", tmp_path / "cfg" / f"guest-{number}.json", *PATTERN).check().out == few(case, *PATTERN).out


@pytest.mark.slow
def test_processes_of_their_own_read_the_same(every):
    """Volatility sends layers to other processes when it scans with --parallelism."""
    case = "PAE", "NPT"
    assert every(case, "--parallelism", "processes", *PATTERN).check().rows == every(case, *PATTERN).rows


@pytest.mark.slow
def test_layerwriter_writes_the_guests_physical_memory(every, tmp_path):
    """It writes the highest layer that is not virtual: the guest's, and nothing of the host."""
    space = every.guests["5-level", "EPT"]
    every(("5-level", "EPT"), "-o", tmp_path, "layerwriter.LayerWriter").check()
    (written,) = tmp_path.iterdir()
    data = written.read_bytes()
    assert len(data) == max(space.placed) + PAGE
    for gpa, hpa in space.placed.items():
        assert data[gpa : gpa + PAGE] == bytes(space.ram.page(hpa))


def test_a_wrong_guest_stops(few, vol):
    result = vol("-f", few.path, "--guest", "3", *PATTERN)
    assert result.status != 0
    assert "--guest 3: no such machine" in result.err
    assert result.table == ""


def test_walk_takes_the_pdptes_of_the_vmcs(few):
    case = FEW[0]
    titles, *rows = few(case, "ept.walk", "--gva", "0xc0100000").check().rows
    first, last = (dict(zip(titles, row, strict=True)) for row in (rows[0], rows[-1]))
    assert (first["Ref"], first["Entry"], first["Entry HPA"]) == ("N/A", "guest PDPTE", "N/A")
    assert first["Result"] == "held in the VMCS"
    space = few.guests[case]
    assert bytes(space.ram.page(int(last["Entry HPA"], 16))) == space.pages[0xC010_0000]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KPTI", "KPTI in 5 levels", "KVA shadow"])
def test_walk_takes_the_kernel_half_for_a_kernels_address(every, name):
    space = every.guests[name, "NPT"]
    row = every((name, "NPT"), "-r", "json", "ept.walk", "--gva", f"{spaces.KERNEL:#x}").check().json[-1]
    assert bytes(space.ram.page(row["Entry HPA"])) == space.pages[spaces.KERNEL]


@pytest.mark.slow
def test_walk_without_paging_says_what_to_do(every):
    result = every(("protected", "NPT"), "ept.walk", "--gva", "0x5000")
    assert result.status != 0
    assert "virtual addresses are guest-physical ones" in result.err
