"""Each benchmark runs on a small input: its figures are not looked at, a loaded machine would make any of them fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("name", ["reads", "flatten"])
def test_the_quick_benchmarks(name, tmp_path):
    assert "| goal | measured | |" in run("run.py", name, "--quick", "--runs", "1", "--work", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["discovery", "carve", "plugins", "scale"])
def test_the_others(name, tmp_path):
    assert "| goal | measured | |" in run("run.py", name, "--quick", "--runs", "1", "--work", str(tmp_path))


def test_a_table_goes_between_its_markers(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- flatten -->\nold\n<!-- end of flatten -->\nafter\n")
    run("run.py", "flatten", "--quick", "--runs", "1", "--work", str(tmp_path), "--write", str(document))
    text = document.read_text()
    assert text.startswith("before\n<!-- flatten -->\n### 3. Flattening\n")
    assert text.endswith("<!-- end of flatten -->\nafter\n")
    assert "old" not in text


def test_the_traps_that_took_no_tool_of_ours_in(tmp_path):
    out = run("traps.py", "--only", "plain", "five_levels", "nested", "stale", "--work", str(tmp_path))
    assert out.count("found (") == 3
    assert "nothing (right)" in out


@pytest.mark.slow
def test_every_trap(tmp_path):
    assert "missed" not in run("traps.py", "--work", str(tmp_path))
