"""Volatility opens the committed captures and sees the host that the truth describes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: ``vol``; its option parser takes Python's own "-c" in argv[0] for an option.
VOL = "import sys; sys.argv[0] = 'vol'; from volatility3.cli import main; main()"
TESTDATA = Path(__file__).resolve().parents[2] / "testdata"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kvm-ept", "kvm-npt"])
def test_the_processes_of_the_host(name, tmp_path):
    options = ["-q", "-r", "json", "--cache-path", tmp_path, "-s", TESTDATA / "symbols"]
    command = [sys.executable, "-c", VOL, *options]
    command += ["-f", TESTDATA / name / "host.elf", "linux.pslist"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    seen = {(row["PID"], row["COMM"].split("-")[0]) for row in json.loads(done.stdout)}
    truth = json.loads((TESTDATA / name / "truth.json").read_text())
    expected = {(row["pid"], row["comm"].split("-")[0]) for row in truth["host"]["processes"]}
    assert expected - seen == set()
