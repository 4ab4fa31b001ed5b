"""Selected attention: both loop orders against the float64 reference, and compiled for every arch without a GPU."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

from nsa_gen import inputs, loader, reference, render, space
from nsa_gen.config import Config, Problem
from nsa_gen.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
RAGGED = (0, 85, 1, 15)


def problem(dtype="float32", group=2, qk=16, v=16, block=16, count=4, initial=1, local=2, varlen=True) -> Problem:
    key = {"dtype": dtype, "group": group, "head_dim_qk": qk, "head_dim_v": v, "selection_block": block, "count": count}
    return Problem.of("selected_attention_fwd", key | {"initial": initial, "local": local, "varlen": varlen})


def kv_outer(p: Problem, **changes) -> Config:
    """The default with merge tiles that keep the interpreter's program count low."""
    chosen = space.default(p, "").replace(**({"MERGE_M": 16} | changes))
    space.check(p, chosen)
    return chosen


def query_outer(operands: str) -> Config:
    return Config.of("selected_attention_fwd", {"loop": "query_outer", "operands": operands, "num_warps": 1, "num_stages": 2})


def loops(p: Problem) -> dict[str, Config]:
    return {"kv_outer": kv_outer(p), "rows": query_outer("rows"), "keys": query_outer("keys")}


def held(p: Problem, c: Config, seqlens=RAGGED, heads=1, **how) -> inputs.Case:
    """Render and run one case; assert that the reference agrees."""
    case = inputs.case(p, seqlens=seqlens, heads_kv=heads, device=DEVICE, **how)
    case.run(loader.load(render.render(p, c)))
    check = case.check()
    assert check.ok, check
    return case


@runs
@pytest.mark.parametrize("loop", ["kv_outer", "rows", "keys"])
@pytest.mark.parametrize("group", [1, 16])
def test_groups(group, loop):
    p = problem(group=group)
    held(p, loops(p)[loop], seqlens=(0, 70, 1))


@runs
@pytest.mark.parametrize("group", [3, 5, 6])
def test_ragged_groups(group):
    p = problem(group=group)
    held(p, kv_outer(p))


@runs
@pytest.mark.parametrize("loop", ["kv_outer", "rows", "keys"])
@pytest.mark.parametrize(("qk", "v"), [(48, 80), (96, 16)])
def test_head_dims(qk, v, loop):
    p = problem(qk=qk, v=v)
    held(p, loops(p)[loop], seqlens=(66, 2))


@runs
@pytest.mark.parametrize("loop", ["kv_outer", "rows", "keys"])
def test_half_precision(loop):
    p = problem(dtype="float16", block=32)
    held(p, loops(p)[loop], seqlens=(130,))


@runs
@pytest.mark.parametrize("kind", ["ties", "equal", "huge", "peaky"])
@pytest.mark.parametrize("loop", ["kv_outer", "rows"])
def test_kinds(kind, loop):
    p = problem()
    held(p, loops(p)[loop], seqlens=(100,), kind=kind)


@runs
@pytest.mark.parametrize(("count", "initial", "local"), [(3, 0, 0), (4, 2, 1), (3, 1, 2), (1, 0, 1), (2, 2, 0)])
def test_forced_blocks(count, initial, local):
    p = problem(count=count, initial=initial, local=local)
    held(p, kv_outer(p), seqlens=(100,))


@runs
def test_batched_is_varlen_of_equal_lengths():
    p = problem(varlen=False)
    held(p, kv_outer(p), seqlens=(70, 70))
    held(p, query_outer("rows"), seqlens=(40, 40))


@runs
@pytest.mark.parametrize("changes", [{"ENTRIES": 32, "MERGE_M": 8}, {"DENSE_M": 128, "GATHER_M": 128}])
def test_tiles_do_not_change_the_result(changes):
    p = problem()
    whole, other = held(p, kv_outer(p)), held(p, kv_outer(p, **changes))
    torch.testing.assert_close(whole.outputs["o"], other.outputs["o"], rtol=1e-6, atol=1e-6)


@runs
def test_a_small_workspace_gives_the_same_bits():
    p = problem()
    whole, chunked = held(p, kv_outer(p)), held(p, kv_outer(p), workspace_bytes=1)
    assert torch.equal(whole.outputs["o"], chunked.outputs["o"])
    assert torch.equal(whole.outputs["lse"], chunked.outputs["lse"])


@runs
@pytest.mark.parametrize("seqlens", [(), (0, 0)])
def test_no_tokens(seqlens):
    p = problem()
    case = inputs.case(p, seqlens=seqlens or (0,), heads_kv=1, device=DEVICE)
    case.run(loader.load(render.render(p, kv_outer(p))))
    assert case.outputs["o"].shape[0] == 0


