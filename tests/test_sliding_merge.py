"""The fused end of the forward: sliding attention, the merge of selected attention and the gated sum, against the float64 reference."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from nsa_gen import inputs, loader, reference, render, space
from nsa_gen.config import Config, Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
RAGGED = (0, 37, 1, 150, 0, 16)


def problem(
    dtype="float32", group=2, qk=16, v=16, window=20, varlen=True, block=16, count=5, initial=1, local=2, parts=None
) -> Problem:  # fmt: skip
    """``parts``: partial results of a query, by default one for each block that is neither initial nor local."""
    parts = count - initial - local if parts is None else parts
    key = {"dtype": dtype, "group": group, "head_dim_qk": qk, "head_dim_v": v, "selection_block": block, "count": count}
    return Problem.of("sliding_merge_fwd", key | {"initial": initial, "local": local, "parts": parts, "window": window, "varlen": varlen})


def config(p: Problem, **changes) -> Config:
    chosen = space.safe(p).replace(**changes)
    space.check(p, chosen)
    return chosen


def held(p: Problem, c: Config, seqlens=RAGGED, kind="random", heads=2) -> inputs.Case:
    """Render and run one case; assert that the reference agrees."""
    case = inputs.case(p, seqlens=seqlens, heads_kv=heads, device=DEVICE, kind=kind)
    case.run(loader.load(render.render(p, c)))
    check = case.check()
    assert check.ok, check
    return case


@runs
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 16])
def test_groups(group, parts):
    p = problem(group=group, parts=parts)
    held(p, config(p), **({"seqlens": (50, 0, 1)} if group > 5 else {}))


@runs
@pytest.mark.parametrize(("qk", "v", "parts"), [(80, 48, 2), (48, 16, 2), (16, 112, 2), (16, 112, 1)])
def test_head_dims(qk, v, parts):
    p = problem(qk=qk, v=v, group=3, parts=parts)
    held(p, config(p), seqlens=(97, 2), heads=1)


@runs
@pytest.mark.parametrize("merge", ["unrolled", "pipelined"])
@pytest.mark.parametrize(
    ("count", "initial", "local", "parts"),
    [(3, 1, 2, 0), (4, 0, 2, 2), (4, 0, 2, 1), (4, 2, 0, 2), (4, 2, 0, 1), (4, 0, 0, 4), (4, 0, 0, 1), (6, 3, 2, 1), (1, 0, 1, 0)],
)
def test_forced_blocks(count, initial, local, parts, merge):
    """Nothing but forced blocks (no partial results), none of one kind, none at all, several initial ones."""
    p = problem(count=count, initial=initial, local=local, parts=parts)
    held(p, config(p, merge=merge), heads=1)


@runs
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("keys", [16, 64])
def test_blocks_and_tiles(block, keys):
    """Tiles of more and of fewer keys than a block; a sequence that ends inside its first block."""
    p = problem(block=block, group=4)
    held(p, config(p, BLOCK_M=64, BLOCK_N=keys), seqlens=(3 * block + 5, block - 1), heads=1)


@runs
@pytest.mark.parametrize("mask", ["edges", "all"])
@pytest.mark.parametrize("window", [1, 33, 64, 500])
def test_windows(window, mask):
    p = problem(window=window)
    held(p, config(p, mask=mask), seqlens=(83, 16))


@runs
@pytest.mark.parametrize("merge", ["unrolled", "pipelined"])
@pytest.mark.parametrize("mask", ["edges", "all"])
def test_descriptors(mask, merge):
    """Tiles that begin before their sequence are loaded another way; blocks smaller and larger than a tile."""
    for block in (16, 64):
        p = problem(window=40, group=3, qk=32, block=block)
        changes = {"loads": "descriptor", "mask": mask, "merge": merge, "num_stages": 2, "dense_stages": 2, "BLOCK_N": 32}
        held(p, config(p, **changes), seqlens=(37, 3, 200), heads=1)


@runs
@pytest.mark.parametrize("kind", ["huge", "peaky", "equal"])
def test_logits(kind):
    p = problem(group=4, qk=32)
    held(p, config(p), kind=kind)


@runs
@pytest.mark.parametrize("seqlens", [(0,), (1,), (48, 48)])
def test_batched(seqlens):
    p = problem(varlen=False, group=3, dtype="float16", qk=32, v=32)
    held(p, config(p), seqlens=seqlens)


@runs
def test_in_place_strided_and_gates_in_float32():
    """o over o_cmp; K, V and gates inside wider tensors; gates in float32 beside float16 activations."""
    p = problem(dtype="float16", group=2)
    case = inputs.case(p, seqlens=RAGGED, heads_kv=2, device=DEVICE)
    exact = case.expected()["o"]
    for name in ("q", "k_slc", "v_slc", "k_swa", "v_swa"):
        x = case.tensors[name]
        wide = torch.full((len(x), x.shape[1] + 1, 2 * x.shape[2]), torch.nan, dtype=x.dtype, device=DEVICE)
        wide[:, :-1, : x.shape[2]] = x
        case.tensors[name] = wide[:, :-1, : x.shape[2]]
    case.tensors["g_slc"] = case.tensors["g_slc"].float()
    case.tensors["g_cmp"] = case.tensors["g_cmp"].t().contiguous().t()
    case.outputs["o"] = case.tensors["o_cmp"]
    case.run(loader.load(render.render(p, config(p))))
    torch.testing.assert_close(case.outputs["o"].double(), exact, rtol=3e-3, atol=3e-3)


@runs
@pytest.mark.parametrize("parts", [1, 2])
def test_is_the_sum_of_the_branches(parts):
    """With partial results that are those of the blocks, each alone or all at once, it is what the branches' own references give."""
    p = problem(parts=parts)
    case = inputs.case(p, seqlens=(150,), heads_kv=1, device=DEVICE)
    t, block, tokens = case.tensors, p.selection_block, torch.arange(150, device=DEVICE)
    scores = torch.rand(150, 1, 10, device=DEVICE)
    chosen = reference.select_at(scores, tokens, block, p.count, p.initial, p.local)
    filled = (tokens // block + 1).clamp(max=p.count) - p.local  # where a query's local blocks begin
    for i in range(parts):
        place, has = torch.arange(p.count, device=DEVICE), filled > p.initial + i
        mine = (place >= p.initial) & (place < filled[:, None]) if parts == 1 else place == p.initial + i
        o, lse = reference.selected_attention(t["q"], t["k_slc"], t["v_slc"], chosen.where(mine[..., None, :], -1), block)
        t["part"][0, i, has], t["part_lse"][0, i, has] = o[has], lse[has] / math.log(2)
    case.run(loader.load(render.render(p, config(p))))
    o_slc, _ = reference.selected_attention(*(t[n].double() for n in ("q", "k_slc", "v_slc")), chosen, block)
    o_swa, _ = reference.sliding_attention(*(t[n].double() for n in ("q", "k_swa", "v_swa")), p.window)
    exact = reference.combine(t["o_cmp"].double(), o_slc, o_swa, t["g_cmp"], t["g_slc"], t["g_swa"])
    torch.testing.assert_close(case.outputs["o"].double(), exact, rtol=1e-5, atol=1e-5)


COMPILE = """
import json
from triton.backends.compiler import GPUTarget

from nsa_gen import device, inputs, loader, render, space
from nsa_gen.config import Problem

found = {}
for arch in device.arches():
    more = {"sm_80": ((128, 128, 13),), "sm_90": ((128, 128, 13), (128, 128, 1), (192, 128, 13))}.get(arch, ())
    for *dims, parts in ((256, 256, 13), *more):  # the widest needs most
        key = {"dtype": "bfloat16", "group": 16, "head_dim_qk": dims[0], "head_dim_v": dims[1], "selection_block": 64, "count": 16}
        p = Problem.of("sliding_merge_fwd", key | {"initial": 1, "local": 2, "parts": parts, "window": 512, "varlen": True})
        case = inputs.case(p, seqlens=(1000, 24), heads_kv=4, device="meta")
        module = loader.load(render.render(p, space.default(p, arch)))
        (resources,) = loader.compile_all(lambda: case.run(module), device.from_name(arch).triton_target())
        found[f"{arch} {dims} {parts}"] = [resources.shared, device.from_name(arch).shared_bytes, resources.spills]
print(json.dumps(found))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """The default config fits every arch, and spills little at head dim 128."""
    for name, (shared, room, spills) in json.loads(compiled_python(COMPILE)).items():
        assert shared <= room, name
        assert "[128, 128]" not in name or (spills or 0) <= 256, (name, spills)
