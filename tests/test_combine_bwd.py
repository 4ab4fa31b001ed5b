"""The gated sum's backward: what attention's backward needs of each branch, and what the operator gives."""

from __future__ import annotations

import ast
import itertools
import json
import math

import pytest
import torch
from gradient_cases import DEVICE, config, held, module, runs

from nsa_gen import inputs, render, space
from nsa_gen.acceptance import FLOOR
from nsa_gen.config import Problem

BRANCHES = ("cmp", "slc", "swa")


def problem(dtype="float32", dim=16) -> Problem:
    return Problem.of("combine_bwd", {"dtype": dtype, "head_dim_v": dim})


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@runs
@pytest.mark.parametrize("dim", [16, 48, 80, 128, 192, 256])
def test_head_dims(dim):
    p = problem(dim=dim)
    held(p, config(p), (37,), heads_query=3)


@runs
@pytest.mark.parametrize("heads", [1, 2, 6, 7, 48])
def test_heads(heads):
    """Programs that hold parts of tokens, and several."""
    p = problem()
    held(p, config(p, BLOCK_ROWS=32), (5, 0, 9), heads_query=heads)


@runs
@pytest.mark.parametrize(("rows", "warps"), [(4, 1), (16, 1), (128, 4)])
def test_configs_do_not_change_results(rows, warps):
    p = problem(dim=32)
    held(p, config(p, BLOCK_ROWS=rows, num_warps=warps), (45,), heads_query=4)


@runs
@pytest.mark.parametrize("seqlens", [(0,), (1,), (0, 0)])
def test_few_tokens(seqlens):
    p = problem()
    held(p, config(p), seqlens, heads_query=2)


@runs
def test_half_and_strides():
    """do by stride; gates of any strides, as one projection gives them."""

    def alter(case):
        do = case.tensors["do"]
        wide = empty(do.shape[0], do.shape[1] + 2, do.shape[2] + 8, dtype=do.dtype)
        wide[:, 1:-1, 8:] = do
        case.tensors["do"] = wide[:, 1:-1, 8:]
        for i, branch in enumerate(BRANCHES):
            gates = empty(*do.shape[:2], 3, dtype=do.dtype)
            gates[..., i] = case.tensors[f"g_{branch}"]
            case.tensors[f"g_{branch}"] = gates[..., i]

    p = problem("float16", 48)
    held(p, config(p), (33,), heads_query=5, alter=alter)


@runs
@pytest.mark.parametrize("wide", list(itertools.product((False, True), repeat=3)))
def test_gates_in_float32(wide):
    """Each by itself: it is read and its gradient written as it is, in calls of one module."""

    def alter(case):
        for branch, fp32 in zip(BRANCHES, wide, strict=True):
            if fp32:
                case.tensors[f"g_{branch}"] = case.tensors[f"g_{branch}"].float() * 1.0001  # no float16
                case.outputs[f"dg_{branch}"] = case.outputs[f"dg_{branch}"].float()

    p = problem("float16", 32)
    case = held(p, config(p), (20,), heads_query=4, alter=alter)
    for branch in BRANCHES:
        delta, dg = case.outputs[f"delta_{branch}"], case.outputs[f"dg_{branch}"]
        assert torch.equal(dg, delta.to(dg.dtype))
        assert torch.equal(case.outputs[f"gate_{branch}"], case.tensors[f"g_{branch}"].float())


@runs
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_of_the_branches(dtype):
    """gate * do, of those branches that it is asked of; dgates where they are; then again as before."""
    p = problem(dtype, 48)
    case = inputs.case(p, seqlens=(25,), heads_kv=1, heads_query=3, device=DEVICE)
    t, shape = case.tensors, (25, 3)
    do, gates, outputs = t["do"], [t[f"g_{branch}"] for branch in BRANCHES], [t[f"o_{branch}"] for branch in BRANCHES]
    exact = [(do.double() * o.double()).sum(-1) for o in outputs]
    for wanted in ((True, True, True), (False, True, False), (False, False, False), (True, True, True)):
        deltas, fp32 = ([empty(*shape, dtype=torch.float32) for _ in range(3)] for _ in range(2))
        dgates = [empty(*shape, dtype=case.dtype) if some else None for some in wanted]
        dos = [empty(*shape, 48, dtype=case.dtype) if some else None for some in wanted]
        module(p, config(p)).combine_bwd(do, *outputs, *gates, deltas, fp32, dgates, dos)
        for i in range(3):
            torch.testing.assert_close(deltas[i].double(), exact[i], rtol=1e-5, atol=1e-5)
            assert torch.equal(fp32[i], gates[i].float())
            if wanted[i]:
                assert torch.equal(dgates[i], deltas[i].to(case.dtype))
                want = gates[i].double()[..., None] * do.double()
                torch.testing.assert_close(dos[i].double(), want, rtol=FLOOR[case.dtype], atol=1e-5)


