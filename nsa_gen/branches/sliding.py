"""Attention to the last ``window`` tokens (paper section 3.3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Shape
from ._inputs import check_values, kernel, ready
from .compression import attention_fake


def sliding_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """``q [T,Hq,Dqk]``, ``k [T,Hkv,Dqk]``, ``v [T,Hkv,Dv]`` → ``o [T,Hq,Dv]``, ``lse [T,Hq]``."""
    total, heads = q.shape[:2]
    check_values(cu_seqlens, total, max_seqlen)
    o = torch.empty((total, heads, v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty((total, heads), dtype=torch.float32, device=q.device)
    if total:
        run = kernel("sliding_attention_fwd", key, q, cu_seqlens, Shape(max_seqlen, batch * k.shape[1]))
        run(ready(q), ready(k), ready(v), o, lse, scale, 0, cu_seqlens, batch, max_seqlen)
    return o, lse


def sliding_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    return attention_fake(q, v)
