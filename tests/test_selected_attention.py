"""Selected attention: both loop orders against the float64 reference, and compiled for every arch without a GPU."""

from __future__ import annotations

import itertools
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
#: Query-outer by what lies on the tensor core's rows, and how K and V are loaded.
QUERY_OUTER = tuple(itertools.product(("rows", "keys"), ("pointer", "descriptor")))
LOOPS = ("kv_outer", *map(" ".join, QUERY_OUTER))


def problem(dtype="float32", group=2, qk=16, v=16, block=16, count=4, initial=1, local=2, varlen=True) -> Problem:
    key = {"dtype": dtype, "group": group, "head_dim_qk": qk, "head_dim_v": v, "selection_block": block, "count": count}
    return Problem.of("selected_attention_fwd", key | {"initial": initial, "local": local, "varlen": varlen})


def kv_outer(p: Problem, **changes) -> Config:
    """The default with merge tiles that keep the interpreter's program count low."""
    chosen = space.default(p, "").replace(**({"MERGE_M": 16} | changes))
    space.check(p, chosen)
    return chosen


def query_outer(p: Problem, operands: str = "rows", loads: str = "pointer") -> Config:
    values = {"loop": "query_outer", "operands": operands, "loads": loads, "num_warps": 1, "num_stages": 2}
    chosen = Config.of("selected_attention_fwd", values)
    space.check(p, chosen)
    return chosen


def built(p: Problem, loop: str) -> Config:
    """The config of one of LOOPS."""
    return kv_outer(p) if loop == "kv_outer" else query_outer(p, *loop.split())


def left_out(loop: str, **dims) -> tuple[Problem, int]:
    """A problem, and the tokens that make some queries leave blocks out. Query-outer has a program for each query: the fewer the better."""
    return (problem(**dims), 70) if loop == "kv_outer" else (problem(**dims, count=2, initial=0, local=1), 37)


def held(p: Problem, c: Config, seqlens=RAGGED, heads=1, **how) -> inputs.Case:
    """Render and run one case; assert that the reference agrees."""
    case = inputs.case(p, seqlens=seqlens, heads_kv=heads, device=DEVICE, **how)
    case.run(loader.load(render.render(p, c)))
    check = case.check()
    assert check.ok, check
    return case


@runs
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("group", [1, 2, 3, 6, 16])
def test_groups(group, loop):
    p, tokens = left_out(loop, group=group)
    held(p, built(p, loop), seqlens=(0, tokens, 1))


@runs
@pytest.mark.parametrize("loop", LOOPS)
def test_ragged_lengths(loop):
    """Blocks that end past their sequence, with other sequences or nothing behind them; a group that tiles do not divide by."""
    p, tokens = left_out(loop, group=5)
    held(p, built(p, loop), seqlens=(0, tokens, 1, 15), heads=2)


@runs
@pytest.mark.parametrize("loop", ["kv_outer", "rows pointer", "keys pointer"])
@pytest.mark.parametrize(("qk", "v"), [(48, 80), (96, 16)])
def test_head_dims(qk, v, loop):
    p = problem(qk=qk, v=v)
    held(p, built(p, loop), seqlens=(66, 2))


@runs
@pytest.mark.parametrize("operands", ["rows", "keys"])
def test_head_dims_by_descriptor(operands):
    p = problem(qk=32, v=64)
    held(p, query_outer(p, operands, "descriptor"), seqlens=(66, 2))


@runs
@pytest.mark.parametrize("loop", LOOPS)
def test_half_precision(loop):
    p, tokens = left_out(loop, dtype="float16", block=32)
    held(p, built(p, loop), seqlens=(2 * tokens,))


@runs
@pytest.mark.parametrize("kind", ["ties", "equal", "huge", "peaky"])
@pytest.mark.parametrize("loop", LOOPS)
def test_kinds(kind, loop):
    p, tokens = left_out(loop)
    held(p, built(p, loop), seqlens=(tokens,), kind=kind)


@runs
@pytest.mark.parametrize(("count", "initial", "local"), [(3, 0, 0), (4, 2, 1), (3, 1, 2), (1, 0, 1), (2, 2, 0)])
def test_forced_blocks(count, initial, local):
    p = problem(count=count, initial=initial, local=local)
    held(p, kv_outer(p), seqlens=(100,))


@runs
def test_batched_is_varlen_of_equal_lengths():
    p = problem(varlen=False)
    held(p, kv_outer(p), seqlens=(70, 70))
    for at in QUERY_OUTER:
        held(p, query_outer(p, *at), seqlens=(40, 40))


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
@pytest.mark.parametrize("loop", ["kv_outer", "rows pointer", "rows descriptor"])
@pytest.mark.parametrize("seqlens", [(), (0, 0)])
def test_no_tokens(seqlens, loop):
    p = problem()
    case = inputs.case(p, seqlens=seqlens or (0,), heads_kv=1, device=DEVICE)
    case.run(loader.load(render.render(p, built(p, loop))))
    assert case.outputs["o"].shape[0] == 0


