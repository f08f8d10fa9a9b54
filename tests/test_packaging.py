"""The layout: subpackages listed, imports one way and only of what is needed, libraries as tested."""

from __future__ import annotations

import ast
import re
import tomllib
import warnings
from pathlib import Path

import pytest
from qlora_fx import tested_versions
from qlora_fx.tested_versions import TESTED, minor, warn_if_untested

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "qlora_fx": ROOT / "qlora_fx",
    "qlora_fx.passes": ROOT / "passes",
    "qlora_fx.runtime": ROOT / "runtime",
}


def subpackages() -> dict[str, Path]:
    """The folder of every package and subpackage, by its full name."""
    found: dict[str, Path] = {}
    for name, folder in PACKAGES.items():
        for init in folder.rglob("__init__.py"):
            relative = init.parent.relative_to(folder)
            if not any(part in ("passes", "runtime") for part in relative.parts):
                found[".".join((name, *relative.parts))] = init.parent
    return found


def test_every_subpackage_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == subpackages().keys()
    assert {k: ROOT / v for k, v in settings["package-dir"].items()} == PACKAGES
    assert (ROOT / "qlora_fx" / "py.typed").exists()


def test_every_file_that_is_no_python_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for name, folder in subpackages().items():
        others = {
            p.name for p in folder.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")
        }
        assert others == set(settings["package-data"].get(name, ())), name


LAYERS = (
    ("__main__", "doctor"),
    ("cli",),
    ("qlora_fx",),
    ("import_order",),
    ("public",),
    ("testing", "training"),
    ("transform", "from_pretrained"),
    ("model",),
    ("memory", "merging", "optimizer", "twin"),
    ("adapters", "checkpoints"),
    ("compiler", "explain"),
    ("weights",),
    ("capture",),
    ("passes",),
    ("runtime",),
    ("config", "units"),
    ("errors", "tested_versions", "transformers_internals"),
)
"""Rooms from the top down; imports go down only, or stay in a room (ARCHITECTURE.md)."""
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the project, by its full name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "qlora_fx" and parts[0] in ("passes", "runtime"):
                continue
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imported(module: str) -> set[str]:
    """The project's modules that a module imports, wherever in it."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        whole = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            for name in (f"{whole}.{alias.name}", whole):
                if name in MODULES:
                    found.add(name)
                    break
    return found


def libraries(module: str) -> set[str]:
    """Modules of other projects that a module imports, wherever in it."""
    return {
        name
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    }


def test_the_process_that_hands_out_tests_imports_no_pytorch() -> None:
    """Workers do. It would take the time that importing takes before the first of them starts."""
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text())
    found = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    found |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert found == {"__future__", "collections.abc", "gc", "os", "pytest", "typing"}


def test_every_room_has_its_place() -> None:
    assert {room(m) for m in MODULES} == RANK.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    for other in imported(module):
        down = RANK[room(other)] > RANK[room(module)]
        assert down or room(other) == room(module), f"{module} imports {other}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {m: imported(m) - {m} for m in MODULES if not m.endswith("__init__")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done:
            return
        for other in graph[module]:
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_runtime_knows_nothing_of_fx() -> None:
    for module, path in MODULES.items():
        if room(module) == "runtime":
            names = {
                name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            }
            assert not any(name.startswith("torch.fx") for name in names), module


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"qlora_fx.transformers_internals"}))
def test_private_modules_of_transformers_and_peft_are_imported_in_one_place(module: str) -> None:
    private = {n for n in libraries(module) if n.startswith(("transformers.", "peft."))}
    assert not private, f"{module} imports {private}; accepted: what transformers_internals.py has"


def test_dependencies_are_bounded_by_what_was_tested() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    readme = (ROOT / "README.md").read_text()
    for library, (oldest, newest) in TESTED.items():
        (line,) = (d for d in lines if d.startswith(f"{library}>="))
        lowest, below = line.removeprefix(f"{library}>=").split(",<")
        assert lowest == oldest
        assert minor(oldest) <= minor(newest) < minor(below)
        tested = oldest if oldest == newest else f"{oldest} and {newest}"
        assert f"{library} {tested}" in readme
    (torch,) = (d for d in lines if d.startswith("torch"))
    assert re.fullmatch(r"torch>=[\d.]+", torch), "never pinned or bounded above"


def test_a_library_newer_than_the_tests_is_named_and_what_is_installed_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()
    monkeypatch.setattr(tested_versions, "version", lambda name: "5.24.0.dev0")
    monkeypatch.setattr(tested_versions, "TESTED", {"transformers": ("5.17", "5.23")})
    with pytest.warns(UserWarning, match=r"tested with transformers 5.17 to 5.23; 5.24.0.dev0 is"):
        warn_if_untested()
