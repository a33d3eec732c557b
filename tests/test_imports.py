"""The rooms of the package and who may enter which: read from the source, nothing is run."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "volatility3_ept"
OURS = PACKAGE.name
STDLIB = frozenset(sys.stdlib_module_names)

#: What each room may import beside the standard library: other packages, and rooms of ours (its own included).
RULES = {
    "spec": ({}, {"spec"}),
    "core": ({"numpy"}, {"core", "spec"}),
    "export": ({"numpy"}, {"export", "core", "spec"}),
    "layers": ({"numpy", "volatility3"}, {"layers", "core", "spec"}),
    "automagic": ({"numpy", "volatility3"}, {"automagic", "layers", "core", "spec"}),
    "plugins": ({"numpy", "volatility3"}, {"automagic", "layers", "core", "export", "spec"}),
}

#: Libraries that one module alone may use, and imports only when it is called: ``vol`` starts without them.
LAZY = {"volatility3_ept/core/pe.py": {"pefile"}}


def modules(*rooms: str) -> list[Path]:
    """Return the source files of these rooms."""
    return sorted(path for room in rooms for path in (PACKAGE / room).rglob("*.py"))


def name(path: Path) -> str:
    """Return a path as the test's id."""
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """Return the room that a source file of the package lies in."""
    return path.relative_to(PACKAGE).parts[0]


def imported(path: Path) -> set[str]:
    """Return the dotted names of every module a file imports, in functions and under conditions too."""
    names: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (parent, node.module) if part)
            # ``from package import module`` names a module as well; a function behind the last dot does no harm.
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(*RULES), ids=name)
def test_a_module_imports_only_what_its_room_may(path):
    packages, rooms = RULES[room_of(path)]
    for module in imported(path):
        top, *rest = module.split(".")
        if top == OURS:
            assert not rest or rest[0] in rooms | {"__version__"}, f"{name(path)} imports {module}"
        else:
            allowed = {*packages, *LAZY.get(name(path), ())}
            assert top in STDLIB or top in allowed, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [ROOT / path for path in LAZY], ids=name)
def test_a_library_of_one_module_is_imported_when_it_is_called(path):
    tree = ast.parse(path.read_text())
    blocks = (ast.FunctionDef, ast.AsyncFunctionDef)
    called = {id(node) for block in ast.walk(tree) if isinstance(block, blocks) for node in ast.walk(block)}
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            called |= {id(inner) for inner in ast.walk(node)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in called]
    names = {alias.name.split(".")[0] for n in found for alias in n.names} | {
        n.module for n in found if hasattr(n, "module")
    }
    assert names.isdisjoint(LAZY[name(path)])


@pytest.mark.parametrize("path", modules("plugins"), ids=name)
def test_a_plugin_never_imports_a_plugin(path):
    """Volatility's own plugins may be called by theirs; ours share code through the core."""
    plugins = (f"{OURS}.plugins", "volatility3.plugins.ept")
    assert not [module for module in imported(path) if module.startswith(plugins)]


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "builders").rglob("*.py")), ids=name)
def test_a_builder_knows_nothing_of_the_package(path):
    """A mask that both shared could be wrong in both, and no test would tell."""
    assert not [module for module in imported(path) if module.split(".")[0] in (OURS, "volatility3")]


@pytest.mark.parametrize("path", modules("spec", "core", "export"), ids=name)
def test_algorithms_never_print(path):
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("print", "input")]
    written = [module for module in imported(path) if module.startswith(("sys.stdout", "sys.stderr"))]
    assert (lines, written) == ([], [])


BROAD = {"Exception", "BaseException"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name)
def test_no_error_is_swallowed(path):
    """A bare ``except`` anywhere, or a broad one that only passes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ExceptHandler):
            continue
        where = f"{name(path)}:{node.lineno}"
        assert node.type is not None, f"bare except at {where}"
        caught = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)}
        idle = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
        assert not (caught & BROAD and idle), f"an error is swallowed at {where}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os.path", {"os.path"}),
        ("from volatility3_ept.core import walk", {"volatility3_ept.core.walk"}),
        ("def f():\n    from . import ept", {"volatility3_ept.spec.ept"}),
        ("from ..core import walk", {"volatility3_ept.core.walk"}),
    ],
)
def test_every_form_of_import_is_seen(source, expected, tmp_path, monkeypatch):
    path = tmp_path / OURS / "spec" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imported(path) == expected
