"""Stock ``windows.*`` plugins in a guest that was built, behind EPT and behind NPT: exactly what was built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import paging, windows
from builders.paging import HostRam
from builders.windows import BOOT, HANDLES, HIDDEN, MODULES, PROCESSES, VADS
from builders.windows_pe import GUID_TEXT, Pe

MASK = (1 << 48) - 1
PROTECTIONS = {7: "PAGE_EXECUTE_WRITECOPY", 4: "PAGE_READWRITE", 1: "PAGE_READONLY"}


@dataclass
class Built:
    """A host's image, the guest in it, and a folder with the guest's symbol table."""

    path: Path
    guest: windows.Windows
    symbols: Path

    @property
    def where(self) -> list[str | Path]:
        return ["-s", self.symbols, "-f", self.path, "--guest", "0"]


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> dict[str, Built]:
    """The same guest behind EPT, behind NPT, and behind EPT with a user's page tables loaded."""
    folder = tmp_path_factory.mktemp("windows")
    hosts = {}
    for name, shape, options in (
        ("EPT", paging.EPT_4, {}),
        ("NPT", paging.NPT_4, {}),
        ("shadow", paging.EPT_4, {"shadow": True}),
    ):
        ram, guest = windows.host(shape, **options)
        path = folder / f"{name}.raw"
        path.write_bytes(ram.image())
        hosts[name] = Built(path, guest, folder / "symbols")
    hosts["EPT"].guest.symbols(folder / "symbols")
    return hosts


EVERY = pytest.mark.parametrize("name", ["EPT", pytest.param("NPT", marks=pytest.mark.slow),
                                         pytest.param("shadow", marks=pytest.mark.slow)])  # fmt: skip


def when(number: int) -> str:
    return f"2024-03-01 12:00:{number:02}.000000 UTC"


@EVERY
def test_pslist(vol, built, name):
    guest = built[name].guest
    rows = vol(*built[name].where, "windows.pslist").check().rows[1:]
    assert BOOT == 133_537_680_000_000_000
    assert rows == [
        [str(p.pid), str(p.parent), p.name, f"{guest.truth[p.name] & MASK:#x}", str(p.threads),
         str(len(HANDLES) if p is PROCESSES[-1] else 0), "N/A" if p.session is None else str(p.session), "False",
         when(number), "N/A", "Disabled"]
        for number, p in enumerate(PROCESSES)
    ]  # fmt: skip


@pytest.mark.slow
@EVERY
def test_psscan_shows_the_process_that_is_in_no_list_too(vol, built, name):
    guest = built[name].guest
    rows = vol(*built[name].where, "windows.psscan").check().rows[1:]
    assert [(int(row[0]), int(row[1]), row[2], row[3]) for row in rows] == [
        (p.pid, p.parent, p.name, f"{guest.truth[p.name] & MASK:#x}") for p in (*PROCESSES, HIDDEN)
    ]


@pytest.mark.slow
@EVERY
def test_pstree(vol, built, name):
    result = vol(*built[name].where, "windows.pstree").check()
    depths = {4: 0, 388: 1, 512: 2, 604: 2, 2044: 3, 3120: 4}
    shown = [(len(line) - len(line.lstrip("*")), row) for line, row in zip(
        [line for line in result.table.splitlines() if line], result.rows, strict=True)][1:]  # fmt: skip
    assert [(stars, int(row[0]), int(row[1])) for stars, row in shown] == [
        (depths[p.pid], p.pid, p.parent) for p in PROCESSES
    ]
    assert shown[-1][1][-2:] == [PROCESSES[-1].command, "C:\\Windows\\notepad.exe"]


@pytest.mark.slow
@EVERY
def test_modules(vol, built, name):
    guest = built[name].guest
    rows = vol(*built[name].where, "windows.modules").check().rows[1:]
    assert rows == [
        [f"{guest.truth[module] & MASK:#x}", f"{guest.base + distance & MASK:#x}", f"{size or guest.pe.size:#x}",
         module, path, "Disabled"]
        for module, path, distance, size in MODULES
    ]  # fmt: skip


@pytest.mark.slow
@EVERY
def test_vadinfo(vol, built, name):
    guest = built[name].guest
    rows = vol(*built[name].where, "windows.vadinfo", "--pid", "3120").check().rows[1:]
    nodes = [guest.truth[node] for node in ("vad", "left", "right")]
    assert rows == [
        ["3120", "notepad.exe", f"{node:#x}", f"{start:#x}", f"{end:#x}", "Vad " if file else "VadS",
         PROTECTIONS[protection], str(commit), str(private), f"{nodes[0] if number else 0:#x}", file or "N/A",
         "Disabled"]
        for number, (node, (start, end, protection, commit, private, file)) in enumerate(zip(nodes, VADS, strict=True))
    ]  # fmt: skip


@pytest.mark.slow
@EVERY
def test_handles(vol, built, name):
    guest = built[name].guest
    rows = vol(*built[name].where, "windows.handles").check().rows[1:]
    assert rows == [
        ["3120", "notepad.exe", f"{guest.truth[f'handle {value}'] & MASK:#x}", f"{value:#x}", kind, f"{access:#x}",
         text or "-"]
        for value, kind, access, text in HANDLES
    ]  # fmt: skip


