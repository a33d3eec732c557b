"""The Python interface: what its page says is what it does, and it reads what the ground truth says is there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import subprocess
import sys
from pathlib import Path

import captures
import numpy as np
import pytest
from builders import machine, paging
from builders.paging import PAGE, HostRam, stamp
from cli import containers

import volatility3_ept
from volatility3_ept import api
from volatility3_ept.core.coverage import Fate
from volatility3_ept.core.sharing import Shared

ROOT = Path(__file__).parents[1]
BLOCKS = re.compile(r"```python\n(.*?)```\n(?:```\n(.*?)```\n)?", re.DOTALL)


def test_the_examples_of_the_page_print_what_it_says(monkeypatch):
    captures.get("kvm-ept")
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    blocks = BLOCKS.findall((ROOT / "docs" / "api.md").read_text())
    assert len(blocks) >= 10
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == expected, code


def test_what_a_script_pays_for():
    """Importing the package costs nothing, and a plain file is read without Volatility."""
    path = captures.get("kvm-ept").path
    code = f"""
import sys, volatility3_ept
assert "numpy" not in sys.modules
with volatility3_ept.open({str(path)!r}) as capture:
    assert "volatility3" not in sys.modules
    print(capture.machine("0").read(0x1000, 4))
assert "volatility3" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def ram() -> tuple[HostRam, machine.Guest]:
    ram, (guest,) = machine.host(paging.EPT_4)
    for gpa in list(guest.placed)[8:]:
        guest.ram.write(gpa, stamp(gpa))
    return ram, guest


@pytest.mark.parametrize(
    "write", [f for f in containers.FORMATS if f is not containers.avml], ids=lambda write: write.__name__
)
def test_every_format_gives_the_same_machine(ram, tmp_path, write):
    with volatility3_ept.open(write(ram[0], tmp_path)) as capture:
        (guest,) = capture.machines
        assert guest.root.raw == ram[1].root
        assert guest.read(9 * PAGE, PAGE) == stamp(9 * PAGE)


def test_an_unchanged_file_is_not_searched_again(ram, tmp_path, monkeypatch):
    path, index = containers.elf(ram[0], tmp_path), tmp_path / "index"
    with volatility3_ept.open(path, index=index) as capture:
        first = [machine.root for machine in capture.machines]
    monkeypatch.setattr("volatility3_ept.core.search.Finder", lambda *_: pytest.fail("searched"))
    with volatility3_ept.open(path, index=index) as capture:
        assert [machine.root for machine in capture.machines] == first
    with volatility3_ept.open(path, index=False) as capture, pytest.raises(pytest.fail.Exception):
        _ = capture.machines
    with volatility3_ept.open(path, index=index, recovery=False) as capture, pytest.raises(pytest.fail.Exception):
        _ = capture.machines


