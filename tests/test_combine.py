"""Combine: the rendered kernel against the float64 reference, and compiled for every arch without a GPU."""

from __future__ import annotations

import ast
import json
import os
import re

import pytest
import torch

from nsa_gen import inputs, loader, paths, render, space
from nsa_gen.config import Problem
from nsa_gen.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")


def problem(dtype="float32", v=16) -> Problem:
    return Problem.of("combine_fwd", {"dtype": dtype, "head_dim_v": v})


def make(p: Problem, tokens=37, heads=6, device=DEVICE) -> inputs.Case:
    return inputs.case(p, seqlens=(tokens,), heads_kv=1, heads_query=heads, device=device)


def module_of(p: Problem, **changes):
    chosen = space.safe(p).replace(**changes)
    space.check(p, chosen)
    return loader.load(render.render(p, chosen))


@runs
@pytest.mark.parametrize("v", [16, 64, 80, 96, 112, 128, 192])
def test_head_dims(v):
    p = problem(v=v)
    case = make(p)
    case.run(module_of(p))
    assert case.check().ok, case.check()


@runs
@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (1, 1), (3, 64), (50, 5)])
def test_sizes(tokens, heads):
    """No token, fewer rows than a tile, rows that are no whole number of tiles."""
    p = problem(dtype="float16")
    case = make(p, tokens, heads)
    case.run(module_of(p, BLOCK_ROWS=32))
    assert case.check().ok, case.check()


@runs
def test_strides_and_gate_dtypes():
    """Outputs with gaps between tokens and heads, gates transposed or fp32: each combination of gate dtypes on one module."""
    p = problem(dtype="float16", v=32)
    module = module_of(p)
    for gates in ("g_cmp",), ("g_slc", "g_swa"), ():
        case = make(p)
        t = case.tensors
        for name in ("o_cmp", "o_slc"):
            wide = torch.full((37, 7, 48), torch.nan, dtype=torch.float16, device=DEVICE)
            wide[:, :6, :32] = t[name]
            t[name] = wide[:, :6, :32]
        t["g_slc"] = t["g_slc"].T.contiguous().T
        t["g_cmp"] = t["g_cmp"].repeat_interleave(3, 1)[:, ::3]
        for name in gates:
            t[name] = t[name].float()
        case.run(module)
        assert case.check().ok, case.check()


@runs
def test_nan_gates_pass_through():
    p = problem()
    case = make(p)
    case.tensors["g_slc"][5, 2] = torch.nan
    case.run(module_of(p))
    lost = case.outputs["o"].isnan()
    assert lost[5, 2].all() and lost.sum() == 16


@runs
def test_accumulates_in_fp32():
    """Terms that cancel: rounding each product to fp16 would leave an error of the size of the product's rounding."""
    p = problem(dtype="float16")
    case = make(p, 8, 2)
    t = case.tensors
    t["o_slc"].copy_(-t["o_cmp"])
    t["g_slc"].copy_(t["g_cmp"])
    t["o_swa"].mul_(1e-3)
    case.run(module_of(p))
    torch.testing.assert_close(case.outputs["o"], (t["o_swa"].double() * t["g_swa"].double()[..., None]).half(), rtol=2e-3, atol=1e-7)


def test_space():
    p = problem(dtype="bfloat16", v=128)
    configs = list(space.candidates(p))
    assert space.default(p, "sm_90") in configs and space.safe(p) in configs
    for changes in ({"BLOCK_ROWS": 128, "num_warps": 1}, {"BLOCK_ROWS": 24}):
        with pytest.raises(ConfigError):
            space.check(p, space.safe(p).replace(**changes))
    for v in range(16, 257, 16):
        assert space.default(problem(v=v), "gfx942") and space.safe(problem(v=v))


def test_rendered_is_python():
    ast.parse((paths.templates() / "combine_fwd.py.jinja").read_text())
    for v in (64, 80):
        ast.parse(render.render(problem(v=v), space.safe(problem(v=v))).text)


COMPILE = """
import json
from triton.backends.compiler import GPUTarget

from nsa_gen import inputs, launch, loader, render, space
from nsa_gen.config import Problem

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}

p = Problem.of("combine_fwd", {"dtype": "bfloat16", "head_dim_v": 128})
case = inputs.case(p, seqlens=(1000,), heads_kv=1, heads_query=64, device="meta")
found = {}
for arch, target in TARGETS.items():
    module = loader.load(render.render(p, space.default(p, arch)))
    (resources,) = loader.compile_all(lambda: case.run(module), target)
    found[arch] = [resources.registers, resources.spills]
module = loader.load(render.render(p, space.default(p, "sm_90")))
with launch.recording() as jobs:
    case.run(module)
    case.tensors["g_slc"] = case.tensors["g_slc"].float()
    case.run(module)
ptx = launch.compile_job(jobs[0], TARGETS["sm_90"]).asm["ptx"]
gates = [job.signature["g_slc_ptr"] for job in jobs]
print(json.dumps([found, ptx, gates, jobs[0].constants != jobs[1].constants]))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """No spills on any arch; 16-byte accesses at any stride; bf16 and fp32 gates do not share a binary."""
    found, ptx, gates, apart = json.loads(compiled_python(COMPILE))
    for arch, (registers, spills) in found.items():
        assert not spills, arch
        assert registers is None or registers <= 128, arch
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and all(store.endswith(".v4.b32") for store in stores)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 3 * len(stores)
    assert gates == ["*bf16", "*fp32"] and apart
