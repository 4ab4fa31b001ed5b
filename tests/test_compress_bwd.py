"""Compression's backward: every pooling against autograd in float64, bit-equal each time, and compiled for every arch without a GPU."""

from __future__ import annotations

import ast
import json
import os
from itertools import islice

import pytest
import torch

from nsa_gen import inputs, loader, paths, render, space, spec
from nsa_gen.branches import compression
from nsa_gen.branches._inputs import geometry_of
from nsa_gen.config import Config, Problem
from nsa_gen.errors import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
POOLINGS = ("mean", "weighted", "linear", "mlp")
RAGGED = (0, 5, 37, 1, 0, 16, 66, 15, 33, 0)


def problem(pooling="mean", dtype="float32", dim=16, block=16, stride=8, hidden=None, varlen=True) -> Problem:
    key = {"dtype": dtype, "head_dim": dim, "block": block, "stride": stride, "pooling": pooling, "varlen": varlen}
    return Problem.of("compress_bwd", key | {"hidden": (hidden or dim) if pooling == "mlp" else 0})


def config(p: Problem, **changes) -> Config:
    chosen = space.safe(p).replace(**changes)
    space.check(p, chosen)
    return chosen


def large(p: Problem, **changes) -> Config:
    """Tiles that hold most of a small case: few programs, so the interpreter is fast."""
    tiles = {} if p.pooling in ("mean", "weighted") else {"BLOCK_J": 32, "BLOCK_C": 128, "BLOCK_R": 64}
    return config(p, **tiles | changes)


def ran(p: Problem, c: Config, seqlens=RAGGED, heads=2, alter=lambda case: None) -> inputs.Case:
    """A case after a call; ``alter`` may change it before. Rows of dout in gaps are NaN."""
    case = inputs.case(p, seqlens=seqlens, heads_kv=heads, device=DEVICE)
    alter(case)
    case.run(loader.load(render.render(p, c)))
    return case


def held(p: Problem, c: Config, *args, **kwargs) -> inputs.Case:
    case = ran(p, c, *args, **kwargs)
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
    p = problem(pooling, dim=dim, block=8, stride=4, hidden=48)
    held(p, large(p), seqlens=(21, 9))


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("seqlens", [(0,), (3,), (1,), (45,), (21, 21, 21)])
def test_batched(pooling, seqlens):
    """Equal lengths without cu_seqlens: none, shorter than the stride, no multiple of it (so rows have gaps)."""
    p = problem(pooling, varlen=False)
    case = held(p, config(p), seqlens=seqlens)
    if max(seqlens) < 16:  # no compressed token
        assert torch.equal(case.outputs["dx"], case.tensors["dx_add"])
        assert not any(out.any() for name, out in case.outputs.items() if name != "dx")


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
def test_half_and_strides(pooling):
    def alter(case):
        x = case.tensors["x"]
        wide = torch.full((x.shape[0], 4, 80), torch.nan, dtype=x.dtype, device=DEVICE)
        wide[:, :3, :32] = x
        case.tensors["x"] = wide[:, :3, :32]

    p = problem(pooling, dtype="float16", dim=32)
    held(p, large(p), seqlens=(5, 37, 0, 20), heads=3, alter=alter)


@runs
@pytest.mark.parametrize("hidden", [16, 40, 80])
def test_hidden(hidden):
    """Fewer hidden units than a tile, several tiles, a last tile that is not full."""
    p = problem("mlp", hidden=hidden)
    held(p, config(p), seqlens=(50,))


@runs
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pos_that_nearly_cancels_x(dtype):
    """Where dw1 is x.T @ dpre + pos * the sum of dpre, both parts take dpre as it was rounded, or what is left of them is noise."""

    def alter(case):
        case.tensors["weights"][4].copy_(-case.tensors["x"][:16].transpose(0, 1) * (1 - (2**-6 if dtype == "float16" else 2**-14)))

    p = problem("mlp", dtype=dtype, dim=32)
    held(p, large(p), seqlens=(16,), alter=alter)


@runs
@pytest.mark.parametrize("pooling", ["linear", "mlp"])
def test_tiles(pooling):
    """Config changes nothing: steps inside a token, row tiles across sequences, one split and several."""
    p = problem(pooling, dim=64, block=8, stride=4)
    steps = {"BLOCK_K": 64} if pooling == "mlp" else {}
    held(p, config(p, BLOCK_J=64, BLOCK_C=64, BLOCK_N=64, BLOCK_R=32, **steps), seqlens=(30, 7, 41))
    held(p, config(p, BLOCK_C=256, BLOCK_R=64, SPLITS=1, num_stages=3), seqlens=(30, 7, 41))
    p = problem(pooling, block=4, stride=2)
    held(p, config(p, BLOCK_J=64, SPLITS=4), seqlens=(300, 0, 93, 200))  # 4 splits of 80 rows, the last not full


@runs
@pytest.mark.parametrize("pooling", ["mean", "weighted"])
def test_tokens(pooling):
    """Tiles of few and many tokens; enough rows for splits, several in a step of their sum."""
    for tokens in (8, 128):
        p = problem(pooling)
        held(p, config(p, BLOCK_T=tokens))
    p = problem(pooling, block=2, stride=1)
    held(p, config(p, BLOCK_T=128), seqlens=(2000, 0, 1, 600), heads=1)


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
def test_addend(pooling):
    """dx_add in float32, none, and the gradient's own memory; dx in float32."""
    p = problem(pooling, dtype="float16")
    module = loader.load(render.render(p, large(p)))
    case = held(p, large(p), seqlens=(5, 37, 20))
    t, weights = case.tensors, [torch.empty_like(w) for w in case.tensors["weights"]]

    def call(dx, add):
        module.compress_bwd(t["x"], t["weights"], t["dout"], dx, tuple(weights), add, t["cu_seqlens"], 3, 37)
        return dx

    half, wide = t["dx_add"].fill_(torch.nan), torch.randn(t["dx_add"].shape, device=DEVICE)
    dx = call(torch.full_like(wide, torch.nan), wide)
    memory = wide.clone()
    assert torch.equal(call(memory, memory), dx)
    assert torch.equal(call(half.clone(), wide), dx.half())
    bare = call(torch.full_like(wide, torch.nan), None)
    assert torch.allclose(bare + wide, dx, atol=1e-6)
    assert torch.equal(call(half.clone(), None), bare.half())
    t["dx_add"] = wide
    case.outputs["dx"] = dx
    assert case.check().ok, case.check()


