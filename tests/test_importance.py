"""Importance of selection blocks: the rendered kernel against the float64 reference."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch

from nsa_gen import inputs, loader, reference, render, space
from nsa_gen.config import Config, Problem, overlap_weights
from nsa_gen.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
RAGGED = (0, 70, 1, 201, 0, 31, 64)


def problem(dtype="float32", group=2, qk=16, block=32, stride=16, selection_block=64, mapping="overlap", varlen=True) -> Problem:
    key = dict(dtype=dtype, group=group, head_dim_qk=qk, block=block, stride=stride)
    return Problem.of("importance_fwd", key | dict(selection_block=selection_block, mapping=mapping, varlen=varlen))


def config(p: Problem, **changes) -> Config:
    chosen = space.safe(p).replace(**changes)
    space.check(p, chosen)
    return chosen


def run(p: Problem, c: Config, seqlens=RAGGED, heads=2, spread=1.0, scale=None, chunks=1, strided=False) -> torch.Tensor:
    """Render, run (in chunks of tokens) and compare with the reference; returns the scores. Undefined columns stay NaN."""
    torch.manual_seed(0)
    dtype, tokens = DTYPES[p.dtype], sum(seqlens)
    starts = [sum(seqlens[:b]) for b in range(len(seqlens) + 1)]
    rows = reference.compressed_rows(tokens, p.stride)

    def random(first, last, dim):
        x = (torch.randn(first, last, 2 * dim if strided else dim, device=DEVICE) * spread).to(dtype)
        return x[..., :dim]

    q, k_cmp = random(tokens, heads * p.group, p.head_dim_qk), random(rows, heads, p.head_dim_qk)
    real = torch.zeros(rows, dtype=torch.bool)
    for row, count in reference.compressed_offsets(starts, tokens, p.block, p.stride):
        real[row : row + count] = True
    k_cmp[~real] = float("nan")
    scale = p.head_dim_qk**-0.5 if scale is None else scale
    geometry = (p.block, p.stride)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, *geometry, scale, starts, dtype=torch.float64)
    blocks = -(-max(seqlens) // p.selection_block) + 1  # one column more than needed
    scores = torch.full((tokens, heads, blocks), float("nan"), device=DEVICE)
    cu = torch.tensor(starts, dtype=torch.int32, device=DEVICE) if p.varlen else None
    module = loader.load(render.render(p, c))
    step = -(-tokens // chunks)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        module.importance_fwd(q[part], k_cmp, lse[part].float(), scores[part], scale, first, cu, len(seqlens), max(seqlens))
    want = reference.importance(q, k_cmp, lse, *geometry, p.selection_block, p.mapping, scale, starts, dtype=torch.float64)
    position = torch.cat([torch.arange(length) for length in seqlens])
    defined = torch.arange(blocks - 1) <= (position // p.selection_block)[:, None]
    assert scores[..., -1].isnan().all() and scores[..., :-1][~defined[:, None].expand(-1, heads, -1)].isnan().all()
    # An error of the fp32 lse and logits (here up to some hundreds) is a relative error of the probability.
    rtol = (2e-5 if dtype == torch.float32 else 2e-3) * max(1.0, spread**2)
    picked = defined[:, None].expand(-1, heads, -1)
    torch.testing.assert_close(scores[..., :-1][picked].double(), want[picked], atol=1e-6, rtol=rtol)
    assert want[picked].count_nonzero() > tokens // 4
    return scores


@runs
@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 16])
def test_groups(group):
    p = problem(group=group)
    run(p, config(p), heads=1 if group == 16 else 2)


@runs
@pytest.mark.parametrize("qk", [64, 80, 96, 192])
def test_head_dims(qk):
    p = problem(qk=qk)
    run(p, config(p), heads=1)


@runs
@pytest.mark.parametrize("mapping", ["overlap", "literal"])
@pytest.mark.parametrize(
    ("block", "stride", "selection_block"),
    [(32, 16, 64), (16, 16, 64), (64, 16, 64), (48, 16, 64), (16, 16, 16), (8, 2, 32), (32, 32, 32)],
)
def test_mappings(mapping, block, stride, selection_block):
    p = problem(block=block, stride=stride, selection_block=selection_block, mapping=mapping)
    run(p, config(p), seqlens=(block - 1, 300, block), heads=1)


@runs
@pytest.mark.parametrize("mapping", ["overlap", "literal"])
def test_weights_of_one_certain_key(mapping):
    """All mass on one compressed token at a time gives the integer weights themselves."""
    block, stride, selection_block, keys = 32, 8, 32, 12
    p = problem(group=1, block=block, stride=stride, selection_block=selection_block, mapping=mapping, varlen=False)
    per_block, tokens = selection_block // stride, 256
    weights = overlap_weights(block, stride, selection_block, mapping)
    module = loader.load(render.render(p, config(p)))
    q = torch.ones(tokens, 1, 16, device=DEVICE)
    for certain in range(keys):
        k_cmp = torch.full((tokens // stride, 1, 16), -100.0, device=DEVICE)
        k_cmp[certain] = 0.0
        scores = torch.full((1, 1, tokens // selection_block), float("nan"), device=DEVICE)
        lse = torch.zeros(tokens, 1, device=DEVICE)
        module.importance_fwd(q[-1:], k_cmp, lse[-1:], scores, 1.0, tokens - 1, None, 1, tokens)
        want = [0.0] * (tokens // selection_block)
        for i in range(len(want)):
            lag, r = divmod(certain - i * per_block, per_block)
            if -lag in range(len(weights)):
                want[i] = float(weights[-lag][r])
        assert scores[0, 0].tolist() == want


@runs
@pytest.mark.parametrize(
    "changes",
    [
        {"BLOCK_T": 64},
        {"BLOCK_T": 128, "num_warps": 8},
        {"BLOCK_K": 128},
        {"BLOCK_K": 256, "num_warps": 8},
        {"TILES": 1},
        {"TILES": 2, "BLOCK_T": 64},
        {"loads": "descriptor", "num_stages": 2},
        {"loads": "descriptor", "num_stages": 3, "TILES": 8, "BLOCK_T": 64, "maxnreg": 168},
    ],
)
def test_configs_do_not_change_results(changes):
    """Several key tiles with their halo, walks of several token tiles that begin anywhere."""
    assert torch.equal(_several_tiles(**changes), _several_tiles())


@cache
def _several_tiles(**changes) -> torch.Tensor:
    p = problem(block=8, stride=4, selection_block=16)
    return run(p, config(p, **changes), seqlens=(50, 3, 701), heads=1).nan_to_num(-1.0)


@runs
@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize("layout", ["sliced", "heads first", "one row expanded"])
def test_strides_of_queries(loads, layout):
    """The descriptor's rows hold all heads of a token; other layouts are copied."""
    p = problem(varlen=False)
    chosen, tokens, heads = config(p, loads=loads, num_stages=2), 100, 2
    torch.manual_seed(0)
    shape = (tokens, heads * p.group, p.head_dim_qk)
    q = {
        "sliced": torch.randn(tokens + 5, 7, 64, device=DEVICE)[5:, 2:6, 32:48],
        "heads first": torch.randn(heads * p.group, tokens, p.head_dim_qk, device=DEVICE).transpose(0, 1),
        "one row expanded": torch.randn(1, *shape[1:], device=DEVICE).expand(shape),
    }[layout]
    k_cmp = torch.randn(tokens // p.stride, heads, p.head_dim_qk, device=DEVICE)
    geometry = (p.block, p.stride)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, *geometry, 0.25, (0, tokens), dtype=torch.float64)
    scores = torch.full((tokens, heads, 2), float("nan"), device=DEVICE)
    loader.load(render.render(p, chosen)).importance_fwd(q, k_cmp, lse.float(), scores, 0.25, 0, None, 1, tokens)
    want = reference.importance(q, k_cmp, lse, *geometry, p.selection_block, p.mapping, 0.25, (0, tokens), dtype=torch.float64)
    defined = torch.arange(2) <= (torch.arange(tokens) // p.selection_block)[:, None]
    picked = defined[:, None].expand(-1, heads, -1)
    torch.testing.assert_close(scores[picked].double(), want[picked], atol=1e-6, rtol=2e-5)
    # The stride of a single token means nothing.
    one, single = q[-1:].as_strided((1, *shape[1:]), (2**31 + 3, *q.stride()[1:]), q[-1:].storage_offset()), scores[-1:].clone()
    scores[-1:] = float("nan")
    loader.load(render.render(p, chosen)).importance_fwd(one, k_cmp, lse[-1:].float(), scores[-1:], 0.25, tokens - 1, None, 1, tokens)
    assert torch.equal(scores[-1:], single)


@runs
@pytest.mark.parametrize("mapping", ["overlap", "literal"])
def test_sums_keep_float32_accuracy(mapping):
    """Probabilities that are powers of two are exact, so all error is that of the sums, over 1024 keys and 16 heads."""
    block, stride, selection_block, tokens = 32, 16, 64, 16 * 1024
    p = problem(group=16, block=block, stride=stride, selection_block=selection_block, mapping=mapping, varlen=False)
    torch.manual_seed(0)
    rows = tokens // stride
    exponent = torch.randint(-12, 1, (rows,), device=DEVICE)
    k_cmp = torch.zeros(rows, 1, 16, device=DEVICE)
    k_cmp[:, 0, 0] = exponent
    q = torch.zeros(64, 16, 16, device=DEVICE)
    q[..., 0] = 1.0
    lse = torch.zeros(64, 16, device=DEVICE)
    scores = torch.full((64, 1, tokens // selection_block), float("nan"), device=DEVICE)
    scale = 0.6931471805599453  # of one power of two
    c = config(p, BLOCK_T=64, BLOCK_K=128)
    loader.load(render.render(p, c)).importance_fwd(q, k_cmp, lse, scores, scale, tokens - 64, None, 1, tokens)
    visible = torch.arange(rows, device=DEVICE)[None, :] * stride + block - 1 <= torch.arange(tokens - 64, tokens, device=DEVICE)[:, None]
    prob = torch.where(visible, 16 * torch.exp2(exponent.double()), 0.0)
    want = torch.zeros(64, tokens // selection_block, dtype=torch.float64, device=DEVICE)
    for lag, counts in enumerate(overlap_weights(block, stride, selection_block, mapping)):
        part = (prob.view(64, -1, len(counts)) * torch.tensor(counts, device=DEVICE)).sum(2)
        want[:, lag:] += part[:, : part.shape[1] - lag]
    torch.testing.assert_close(scores[:, 0].double(), want, atol=0.0, rtol=1e-6)


@runs
def test_fixed_lengths_and_half_precision():
    p = problem("float16", qk=64, varlen=False)
    run(p, config(p), seqlens=(150, 150))


@runs
def test_strided_inputs():
    p = problem()
    run(p, config(p), strided=True)


@runs
def test_huge_logits():
    p = problem(block=8, stride=4, selection_block=16)
    run(p, config(p), spread=8.0, scale=1.0)


@runs
def test_chunks_give_the_same_bits():
    p = problem(block=8, stride=4, selection_block=16)
    whole = run(p, config(p))
    for chunks in (2, 7):
        assert torch.equal(run(p, config(p), chunks=chunks).nan_to_num(-1.0), whole.nan_to_num(-1.0))


def test_every_legal_key_tile_owns_a_block():
    for block, stride, selection_block in ((32, 16, 64), (64, 1, 64), (64, 16, 64), (16, 16, 16), (128, 2, 128)):
        for mapping in ("overlap", "literal"):
            p = problem(block=block, stride=stride, selection_block=selection_block, mapping=mapping)
            lags = len(overlap_weights(block, stride, selection_block, mapping))
            space.check(p, space.safe(p))
            for c in space.candidates(p):
                assert c.BLOCK_K // (selection_block // stride) >= lags
                assert f"_HALO = {lags - 1}\n" in render.render(p, c).text


@runs
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_kinds_of_values(kind):
    p = problem("float16", block=8, stride=4, selection_block=16)
    made = inputs.case(p, seqlens=(50, 0, 33), heads_kv=1, device=DEVICE, kind=kind)
    made.run(loader.load(render.render(p, config(p))))
    check = made.check()
    assert check.ok, check.message


@pytest.mark.compile
def test_defaults_compile_and_fit(compiled_python):
    """For Hopper, Ampere and CDNA3, through the same host code that launches; registers hold the tiles but for a few bytes."""
    compiled_python(
        """
from triton.backends.compiler import GPUTarget
from test_importance import problem
from nsa_gen import inputs, loader, render, space

p = problem("bfloat16", 16, 128)
targets = ("cuda", 90, 32, "sm_90", 232448), ("cuda", 80, 32, "sm_80", 166912), ("hip", "gfx942", 64, "gfx942", 65536)
for backend, cc, warp, arch, limit in targets:
    target = GPUTarget(backend, cc, warp)
    module = loader.load(render.render(p, space.default(p, arch)))
    made = inputs.case(p, seqlens=(8192, 1000), heads_kv=4, device="meta")
    for found in loader.compile_all(lambda: made.run(module), target):
        assert found.shared <= limit and (found.spills or 0) <= 16, (arch, found)
"""
    )


def test_illegal_configs():
    with pytest.raises(ConfigError, match="beside its halo"):
        config(problem(block=64, stride=1), BLOCK_K=64)
    with pytest.raises(ConfigError, match="registers"):
        config(problem(), BLOCK_T=128, BLOCK_K=256)
    with pytest.raises(ConfigError, match="power-of-two"):
        config(problem(qk=96), loads="descriptor", num_stages=2)
    with pytest.raises(ConfigError, match="pipeline"):
        config(problem(), loads="descriptor")
