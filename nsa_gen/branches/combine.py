"""The gated sum of the branches (paper eq. 5)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import kernels
from ..config import Problem, Shape
from ._inputs import ready, ready_flat

Three = tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=256)
def _problem(name: str, dtype: torch.dtype, head_dim: int) -> Problem:
    return Problem.of(name, {"dtype": str(dtype).removeprefix("torch."), "head_dim_v": head_dim})


def combine_fwd(
    o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, shape: Shape | None = None,
) -> Tensor:  # fmt: skip
    """``o_* [T,Hq,Dv]``, ``g_* [T,Hq]`` → ``o [T,Hq,Dv]``.

    Args:
        shape: the call's sizes, which choose the config; default: one sequence of all tokens, as many KV as query heads.
    """
    total, heads, dim = o_cmp.shape
    o = torch.empty((total, heads, dim), dtype=o_cmp.dtype, device=o_cmp.device)
    if total:
        found = kernels.get(_problem("combine_fwd", o_cmp.dtype, dim), shape or Shape(total, heads), kernels.device_of(o_cmp))
        found.combine_fwd(ready(o_cmp), ready(o_slc), ready(o_swa), g_cmp, g_slc, g_swa, o)
    return o


def combine_fake(o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor) -> Tensor:
    return o_cmp.new_empty(o_cmp.shape)


def combine_bwd(
    do: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`combine_fwd`: those of ``o_cmp, o_slc, o_swa``, then of the gates."""
    dos = tuple(torch.empty(o_cmp.shape, dtype=o_cmp.dtype, device=o_cmp.device) for _ in range(3))
    _, _, dgates = numbers(do, (o_cmp, o_slc, o_swa), (g_cmp, g_slc, g_swa), dos=dos)
    return *dos, *dgates  # type: ignore[return-value]


def combine_bwd_fake(
    do: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor
) -> tuple[Tensor, ...]:
    return *(o_cmp.new_empty(o_cmp.shape) for _ in range(3)), *(g.new_empty(g.shape) for g in (g_cmp, g_slc, g_swa))


def numbers(
    do: Tensor, outputs: tuple[Tensor, ...], gates: Three, shape: Shape | None = None, dos: tuple[Tensor | None, ...] = (None, None, None)
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What attention's backward takes of each branch: ``do @ o`` and the gate, fp32 ``[T,Hq]``; and the gradients of the gates.

    Args:
        do: ``[T,Hq,Dv]``, of the gated sum.
        outputs: of the branches, or of one.
        gates: ``[T,Hq]`` each.
        shape: as for :func:`combine_fwd`.
        dos: ``[T,Hq,Dv]`` of each branch, written: ``gate * do``; None where not wanted.
    """
    total, heads, dim = do.shape
    rows = (total, heads)
    count, missing = len(outputs), (None,) * (3 - len(outputs))
    deltas, fp32 = ([torch.empty(rows, dtype=torch.float32, device=do.device) for _ in range(count)] for _ in range(2))
    # Of a gate in fp32 the gradient is delta; an operator's results must be tensors of their own, which they are.
    dgates = [None if g.dtype is torch.float32 else torch.empty(rows, dtype=g.dtype, device=g.device) for g in gates[:count]]
    if total:
        found = kernels.get(_problem("combine_bwd", do.dtype, dim), shape or Shape(total, heads), kernels.device_of(do))
        given = (*(ready_flat(o) for o in outputs), *missing)
        found.combine_bwd(ready(do), *given, *gates, (*deltas, *missing), (*fp32, *missing), (*dgates, *missing), dos)
    return deltas, fp32, [delta if dg is None else dg for delta, dg in zip(deltas, dgates, strict=True)]


def delta(do: Tensor, o: Tensor, dlse: Tensor | None, shape: Shape) -> tuple[Tensor, Tensor]:
    """``do @ o`` less the gradient of the LSE, and a gate of 1, both fp32 ``[T,Hq]``: the backward of a branch by itself."""
    one = torch.ones((1,), dtype=torch.float32, device=do.device).expand(do.shape[:2])
    (found,), (gate,), _ = numbers(do, (o,), (one, one, one), shape)
    return found if dlse is None else found - dlse, gate
