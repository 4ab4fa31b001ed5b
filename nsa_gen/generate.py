"""``nsa-gen generate``: one spec for one target as an importable directory that needs only torch and triton.

The directory holds copies of the run-time modules, every rendered kernel the target's tables choose at any shape, and a static
``kernels.py`` in place of rendering and look-up. Nothing outside the directory is read, and the same call runs the same kernel as in
the library with the same tables. The same tables and templates give the same bytes.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import lookup
from .config import Config, Problem, Shape, problems
from .device import Device
from .errors import CacheError, InputError, RenderError
from .lookup import Resolution
from .precompile import Build
from .render import environment, render
from .spec import Spec

#: Modules a generated package replaces or must never contain.
REPLACED = frozenset({"kernels"})
FORBIDDEN = frozenset({"device", "generate", "inputs", "knobs", "loader", "lookup", "reference", "render", "row", "space", "table", "tune"})
#: Largest sequence length and sequences × KV heads that plans tell apart.
MAX_SEQLEN, MAX_HEADS = 1 << 24, 1 << 16
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Plan:
    """Which module serves one problem at every shape.

    ``modules[i][j]`` serves lengths from ``seqlens[i]`` and sequences × KV heads from ``heads[j]`` on, up to the next start.
    """

    problem: Problem
    seqlens: tuple[int, ...]
    heads: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...]


@dataclass
class Package:
    """A generated package before it is written: relative path → text, and what went in."""

    spec: Spec
    target: Device
    files: dict[str, str] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    chosen: dict[str, tuple[Problem, Resolution, int]] = field(default_factory=dict)

    def builds(self) -> list[Build]:
        """What ``--check`` compiles: every rendered kernel, at a length it serves."""
        return [Build(problem, found.config, self.target, seqlen) for problem, found, seqlen in self.chosen.values()]


def plan(spec: Spec, target: Device) -> Package:
    """Resolve every problem of ``spec`` (batched and packed) at every shape on ``target``, and render what is chosen.

    Raises:
        NotTuned: ``NSA_GEN_STRICT=1`` and a shape has no exact row.
        RenderError: a template is broken.
    """
    package = Package(spec, target)
    for varlen in (False, True):
        for problem in problems(spec, varlen=varlen):
            if problem not in {known.problem for known in package.plans}:
                package.plans.append(_plan_one(problem, target, package, alone=spec.head_dim.qk == spec.head_dim.v))
    return package


def _plan_one(problem: Problem, target: Device, package: Package, alone: bool) -> Plan:
    all_seqlens, all_heads = lookup.cuts(problem, target)
    seqlens = [cut for cut in all_seqlens if cut <= MAX_SEQLEN]
    heads = [cut for cut in all_heads if cut <= MAX_HEADS]
    stem = problem.kernel + ("" if alone or "head_dim" not in problem.as_dict() else f"_d{problem.head_dim}")
    stem += f"_{problem.parts}" if "parts" in problem.as_dict() else ""
    stem += "_deterministic" if problem.as_dict().get("deterministic") else ""
    stem += "_varlen" if problem.as_dict().get("varlen") else ""
    names: dict[Config, str] = {}
    grid = []
    for seqlen in seqlens:
        row = []
        for head in heads:
            found = lookup.resolve(problem, Shape(seqlen, head), target, digest_of=_digest)
            if found.config not in names:
                names[found.config] = stem + (f"_{len(names) + 1}" if names else "")
                if names[found.config] in package.chosen:
                    raise RenderError(f"two kernels of one name: {names[found.config]}")
                package.chosen[names[found.config]] = (problem, found, max(seqlen, 1024))
                package.files[f"rendered/{names[found.config]}.py"] = render(problem, found.config, standalone=True).text
            row.append(names[found.config])
        grid.append(tuple(row))
    kept_rows = [i for i in range(len(grid)) if i == 0 or grid[i] != grid[i - 1]]
    columns = list(zip(*grid, strict=True))
    kept_columns = [j for j in range(len(columns)) if j == 0 or columns[j] != columns[j - 1]]
    return Plan(
        problem,
        tuple(0 if i == 0 else seqlens[i] for i in kept_rows),
        tuple(0 if j == 0 else heads[j] for j in kept_columns),
        tuple(tuple(grid[i][j] for j in kept_columns) for i in kept_rows),
    )


@lru_cache(maxsize=4096)
def _digest(problem: Problem, config: Config) -> str:
    return render(problem, config).digest


def build(spec: Spec, target: Device) -> Package:
    """The whole package in memory: plans, rendered kernels, copies of the run-time modules, and the manifest."""
    from . import __version__

    package = plan(spec, target)
    files = package.files
    for name in vendored():
        files[f"{name}.py"] = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    files["rendered/__init__.py"] = '"""Rendered kernels; ``kernels.PLANS`` says which serves what."""\n'
    variables: dict[str, Any] = {
        "spec": spec,
        "spec_dict": {name: value for name, value in spec.to_dict().items() if name != "tune"},
        "summary": _summary(spec),
        "target": target.slug,
        "arch": target.arch,
        "backend": target.backend,
        "plans": package.plans,
        "version": __version__,
    }
    env = environment()
    env.filters["python"] = _literal
    for name in ("__init__.py", "kernels.py"):
        files[name] = env.get_template(f"package/{name}.jinja").render(variables)
    files[_MANIFEST] = _manifest(package, __version__)
    return package


def _summary(spec: Spec) -> str:
    pooled, selected = spec.compression, spec.selection
    return (
        f"{spec.heads.query}/{spec.heads.kv} heads, head dim {spec.head_dim.qk}/{spec.head_dim.v}, "
        f"compression {pooled.block}/{pooled.stride} ({pooled.pooling}),\n"
        f"{selected.count} blocks of {selected.block}, window {spec.window}, {spec.dtype}, K/V {spec.kv}.\n"
    )


def _literal(value: Any) -> str:
    """Python source of plain values, on one line, strings in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def _manifest(package: Package, version: str) -> str:
    kernels = {
        name: {"problem": problem.as_dict(), "config": found.config.as_dict(), "source": found.source, "reason": found.reason}
        for name, (problem, found, _) in package.chosen.items()
    }
    content = {
        "generator": "nsa-gen",
        "version": version,
        "spec": package.spec.to_dict(),
        "target": package.target.slug,
        "arch": package.target.arch,
        "kernels": kernels,
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def vendored() -> list[str]:
    """Modules (``branches/sliding`` …) a package copies: ``ops``, ``launch`` and all they import of nsa_gen, without ``kernels``.

    Raises:
        RenderError: the run-time path reaches a module that needs the generator.
    """
    root = Path(__file__).parent
    found: set[str] = set()
    queue = ["ops", "launch"]
    while queue:
        name = queue.pop()
        path = root / f"{name}.py"
        if not path.exists() and (root / name / "__init__.py").exists():
            name, path = f"{name}/__init__", root / name / "__init__.py"
        if name in found or name in REPLACED:
            continue
        if name in FORBIDDEN:
            raise RenderError(f"the run-time modules import nsa_gen.{name}, which a generated package does not have")
        found.add(name)
        if "/" in name:
            queue.append(f"{name.partition('/')[0]}/__init__")
        queue += _relative_imports(path, name)
    return sorted(found)


def _relative_imports(path: Path, name: str) -> Iterable[str]:
    """Modules of nsa_gen that a file imports relatively, also inside functions, but not under ``if TYPE_CHECKING``."""
    root = Path(__file__).parent
    folder = Path(name).parent
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = folder if node.level == 1 else folder.parent
        inside = base / node.module.replace(".", "/") if node.module else base
        if (root / inside).is_dir():
            submodules = [inside / alias.name for alias in node.names]
            yield from (str(sub) for sub in submodules if (root / f"{sub}.py").exists() or (root / sub).is_dir())
            if str(inside) != ".":
                yield f"{inside}/__init__"
        else:
            yield str(inside)


def _nodes(tree: ast.AST) -> Iterable[ast.AST]:
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        for node in tree.orelse:
            yield from _nodes(node)
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _nodes(child)


def write(package: Package, folder: Path) -> None:
    """Write the package; the directory is replaced as a whole.

    Raises:
        InputError: the directory's name cannot be imported, or it holds something nsa-gen did not generate.
        CacheError: it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.name.isidentifier():
        raise InputError(f"-o must end in a name Python can import (letters, digits, _), got {folder.name!r}")
    if folder.exists() and not _is_ours(folder):
        raise InputError(f"{folder} exists and was not made by nsa-gen generate: choose another directory or remove it")
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        made = scratch / "new"
        for name, text in package.files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(scratch / "old")
        made.rename(folder)
    except OSError as error:
        raise CacheError(f"cannot write {folder}: {error.strerror or error}; choose a writable directory with -o") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["generator"] == "nsa-gen"
    except (OSError, ValueError, KeyError, TypeError):
        return False
