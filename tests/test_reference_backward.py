"""The backward's oracle against autograd through the forward's, in float64; what it samples against its whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_gen import reference
from nsa_gen import reference_backward as backward

LENGTHS = (0, 37, 1, 0, 66, 7)
LIMITS = (0, 0, 37, 38, 38, 104, 111)
TOTAL, HEADS, BLOCK, STRIDE, CHOSEN, COUNT, WINDOW = 111, 2, 8, 4, 16, 3, 12
BRANCHES = ("compressed", "selected", "sliding")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Branch:
    """One branch with everything its gradients follow from; ``dq dk dv`` are autograd's."""

    def __init__(self, name: str, group: int = 2, qk: int = 6, v: int = 6, gated: bool = True):
        rows = reference.compressed_rows(TOTAL, STRIDE) if name == "compressed" else TOTAL
        self.group = group
        self.q, self.k, self.v = (
            x.requires_grad_() for x in (normal(TOTAL, HEADS * group, qk), normal(rows, HEADS, qk, seed=1), normal(rows, HEADS, v, seed=2))
        )
        self.offsets = [(start, end - start) for start, end in reference.bounds(LIMITS, TOTAL)]
        if name == "compressed":
            self.visible = backward.sees_compressed(BLOCK, STRIDE)
            self.offsets = reference.compressed_offsets(LIMITS, TOTAL, BLOCK, STRIDE)
            o, lse = reference.compressed_attention(self.q, self.k, self.v, BLOCK, STRIDE, cu_seqlens=LIMITS)
        elif name == "selected":
            scores = torch.rand(TOTAL, HEADS, 5, generator=torch.Generator().manual_seed(3))
            blocks = reference.select_blocks(scores, CHOSEN, COUNT, 0, 1, LIMITS)
            self.visible = backward.sees_selected(blocks, CHOSEN)
            o, lse = reference.selected_attention(self.q, self.k, self.v, blocks, CHOSEN, cu_seqlens=LIMITS)
        else:
            self.visible = backward.sees_window(WINDOW)
            o, lse = reference.sliding_attention(self.q, self.k, self.v, WINDOW, cu_seqlens=LIMITS)
        self.do, dlse = normal(*o.shape, seed=4), normal(*lse.shape, seed=5)
        self.gate = normal(*lse.shape, seed=6).sigmoid() if gated else None
        self.lse, self.delta = lse.detach(), ((self.do * o).sum(-1) - dlse).detach()
        factor = torch.ones_like(dlse) if self.gate is None else self.gate
        loss = (factor[..., None] * self.do * o).sum() + (factor * dlse * lse)[lse.isfinite()].sum()
        self.wanted = torch.autograd.grad(loss, (self.q, self.k, self.v))
        self.q, self.k, self.v = (x.detach() for x in (self.q, self.k, self.v))

    def found(self, queries=None, keys=None, dtype=None, **changed) -> tuple[Tensor, Tensor, Tensor]:
        given = {name: changed.get(name, getattr(self, name)) for name in ("q", "k", "v", "do", "lse", "delta", "gate")}
        scale = self.q.shape[2] ** -0.5
        return backward.attention_backward(
            **given, visible=self.visible, scale=scale, offsets=self.offsets, cu_seqlens=LIMITS, queries=queries, keys=keys, dtype=dtype
        )


def close(got, want, atol=1e-10) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-10)


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("name", BRANCHES)
def test_gradients_are_autograd_s(name, group):
    branch = Branch(name, group)
    close(branch.found(), branch.wanted)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("qk", "v"), [(8, 4), (3, 7)])
@pytest.mark.parametrize("name", BRANCHES)
def test_head_dims_and_no_gate(name, qk, v, gated):
    branch = Branch(name, qk=qk, v=v, gated=gated)
    close(branch.found(), branch.wanted)


@pytest.mark.parametrize("name", BRANCHES)
def test_small_slabs_give_the_same(name, monkeypatch):
    branch = Branch(name)
    monkeypatch.setattr(reference, "SLAB_BYTES", 1)
    close(branch.found(), branch.wanted)


@pytest.mark.parametrize("name", BRANCHES)
def test_samples_are_rows_of_the_whole(name):
    """Of queries alone, of keys alone, of both; in any order, of sequences with and without any."""
    branch = Branch(name, group=3)
    dq, dk, dv = branch.found()
    queries = torch.tensor([110, 5, 36, 37, 38, 103, 60])
    rows = len(branch.k)
    keys = torch.tensor([rows - 1, 0, rows // 2, 3, rows // 2 + 1, 1])
    close(branch.found(queries, keys), (dq[queries], dk[keys], dv[keys]))
    close(branch.found(queries), (dq[queries], dk, dv))
    close(branch.found(None, keys), (dq, dk[keys], dv[keys]))
    nothing = torch.empty(0, dtype=torch.long)
    close(branch.found(nothing, keys[:1]), (dq[:0], dk[keys[:1]], dv[keys[:1]]))
    close(branch.found(queries[:2], nothing), (dq[queries[:2]], dk[:0], dv[:0]))


def test_rows_of_no_sequence_get_nothing_and_give_nothing():
    """Also where they are NaN, as gap rows of compressed tensors are in tests."""
    branch = Branch("compressed")
    gap = torch.ones(len(branch.k), dtype=torch.bool)
    for first, count in branch.offsets:
        gap[first : first + count] = False
    assert 0 < gap.sum() < len(gap)
    k, v = (x.masked_fill(gap[:, None, None], torch.nan) for x in (branch.k, branch.v))
    found = branch.found(k=k, v=v)
    close(found, branch.wanted)
    assert not found[1][gap].any() and not found[2][gap].any()
    blind = branch.lse == -torch.inf
    assert bool(blind.any()) and not found[0][blind].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BRANCHES)
def test_other_dtypes_round_only(name, dtype):
    branch = Branch(name)
    found = branch.found(dtype=dtype)
    assert all(x.dtype == dtype for x in found)
    for got, want in zip(found, branch.wanted, strict=True):
        assert (got.double() - want).norm() < 4 * torch.finfo(dtype).eps * want.norm()


def test_a_key_that_no_query_chose():
    """Blocks of a query need not hold its own token, nor need any query choose a block."""
    branch = Branch("selected")
    blocks = torch.full((TOTAL, HEADS, COUNT), -1)
    blocks[20:37, 0, 0] = 1
    branch.visible = backward.sees_selected(blocks, CHOSEN)
    _, lse = reference.selected_attention(branch.q, branch.k, branch.v, blocks, CHOSEN, cu_seqlens=LIMITS)
    dq, dk, dv = branch.found(lse=lse)
    for x in (dk, dv):
        assert x[16:32, 0].any() and not x[:16].any() and not x[32:].any() and not x[:, 1].any()
    assert dq[20:37, :2].any() and not dq[:20].any() and not dq[37:].any() and not dq[:, 2:].any()