@runs
@pytest.mark.parametrize("pooling", POOLINGS[1:])
def test_gradients_of_weights_in_float32(pooling):
    """Not rounded to the weights' dtype: closer to the exact ones."""
    p = problem(pooling, dtype="float16")

    def alter(case):
        case.outputs |= {name: out.float() for name, out in case.outputs.items()}

    rounded, case = ran(p, large(p), (5, 37, 20)), ran(p, large(p), (5, 37, 20), alter=alter)
    exact = case.expected()
    for name, out in case.outputs.items():
        error = (out - exact[name]).norm()
        assert error <= 5e-4 * exact[name].norm(), name
        assert torch.equal(out.half(), rounded.outputs[name]), name


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_same_bits_each_time(pooling):
    """Also where gap rows of dout hold something else."""
    p = problem(pooling, block=4, stride=2)
    c = large(p, **({} if pooling in ("mean", "weighted") else {"BLOCK_R": 16, "SPLITS": 2}))
    first, again = (ran(p, c, (190, 3, 147), 1).outputs for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)

    def alter(case):
        case.tensors["dout"] = case.tensors["dout"].nan_to_num(7.0)

    other = ran(p, c, (190, 3, 147), 1, alter).outputs
    assert all(torch.equal(first[name], other[name]) for name in first)


@runs
@pytest.mark.parametrize("pooling", POOLINGS)
def test_operator(pooling):
    """Through tables and layouts that kernels cannot read in place; no token, no sequence."""
    tiny = spec.load("tiny")
    shape = tiny.replace(compression={"block": 16, "stride": 8, "pooling": pooling}, head_dim={"qk": 16, "v": 16}, dtype="float32")
    p, seqlens = problem(pooling, hidden=16), (0, 5, 37, 20)
    case = inputs.case(p, seqlens=seqlens, heads_kv=2, device=DEVICE)
    t, key = case.tensors, geometry_of(shape).key
    x, dout = (torch.stack([a, a], -1)[..., 0] for a in (t["x"], t["dout"]))
    sizes = len(seqlens), max(seqlens)
    dx, dweights = compression.compress_bwd(x, list(t["weights"]), dout, t["cu_seqlens"], key, "k", *sizes, t["dx_add"])
    case.outputs = dict(zip(case.outputs, (dx, *dweights), strict=True))
    assert case.check().ok, case.check()
    wide, _ = compression.compress_bwd(x.half(), [w.half() for w in t["weights"]], dout.half(), t["cu_seqlens"], key, "k", *sizes,
                                       dx_dtype=torch.float32)  # fmt: skip
    assert wide.dtype == torch.float32 and (wide + t["dx_add"] - dx).abs().max() < 0.01 * dx.abs().max()
    for cu in (torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)):
        dx, dweights = compression.compress_bwd(x[:0], list(t["weights"]), dout[:1], cu.to(DEVICE), key, "k", len(cu) - 1, 0)
        assert dx.shape == (0, 2, 16) and len(dweights) == len(t["weights"]) and not any(w.any() for w in dweights)


def test_space():
    for pooling in POOLINGS:
        p = problem(pooling, dtype="bfloat16", dim=128, block=32, stride=16)
        body = "stream" if pooling in ("mean", "weighted") else pooling
        assert {c.body for c in islice(space.candidates(p), 1000)} == {body}
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
            for dim in (16, 48, 80, 96, 192, 256):
                for dtype in ("bfloat16", "float32"):
                    small = problem(pooling, dtype=dtype, dim=dim, block=8, stride=4, hidden=24)
                    assert space.default(small, arch) and space.safe(small)
    p = problem("mlp", dim=80)
    for changes in ({"BLOCK_K": 32}, {"BLOCK_N": 256}, {"body": "linear"}, {"BLOCK_J": 128, "BLOCK_C": 256}):
        with pytest.raises(ConfigError):
            config(p, **changes)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_rendered_is_python(pooling):
    ast.parse((paths.templates() / "compress_bwd.py.jinja").read_text())
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
    p = Problem.of("compress_bwd", key)
    case = inputs.case(p, seqlens=(40000, 24), heads_kv=4, device="meta")
    # MLP has every kernel, and the largest: it stands for the others but on one target of each compiler.
    for arch, target in [(arch, target) for arch, target in TARGETS.items() if pooling == "mlp" or arch in ("sm_90", "gfx942")]:
        module = loader.load(render.render(p, space.default(p, arch)))
        for one in loader.compile_all(lambda: case.run(module), target):
            found[f"{pooling} {arch} {one.name}"] = [one.shared, one.spills]
print(json.dumps(found))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """The default config of every pooling fits and spills next to nothing."""
    found = json.loads(compiled_python(COMPILE))
    assert len(found) == 2 * (1 + 4 + 4) + 5 * 6
    for name, (shared, spills) in found.items():
        assert shared <= (65536 if "gfx" in name else 101376), name
        assert spills <= 16, (name, spills)
