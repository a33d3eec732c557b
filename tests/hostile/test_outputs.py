"""Files: named by nothing in an image, inside their folder, never executed; and no capture is written to."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from builders import machine, paging
from builders.paging import PAGE
from readers import memory_of

import volatility3_ept
from volatility3_ept.core import search
from volatility3_ept.core.index import Index
from volatility3_ept.layers import errors, folder

PACKAGE = Path(volatility3_ept.__file__).parent
HOSTILE = b"Linux version 6.6.6-../../../../etc/passwd (a@b) (gcc 12) #1 \x1b[31m\n\x00"


@pytest.fixture
def image(tmp_path) -> Path:
    """A host whose guest calls itself by a path."""
    ram, (guest,) = machine.host(paging.EPT_4)
    guest.ram.write(guest.kernel_gpa, HOSTILE.ljust(PAGE, b"\xcc"))
    path = tmp_path / "in" / "host.raw"
    path.parent.mkdir()
    path.write_bytes(ram.image())
    return path


def everything(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*")}


def test_no_name_of_a_file_comes_from_the_image(image, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    before = everything(tmp_path)
    with volatility3_ept.open(image) as capture:
        (guest,) = capture.machines
        carved = guest.carve(out, "elf")
        assert "passwd" not in str(carved.path)
    new = everything(tmp_path) - before
    assert new
    assert all(re.fullmatch(r"out/guest-[0-9a-z.-]+", name) for name in new)


def test_a_link_in_the_output_folder_does_not_lead_out_of_it(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "link").symlink_to(elsewhere)
    (out / "within").symlink_to(out / "real")
    for name in ("link", "link/deeper", "../elsewhere", str(elsewhere), "a/../../elsewhere"):
        with pytest.raises(errors.EptError, match="outside the output folder"):
            folder.inside(out, name, "--save")
    assert folder.inside(out, "within", "--save") == (out / "real").resolve()
    assert everything(elsewhere) == set()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".", "", "a\\b", "a\0b"])
def test_a_file_name_is_a_file_name(name):
    with pytest.raises(errors.EptError, match="plain file name"):
        folder.plain_name(name, "--html")


def test_nothing_in_the_package_reads_data_that_can_execute():
    """No pickle, marshal or shelve, no eval and exec: an index and a configuration are JSON."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"pickle", "marshal", "shelve", "dill", "yaml"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile"), path


DEEP = "[" * 200_000
CRAFTED = {
    "no JSON": "\x80\x04\x95cos\nsystem\n(S'id'\ntR.",
    "nested without end": DEEP,
    "nested in a field": '{"format": 4, "key": "k", "structures": ' + DEEP,
    "a number": "1e999",
    "a list": "[]",
    "another key": json.dumps({"format": 4, "key": "other"}),
    "a number of the wrong kind": json.dumps({"format": 4, "key": "k", "structures": ["__import__('os')"]}),
}


@pytest.mark.parametrize("text", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_index_is_no_index(text):
    assert Index.from_json(text, "k") is None


@pytest.fixture(scope="module")
def small():
    ram, _ = machine.host(paging.EPT_4, paging.NPT_4)
    memory = memory_of(ram)
    return memory, search.discover(memory)


ROWS = ["", "x", DEEP, "0:0:0:0:0:0:9", "-1:2:3:4:5:6:4", "1:2:3", json.dumps({"root": "eptp=0x1000"}),
        json.dumps({"root": [], "table": {}, "certainty": 7, "cr3": "x", "paging": [], "evidence": 3})]  # fmt: skip


@pytest.mark.parametrize("field", ["systems", "slots", "found", "inferred"])
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_an_index_with_a_crafted_row_makes_no_result_wrong(small, field, row):
    """It may make a search longer; the machines and their memory are the same."""
    memory, found = small
    given = getattr(found.index, field)
    names = [*given, *(f"/{m.root}" for m in found.machines), "", "inferred_0x12"]
    value = dict.fromkeys(names, row if field == "systems" else (row,))
    again = search.discover(memory, known=replace(found.index, **{field: value}))
    assert [(m.id, m.root, m.memory.size) for m in again.machines] == [
        (m.id, m.root, m.memory.size) for m in found.machines
    ]


_WATCHED = """
import os, sys
seen = []
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        if os.path.abspath(os.fsdecode(args[0])) == sys.argv[1]:
            seen.append(args[2])
sys.addaudithook(watch)
import volatility3_ept
with volatility3_ept.open(sys.argv[1]) as capture:
    for machine in capture.machines:
        machine.carve(sys.argv[2], "raw")
    capture.html()
    capture.owner(0x1000)
assert seen, "the watch saw nothing"
assert not any(flags & (os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_TRUNC | os.O_CREAT) for flags in seen), seen
"""


def test_a_capture_is_only_ever_opened_for_reading(image, tmp_path):
    before = image.read_bytes(), image.stat().st_mtime_ns
    image.chmod(0o444)
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", _WATCHED, str(image), str(out)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


def test_the_mapped_file_cannot_be_written_through(image):
    with volatility3_ept.open(image) as capture:
        rows, _ = capture.memory.words([0x10_0000])
        view = next(rows for _, rows in capture.memory.blocks())
        assert not view.flags.writeable
        assert rows.size
