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


def sliding_attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor, cu_seqlens: Tensor | None, key: str,
    batch: int, max_seqlen: int, scale: float, dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    dtype: torch.dtype | None = None, selected: tuple[Tensor, Tensor, Tensor, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``gate * sliding_attention``: ``dq [T,Hq,Dqk]``, ``dk [T,Hkv,Dqk]``, ``dv [T,Hkv,Dv]``, the same bits in every run.

    Args:
        do, lse, delta, gate: as for ``compressed_attention_bwd``.
        dq, dk, dv: contiguous, are added to the gradients; dq in place, dk and dv too where they are of ``dtype``.
        dtype: of the gradients of k and v, default q's.
        selected: selected attention's lse, delta and gate, its block and how many blocks are local: the gradients of its attention to
            those, which has the same k and v, are added.
    """
    dq_out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if dq is None else dq
    dk_out, dv_out = (_like(x, given, dtype or q.dtype) for x, given in ((k, dk), (v, dv)))
    if q.shape[0]:
        run = kernel("sliding_attention_bwd", key, q, cu_seqlens, Shape(max_seqlen, batch * k.shape[1]))
        given = (ready(q), ready(k), ready(v), ready(do), lse, delta, gate)
        run(*given, dq_out, dk_out, dv_out, dq, dk, dv, scale, cu_seqlens, batch, max_seqlen, selected)
    return dq_out, dk_out, dv_out


def _like(x: Tensor, given: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device) if given is None or given.dtype is not dtype else given