@runs
@pytest.mark.parametrize("loop", LOOPS)
def test_any_set_of_blocks_is_attended_as_given(loop):
    """Indices from elsewhere need not hold the forced blocks: dense blocks count where they are listed; no block gives 0 and -inf."""
    p, tokens = left_out(loop)
    case = inputs.case(p, seqlens=(tokens,), heads_kv=2, device=DEVICE)
    chosen = case.tensors["block_indices"]
    generator = torch.Generator().manual_seed(5)
    for t in range(tokens):
        for h in range(2):
            some = [i for i in range(t // 16 + 1) if torch.rand((), generator=generator) < 0.4][: p.count]
            chosen[t, h] = torch.tensor(some + [-1] * (p.count - len(some)), dtype=torch.int32)
    assert bool((chosen == -1).all(-1).any()), "no query without a block"
    case.run(loader.load(render.render(p, built(p, loop))))
    check = case.check()
    assert check.ok, check
    none = (chosen == -1).all(-1).repeat_interleave(p.group, 1)
    assert bool((case.outputs["o"][none] == 0).all()) and bool((case.outputs["lse"][none] == -torch.inf).all())


def partial(case: inputs.Case, module, merge) -> None:
    """Run a case with ``rest``: what it is handed goes to ``merge``."""
    rest = SimpleNamespace(merge=merge)
    case.run(SimpleNamespace(selected_attention_fwd=lambda *given: module.selected_attention_fwd(*given, rest)))


def rows_of(part: torch.Tensor, part_lse: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results ``[Hkv,R,G,Dv]``, ``[Hkv,R,G]`` of some queries as float64 ``o [S,Hq,Dv]`` and ``lse [S,Hq]``."""
    o, lse = part[:, queries].transpose(0, 1).flatten(1, 2), part_lse[:, queries].transpose(0, 1).flatten(1)
    return o.double(), lse.double() * math.log(2)


@runs
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("operands", "loads"), QUERY_OUTER)
def test_what_lies_past_a_sequence_does_not_leak(operands, loads, listed):
    """NaN in the next sequence's K and V, and past the last token: a block that ends past its sequence holds them."""
    p = problem(initial=0, local=0)
    case = inputs.case(p, seqlens=(5, 37, 20), heads_kv=2, device=DEVICE)
    exact = case.expected()
    for name in "kv":
        case.tensors[name][42:] = torch.nan
    module, queries = loader.load(render.render(p, query_outer(p, operands, loads))), torch.arange(42, device=DEVICE)
    found = []
    if listed:
        partial(case, module, lambda begin, end, part, part_lse: found.extend(rows_of(part[:, 0], part_lse[:, 0], queries)))
    else:
        case.run(module)
        found = [case.outputs[name][queries].double() for name in ("o", "lse")]
    for got, name in zip(found, ("o", "lse"), strict=True):
        torch.testing.assert_close(got, exact[name][queries], rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize(
    ("operands", "loads", "count", "initial", "local"),
    [*((*way, 5, 1, 2) for way in QUERY_OUTER), *(("rows", "pointer", *blocks) for blocks in ((4, 0, 1), (4, 2, 0), (3, 0, 0)))],
)
def test_one_partial_result_for_the_rest(operands, loads, count, initial, local):
    """What query-outer hands to the rest of the forward: each query's attention over all its blocks that are not forced."""
    p = problem(group=3, v=48 if loads == "pointer" else 32, count=count, initial=initial, local=local)
    case, handed = inputs.case(p, seqlens=RAGGED, heads_kv=2, device=DEVICE), []
    partial(case, loader.load(render.render(p, query_outer(p, operands, loads))), lambda *given: handed.append(given))
    ((begin, end, part, part_lse),) = handed
    assert (begin, end) == (0, case.total)
    assert part.shape == (2, 1, case.total, 3, p.head_dim_v) and part_lse.shape == part.shape[:4]
    assert part.dtype == case.dtype and part_lse.dtype == torch.float32 and part.is_contiguous() and part_lse.is_contiguous()
    blocks = (inputs.positions(case.seqlens, DEVICE) // p.selection_block + 1).clamp(max=count)
    queries = (blocks > initial + local).nonzero().flatten()  # nothing is asked of the others' rows
    assert len(queries) > 0 and (len(queries) < case.total) == (initial + local > 0)
    t, place = case.tensors, torch.arange(count, device=DEVICE)
    forced = (place < initial) | (place >= (blocks - local)[:, None])
    chosen = t["block_indices"].masked_fill(forced[:, None], -1)
    exact = reference.selected_attention(
        *(t[name].double() for name in "qkv"), chosen, p.selection_block, t["scale"], case.cu_seqlens, queries
    )
    for got, want in zip(rows_of(part[:, 0], part_lse[:, 0], queries), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert all(bool(x.isnan().all()) for x in case.outputs.values())  # left to the rest


@runs
@pytest.mark.parametrize(("operands", "loads"), QUERY_OUTER)
def test_nothing_but_forced_blocks_launches_nothing(operands, loads, monkeypatch):
    p = problem(count=3, initial=1, local=2)
    case, handed, grids = inputs.case(p, seqlens=RAGGED, heads_kv=2, device=DEVICE), [], []
    module = loader.load(render.render(p, query_outer(p, operands, loads)))
    monkeypatch.setattr(module, "_attend", lambda grid, *arguments, **constants: grids.append(math.prod(grid)))
    partial(case, module, lambda *given: handed.append(given))
    ((begin, end, part, part_lse),) = handed
    assert (begin, end) == (0, case.total) and part.shape == (2, 0, case.total, 2, 16) and part_lse.shape == part.shape[:4]
    assert not any(grids)
    assert all(bool(x.isnan().all()) for x in case.outputs.values())
    assert module.workspace(2, 4, case.total, 4, True)[:2] == (0, 0)


@runs
@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
def test_a_partial_result_takes_what_the_workspace_says(loads):
    p = problem(group=3)
    case, handed = inputs.case(p, seqlens=RAGGED, heads_kv=2, device=DEVICE), []
    module = loader.load(render.render(p, query_outer(p, loads=loads)))
    partial(case, module, lambda begin, end, *parts: handed.append(sum(x.numel() * x.element_size() for x in parts)))
    fixed, each, most = module.workspace(2, 4, case.total, 4, True)
    assert handed == [case.total * each] and fixed == 0 and most >= case.total
    assert module.workspace(2, 4, case.total, 4)[:2] == (0, 0)


@runs
@pytest.mark.parametrize(("count", "initial", "local"), [(5, 1, 2), (4, 0, 1), (3, 1, 2)])
def test_a_partial_result_a_block_for_the_rest(count, initial, local):
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
            got = rows_of(part[:, slot], part_lse[:, slot], queries - begin)
            torch.testing.assert_close(got[0], o, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got[1], lse, rtol=1e-5, atol=1e-5)
            filled.append(len(queries))
        chunks.append((begin, end))

    chunks: list[tuple[int, int]] = []
    partial(case, module, merge)
    assert chunks == [(0, 64), (64, 101)]
    assert (sum(filled) > 0) == (count > initial + local)
    assert bool(case.outputs["o"].isnan().all())  # left to the rest


@pytest.mark.parametrize(
    ("dims", "changes", "why"),
    [
        ({"block": 64}, {"operands": "keys", "num_stages": 1}, "illegally"),
        ({"block": 16}, {"operands": "keys", "num_warps": 2}, "leave warps without rows"),
        ({}, {"loads": "descriptor", "num_stages": 1}, "descriptor loads without a pipeline"),
        ({"qk": 48}, {"loads": "descriptor"}, "head dims are 48 and 16"),
        ({"v": 80}, {"loads": "descriptor"}, "head dims are 16 and 80"),
        ({}, {"loads": "block"}, "knob loads"),
    ],
)
def test_the_space_refuses_what_miscompiles_or_cannot_be_built(dims, changes, why):
    p = problem(**dims)
    with pytest.raises(ConfigError, match=why):
        space.check(p, query_outer(p).replace(**changes))


def test_loads_are_a_choice_of_query_outer_alone():
    p = problem()
    assert space.safe(p).loop == "query_outer" and space.safe(p).loads == "pointer"
    assert "loads" not in space.default(p, "sm_90").as_dict()
    with pytest.raises(ConfigError, match="unknown knob 'loads'"):
        space.check(p, kv_outer(p).replace(loads="descriptor"))
    with pytest.raises(ConfigError, match="missing knob 'loads'"):
        space.check(p, Config.of(p.kernel, {"loop": "query_outer", "operands": "rows", "num_warps": 1, "num_stages": 2}))


BY_DESCRIPTOR = ("sm_90", "sm_100", "sm_120")  # what has hardware for it


COMPILE = """
import json, sys
from types import SimpleNamespace
from nsa_gen import device, inputs, loader, render, space
from nsa_gen.config import problem
from nsa_gen.spec import load

p, found = problem("selected_attention_fwd", load("gqa16-d128")), {}
for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
    there, configs = device.from_name(arch), [space.default(p, arch), space.safe(p)]
    if arch in sys.argv[1:]:
        configs += [space.safe(p).replace(loads="descriptor", operands=operands, num_stages=2) for operands in ("rows", "keys")]
    made = []
    for config in configs:
        case, module = inputs.case(p, seqlens=(4096,), heads_kv=4, device="meta"), loader.load(render.render(p, config))
        rest = SimpleNamespace(merge=lambda *given: None)
        handing = SimpleNamespace(selected_attention_fwd=lambda *given: module.selected_attention_fwd(*given, rest))
        for one in (module, handing):
            made += [[r.name, r.shared, r.spills] for r in loader.compile_all(lambda: case.run(one), there.triton_target())]
    found[arch] = [there.shared_bytes, made]
print(json.dumps(found))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """The default and the safe config fit every arch, alone and as a part of the forward."""
    every = json.loads(compiled_python(COMPILE, *BY_DESCRIPTOR))
    assert len(every) == 5
    for arch, (limit, found) in every.items():
        assert {name for name, _, _ in found} >= {"gather_kernel", "dense_kernel", "merge_kernel", "selected_attention_fwd_kernel"}, arch
        assert all(shared <= limit for _, shared, _ in found), (arch, found)
