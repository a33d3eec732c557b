"""What our files do to every ``vol`` command: they are found, cost little, and go away where they cannot run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli import running

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("ept.scan", "ept.walk", "ept.vmcs")

WITHOUT_NUMPY = """
import importlib.machinery
import sys

class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "numpy" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hidden
"""
OLD_FRAMEWORK = """
from volatility3 import framework

framework.interface_version = lambda: (2, 27, 0)
"""


@pytest.fixture(scope="module")
def vol(tmp_path_factory) -> running.Volatility:
    return running.Volatility(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def changed(request, tmp_path_factory) -> running.Volatility:
    """The same command in an interpreter that runs some code first."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(request.param)
    return running.Volatility(tmp_path_factory.mktemp("home"), environment={"PYTHONPATH": str(folder)})


def test_the_installed_package_is_this_source(tmp_path):
    """The other tests of the command line run what pip installed: after a change, ``pip install .`` again."""
    code = "import volatility3_ept, volatility3; print(volatility3_ept.__path__[0]); print(volatility3.__path__[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    package, volatility3 = (Path(line) for line in done.stdout.splitlines())
    source = ROOT / "volatility3_ept"
    stale = []
    for path in source.rglob("*.py"):
        name = path.relative_to(source)
        # pip puts the plugins where Volatility looks for them, and nowhere else.
        there = volatility3 / name if name.parts[:2] == ("plugins", "ept") else package / name
        if not there.exists() or there.read_bytes() != path.read_bytes():
            stale.append(str(name))
    assert not stale, "run pip install . again"


def test_help_shows_our_plugins_and_the_option(vol):
    text = vol("-h").check().out
    for word in (*PLUGINS, "--guest", "--maxphyaddr", "--allow-truncated"):
        assert word in text
    assert "volatility3.plugins.ept" not in text, "named among those that could not be loaded"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_each_plugin_and_each_option_has_a_help_text(vol, plugin):
    text = vol(plugin, "-h").check().out
    usage, options = text.split("\noptions:\n")
    assert len(usage.strip().split("\n\n")) > 1, "the docstring is the description"
    for block in re.split(r"\n  (?=-)", options)[1:]:
        assert len(block.split()) > 3, f"no description: {block}"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (WITHOUT_NUMPY, "volatility3_ept needs numpy"),
        (OLD_FRAMEWORK, "volatility3_ept needs Volatility 3 2.28.0 or newer"),
    ],
    ids=["no-numpy", "old-volatility"],
    indirect=["changed"],
)
def test_where_we_cannot_run_vol_works_on_without_us_and_says_why(changed, reason):
    text = changed("-h").check().out
    assert "linux.pslist.PsList" in text
    assert "--guest" not in text
    assert not [line for line in text.splitlines() if line.strip().startswith("ept.")]
    told = changed("-vv", "-h")
    assert (told.status, reason in told.err) == (0, True)


def test_no_plugin_file_of_ours_imports_numpy_or_pefile(tmp_path):
    """Volatility imports every plugin file for every command, ``vol -h`` too."""
    code = """
        import sys
        import volatility3.framework
        from volatility3.framework import plugins, automagic, contexts
        before = set(sys.modules)
        import volatility3.plugins.ept.scan, volatility3.plugins.ept.walk, volatility3.plugins.ept.vmcs
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
        print(*sorted(set(sys.modules) - before))
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    top, every = (set(line.split()) for line in done.stdout.splitlines())
    assert "volatility3_ept" in top
    assert not top & {"numpy", "pefile", "yara", "capstone"}
    assert not [name for name in every if name.startswith("volatility3_ept.core")]
    third_party = top - set(sys.stdlib_module_names) - {"volatility3", "volatility3_ept"}
    assert not third_party


def test_the_readme_holds_the_command_that_the_continuous_integration_runs():
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"grep -E '([^']+)' README\.md", script)
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if re.search(pattern, line)]
    assert len(lines) == 1
    assert "'.[test]'" in lines[0]