@runs
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_branches(count):
    """A branch by itself: its delta, with a gate of 1 that is one element seen everywhere."""
    p = problem(dim=32)
    case = inputs.case(p, seqlens=(25,), heads_kv=1, heads_query=3, device=DEVICE)
    t, missing = case.tensors, (None,) * (3 - count)
    one = torch.ones(1, device=DEVICE).expand(25, 3)
    outputs = [t[f"o_{branch}"] for branch in BRANCHES][:count]
    deltas, fp32 = ([empty(25, 3, dtype=torch.float32) for _ in range(count)] for _ in range(2))
    none = (None,) * 3
    module(p, config(p)).combine_bwd(t["do"], *outputs, *missing, one, one, one, (*deltas, *missing), (*fp32, *missing), none, none)
    for o, delta, gate in zip(outputs, deltas, fp32, strict=True):
        torch.testing.assert_close(delta.double(), (t["do"].double() * o.double()).sum(-1), rtol=1e-5, atol=1e-5)
        assert bool((gate == 1).all())


@runs
def test_nan_stays_where_it_is():
    p = problem()
    case = inputs.case(p, seqlens=(20,), heads_kv=1, heads_query=4, device=DEVICE)
    case.tensors["g_slc"][7, 2] = math.nan
    case.tensors["o_swa"][3, 1, 5] = math.nan
    case.run(module(p, config(p)))
    for name, out in case.outputs.items():
        at = {"gate_slc": (7, 2), "delta_swa": (3, 1), "dg_swa": (3, 1)}.get(name)
        assert out.isnan().nonzero().tolist() == ([list(at)] if at else []), name


@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_defaults_are_legal(dim):
    for dtype in ("float16", "bfloat16", "float32"):
        p = problem(dtype, dim)
        assert space.safe(p) and len(set(space.candidates(p))) > 5
        for arch in ("sm_80", "sm_90", "gfx942"):
            assert space.default(p, arch) in set(space.candidates(p))


def test_rendered_is_python():
    for dim, debug in itertools.product((16, 80), (False, True)):
        ast.parse(render.render(problem(dim=dim), config(problem(dim=dim)), debug=debug).text)


COMPILE = """
import json
import torch
from triton.backends.compiler import GPUTarget
from gradient_cases import bound, module
from test_combine_bwd import BRANCHES, problem

from nsa_gen import inputs, loader, space

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
p = problem("bfloat16", 128)
case = inputs.case(p, seqlens=(1000,), heads_kv=4, heads_query=64, device="meta")
found = {}
for arch, target in TARGETS.items():
    (one,) = loader.compile_all(lambda: case.run(module(p, space.default(p, arch))), target)
    found[arch] = one.spills

def calls():
    o, g = case.tensors["do"], case.tensors["g_cmp"]
    fp32, half = g.float(), g
    run = module(p, space.default(p, "sm_90")).combine_bwd
    for gate in (half, fp32):
        for dg in (half, fp32, None):
            for do in (o, None):
                run(o, o, o, o, gate, half, half, (fp32,) * 3, (fp32,) * 3, (dg,) * 3, (do,) * 3)
                run(o, o, None, None, gate, gate, gate, (fp32, None, None), (fp32, None, None), (dg, None, None), (do, None, None))

assert bound(calls) == 24
print(json.dumps(found))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """Next to no spills; what is asked for, of which branches and in what dtypes, are binaries apart."""
    found = json.loads(compiled_python(COMPILE))
    assert len(found) == 4 and max(found.values()) <= 16, found
