"""What surrounds Volatility's plugins works in a guest as it does on a host: volshell, processes, timelines, files."""

from __future__ import annotations

import captures
import pytest
from builders import paging, windows
from builders.machine import BANNER
from builders.paging import PAGE
from cli import running

#: Where the built Windows guest has a page in its page file, and which page of the file that is.
PAGED_OUT, SLOT = 0xFFFF_F803_6000_0000, 5


@pytest.fixture(scope="session")
def volshell(vol) -> running.Volatility:
    return running.Volatility(vol.home, running.command("volshell", "volatility3.cli.volshell"))


@pytest.fixture
def where(real) -> list:
    """The Linux guest of the real capture, with its symbols."""
    return ["-s", captures.SYMBOLS, "-f", real.path, "--guest", "0"]


def test_a_missing_symbol_table_ends_with_one_message_and_no_row(vol, small):
    result = vol("-f", small, "--guest", "1", "linux.pslist")
    assert (result.status, result.table) == (1, "")
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line]
    assert lines[0].startswith("volatility3_ept: --guest 1: no symbol table (ISF)")
    assert lines.count("  " + BANNER.decode().strip("\n\0")) == 1
    assert "docs/isf-from-btf.md" in lines[-1]


def test_without_the_option_volatility_says_what_it_says_without_us(vol, small):
    result = vol("-f", small, "linux.pslist")
    assert "Unsatisfied requirement" in result.out
    assert "volatility3_ept" not in result.out + result.err


def test_processes_of_a_parallel_scan_read_the_guest(vol, small):
    """Each process gets a copy of the layers through pickle; ours open the file anew."""
    plain = vol("-f", small, "--guest", "1", "banners").check()
    assert vol("--parallelism", "processes", "-f", small, "--guest", "1", "banners").check().out == plain.out


@pytest.mark.slow
def test_processes_find_the_kernel_and_its_list(vol, pslist, where):
    assert vol("--parallelism", "processes", *where, "linux.pslist").check().out == pslist("0")[0].out


@pytest.mark.slow
def test_a_script_of_volshell_sees_the_guests_processes(volshell, pslist, where, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('PIDS', sorted(int(task.pid) for task in self.list_tasks()))\n")
    result = volshell("-l", *where, "--script", script, text="quit()\n").check()
    (line,) = [line for line in result.out.splitlines() if line.startswith("PIDS ")]
    titles, *rows = pslist("0")[0].rows
    assert line == f"PIDS {sorted(int(row[titles.index('PID')]) for row in rows)}"


@pytest.mark.slow
def test_volshell_saves_a_configuration_that_vol_understands(volshell, vol, pslist, where, tmp_path):
    path = tmp_path / "shell.json"
    volshell("-l", "--save-config", path, *where, text="quit()\n").check()
    assert vol("-s", captures.SYMBOLS, "-c", path, "linux.pslist").check().out == pslist("0")[0].out


@pytest.mark.slow
def test_the_timeliner_leaves_out_what_is_for_other_systems(vol, pslist, where):
    """It builds every plugin that has a timeline, windows.* ones too, which cannot run here."""
    result = vol(*where, "timeliner.Timeliner", "--plugin-filter", "PsList").check()
    titles, *rows = result.rows
    assert {row[titles.index("Plugin")] for row in rows} == {"PsList"}
    named = {row[titles.index("Description")].split()[1].partition("/")[0] for row in rows}
    columns, *listed = pslist("0")[0].rows
    assert named == {row[columns.index("PID")] for row in listed}


@pytest.mark.slow
def test_files_of_a_plugin_hold_the_guests_memory(vol, where, tmp_path):
    rows = vol("-r", "json", "-o", tmp_path, *where, "linux.elfs", "--pid", "1", "--dump").check().json
    written = [(tmp_path / row["File Output"]).read_bytes() for row in rows]
    assert len(written) == 2
    vdso = min(written, key=len)  # the program's first page is not in memory, the kernel's own library is
    assert vdso.startswith(b"\x7fELF")
    assert b"__vdso_gettimeofday" in vdso


@pytest.mark.slow
def test_a_file_in_the_guests_page_cache_can_be_written_out(vol, where, tmp_path):
    found = ["linux.pagecache.InodePages", "--find", "/tmp/secret.txt", "--dump"]
    (row,) = vol("-r", "json", "-o", tmp_path, *where, *found).check().json
    assert (tmp_path / row["Output File"]).read_bytes().startswith(b"file content L2-GUEST-MARKER-1-FILE")


@pytest.mark.slow
def test_a_linux_guest_has_no_use_for_swap_layers(vol, pslist, real, where, tmp_path):
    swap = tmp_path / "swap.raw"
    swap.write_bytes(bytes(16 * PAGE))
    assert vol("--single-swap-locations", swap.as_uri(), *where, "linux.pslist").check().out == pslist("0")[0].out


@pytest.fixture(scope="module")
def paged_out(tmp_path_factory):
    """A host with a Windows guest that has a page in its page file, its symbols, and the page file."""
    folder = tmp_path_factory.mktemp("swap")
    ram, guest = windows.host(paging.EPT_4)
    guest.own.put(PAGED_OUT, "PTE", SLOT << 32 | 0x80)
    (folder / "host.raw").write_bytes(ram.image())
    (folder / "pagefile.sys").write_bytes(bytes(SLOT * PAGE) + b"IN THE PAGE FILE".ljust(PAGE, b"."))
    guest.symbols(folder / "symbols")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("is_given", [True, False])
def test_the_page_file_that_is_named_is_the_guests(volshell, paged_out, is_given):
    swap = ["--single-swap-locations", (paged_out / "pagefile.sys").as_uri()] if is_given else []
    typed = f"print('READ', self.context.layers[self.current_layer].read({PAGED_OUT:#x}, 16, pad=True))\nquit()\n"
    result = volshell(*swap, "-s", paged_out / "symbols", "-f", paged_out / "host.raw", "--guest", "0", text=typed)
    expected = b"IN THE PAGE FILE" if is_given else bytes(16)
    assert f"READ {expected!r}" in result.check().out


@pytest.mark.slow
def test_a_script_of_volshell_sees_the_processes_of_a_windows_guest(volshell, paged_out, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('PIDS', [int(process.UniqueProcessId) for process in self.list_processes()])\n")
    where = ["-s", paged_out / "symbols", "-f", paged_out / "host.raw", "--guest", "0"]
    result = volshell("-w", *where, "--script", script, text="quit()\n").check()
    assert f"PIDS {[process.pid for process in windows.PROCESSES]}" in result.out