@runs
@pytest.mark.parametrize("loop", ["kv_outer", "rows", "keys"])
def test_any_set_of_blocks_is_attended_as_given(loop):
    """Indices from elsewhere need not hold the forced blocks: dense blocks count where they are listed; no block gives 0 and -inf."""
    p = problem()
    case = inputs.case(p, seqlens=(70,), heads_kv=2, device=DEVICE)
    chosen = case.tensors["block_indices"]
    generator = torch.Generator().manual_seed(5)
    for t in range(70):
        for h in range(2):
            some = [i for i in range(t // 16 + 1) if torch.rand((), generator=generator) < 0.4][: p.count]
            chosen[t, h] = torch.tensor(some + [-1] * (p.count - len(some)), dtype=torch.int32)
    assert bool((chosen == -1).all(-1).any()), "no query without a block"
    case.run(loader.load(render.render(p, loops(p)[loop])))
    check = case.check()
    assert check.ok, check
    none = (chosen == -1).all(-1).repeat_interleave(p.group, 1)
    assert bool((case.outputs["o"][none] == 0).all()) and bool((case.outputs["lse"][none] == -torch.inf).all())


@runs
@pytest.mark.parametrize("gate_dtype", ["float32", "float16"])
@pytest.mark.parametrize("loop", ["rows", "keys"])
def test_gated_sum_of_the_branches(loop, gate_dtype):
    """What query-outer makes of the rest of the forward."""
    p = problem(dtype="float16", v=48, group=3)
    config, seqlens = loops(p)[loop], (40, 3)
    module = loader.load(render.render(p, config))
    alone = inputs.case(p, seqlens=seqlens, heads_kv=2, device=DEVICE)
    alone.run(module)
    o = alone.outputs["o"]
    generator = torch.Generator().manual_seed(3)
    o_cmp, o_swa = (torch.randn(o.shape, generator=generator).to(o) for _ in range(2))
    gates = [torch.rand(o.shape[1], o.shape[0], generator=generator).to(DEVICE, getattr(torch, gate_dtype)).T for _ in range(3)]
    gates[1][0, 0] = torch.nan
    both = inputs.case(p, seqlens=seqlens, heads_kv=2, device=DEVICE)
    rest = SimpleNamespace(branches=lambda: (o_cmp, o_swa, *gates))
    both.run(SimpleNamespace(selected_attention_fwd=lambda *given: module.selected_attention_fwd(*given, rest)))
    g_cmp, g_slc, g_swa = (gate.float()[..., None] for gate in gates)
    expected = g_cmp * o_cmp.float() + g_slc * o.float() + g_swa * o_swa.float()
    torch.testing.assert_close(both.outputs["o"].float(), expected, rtol=2e-3, atol=2e-3, equal_nan=True)
    assert bool(both.outputs["o"][0, 0].isnan().all())
    assert torch.equal(both.outputs["lse"], alone.outputs["lse"])


@runs
@pytest.mark.parametrize(("count", "initial", "local"), [(5, 1, 2), (4, 0, 1), (3, 1, 2)])
def test_partial_results_for_the_rest(count, initial, local):
    """What KV-outer hands to the rest of the forward, in chunks: each query's attention over each block that is not forced."""
    p = problem(group=3, v=48, count=count, initial=initial, local=local)
    case = inputs.case(p, seqlens=RAGGED, heads_kv=2, device=DEVICE, workspace_bytes=1)
    module, t, filled = loader.load(render.render(p, kv_outer(p))), case.tensors, []

    def merge(begin, end, part, part_lse):
        assert part.shape == (2, count - initial - local, part.shape[2], 3, 48) and part.shape[:4] == part_lse.shape
        for slot in range(count - initial - local):
            chosen = t["block_indices"][..., initial + slot : initial + slot + 1]
            blocks = (inputs.positions(case.seqlens, DEVICE) // p.selection_block + 1).clamp(max=count)
            queries = torch.arange(begin, end, device=DEVICE)
            queries = queries[blocks[begin:end] - local > initial + slot]
            o, lse = reference.selected_attention(
                *(t[name].double() for name in "qkv"), chosen, p.selection_block, t["scale"], case.cu_seqlens, queries
            )
            got = part[:, slot, queries - begin].permute(1, 0, 2, 3).flatten(1, 2), part_lse[:, slot, queries - begin].permute(1, 0, 2)
            torch.testing.assert_close(got[0].double(), o, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got[1].flatten(1).double() * math.log(2), lse, rtol=1e-5, atol=1e-5)
            filled.append(len(queries))
        chunks.append((begin, end))

    chunks: list[tuple[int, int]] = []
    rest = SimpleNamespace(merge=merge)
    case.run(SimpleNamespace(selected_attention_fwd=lambda *given: module.selected_attention_fwd(*given, rest)))
    assert chunks == [(0, 64), (64, 101)]
    assert (sum(filled) > 0) == (count > initial + local)
    assert bool(case.outputs["o"].isnan().all())  # left to the rest


def test_the_space_refuses_what_miscompiles_or_cannot_fit():
    p = problem(block=64)
    with pytest.raises(ConfigError, match="illegally"):
        space.check(p, query_outer("keys").replace(num_stages=1))
    with pytest.raises(ConfigError, match="warps"):
        space.check(problem(block=16), query_outer("keys").replace(num_warps=2))
    assert space.safe(p).loop == "query_outer"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_compiles(arch, compiled_python):
    code = f"""
import json
from nsa_gen import device, inputs, loader, render, space
from nsa_gen.config import problem
from nsa_gen.spec import load
p, there = problem("selected_attention_fwd", load("gqa16-d128")), device.from_name({arch!r})
found = []
for config in (space.default(p, {arch!r}), space.safe(p)):
    case, module = inputs.case(p, seqlens=(4096,), heads_kv=4, device="meta"), loader.load(render.render(p, config))
    found += [[r.name, r.shared, r.spills] for r in loader.compile_all(lambda: case.run(module), there.triton_target())]
print(json.dumps([there.shared_bytes, found]))
"""
    limit, found = json.loads(compiled_python(code).splitlines()[-1])
    assert {name for name, _, _ in found} >= {"gather_kernel", "dense_kernel", "merge_kernel", "selected_attention_fwd_kernel"}
    assert all(shared <= limit for _, shared, _ in found), found
