"""Calls on a range of the queries: every chunk gives the bits of the whole call, and the forward's memory stays below its bound."""

from __future__ import annotations

import os
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import nsa_gen
from nsa_gen import inputs, launch, loader, lookup, render, space
from nsa_gen.branches import forward, selection
from nsa_gen.config import Config, Problem
from nsa_gen.spec import load

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
RAGGED = (0, 9, 1, 70, 0, 16)
KEYS = {
    "compressed_attention_fwd": {"head_dim_qk": 16, "head_dim_v": 16, "block": 8, "stride": 4},
    "sliding_attention_fwd": {"head_dim_qk": 16, "head_dim_v": 16, "window": 21},
    "sliding_merge_fwd": {
        "head_dim_qk": 16, "head_dim_v": 16, "selection_block": 16, "count": 5, "initial": 1, "local": 2, "parts": 2,
        "window": 21,
    },
    "selected_attention_fwd": {"head_dim_qk": 16, "head_dim_v": 16, "selection_block": 16, "count": 4, "initial": 1, "local": 1},
    "importance_fwd": {"head_dim_qk": 16, "block": 8, "stride": 4, "selection_block": 16, "mapping": "overlap"},
}  # fmt: skip
#: Arguments and results of a host function that hold one row a query.
PER_QUERY = ("q", "lse", "block_indices", "o_cmp", "g_cmp", "g_slc", "g_swa")


#: Configs of selected attention by loop order and loads of K and V.
QUERY_OUTER = {
    loads: Config.of("selected_attention_fwd", {"loop": "query_outer", "operands": "rows", "loads": loads, "num_warps": 1, "num_stages": 2})
    for loads in ("pointer", "descriptor")
}


def problem(kernel: str, group: int = 3, varlen: bool = True, dtype: str = "float32", **changes) -> Problem:
    return Problem.of(kernel, {"dtype": dtype, "group": group, "varlen": varlen} | KEYS[kernel] | changes)


