"""Selection of blocks: exact equality with the reference, ties and odd values included."""

from __future__ import annotations

import os

import pytest
import torch

from nsa_gen import inputs, loader, reference, render, space
from nsa_gen.config import Config, Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, in the interpreter
RAGGED = (0, 19, 1, 9, 0, 2)
CONFIGS = [{}, {"BLOCK_ROWS": 4}, {"num_warps": 2}, {"BLOCK_ROWS": 2, "num_warps": 4}]


def problem(block=2, count=4, initial=1, local=2, varlen=True) -> Problem:
    return Problem.of("select_topk", dict(selection_block=block, count=count, initial=initial, local=local, varlen=varlen))


def config(**changes) -> Config:
    return Config.of("select_topk", {"WIDTH": 16384, "BLOCK_ROWS": 1, "num_warps": 1, "maxnreg": None} | changes)


def select(p: Problem, c: Config, scores: torch.Tensor, seqlens, chunks=1) -> torch.Tensor:
    """Run on scores [T,Hkv,NB] in chunks of tokens; the output is -7 where nothing was written."""
    space.check(p, c)
    tokens, heads, _ = scores.shape
    starts = [sum(seqlens[:b]) for b in range(len(seqlens) + 1)]
    cu = torch.tensor(starts, dtype=torch.int32, device=DEVICE) if p.varlen else None
    found = torch.full((tokens, heads, p.count), -7, dtype=torch.int32, device=DEVICE)
    module = loader.load(render.render(p, c))
    step = -(-tokens // chunks)
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        module.select_topk(scores[first:last].contiguous(), found[first:last], first, cu, len(seqlens), max(seqlens))
    return found


def expected(p: Problem, scores: torch.Tensor, seqlens) -> torch.Tensor:
    starts = [sum(seqlens[:b]) for b in range(len(seqlens) + 1)]
    return reference.select_blocks(scores, p.selection_block, p.count, p.initial, p.local, starts)


def random_scores(p: Problem, seqlens, heads=1, kind="random") -> torch.Tensor:
    """Scores whose undefined columns hold NaN."""
    torch.manual_seed(0)
    shape = sum(seqlens), heads, -(-max(seqlens) // p.selection_block)
    scores = torch.randn(shape, device=DEVICE)
    if kind == "probabilities":
        scores = torch.exp(4 * scores - 30)
    elif kind == "ties":
        scores = (2 * scores).round()  # among them 0.0 and -0.0, which tie
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "adjacent":  # neighbouring floats: no bit may be lost
        scores = (torch.randint(0, 5, shape, device=DEVICE, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    elif kind == "extreme":
        values = torch.tensor([-float("inf"), 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0, 1.0], device=DEVICE)
        scores = values[torch.randint(0, len(values), shape, device=DEVICE)]
    position = torch.cat([torch.arange(length, device=DEVICE) for length in seqlens])
    future = torch.arange(shape[2], device=DEVICE) > (position // p.selection_block)[:, None]
    return scores.masked_fill(future[:, None], float("nan"))


@runs
@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, CONFIGS[i % 4]) for i, kind in enumerate(("random", "probabilities", "ties", "equal", "adjacent", "extreme"))]
    + [(kind, CONFIGS[(i + 2) % 4]) for i, kind in enumerate(("random", "probabilities", "ties", "equal", "adjacent", "extreme"))],
)
def test_equals_the_reference(kind, changes):
    p = problem()
    scores = random_scores(p, RAGGED, kind=kind)
    assert torch.equal(select(p, config(**changes), scores, RAGGED), expected(p, scores, RAGGED))


@runs
@pytest.mark.parametrize(
    ("count", "initial", "local"), [(1, 0, 1), (1, 0, 0), (3, 1, 2), (5, 0, 1), (7, 3, 0), (16, 1, 2), (18, 0, 2), (40, 1, 2)]
)
def test_counts(count, initial, local):
    """Counters of 4 and 8 bits, nothing to search, nothing forced."""
    p, seqlens = problem(1, count, initial, local), (21 + count, 3)
    scores = random_scores(p, seqlens)
    assert torch.equal(select(p, config(BLOCK_ROWS=4), scores, seqlens), expected(p, scores, seqlens))


def last_rows(p: Problem, c: Config, blocks: int, kind: str, rows: int = 3, heads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel and the reference choose for the last rows of one sequence of ``blocks`` blocks of one token."""
    torch.manual_seed(0)
    scores = torch.randn(rows, heads, blocks, device=DEVICE)
    if kind == "equal":
        scores.zero_()
    elif kind == "ties":
        scores.mul_(2).round_()
    elif kind == "crowded":  # the best share the sets of columns whose maxima bound the threshold
        scores[..., 5::512] += 10
    elif kind == "nan":
        scores[..., 9:].fill_(float("nan"))
    found = torch.full((rows, heads, p.count), -7, dtype=torch.int32, device=DEVICE)
    loader.load(render.render(p, c)).select_topk(scores, found, blocks - rows, None, 1, blocks)
    position = torch.arange(blocks - rows, blocks, device=DEVICE)
    scores = scores.nan_to_num(nan=-float("inf"))
    return found, reference.select_at(scores, position, p.selection_block, p.count, p.initial, p.local)


@runs
@pytest.mark.parametrize("kind", ["random", "equal", "ties", "crowded", "nan"])
@pytest.mark.parametrize(
    ("blocks", "changes"), [(200, {}), (500, {"BLOCK_ROWS": 4}), (1500, {"num_warps": 4}), (5003, {}), (5003, {"WIDTH": 1024})]
)
def test_long_rows(blocks, changes, kind):
    """Every width of the resident rows, and rows of three parts that stream."""
    found, want = last_rows(problem(1, 16, varlen=False), config(**changes), blocks, kind, heads=2)
    assert torch.equal(found, want)


@runs
@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("blocks", [16384, 70000])
def test_widest_rows(blocks, kind):
    """16384 blocks (a million tokens in blocks of 64): the widest resident rows; and rows that only stream."""
    found, want = last_rows(problem(1, 16, varlen=False), config(), blocks, kind)
    assert torch.equal(found, want)


@runs
@pytest.mark.parametrize("changes", [{}, {"WIDTH": 1024}])
def test_many_slots(changes):
    """More than 255 searched blocks: counters of 16 bits, more sets of columns."""
    for kind in ("random", "ties"):
        found, want = last_rows(problem(1, 300, varlen=False), config(**changes), 2100, kind)
        assert torch.equal(found, want)


@runs
@pytest.mark.parametrize("changes", CONFIGS[:3:2])
def test_nan_scores_give_valid_indices(changes):
    p = problem()
    scores = random_scores(p, RAGGED)
    scores[::3] = float("nan")
    scores[1::3, :, ::2] = float("nan")
    found = select(p, config(**changes), scores, RAGGED)
    clean = torch.where(scores.isnan(), -float("inf"), scores)
    assert torch.equal(found, expected(p, clean, RAGGED))
    found = select(p, config(**changes), torch.full_like(scores, float("inf")), RAGGED)
    assert torch.equal(found, expected(p, torch.zeros_like(scores), RAGGED)), "forced blocks are chosen beside any score"


@runs
def test_chunks():
    p = problem()
    scores = random_scores(p, RAGGED)
    assert torch.equal(select(p, config(BLOCK_ROWS=4), scores, RAGGED, chunks=5), expected(p, scores, RAGGED))


@runs
def test_fixed_lengths_and_heads():
    p = problem(varlen=False)
    scores = random_scores(p, (45, 45), heads=2)
    assert torch.equal(select(p, config(), scores, (45, 45)), expected(p, scores, (45, 45)))


@runs
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_kinds_of_values(kind):
    p = problem()
    made = inputs.case(p, seqlens=(25, 0, 6), heads_kv=1, device=DEVICE, kind=kind)
    made.run(loader.load(render.render(p, config(BLOCK_ROWS=4))))
    check = made.check()
    assert check.ok, check.message


@pytest.mark.compile
def test_defaults_compile_and_fit(compiled_python):
    """For Hopper, Ampere and CDNA3, through the same host code that launches; registers hold the tiles but for a few bytes."""
    compiled_python(
        """
from triton.backends.compiler import GPUTarget
from test_select_topk import problem
from nsa_gen import inputs, loader, render, space

p = problem(64, 16)
targets = ("cuda", 90, 32, "sm_90", 232448), ("cuda", 80, 32, "sm_80", 166912), ("hip", "gfx942", 64, "gfx942", 65536)
for backend, cc, warp, arch, limit in targets:
    target = GPUTarget(backend, cc, warp)
    module = loader.load(render.render(p, space.default(p, arch)))
    made = inputs.case(p, seqlens=(65536, 1000), heads_kv=4, device="meta")
    for found in loader.compile_all(lambda: made.run(module), target):
        assert found.shared <= limit and (found.spills or 0) <= 16, (arch, found)
"""
    )


def test_configs_are_legal():
    p = problem()
    for arch in ("sm_80", "sm_90", "gfx942"):
        space.check(p, space.default(p, arch))
    space.check(p, space.safe(p))
    assert space.size(p) == 3 * 5 * 3 * 4
