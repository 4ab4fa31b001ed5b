"""The floors of docs/design.md: a module imports only what is below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nsa_gen"

#: Modules by floor. One imports lower floors, and of its own floor those named before it.
FLOORS = (
    ("errors", "paths", "versions", "timing", "launch", "pages"),
    ("geometry", "spec", "config", "device"),
    ("render", "knobs", "space", "row", "table", "lookup", "reference", "reference_backward", "acceptance", "values", "inputs"),
    ("loader", "precompile"),
    ("kernels",),
    ("branches", "replay"),
    ("register", "operators", "ops", "rows", "cache", "serving", "rope", "module", "huggingface", "verify"),
    ("console", "generate", "bench_training", "bench_decode", "bench", "bench_report", "tables", "tune", "report", "doctor", "demo"),
    ("cli_tables", "cli"),
    ("__main__", "__init__"),
)
RANK = {name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}

#: Modules that need neither torch nor triton to be imported.
PLAIN = (
    "errors",
    "paths",
    "versions",
    "pages",
    "geometry",
    "spec",
    "config",
    "device",
    "render",
    "knobs",
    "space",
    "row",
    "table",
    "lookup",
)

FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The floor plan's name of a file: its module, or the package it is in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def nodes(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """Nodes outside ``if TYPE_CHECKING``; without ``lazy`` only those that run on import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield node
        yield from nodes(node, lazy)


def imports(path: Path, lazy: bool = True) -> Iterator[tuple[int, str]]:
    """``(line, dotted module)`` of a file's imports; relative ones made absolute."""
    folder = path.relative_to(PACKAGE.parent).parent.parts
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            if base == ["nsa_gen"]:  # from . import paths: the names are modules (or what the package's __init__ defines)
                yield from ((node.lineno, f"nsa_gen.{alias.name}") for alias in node.names if alias.name != "__version__")
            else:
                yield node.lineno, ".".join(base)


def inner_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Of these, the ones inside nsa_gen, as the floor plan's names."""
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "nsa_gen":
            yield line, parts[1] if len(parts) > 1 else "__init__"


def test_every_module_has_a_floor():
    assert len(FILES) > 10
    strange = {unit(path) for path in FILES} - set(RANK)
    assert not strange, f"give them a floor in {Path(__file__).name}: {', '.join(sorted(strange))}"
    assert len(RANK) == sum(map(len, FLOORS))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = unit(path)
    for line, other in inner_imports(path):
        assert other in RANK, f"{path}:{line}: imports nsa_gen.{other}, which has no floor"
        inside = other == own and path.parent != PACKAGE
        assert inside or RANK[other] < RANK[own], f"{path}:{line}: {own} {RANK[own]} imports {other} {RANK[other]}"


@pytest.mark.parametrize("path", [path for path in FILES if unit(path) in PLAIN], ids=lambda path: path.stem)
def test_plain_modules_need_no_torch(path):
    for line, module in imports(path, lazy=False):
        assert module.split(".")[0] not in ("torch", "triton"), f"{path}:{line}: imports {module}"


def test_plain_modules_load_without_torch():
    """Not only by reading: in a process where torch and triton cannot be imported."""
    present = [name for name in PLAIN if (PACKAGE / f"{name}.py").exists()]
    code = "\n".join(
        [
            "import importlib, sys, types",
            "for name in ('torch', 'triton', 'optuna', 'yaml'): sys.modules[name] = None",
            "package = sys.modules['nsa_gen'] = types.ModuleType('nsa_gen')",
            f"package.__path__ = [{str(PACKAGE)!r}]",
            f"for name in {present!r}: importlib.import_module('nsa_gen.' + name)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_operators_load_without_what_only_compiling_needs():
    """torch._dynamo and sympy take a second or more, which every process with a first call would wait for."""
    code = "import sys, nsa_gen; nsa_gen.nsa_attention; sys.exit(', '.join(x for x in ('torch._dynamo', 'sympy') if x in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr


@pytest.mark.parametrize("path", [path for path in FILES if unit(path) != "tune"], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_tune_imports_optuna(path):
    for line, module in imports(path):
        assert module.split(".")[0] != "optuna", f"{path}:{line}: only nsa_gen/tune imports optuna"


def test_module_sizes():
    """A module is one idea: about 400 lines are the mark past which it is two."""
    long = {str(path.relative_to(PACKAGE)): n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long, f"split them: {long}"


def test_the_walk_sees_what_it_should(tmp_path, monkeypatch):
    """The checks above rest on ``imports``: lazy, type-checking and relative imports are told apart."""
    package = tmp_path / "nsa_gen"
    (package / "tune").mkdir(parents=True)
    path = package / "tune" / "study.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch.nn\nfrom .. import paths, __version__\nfrom ..config import Config\n"
        "from .log import Log\nfrom . import worker\nif TYPE_CHECKING:\n    from .. import cli\ndef f():\n    from ..ops import nsa\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    found = [module for _, module in imports(path)]
    assert found == ["typing", "torch.nn", "nsa_gen.paths", "nsa_gen.config", "nsa_gen.tune.log", "nsa_gen.tune", "nsa_gen.ops"]
    assert "nsa_gen.ops" not in [module for _, module in imports(path, lazy=False)]
    assert [name for _, name in inner_imports(path)] == ["paths", "config", "tune", "tune", "ops"]