def run_part(case: inputs.Case, module, start: int, stop: int) -> dict[str, torch.Tensor]:
    """The kernel's outputs for the queries [start, stop), from tensors that hold nothing but these."""
    t, kernel = case.tensors, case.problem.kernel
    t = {name: x[start:stop].clone() if name in PER_QUERY else x for name, x in t.items()}
    out = {name: torch.full_like(x[start:stop], torch.nan) for name, x in case.outputs.items()}
    tail = (start, t["cu_seqlens"], len(case.seqlens), case.max_seqlen)
    host = getattr(module, kernel)
    match kernel:
        case "compressed_attention_fwd":
            host(t["q"], t["k_cmp"], t["v_cmp"], out["o"], out["lse"], t["scale"], *tail)
        case "sliding_attention_fwd":
            host(t["q"], t["k"], t["v"], out["o"], out["lse"], t["scale"], *tail)
        case "sliding_merge_fwd":
            part, part_lse = (t[name][:, :, start:stop].clone() for name in ("part", "part_lse"))
            keys = (t[name] for name in ("k_slc", "v_slc", "k_swa", "v_swa"))
            gates = (t[name] for name in ("g_cmp", "g_slc", "g_swa"))
            host(t["q"], *keys, part, part_lse, t["o_cmp"], *gates, out["o"], t["scale"], *tail)
        case "selected_attention_fwd":
            host(t["q"], t["k"], t["v"], t["block_indices"], out["o"], out["lse"], t["scale"], t["workspace_bytes"], *tail)
        case "importance_fwd":
            host(t["q"], t["k_cmp"], t["lse"], out["scores"], t["scale"], *tail)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; NaN (undefined score columns) equals NaN."""
    return torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) and torch.equal(a.isnan(), b.isnan())


def configs(kernel: str, p: Problem) -> list[Config]:
    safe = space.safe(p)
    if kernel != "selected_attention_fwd":
        return [safe]
    return [safe, space.default(p, "sm_90").replace(ENTRIES=64), QUERY_OUTER["descriptor"]]


@runs
@pytest.mark.parametrize(("kernel", "group"), [(k, g) for k in KEYS for g in (1, 3) if g > 1 or k != "selected_attention_fwd"])
def test_a_chunk_has_the_bits_of_the_whole(kernel, group):
    """Chunks that begin and end inside tiles and sequences, hold several sequences, one query, or end with an empty sequence."""
    p = problem(kernel, group)
    case = inputs.case(p, seqlens=RAGGED, heads_kv=1, device=DEVICE)
    for config in configs(kernel, p):
        module = loader.load(render.render(p, config))
        whole = run_part(case, module, 0, case.total)
        if kernel != "importance_fwd":
            case.poison()
            case.run(module)
            assert case.check().ok
        cuts = (0, 5, 10, 50, 51, case.total)
        for start, stop in pairwise(cuts):
            for name, part in run_part(case, module, start, stop).items():
                assert same(part, whole[name][start:stop]), (name, start, stop, config)


@runs
@pytest.mark.parametrize("kernel", KEYS)
def test_equal_lengths(kernel):
    p = problem(kernel, 2, varlen=False)
    case = inputs.case(p, seqlens=(35,) * 3, heads_kv=1, device=DEVICE)
    for config in configs(kernel, p):
        module = loader.load(render.render(p, config))
        whole = run_part(case, module, 0, case.total)
        for start, stop in ((0, 64), (64, 105), (33, 71)):
            for name, part in run_part(case, module, start, stop).items():
                assert same(part, whole[name][start:stop]), (name, start, stop)


@runs
def test_one_partial_result_a_query():
    """As query-outer hands them to the fused end."""
    p = problem("sliding_merge_fwd", parts=1)
    case = inputs.case(p, seqlens=RAGGED, heads_kv=2, device=DEVICE)
    module = loader.load(render.render(p, space.safe(p)))
    whole = run_part(case, module, 0, case.total)
    for start, stop in pairwise((0, 5, 51, case.total)):
        assert same(run_part(case, module, start, stop)["o"], whole["o"][start:stop]), (start, stop)


@runs
@pytest.mark.parametrize("config", QUERY_OUTER.values(), ids=QUERY_OUTER)
def test_partial_results_of_a_chunk_have_the_bits_of_the_whole(config):
    p = problem("selected_attention_fwd")
    case, module = inputs.case(p, seqlens=RAGGED, heads_kv=2, device=DEVICE), loader.load(render.render(p, config))

    def parts(start, stop):
        handed = []
        rest = SimpleNamespace(merge=lambda *given: handed.append(given))
        handing = SimpleNamespace(selected_attention_fwd=lambda *given: module.selected_attention_fwd(*given, rest))
        run_part(case, handing, start, stop)
        ((begin, end, part, part_lse),) = handed
        assert (begin, end) == (0, stop - start)
        return part, part_lse

    whole = parts(0, case.total)
    for start, stop in pairwise((0, 5, 10, 51, case.total)):
        for got, all_ in zip(parts(start, stop), whole, strict=True):
            assert torch.equal(got, all_[:, :, start:stop]), (start, stop)


@runs
def test_selected_attention_has_chunks_of_its_own():
    """A workspace too small for all queries of a call that begins past the first token; the least is a chunk of 64."""
    p = problem("selected_attention_fwd", 2)
    case = inputs.case(p, seqlens=RAGGED, heads_kv=2, device=DEVICE)
    module = loader.load(render.render(p, configs(p.kernel, p)[1]))
    whole = run_part(case, module, 0, case.total)
    case.tensors["workspace_bytes"] = 1
    for start in (0, 30):
        for name, part in run_part(case, module, start, case.total).items():
            assert same(part, whole[name][start:]), name


@runs
@pytest.mark.parametrize("loop", ["kv_outer", *QUERY_OUTER])
@pytest.mark.parametrize("form", ["ragged, odd strides", "batched"])
def test_the_forward_does_not_depend_on_the_workspace(form, loop, monkeypatch):
    spec = load("tiny")
    lengths = (40, 40) if form == "batched" else RAGGED
    generator = torch.Generator().manual_seed(3)

    def normal(heads: int, *dim: int) -> torch.Tensor:
        x = torch.randn((sum(lengths), heads, *dim), generator=generator).to(DEVICE)
        return x.unflatten(0, (2, 40)) if form == "batched" else x

    x = [normal(2 * spec.group, 16), normal(2, 16), normal(2, 16), *(normal(2 * spec.group).sigmoid() for _ in range(3))]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    at = {} if form == "batched" else {"cu_seqlens": cu, "max_seqlen": max(lengths)}
    planned = []
    plan = forward.chunk_sizes
    with lookup.override(*([] if loop == "kv_outer" else [QUERY_OUTER[loop]])):
        o = nsa_gen.nsa_attention(*x, spec=spec, **at)
        monkeypatch.setattr(forward, "chunk_sizes", lambda *args: planned.append(plan(*args)) or planned[-1])
        monkeypatch.setenv("NSA_GEN_WORKSPACE", "4K")
        if form != "batched":
            x = [torch.nn.functional.pad(value, (0, 3))[..., : value.shape[-1]] for value in x]
        again = nsa_gen.nsa_attention(*x, spec=spec, **at)
    assert planned == [(selection.CHUNK, selection.CHUNK)]
    assert torch.equal(again, o) and not o.isnan().any()


@runs
def test_scores_of_a_part_of_a_chunk(monkeypatch):
    """Scores that are made for fewer queries than a chunk has choose the same blocks."""
    spec = load("tiny")
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(80, n, 16, generator=generator).to(DEVICE) for n in (spec.group, 1, 1))
    gates = [torch.rand(80, spec.group, generator=generator).to(DEVICE) for _ in range(3)]
    o = nsa_gen.nsa_attention(q, k, v, *gates, spec=spec)
    monkeypatch.setattr(forward, "chunk_sizes", lambda *args: (128, 64))
    assert torch.equal(nsa_gen.nsa_attention(q, k, v, *gates, spec=spec), o)


@pytest.mark.parametrize("loop", ["kv_outer", *QUERY_OUTER])
@pytest.mark.parametrize("bound", ["2G", "256M"])
@pytest.mark.parametrize(("heads", "group"), [(4, 16), (4, 4), (32, 1)])
def test_half_a_million_tokens_stay_below_the_bound(heads, group, bound, loop, monkeypatch):
    """512k tokens through the host code on ``meta`` tensors: what is allocated besides o, k_cmp, v_cmp never passes the bound."""
    bound_bytes = {"2G": 2**31, "256M": 2**28}[bound]
    with lookup.override(*([] if loop == "kv_outer" else [QUERY_OUTER[loop]])):
        peak, chunks = _peak(monkeypatch, 1 << 19, heads, group, bound)
    assert peak <= bound_bytes
    if bound == "2G":
        assert chunks <= 100
    if group == 16:
        assert peak > 0.9 * bound_bytes  # what is there is used


def test_chunks_are_as_large_as_fit(monkeypatch):
    """64k tokens of 64/4 heads in 2 GiB: 8192 queries a chunk, the most the default takes; a short call is one chunk."""
    assert _peak(monkeypatch, 65536, 4, 16, "2G")[1] == 8
    assert _peak(monkeypatch, 4096, 4, 16, "2G")[1] == 1


def _peak(monkeypatch, total: int, heads: int, group: int, bound: str) -> tuple[int, int]:
    """Peak bytes of one inference call besides its result, and its number of chunks. Nothing is launched, tensors hold nothing."""
    live = {"now": 0, "peak": 0}
    launched = []
    empty = torch.empty

    def free(size):
        live["now"] -= size

    def counted(*args, **kwargs):
        x = empty(*args, **kwargs)
        size = x.numel() * x.element_size()
        live["now"] += size
        live["peak"] = max(live["peak"], live["now"])
        weakref.finalize(x, free, size)
        return x

    spec = load("nsa-paper").replace(heads={"query": heads * group, "kv": heads}, head_dim={"qk": 128, "v": 128}, dtype="bfloat16")
    like = dict(dtype=torch.bfloat16, device="meta")
    q, k, v = (empty(total, n, 128, **like) for n in (heads * group, heads, heads))
    gates = [empty(total, heads * group, **like) for _ in range(3)]
    compressed = [empty(total // spec.compression.stride, heads, 128, **like) for _ in range(2)]
    monkeypatch.setenv("NSA_GEN_WORKSPACE", bound)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        patch.setattr(launch.Launcher, "__call__", lambda self, grid, *args, **extra: launched.append(self.kernel.__name__))
        o = forward.inference(q, [k], [v], *gates, [], [], *compressed, None, spec.key, 1, total, 0.1)
    size = o.numel() * o.element_size()
    assert live["now"] == size, "what is counted as freed"
    del o
    assert live["now"] == 0
    return live["peak"] - size, launched.count("sliding_merge_fwd_kernel")