def test_without_an_index_nothing_is_written(ram, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with volatility3_ept.open(containers.elf(ram[0], tmp_path), index=False) as capture:
        assert capture.machines
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(ram, tmp_path):
    (tmp_path / "file").touch()
    with volatility3_ept.open(containers.elf(ram[0], tmp_path), index=tmp_path / "file") as capture:
        assert capture.machines


@pytest.fixture
def guest(ram, tmp_path):
    with volatility3_ept.open(containers.elf(ram[0], tmp_path)) as capture:
        yield capture.machine("0")


def test_pages_and_which_of_them_there_are(guest):
    pages, there = guest.pages([9 * PAGE, 99 * PAGE, 10 * PAGE])
    assert there.tolist() == [True, False, True]
    assert pages[2].tobytes() == stamp(10 * PAGE)
    assert not pages[1].any()


def test_missing_is_not_zero(guest):
    with pytest.raises(api.MissingMemoryError) as caught:
        guest.read(31 * PAGE + 8, 2 * PAGE)
    assert caught.value.address == 32 * PAGE
    assert guest.read(32 * PAGE - 2, 4, fill=b"?")[2:] == b"??"


def test_runs_lead_to_the_frames(ram, guest):
    placed = {}
    for run in guest.runs():
        for within in range(0, run.length, PAGE):
            placed[run.gpa + within] = run.hpa + within
    assert placed == ram[1].placed


def test_virtual_memory(ram, guest):
    kernel = machine.KERNEL
    assert guest.read_virtual(kernel, 13) == b"Linux version"
    found = guest.translate(gva=kernel + 5)
    gpa = ram[1].kernel_gpa
    assert (found.gpa, found.hpa, found.reason) == (gpa + 5, ram[1].placed[gpa] + 5, "mapped")
    assert guest.translate(gva=kernel, cr3=ram[1].own.register).gpa == gpa
    with pytest.raises(api.MissingMemoryError):
        guest.read_virtual(kernel + PAGE - 2, 4)
    assert guest.read_virtual(kernel + PAGE - 2, 4, fill=b"?")[2:] == b"??"
    lost = guest.translate(gva=0x1000)
    assert (lost.gpa, lost.hpa) == (None, None)
    assert lost.reason.startswith("guest: the PML4E")
    assert len(guest.walk_virtual(kernel).references) == 5
    with pytest.raises(LookupError, match="1 vCPUs"):
        guest.translate(gva=kernel, vcpu=7)
    with pytest.raises(TypeError):
        guest.translate()


def test_a_root_that_is_known_from_elsewhere(ram, tmp_path):
    with volatility3_ept.open(containers.raw(ram[0], tmp_path)) as capture:
        guest = capture.machine(f"eptp={ram[1].root:#x}")
        assert guest.read(9 * PAGE, 8) == stamp(9 * PAGE)[:8]
        assert guest.coverage().totals()[Fate.MAPPED] == 32 * PAGE
        with pytest.raises(LookupError, match="give cr3"):
            guest.read_virtual(machine.KERNEL, 8)
        assert guest.read_virtual(machine.KERNEL, 5, cr3=ram[1].own.register) == b"Linux"


def test_a_machine_that_is_not_there(guest, ram, tmp_path):
    with volatility3_ept.open(containers.raw(ram[0], tmp_path)) as capture, pytest.raises(LookupError, match="are: 0"):
        capture.machine("7")


def test_whose_memory(ram, tmp_path):
    with volatility3_ept.open(containers.lime(ram[0], tmp_path)) as capture:
        gpa, hpa = next(iter(ram[1].placed.items()))
        (answer,) = capture.owner(hpa)
        assert (answer.machine, answer.gpa) == ("0", gpa)
        (answer,) = capture.owner_of_offset(0)
        assert str(answer.how).startswith("not memory")
        assert capture.shared() == {"0": Shared()}
        assert capture.read(hpa, 8) == bytes(ram[0].page(hpa)[:8])
    with volatility3_ept.open(containers.gz(ram[0], tmp_path)) as capture, pytest.raises(api.CaptureError):
        capture.owner_of_offset(0)


def test_files_that_are_no_capture(tmp_path, ram):
    text = tmp_path / "text"
    text.write_bytes(b"Dear analyst\n" * 1000)
    with pytest.raises(api.CaptureError, match="text"):
        volatility3_ept.open(text)
    with pytest.raises(OSError, match="nothing"):
        volatility3_ept.open(tmp_path / "nothing")
    cut = containers.elf(ram[0], tmp_path)
    cut.write_bytes(cut.read_bytes()[:-0x1000])
    with pytest.raises(api.CaptureError, match="truncated"):
        volatility3_ept.open(cut)
    with volatility3_ept.open(cut, allow_truncated=True) as capture:
        assert [guest.id for guest in capture.machines] == ["0"]


def test_carved_twice_and_never_over_a_file(guest, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = guest.carve(out, "raw")
    assert done.path.read_bytes()[9 * PAGE : 10 * PAGE] == stamp(9 * PAGE)
    with pytest.raises(api.OutputError, match="exists already"):
        guest.carve(out, "raw")


def test_nested_machines(tmp_path):
    ram = HostRam()
    outer = machine.Guest(ram, paging.EPT_4, 96)
    outer.vcpu()
    inner = machine.Guest(outer.ram, paging.EPT_4, 8)
    inner.vcpu()
    with volatility3_ept.open(containers.elf(ram, tmp_path)) as capture:
        (child,) = capture.machine("0").children
        assert child.id == "0.0"
        for gpa, between in inner.placed.items():
            assert child.translate(gpa).hpa == outer.placed[between]


@pytest.mark.parametrize("name", captures.committed(guests=1))
def test_the_memory_of_a_real_guest(name):
    held = captures.get(name)
    (truth,) = held.guests
    with volatility3_ept.open(held.path) as capture:
        guest = capture.machine("0")
        gpas = np.array(list(truth.pages), dtype=np.int64)
        pages, there = guest.pages(gpas)
        assert there.all()
        digests = [digest for _, digest in truth.pages.values()]
        assert [hashlib.sha256(page).hexdigest() for page in pages] == digests
        frames = [frame << 12 for frame, _ in truth.pages.values()]
        assert guest.host_runs.to_hpa(gpas).tolist() == frames
