"""Compression: every pooling against the float64 reference, and compiled for every arch without a GPU."""

from __future__ import annotations

import ast
import json
import os

import pytest
import torch

from nsa_gen import inputs, loader, paths, render, space
from nsa_gen.config import Config, Problem
from nsa_gen.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
POOLINGS = ("mean", "weighted", "linear", "mlp")
RAGGED = (0, 5, 37, 1, 0, 16, 66, 15, 33, 0)


def problem(pooling="mean", dtype="float32", dim=16, block=16, stride=8, hidden=None, varlen=True) -> Problem:
    key = {"dtype": dtype, "head_dim": dim, "block": block, "stride": stride, "pooling": pooling, "varlen": varlen}
    return Problem.of("compress_fwd", key | {"hidden": (hidden or dim) if pooling == "mlp" else 0})


def config(p: Problem, **changes) -> Config:
    chosen = space.safe(p).replace(**changes)
    space.check(p, chosen)
    return chosen


def held(p: Problem, c: Config, seqlens=RAGGED, heads=2) -> inputs.Case:
    case = inputs.case(p, seqlens=seqlens, heads_kv=heads, device=DEVICE)
    case.run(loader.load(render.render(p, c)))
    check = case.check()
    assert check.ok, check
    return case


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("block", "stride"), [(16, 16), (32, 8), (16, 8)])
def test_blocks(pooling, block, stride):
    """Blocks that touch, overlap twice and overlap four times; sequences shorter than a block and of no token between them."""
    p = problem(pooling, block=block, stride=stride)
    held(p, config(p))


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dim", [64, 80, 96])
def test_head_dims(pooling, dim):
    p = problem(pooling, dim=dim, block=8, stride=4)
    held(p, config(p), seqlens=(21, 9))


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("seqlens", [(0,), (3,), (45,), (21, 21, 21)])
def test_batched(pooling, seqlens):
    """Equal lengths without cu_seqlens: none, shorter than the stride, no multiple of it (so rows have gaps)."""
    p = problem(pooling, varlen=False)
    held(p, config(p), seqlens=seqlens)


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
def test_half_and_strides(pooling):
    p = problem(pooling, dtype="float16", dim=32)
    case = inputs.case(p, seqlens=RAGGED, heads_kv=3, device=DEVICE)
    x = case.tensors["x"]
    wide = torch.full((x.shape[0], 4, 80), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, :3, :32] = x
    case.tensors["x"] = wide[:, :3, :32]
    case.run(loader.load(render.render(p, config(p))))
    assert case.check().ok, case.check()


@runs
@pytest.mark.parametrize("hidden", [16, 40, 80])
def test_hidden(hidden):
    """Fewer hidden units than a tile, several tiles, a last tile that is not full."""
    p = problem("mlp", hidden=hidden)
    held(p, config(p), seqlens=(50,))


@runs
def test_tiles():
    """Config changes nothing: K steps inside a token, row tiles across sequences."""
    p = problem("mlp", dim=64, hidden=64, block=8, stride=4)
    for changes in ({"BLOCK_K": 64, "BLOCK_N": 64}, {"BLOCK_J": 64, "BLOCK_K": 32}):
        held(p, config(p, **changes), seqlens=(30, 7, 41))
    p = problem("weighted")
    for rows in (4, 64):
        held(p, config(p, BLOCK_J=rows))


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gap_rows_are_zero(pooling):
    """Every row is written once: rows of no compressed token are zeros, also where a bias would show."""
    p = problem(pooling)
    case = held(p, config(p), seqlens=(25, 3, 9, 40))
    rows = case.outputs["out"].abs().amax((1, 2)) > 0
    starts, counts = (0, 25 // 8, 28 // 8, 37 // 8), (2, 0, 0, 4)
    expected = torch.zeros(77 // 8, dtype=torch.bool, device=DEVICE)
    for start, count in zip(starts, counts, strict=True):
        expected[start : start + count] = True
    assert torch.equal(rows, expected)


def test_space():
    for pooling in POOLINGS:
        p = problem(pooling, dtype="bfloat16", dim=128, block=32, stride=16)
        configs = list(space.candidates(p))
        assert len(set(configs)) == len(configs)
        assert space.default(p, "sm_90") in configs and space.safe(p) in configs
        assert {c.body for c in configs} == {"stream" if pooling in ("mean", "weighted") else "gemm"}
        for dim in (16, 48, 80, 192, 256):
            for dtype in ("bfloat16", "float32"):
                small = problem(pooling, dtype=dtype, dim=dim)
                assert space.default(small, "sm_90") and space.safe(small)
    p = problem("mlp", dim=80)
    for changes in ({"BLOCK_K": 32}, {"BLOCK_J": 8}, {"body": "stream"}, {"BLOCK_J": 128, "BLOCK_N": 128, "num_warps": 2}):
        with pytest.raises(ConfigError):
            config(p, **changes)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_rendered_is_python(pooling):
    ast.parse((paths.templates() / "compress_fwd.py.jinja").read_text())
    for varlen in (False, True):
        p = problem(pooling, varlen=varlen)
        ast.parse(render.render(p, config(p)).text)


COMPILE = """
import json
from triton.backends.compiler import GPUTarget

from nsa_gen import inputs, loader, render, space
from nsa_gen.config import Problem

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}

found = {}
for pooling in ("mean", "weighted", "linear", "mlp"):
    hidden = 128 if pooling == "mlp" else 0
    key = {"dtype": "bfloat16", "head_dim": 128, "block": 32, "stride": 16, "pooling": pooling, "hidden": hidden, "varlen": True}
    p = Problem.of("compress_fwd", key)
    case = inputs.case(p, seqlens=(1000, 24), heads_kv=4, device="meta")
    for arch, target in TARGETS.items():
        module = loader.load(render.render(p, space.default(p, arch)))
        (resources,) = loader.compile_all(lambda: case.run(module), target)
        found[f"{pooling} {arch}"] = [resources.shared, resources.spills]
print(json.dumps(found))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """The default config of every pooling fits every arch without spilling registers."""
    found = json.loads(compiled_python(COMPILE))
    assert len(found) == 20
    for name, (shared, spills) in found.items():
        assert shared <= (65536 if "gfx" in name else 101376), name
        assert not spills, name