@pytest.mark.slow
@EVERY
def test_info(vol, built, name):
    guest = built[name].guest
    rows = dict(vol(*built[name].where, "windows.info").check().rows[1:])
    assert rows["Kernel Base"] == f"{guest.base & MASK:#x}"
    assert rows["DTB"] == f"{guest.roots[PROCESSES[-1].pid].root:#x}"
    assert rows["layer_name"] == "0 WindowsIntel32e"
    assert rows["memory_layer"] == "1 GuestPhysicalLayer"
    assert (rows["Major/Minor"], rows["NtMajorVersion"], rows["NtSystemRoot"]) == ("15.19041", "10", "C:\\Windows")
    assert rows["SystemTime"] == "2024-03-01 12:00:00+00:00"


@pytest.mark.slow
def test_cmdline_is_read_in_the_address_space_of_the_process(vol, built):
    rows = vol(*built["NPT"].where, "windows.cmdline").check().rows[1:]
    assert rows[-1] == ["3120", "notepad.exe", PROCESSES[-1].command]


@pytest.mark.slow
def test_a_saved_configuration_brings_the_guest_back(vol, built, tmp_path):
    config = tmp_path / "guest.json"
    run = vol(*built["EPT"].where, "--save-config", config, "windows.pslist").check()
    assert vol("-s", built["EPT"].symbols, "-c", config, "windows.pslist").check().out == run.out


@pytest.mark.slow
def test_a_configuration_of_ept_scan_does_too(vol, built, tmp_path):
    where = built["EPT"]
    vol("-f", where.path, "-o", tmp_path, "ept.scan", "--save", "machines", "--no-host-check").check()
    shown = vol("-s", where.symbols, "-c", tmp_path / "machines" / "guest-0.json", "windows.pslist").check()
    assert shown.rows == vol(*where.where, "windows.pslist").check().rows


@pytest.mark.slow
def test_ept_scan_names_the_kernel_and_its_symbols(vol, built):
    titles, row = vol("-f", built["EPT"].path, "ept.scan").check().rows
    assert row[titles.index("OS")] == f"Windows 10.0.19041 (ntkrnlmp.pdb {GUID_TEXT}-1)"


def test_without_the_symbol_table_one_message_says_which_and_where(vol, built):
    result = vol("-f", built["EPT"].path, "--guest", "0", "windows.pslist")
    assert result.status == 1
    assert result.table == ""
    assert "Traceback" not in result.err
    for needed in (f"PDB ntkrnlmp.pdb, GUID {GUID_TEXT}, age 1", f"DIR/windows/ntkrnlmp.pdb/{GUID_TEXT}-1.json.xz",
                   "vol with -s DIR", f"-p ntkrnlmp.pdb -g {GUID_TEXT}1"):  # fmt: skip
        assert result.err.count(needed) == 1


@pytest.mark.slow
def test_with_the_table_of_another_build_nothing_is_shown(vol, built, tmp_path):
    path = built["EPT"].guest.symbols(tmp_path, Pe(guid=bytes(16)))
    assert path.name == f"{'0' * 32}-1.json.xz"
    result = vol("-s", tmp_path, "-f", built["EPT"].path, "--guest", "0", "windows.pslist")
    assert result.status == 1
    assert f"GUID {GUID_TEXT}" in result.err


@pytest.mark.slow
def test_a_table_of_another_build_under_the_right_name_is_refused(vol, built, tmp_path):
    wrong = built["EPT"].guest.symbols(tmp_path, Pe(guid=bytes(16)))
    wrong.rename(wrong.with_name(f"{GUID_TEXT}-1.json.xz"))
    result = vol("-s", tmp_path, "-f", built["EPT"].path, "--guest", "0", "windows.pslist")
    assert (result.status, result.table) == (1, "")
    assert f"GUID {GUID_TEXT}" in result.err


@pytest.mark.slow
def test_volatility_alone_does_not_find_the_kernel_in_the_same_memory(vol, built, tmp_path):
    """The guest's memory as an image of its own: its page tables lie where Volatility does not look."""
    image = built["EPT"].guest.guest_image(tmp_path / "guest.raw")
    result = vol("-s", built["EPT"].symbols, "-f", image, "windows.pslist")
    assert result.status != 0
    assert "Unsatisfied requirement" in result.out


@pytest.mark.slow
def test_a_linux_plugin_says_that_the_guest_runs_windows(vol, built):
    result = vol("-f", built["EPT"].path, "--guest", "0", "linux.pslist")
    assert result.status == 1
    assert "Windows 10.0.19041" in result.err


@pytest.mark.slow
def test_another_kernel_whose_symbols_are_there_is_refused(vol, tmp_path):
    """An update's kernel, mapped by the system's cache below the one that runs: Volatility's scanner meets it first."""
    ram = HostRam()
    guest = windows.Windows(ram)
    other = Pe(guid=bytes(16))
    for rva, data in other.parts().items():
        guest.write(guest.base - 0x1000_0000 + rva, data)
    guest.share_kernel()
    guest.vcpu()
    path = tmp_path / "host.raw"
    path.write_bytes(ram.image())
    guest.symbols(tmp_path / "symbols", other)
    result = vol("-s", tmp_path / "symbols", "-f", path, "--guest", "0", "windows.pslist")
    assert (result.status, result.table) == (1, "")
    assert (
        "Volatility took an image at 0xf8034a600000 for the kernel, and the guest's is at 0xf8035a600000" in result.err
    )
    assert f"GUID {GUID_TEXT}" in result.err
