"""Templates and renderings are valid, readable Python; goldens are compared byte for byte (``--update-goldens`` writes them anew)."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from nsa_gen import config, paths, render, space, spec
from nsa_gen.config import Config, Problem
from nsa_gen.errors import RenderError

GOLDENS = Path(__file__).parent / "goldens"
TEMPLATES = sorted(paths.templates().rglob("*.jinja"))
ARCHES = ("sm_80", "sm_90", "gfx942")


def of(name: str, varlen: bool) -> list[Problem]:
    """Every distinct problem of a spec, serving too."""
    loaded = spec.load(name)
    return [*config.problems(loaded, varlen=varlen), *(config.problem(kernel, loaded) for kernel in config.SERVING)]


def problems() -> list[Problem]:
    """Every distinct problem of the shipped specs, batched and packed."""
    return list(dict.fromkeys(problem for name in spec.names() for varlen in (False, True) for problem in of(name, varlen)))


def structures(problem: Problem) -> list[Config]:
    """The default of each arch, the safe config, and one config for each value of each structural (lower-case text) knob."""
    found = [space.default(problem, arch) for arch in ARCHES] + [space.safe(problem)]
    unseen = {(knob.name, value) for knob in space.knobs(problem.kernel) for value in knob.values if isinstance(value, str)}
    unseen -= {pair for one in found for pair in one.values}
    if problem.kernel == "compress_bwd":  # its one choice follows from the pooling
        unseen = set()
    # A value that stays unseen is illegal for the problem. Not worth a walk through kv_outer's sizes, which come last, by the million; in
    # the backward, structure has the tiles of the safe config.
    walk = with_safe_tiles if problem.kernel.endswith("_bwd") else space.candidates
    for one in islice(walk(problem), 10_000) if unseen else ():
        if unseen & set(one.values):
            found.append(one)
            unseen -= set(one.values)
            if not unseen:
                break
    return list(dict.fromkeys(found))


def with_safe_tiles(problem: Problem) -> Iterator[Config]:
    """The candidates whose tile sizes, where the safe config has them, are its own."""
    tiles, illegal = space.safe(problem).as_dict(), space.SPACES[problem.kernel].illegal
    knobs = (
        replace(knob, values=(tiles[knob.name],)) if knob.name.isupper() and knob.name in tiles else knob
        for knob in space.knobs(problem.kernel)
    )
    return (one for one in space._walk(problem.kernel, tuple(knobs), {}) if illegal(problem, one) is None)


def goldens() -> dict[str, str]:
    """Golden renderings by file name: each kernel of ``gqa16-d128`` in each structure, and what the paper's spec adds, ragged. Of what
    gives the same bits each time, the default."""
    texts = {}
    for name, varlen in (("gqa16-d128", False), ("nsa-paper", True)):
        for problem in of(name, varlen):
            key = f"{problem.kernel}_d{problem.head_dim}" if "head_dim" in problem.as_dict() else problem.kernel
            configs = [space.default(problem, "sm_90"), *structures(problem)]
            if problem.as_dict().get("deterministic"):
                key, configs = f"{key}_deterministic", configs[:1] if name == "gqa16-d128" else []
            for one in configs:
                words = [str(value) for _, value in one.values if isinstance(value, str)]
                texts.setdefault("-".join([name, key, *words]) + ".py", render.render(problem, one).text)
    return texts


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: str(path.relative_to(paths.templates())))
def test_template_is_python(path):
    ast.parse(path.read_text(encoding="utf-8"))


def test_every_rendering_is_python_and_the_same_each_time():
    count = 0
    for problem in problems():
        for one in structures(problem):
            for debug in (False, True):
                source = render.render(problem, one, debug=debug)
                names = {node.name for node in ast.parse(source.text).body if isinstance(node, ast.FunctionDef)}
                assert problem.kernel in names, f"no host function {problem.kernel}"
                assert debug or source == render.render(problem, one)
                assert "{{" not in source.text and "#%" not in source.text
            count += 1
    assert count > 100


def test_no_block_pointers():
    for path in TEMPLATES:
        assert not re.search(r"make_block_ptr|tl\.advance", path.read_text(encoding="utf-8")), path


def test_header_says_what_it_is_and_nothing_of_where():
    problem = config.problem("sliding_attention_fwd", spec.load("gqa16-d128"))
    chosen = space.default(problem, "sm_90")
    head = render.render(problem, chosen).text.partition('"""\n')[0]
    assert problem.digest in head and chosen.digest in head and "sliding_attention_fwd.py.jinja" in head and "generate" in head
    assert str(paths.templates().parent) not in head and not re.search(r"\d{4}-\d\d-\d\d", head)


def test_standalone_differs_by_the_import_alone():
    problem = config.problem("combine_fwd", spec.load("tiny"))
    chosen = space.safe(problem)
    library, package = (render.render(problem, chosen, standalone=alone).text.splitlines() for alone in (False, True))
    assert [pair for pair in zip(library, package, strict=True) if pair[0] != pair[1]] == [
        ("from nsa_gen.launch import Launcher", "from ..launch import Launcher")
    ]


def test_broken_template_shows_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "templates", lambda: tmp_path)
    monkeypatch.setattr(render, "_environment", render.environment)
    problem = config.problem("combine_fwd", spec.load("tiny"))
    (tmp_path / "combine_fwd.py.jinja").write_text("x = 1\ny = {{ nowhere }}\n")
    with pytest.raises(RenderError, match=r"(?s)combine_fwd.py.jinja:2.*nowhere.*>    2 \| y"):
        render.render(problem, space.safe(problem))
    (tmp_path / "combine_fwd.py.jinja").write_text("x = 1\n#% if\n")
    with pytest.raises(RenderError, match=r"combine_fwd\.py\.jinja:2"):
        render.render(problem, space.safe(problem))


def test_goldens(update_goldens):
    wanted = goldens()
    if update_goldens:
        shutil.rmtree(GOLDENS, ignore_errors=True)
        GOLDENS.mkdir()
        for name, text in wanted.items():
            (GOLDENS / name).write_text(text, encoding="utf-8")
    assert {path.name for path in GOLDENS.glob("*.py")} == set(wanted), "run: make goldens"
    for name, text in wanted.items():
        assert (GOLDENS / name).read_text(encoding="utf-8") == text, f"{name} changed; if that is meant: make goldens"


def test_goldens_are_clean():
    """Unused names, unsorted imports, long lines: a rendered file is held to what a written one is."""
    ruff = [sys.executable, "-m", "ruff"]
    if subprocess.run([*ruff, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("needs ruff")
    config_file = Path(__file__).resolve().parent.parent / "pyproject.toml"
    done = subprocess.run([*ruff, "check", "--no-cache", "--config", config_file, GOLDENS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
