"""Compressed branch, forward: the rendered kernel against the float64 reference, on every element of NaN-filled outputs."""

from __future__ import annotations

import os

import pytest
import torch

from nsa_gen import inputs, loader, reference, render, space
from nsa_gen.config import Config, Problem
from nsa_gen.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
RAGGED = (0, 37, 1, 90, 0, 31, 16)


def problem(dtype="float32", group=2, qk=16, v=16, block=32, stride=16, varlen=True) -> Problem:
    key = dict(dtype=dtype, group=group, head_dim_qk=qk, head_dim_v=v, block=block, stride=stride, varlen=varlen)
    return Problem.of("compressed_attention_fwd", key)


def config(p: Problem, **changes) -> Config:
    chosen = space.safe(p).replace(**changes)
    space.check(p, chosen)
    return chosen


def run(p: Problem, c: Config, seqlens=RAGGED, heads=2, spread=1.0, scale=None, strided=False) -> None:
    """Render, run and compare with the reference. Compressed rows of no sequence hold NaN, as do the outputs before the run."""
    torch.manual_seed(0)
    dtype, tokens = DTYPES[p.dtype], sum(seqlens)
    starts = [sum(seqlens[:b]) for b in range(len(seqlens) + 1)]
    rows = reference.compressed_rows(tokens, p.stride)

    def random(first, last, dim):
        x = torch.randn(first, last, dim, device=DEVICE) * spread
        x = x.to(dtype)
        return x.repeat(1, 2, 2)[:, 1 : 1 + last, 8 : 8 + dim].as_strided(x.shape, (2 * last * 2 * dim, 2 * dim, 1)) if strided else x

    q = random(tokens, heads * p.group, p.head_dim_qk)
    k_cmp, v_cmp = random(rows, heads, p.head_dim_qk), random(rows, heads, p.head_dim_v)
    real = torch.zeros(rows, dtype=torch.bool)
    for row, count in reference.compressed_offsets(starts, tokens, p.block, p.stride):
        real[row : row + count] = True
    k_cmp[~real] = v_cmp[~real] = float("nan")
    o = torch.full((tokens, heads * p.group, p.head_dim_v), float("nan"), dtype=dtype, device=DEVICE)
    lse = torch.full((tokens, heads * p.group), float("nan"), device=DEVICE)
    cu = torch.tensor(starts, dtype=torch.int32, device=DEVICE) if p.varlen else None
    scale = p.head_dim_qk**-0.5 if scale is None else scale
    loader.load(render.render(p, c)).compressed_attention_fwd(q, k_cmp, v_cmp, o, lse, scale, 0, cu, len(seqlens), max(seqlens))
    want_o, want_lse = reference.compressed_attention(q, k_cmp, v_cmp, p.block, p.stride, scale, starts, dtype=torch.float64)
    close = dict(atol=2e-5, rtol=2e-5) if dtype == torch.float32 else dict(atol=4e-3 * max(1, spread), rtol=4e-3)
    torch.testing.assert_close(o.double(), want_o, **close)
    torch.testing.assert_close(lse.double(), want_lse, **close)
    blind = want_lse == -float("inf")
    assert blind.any() and not blind.all()
    assert (o[blind] == 0).all()


@runs
@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 16])
def test_groups(group):
    p = problem(group=group)
    run(p, config(p), heads=1 if group == 16 else 2)


@runs
@pytest.mark.parametrize(("qk", "v"), [(80, 80), (96, 64), (64, 112), (192, 128)])
def test_head_dims(qk, v):
    p = problem(qk=qk, v=v)
    run(p, config(p), heads=1)


@runs
@pytest.mark.parametrize(("block", "stride"), [(16, 16), (64, 16), (48, 16), (8, 4)])
def test_blocks(block, stride):
    p = problem(block=block, stride=stride)
    run(p, config(p), seqlens=(70, 5, 0, 133, block, block - 1))


@runs
@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize("changes", [{}, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8}, {"BLOCK_N": 128, "num_stages": 3}])
def test_configs_do_not_change_results(loads, changes):
    """Several key tiles, whole and cut, between neighbours that hold NaN."""
    p = problem(block=4, stride=2, group=3)
    run(p, config(p, loads=loads, **changes), seqlens=(50, 3, 301))


@runs
@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
def test_fixed_lengths_and_half_precision(loads):
    p = problem("float16", group=2, qk=64, v=32, varlen=False, block=8, stride=4)
    run(p, config(p, loads=loads), seqlens=(150, 150))


@runs
@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
def test_strided_inputs(loads):
    p = problem(block=4, stride=2)
    run(p, config(p, loads=loads), seqlens=(50, 90), strided=True)


@runs
def test_huge_logits():
    p = problem(block=4, stride=2)
    run(p, config(p), seqlens=(50, 90), spread=20.0, scale=1.0)


@runs
def test_no_sequence_long_enough_and_no_token():
    p = problem(group=1)
    module = loader.load(render.render(p, config(p)))
    for tokens, batch in ((20, 2), (0, 1)):
        cu = torch.tensor([0, tokens // 2, tokens][-batch - 1 :], dtype=torch.int32, device=DEVICE)
        q = torch.randn(tokens, 1, 16, device=DEVICE)
        k_cmp = torch.full((max(tokens // p.stride, 1), 1, 16), float("nan"), device=DEVICE)
        o, lse = torch.full_like(q, float("nan")), torch.full((tokens, 1), float("nan"), device=DEVICE)
        module.compressed_attention_fwd(q, k_cmp, k_cmp, o, lse, 0.25, 0, cu, batch, tokens)
        assert (o == 0).all() and (lse == -float("inf")).all()


@runs
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_kinds_of_values(kind):
    p = problem("float16", block=8, stride=4)
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
from test_compressed_attention import problem
from nsa_gen import inputs, loader, render, space

p = problem("bfloat16", 16, 128, 128)
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
    with pytest.raises(ConfigError, match="power-of-two"):
        config(problem(qk=96), loads="descriptor")
    with pytest.raises(ConfigError, match="leave warps without rows"):
        config(problem(), num_warps=8)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "other"])
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (80, 80), (256, 256)])
def test_defaults_are_legal(arch, dims):
    for dtype in ("float32", "float16", "bfloat16"):
        p = problem(dtype, 16, *dims)
        space.check(p, space.default(p, arch))
