"""When a kernel's outputs are accepted: errors against the float64 reference, held to what plain PyTorch reaches in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .config import Problem

#: About one rounding, relative: what is granted on top of twice PyTorch's own error.
FLOOR = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
#: What an LSE may be off, relative to the largest. It is summed in float32 whatever the dtype: one key of 8192 too many shows
#: (1.2e-4 in about 11).
LSE_FLOOR = 5e-6


@dataclass(frozen=True)
class Check:
    """Whether a kernel's outputs are accepted, the measured errors by output and metric, and in words what is wrong."""

    ok: bool
    errors: dict[str, dict[str, float]]
    message: str


def check_floats(wanted: dict[str, Tensor], eager: dict[str, Tensor], outputs: dict[str, Tensor], rows: Tensor | None) -> Check:
    """Hold float outputs to ``wanted`` (float64), given ``eager``: the same computed by PyTorch in the problem's dtype.

    The error may be twice that of ``eager`` plus ``FLOOR``: in the largest element (``max_abs``), in norm (``rel_fro``), and in the norm of
    the worst row (``row_rel``: a wrong tile among small values shows there). An output called ``lse`` may be off by ``LSE_FLOOR`` only:
    PyTorch rounds its logits, the kernels do not. Rows that are exactly zero and LSEs of -inf must be so.

    Args:
        outputs: whole outputs: every element must be written.
        rows: the rows of ``outputs`` that ``wanted`` and ``eager`` have, None for all.
    """
    errors, faults = {}, []
    for name, exact in wanted.items():
        out = outputs[name]
        errors[name], fault = _compare(out if rows is None else out[rows], exact, eager[name], name == "lse")
        unwritten = int(out.isnan().sum())
        if unwritten:
            fault = f"{unwritten} of {out.numel()} elements are NaN (not written, or computed so)"
        if fault:
            faults.append(f"{name}: {fault}")
    return Check(not faults, errors, "; ".join(faults))


