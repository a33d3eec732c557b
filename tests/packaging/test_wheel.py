"""What is in the wheel, and what an uninstall leaves behind."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What a build needs; the captures would only be copied in vain.
SOURCE = ("volatility3_ept", "symbols", "pyproject.toml", "README.md", "LICENSE.txt")

pytestmark = pytest.mark.slow


def pip(*args: str | Path, python: str = sys.executable) -> None:
    done = subprocess.run([python, "-m", "pip", *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy. Without hatchling in this environment pip fetches it."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    out = tmp_path_factory.mktemp("wheel")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip("wheel", "--no-deps", *here, "-w", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_plugins_lie_where_a_plain_vol_looks(names):
    held = {name for name in names if name.startswith("volatility3/")}
    assert held == {f"volatility3/plugins/ept/{name}" for name in sources(ROOT / "volatility3_ept/plugins/ept", "*.py")}
    # Volatility's own folders have no __init__.py of ours to be overwritten with.
    assert "volatility3/plugins/__init__.py" not in names


def test_the_package_and_its_tables_are_complete(names):
    held = {name.partition("/")[2] for name in names if name.startswith("volatility3_ept/")}
    moved = {name for name in sources(ROOT / "volatility3_ept", "*.py") if name.startswith("plugins/ept/")}
    assert sources(ROOT / "volatility3_ept", "*.py") - moved <= held
    assert {f"symbols/{name}" for name in sources(ROOT / "symbols", "*.json")} <= held


def test_nothing_else_is_in_it(names):
    tops = {name.partition("/")[0] for name in names}
    (info,) = [top for top in tops if top.endswith(".dist-info")]
    assert tops == {"volatility3", "volatility3_ept", info}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".elf", ".raw"))]
    assert any(name.startswith(f"{info}/licenses/") for name in names)


def test_the_record_lists_every_file_so_that_uninstall_removes_it(wheel, names):
    with zipfile.ZipFile(wheel) as archive:
        (record,) = [name for name in names if name.endswith(".dist-info/RECORD")]
        listed = {row[0] for row in csv.reader(io.StringIO(archive.read(record).decode()))}
    assert listed == {name for name in names if not name.endswith("/")}


def test_install_and_uninstall_leave_nothing(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    before = files(Path(where))
    pip("install", "--no-deps", "--no-index", wheel, python=python)
    assert (Path(where) / "volatility3" / "plugins" / "ept" / "scan.py").exists()
    pip("uninstall", "-y", "volatility3-ept", python=python)
    assert files(Path(where)) == before
