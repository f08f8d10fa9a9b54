"""The layout: subpackages listed, imports one way, text of the project free of leftovers."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "qlora_fx": ROOT / "qlora_fx",
    "qlora_fx.passes": ROOT / "passes",
    "qlora_fx.runtime": ROOT / "runtime",
}


def test_every_subpackage_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"qlora_fx"}
    for name, folder in PACKAGES.items():
        for init in folder.rglob("__init__.py"):
            relative = init.parent.relative_to(folder)
            if not any(part in ("passes", "runtime") for part in relative.parts):
                found.add(".".join((name, *relative.parts)))
    assert set(settings["packages"]) == found
    assert {k: ROOT / v for k, v in settings["package-dir"].items()} == PACKAGES
    assert (ROOT / "qlora_fx" / "py.typed").exists()


def test_every_file_that_is_no_python_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for name, folder in PACKAGES.items():
        others = {
            p.name for p in folder.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")
        }
        assert others == set(settings["package-data"].get(name, ())), name


def imports(path: Path) -> set[str]:
    """Names of the project's own modules that a file imports, relative ones included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = "." * node.level + (node.module or "")
            found |= {base} if node.module else {base + a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").glob("*.py")), ids=lambda p: p.name)
def test_runtime_imports_neither_passes_nor_fx(path: Path) -> None:
    for name in imports(path):
        assert "passes" not in name, name
        assert not name.startswith("torch.fx"), name
        assert not name.startswith("..") or name in ("..errors", "..config"), name


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*.py")), ids=lambda p: p.name)
def test_passes_import_runtime_and_leaves_only(path: Path) -> None:
    for name in imports(path):
        assert not name.startswith("..") or name.startswith(
            ("..errors", "..config", "..runtime")
        ), name


@pytest.mark.parametrize("name", ["errors", "config"])
def test_leaves_import_nothing_of_the_project_but_leaves(name: str) -> None:
    own = {n for n in imports(ROOT / "qlora_fx" / f"{name}.py") if n.startswith(".")}
    assert own <= {".errors"}