def _compare(got: Tensor, exact: Tensor, eager: Tensor, lse: bool) -> tuple[dict[str, float], str]:
    """Errors of ``got`` and of ``eager``, and what breaks the rule, if anything."""
    floor = FLOOR[got.dtype]
    got, eager, exact = got.double(), eager.double(), exact.double()
    if lse:
        if not torch.equal(got == -torch.inf, exact == -torch.inf):
            return {}, "-inf stands elsewhere than in the reference"
        got, eager, exact = (torch.where(exact == -torch.inf, 0.0, x) for x in (got, eager, exact))
    norm = exact.norm(dim=-1)
    if not lse and bool((got[norm == 0] != 0).any()):
        return {}, "rows that must be exactly 0 are not"
    measured: dict[str, float] = {}
    for prefix, x in (("", got), ("eager_", eager)):
        error = x - exact
        measured[f"{prefix}max_abs"] = _largest(error.abs())
        measured[f"{prefix}rel_fro"] = float(error.norm()) / max(float(exact.norm()), 1e-30)
        measured[f"{prefix}row_rel"] = _largest((error.norm(dim=-1) / norm)[norm > 0])
    largest = _largest(exact.abs())
    if lse:
        bounds = {"max_abs": LSE_FLOOR * max(largest, 1.0)}
    else:
        granted = {"max_abs": floor * max(largest, 1e-3), "rel_fro": floor / 4, "row_rel": floor}
        bounds = {name: 2 * measured[f"eager_{name}"] + more for name, more in granted.items()}
    for name, bound in bounds.items():
        if not measured[name] <= bound:  # NaN fails too
            return measured, f"{name} {measured[name]:.2e} > {bound:.2e} (PyTorch in this dtype: {measured[f'eager_{name}']:.2e})"
    return measured, ""


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def check_scores(scores: Tensor, exact: Tensor, rows: Tensor, position: Tensor, selection_block: int, lse: Tensor) -> Check:
    """Hold importance scores to the exact ones in their defined columns ``i <= t//selection_block``: small scores count like large ones.

    Args:
        scores: the whole buffer ``[R,Hkv,≥NB]``, of which every defined element must be written.
        exact: ``[S,Hkv,NB]``, for the ``rows [S]`` of the buffer.
        position: ``[R]`` of the buffer's rows in their sequences.
        lse: what the scores were made from; its size bounds that of the logits, whose float32 rounding the exponential passes on.
    """
    blocks = exact.shape[2]
    column = torch.arange(blocks, device=scores.device)
    last = (position // selection_block)[:, None, None]
    unwritten = 0
    for i in range(0, len(scores), 4096):
        part = slice(i, i + 4096)
        unwritten += int((scores[part, :, :blocks].isnan() & (column <= last[part])).sum())
    relative = (scores[rows][..., :blocks].double() - exact).abs() / exact.clamp(min=1e-30)
    worst = _largest(relative[(column <= last[rows]).expand_as(relative)])
    finite = lse[lse.isfinite()]
    bound = 1e-4 + 1.6e-5 * _largest(finite.abs())
    message = ""
    if unwritten:
        message = f"scores: {unwritten} defined elements are NaN (not written, or computed so)"
    elif not worst <= bound:
        message = f"scores: relative error {worst:.2e} > {bound:.2e}"
    return Check(not message, {"scores": {"max_rel": worst, "bound": bound}}, message)


def check_indices(out: Tensor, exact: Tensor, rows: Tensor | None) -> Check:
    """Hold ``block_indices`` to the exact ones: equal in all ``rows``, every element of ``out`` written (not -7)."""
    got = out if rows is None else out[rows]
    wrong, unwritten = int((got != exact).any(-1).sum()), int((out == -7).sum())
    message = ""
    if unwritten:
        message = f"block_indices: {unwritten} elements were not written"
    elif wrong:
        message = f"block_indices: {wrong} of {got.shape[0] * got.shape[1]} rows differ"
    return Check(not message, {"block_indices": {"rows_wrong": float(wrong)}}, message)


def selection_agrees(block_indices: Tensor, scores64: Tensor, problem: Problem, rtol: float, position: Tensor | None = None) -> bool:
    """Whether every chosen set is right up to rounding of the scores.

    Args:
        block_indices: int32 ``[S,Hkv,n]`` to judge.
        scores64: exact scores ``[S,Hkv,NB]``.
        problem: of ``select_topk``.
        rtol: scores this close, relatively, may stand for each other: a row must hold the exact choice except for blocks that tie so.
        position: ``[S]`` of the queries in their sequences (default: ``0 … S-1``).

    Returns:
        False also for malformed rows: not ascending, not distinct, not causal, wrong count, a forced block missing.
    """
    blocks, device = scores64.shape[2], scores64.device
    position = torch.arange(len(scores64), device=device) if position is None else position.to(device)
    wanted = reference.select_at(scores64, position, problem.selection_block, problem.count, problem.initial, problem.local)
    if not torch.equal(wanted < 0, block_indices < 0) or bool((block_indices >= blocks).any()):
        return False
    if not bool(((block_indices[..., 1:] > block_indices[..., :-1]) | (block_indices[..., 1:] < 0)).all()):
        return False
    got, exact = (_members(x, blocks) for x in (block_indices, wanted))
    column, current = torch.arange(blocks, device=device), position[:, None] // problem.selection_block
    causal = column <= current
    forced = causal & ((column < problem.initial) | (column > current - problem.local))
    if bool((got & ~causal[:, None]).any()) or bool((forced[:, None] & ~got).any()):
        return False
    differ = got != exact
    high = torch.where(differ, scores64, -torch.inf).amax(2)
    low = torch.where(differ, scores64, torch.inf).amin(2)
    return bool(((high - low <= rtol * high.abs()) | ~differ.any(2)).all())


def _members(block_indices: Tensor, blocks: int) -> Tensor:
    """Which blocks each row holds, bool ``[S,Hkv,NB]``."""
    index = block_indices.long()
    index = torch.where(index < 0, blocks, index)
    return torch.zeros(*index.shape[:2], blocks + 1, dtype=torch.bool, device=index.device).scatter_(2, index, True)[..., :blocks]
