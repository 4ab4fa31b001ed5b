"""The gated sum of the branches (paper eq. 5)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import kernels
from ..config import Problem, Shape
from ._inputs import ready


@lru_cache(maxsize=256)
def _problem(dtype: torch.dtype, head_dim: int) -> Problem:
    return Problem.of("combine_fwd", {"dtype": str(dtype).removeprefix("torch."), "head_dim_v": head_dim})


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
        found = kernels.get(_problem(o_cmp.dtype, dim), shape or Shape(total, heads), kernels.device_of(o_cmp))
        found.combine_fwd(ready(o_cmp), ready(o_slc), ready(o_swa), g_cmp, g_slc, g_swa, o)
    return o


def combine_fake(o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor) -> Tensor:
    return o_cmp.new_empty(o_cmp.shape)
