"""Sliding attention: the rendered kernel against the float64 reference, and compiled for every arch without a GPU."""

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
RAGGED = (0, 37, 1, 66, 0, 15)


def problem(dtype="float32", group=2, qk=16, v=16, window=20, varlen=True) -> Problem:
    key = {"dtype": dtype, "group": group, "head_dim_qk": qk, "head_dim_v": v, "window": window, "varlen": varlen}
    return Problem.of("sliding_attention_fwd", key)


def config(p: Problem, **changes) -> Config:
    chosen = space.safe(p).replace(**changes)
    space.check(p, chosen)
    return chosen


def held(p: Problem, c: Config, seqlens=RAGGED, kind="random", strided=False) -> inputs.Case:
    """Render and run one case; assert that the reference agrees."""
    case = inputs.case(p, seqlens=seqlens, heads_kv=2, device=DEVICE, kind=kind)
    if strided:
        for name in "qkv":
            x = case.tensors[name]
            wide = torch.full((x.shape[0], x.shape[1], 3 * x.shape[2]), torch.nan, dtype=x.dtype, device=DEVICE)
            wide[..., : x.shape[2]] = x
            case.tensors[name] = wide[..., : x.shape[2]]
    case.run(loader.load(render.render(p, c)))
    check = case.check()
    assert check.ok, check
    return case


@runs
@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 16])
def test_groups(group):
    p = problem(group=group)
    held(p, config(p))


@runs
@pytest.mark.parametrize(("qk", "v"), [(80, 48), (96, 16), (64, 112), (192, 128)])
def test_head_dims(qk, v):
    p = problem(qk=qk, v=v, group=3)
    held(p, config(p), seqlens=(33, 2))


@runs
@pytest.mark.parametrize("mask", ["edges", "all"])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 33, 64, 500])
def test_windows(window, mask):
    """Of one key, of whole tiles, of no whole number of tiles, longer than any sequence."""
    p = problem(window=window)
    held(p, config(p, mask=mask), seqlens=(83, 16))


@runs
@pytest.mark.parametrize(("rows", "keys"), [(64, 16), (64, 64), (128, 32)])
def test_tiles(rows, keys):
    """Config changes nothing: tiles of more tokens than keys and the reverse, several tiles a window."""
    p = problem(group=1, window=130)
    held(p, config(p, BLOCK_M=rows, BLOCK_N=keys), seqlens=(200, 7))


@runs
@pytest.mark.parametrize("mask", ["edges", "all"])
def test_descriptors(mask):
    p = problem(window=40, group=3, qk=32)
    held(p, config(p, loads="descriptor", mask=mask, num_stages=2), strided=True)


@runs
@pytest.mark.parametrize("seqlens", [(0,), (1,), (32, 32, 32)])
def test_batched(seqlens):
    p = problem(varlen=False, group=3)
    held(p, config(p), seqlens=seqlens)


@runs
@pytest.mark.parametrize("kind", ["huge", "peaky", "equal"])
def test_logits(kind):
    p = problem(group=4, qk=32)
    held(p, config(p), kind=kind)


@runs
def test_half_and_strides():
    p = problem(dtype="float16", group=3, qk=48, v=32)
    held(p, config(p), strided=True)


@runs
def test_window_of_one_is_v():
    """A query that sees only itself returns its value, and its logit as LSE."""
    p = problem(window=1, group=2)
    case = held(p, config(p), seqlens=(20,))
    torch.testing.assert_close(case.outputs["o"], case.tensors["v"].repeat_interleave(2, 1))


@runs
def test_other_sequences_are_not_read():
    """NaN in a neighbouring sequence does not reach this one, masked tiles included."""
    p = problem(group=2)
    case = inputs.case(p, seqlens=(13, 40, 9), heads_kv=1, device=DEVICE)
    module = loader.load(render.render(p, config(p)))
    case.run(module)
    clean = case.outputs["o"][13:53].clone()
    for name in "qkv":
        case.tensors[name][:13] = torch.nan
        case.tensors[name][53:] = torch.nan
    case.poison()
    case.run(module)
    assert torch.equal(case.outputs["o"][13:53], clean)


def test_space():
    p = problem(dtype="bfloat16", group=16, qk=128, v=128, window=512)
    configs = list(space.candidates(p))
    assert len(set(configs)) == len(configs) > 50
    assert space.default(p, "sm_90") in configs and space.safe(p) in configs
    for changes in ({"BLOCK_M": 64, "num_warps": 8}, {"BLOCK_M": 256}, {"BLOCK_M": 128, "maxnreg": 128}, {"BLOCK_N": 24}):
        with pytest.raises(ConfigError):
            config(p, **changes)


def test_default_is_legal_everywhere():
    for dtype in ("float16", "bfloat16", "float32"):
        for qk, v in ((16, 16), (80, 80), (128, 128), (192, 128), (256, 256)):
            for window in (1, 16, 100, 512):
                p = problem(dtype=dtype, qk=qk, v=v, window=window, group=7)
                assert space.default(p, "sm_80") and space.safe(p)


@pytest.mark.parametrize("mask", ["edges", "all"])
def test_rendered_is_python(mask):
    ast.parse((paths.templates() / "sliding_attention_fwd.py.jinja").read_text())
    for dims in ({}, {"qk": 80, "v": 192}):
        for debug in (False, True):
            p = problem(**dims)
            ast.parse(render.render(p, config(p, mask=mask), debug=debug).text)


SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
COMPILE = """
import json
from triton.backends.compiler import GPUTarget

from nsa_gen import inputs, launch, loader, render, space
from nsa_gen.config import Problem

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}

key = {"dtype": "bfloat16", "group": 16, "head_dim_qk": 128, "head_dim_v": 128, "window": 512, "varlen": True}
p = Problem.of("sliding_attention_fwd", key)
case = inputs.case(p, seqlens=(1000, 24), heads_kv=4, device="meta")
found = {}
for arch, target in TARGETS.items():
    module = loader.load(render.render(p, space.default(p, arch)))
    (resources,) = loader.compile_all(lambda: case.run(module), target)
    found[arch] = [resources.shared, resources.spills]
with launch.recording() as jobs:
    case.run(loader.load(render.render(p, space.default(p, "sm_90"))))
found["ptx"] = launch.compile_job(jobs[0], TARGETS["sm_90"]).asm["ptx"].count("wgmma.mma_async")
print(json.dumps(found))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """The default config fits every arch without spilling registers, and uses the warpgroup tensor cores where there are some."""
    found = json.loads(compiled_python(COMPILE))
    assert found.pop("ptx") > 0
    for arch, (shared, spills) in found.items():
        assert shared <= SHARED[arch], arch
        assert not spills, arch
