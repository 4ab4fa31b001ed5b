"""The rule by which outputs are accepted. That right kernels pass and wrong ones fail is also tested case by case in test_inputs."""

from __future__ import annotations

import pytest
import torch

from nsa_gen import acceptance, reference
from nsa_gen.config import Problem


def attention_like(dtype=torch.bfloat16):
    """An output whose first rows are large and later ones small, as attention over more and more keys gives."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(512, 4, 32, dtype=torch.float64, generator=generator) / torch.arange(1, 513)[:, None, None]
    exact[7, 2] = 0
    noise = 1 + torch.randn(exact.shape, dtype=torch.float64, generator=generator) * torch.finfo(dtype).eps
    return exact, (exact * noise).to(dtype), exact.to(dtype)


def check(exact, eager, got, rows=None, name="o"):
    return acceptance.check_floats({name: exact}, {name: eager}, {name: got}, rows)


def test_rounding_is_accepted():
    exact, eager, got = attention_like()
    found = check(exact, eager, got)
    assert found.ok and found.message == ""
    assert found.errors["o"]["rel_fro"] < found.errors["o"]["eager_rel_fro"] < 0.02
    assert check(exact[10:20], eager[10:20], got, torch.arange(10, 20)).ok


@pytest.mark.parametrize("metric", ["max_abs", "rel_fro", "row_rel"])
def test_each_metric_sees_its_fault(metric):
    exact, eager, got = attention_like()
    if metric == "max_abs":
        got[0, 0, 0] += 0.25
    elif metric == "rel_fro":
        got = (exact * 1.025).to(got.dtype)  # one bias everywhere, nowhere large
    else:
        got[508:] = -got[508:]  # a wrong tile among the smallest rows: hidden from the other two
        assert (got[508:].double() - exact[508:]).norm() / exact.norm() < 0.007
    found = check(exact, eager, got)
    assert not found.ok and found.message.startswith(f"o: {metric}"), found.message


def test_zero_rows_and_nan():
    exact, eager, got = attention_like()
    got[7, 2, 0] = 1e-30
    assert check(exact, eager, got).message == "o: rows that must be exactly 0 are not"
    got[7, 2, 0] = 0
    got[400, 1, 1] = torch.nan
    assert "1 of 65536 elements are NaN" in check(exact, eager, got).message
    assert "1 of 65536 elements are NaN" in check(exact[:5], eager[:5], got, torch.arange(5)).message
    got[400, 1, 1] = torch.inf
    assert not check(exact, eager, got).ok


def test_lse():
    exact = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    exact[3] = -torch.inf
    eager = exact.float()

    def judge(got, eager=eager):
        return check(exact, eager, got, name="lse").ok

    assert judge(exact.float())
    assert judge(exact.float() + 1e-5)
    assert not judge(exact.float() + 1e-3)
    rounded = exact.bfloat16().float()  # PyTorch's own LSE in a low precision grants nothing
    assert not judge(rounded, rounded)
    for row, value in ((3, 0.0), (4, -torch.inf), (4, torch.inf)):
        got = exact.float()
        got[row, 1] = value
        assert not judge(got)


def test_only_what_is_called_lse_is_held_to_its_rule():
    """The gradient of a bias has rank 2 too: what PyTorch makes of it in the dtype counts."""
    exact = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = exact.bfloat16()
    assert check(exact, rounded, rounded, name="dw1").ok
    assert not check(exact, rounded, rounded, name="lse").ok


def test_scores_are_relative_and_only_defined_columns_count():
    position = torch.tensor([0, 40, 90])
    exact = torch.tensor([[1e-9, 5.0, 5.0], [1.0, 1e-12, 5.0], [0.5, 0.0, 2.0]], dtype=torch.float64)[:, None]
    lse = torch.tensor([[3.0], [-torch.inf], [5.0]])
    scores = torch.full((3, 1, 8), torch.nan)
    defined = torch.arange(3) <= position[:, None] // 32
    scores[:, 0, :3] = torch.where(defined, exact[:, 0].float(), torch.nan)
    rows = torch.arange(3)

    def judge(changed, pick=rows):
        return acceptance.check_scores(changed, exact[pick], pick, position, 32, lse)

    assert judge(scores).ok and judge(scores, torch.tensor([2])).ok
    for row, column, value in ((0, 0, 1.01e-9), (1, 1, 0.0), (2, 1, 1e-20), (2, 2, torch.nan), (2, 0, torch.inf)):
        changed = scores.clone()
        changed[row, 0, column] = value
        assert not judge(changed).ok, (row, column)
    unseen = scores.clone()
    unseen[0, 0, 0] = torch.nan
    assert "1 defined elements are NaN" in judge(unseen, torch.tensor([2])).message


def test_selection_agrees_up_to_ties():
    fields = {"selection_block": 32, "count": 4, "initial": 1, "local": 2, "varlen": True}
    p = Problem.of("select_topk", fields)
    position = torch.tensor([250, 10, 250])
    scores = torch.rand(3, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = reference.select_at(scores, position, 32, 4, 1, 2)
    assert acceptance.selection_agrees(exact, scores, p, 0.0, position)
    free = [i for i in range(1, 6) if i not in exact[0, 0].tolist()]
    loser, winner = max(free, key=lambda i: scores[0, 0, i]), next(i for i in exact[0, 0].tolist() if i not in (0, 6, 7))
    swapped = exact.clone()
    swapped[0, 0] = torch.tensor(sorted({0, 6, 7, loser}))
    assert not acceptance.selection_agrees(swapped, scores, p, 1e-6, position)
    near = scores.clone()
    near[0, 0, loser] = near[0, 0, winner] * (1 - 1e-7)
    assert acceptance.selection_agrees(swapped, near, p, 1e-6, position)
    assert not acceptance.selection_agrees(swapped, near, p, 1e-9, position)
    for bad in ([0, winner, 6, 8], [0, winner, 7, 6], [0, winner, 7, -1], [winner, winner, 6, 7], [1, winner, 6, 7], [0, winner, 6, 9]):
        malformed = exact.clone()
        malformed[0, 0] = torch.tensor(bad)
        assert not acceptance.selection_agrees(malformed, torch.ones_like(scores), p, 1.0, position), bad
