"""Rotary position embedding, and the positions of packed tokens and compressed blocks: no host reads ``cu_seqlens`` for them."""

from __future__ import annotations

import torch
from torch import Tensor

from .branches._inputs import Tokens
from .branches.compression import rows_of
from .spec import Spec


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """``x [T,H,D]`` at ``positions [T]``: dimensions ``i`` and ``i + D/2`` are a pair, turned by ``p * θ**(-2i/D)``.

    Angles and rotation are float32 (arXiv 2104.09864, eq. 34, with Llama's order of dimensions).
    """
    half = x.shape[-1] // 2
    frequency = theta ** (torch.arange(half, device=x.device, dtype=torch.float32) / -half)
    angle = positions.float()[:, None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def positions_of(tokens: Tokens, device: torch.device) -> Tensor:
    """Each packed token's position in its sequence, int64 ``[T]``."""
    if tokens.cu_seqlens is None:
        return torch.arange(tokens.max_seqlen, device=device).repeat(tokens.batch)
    token, cu = torch.arange(tokens.total, device=device), tokens.cu_seqlens.long()
    return token - cu[torch.searchsorted(cu, token, right=True) - 1]


def positions_of_blocks(tokens: Tokens, spec: Spec, device: torch.device, position_ids: Tensor | None = None) -> Tensor:
    """The position of token ``l // 2`` of the block behind each compressed row, int64 ``[max(T//d,1)]``; anything for rows of no block."""
    block, stride = spec.compression.block, spec.compression.stride
    row, cu = torch.arange(rows_of(tokens.total, stride), device=device), tokens.cu_seqlens
    cu = torch.arange(tokens.batch + 1, device=device) * tokens.max_seqlen if cu is None else cu.long()
    # A sequence's rows end where the next one's begin, at the latest: the last start at or before a row is its own.
    start = cu[torch.searchsorted(cu // stride, row, right=True) - 1]
    position = (row - start // stride) * stride + block // 2
    if position_ids is None or tokens.total == 0:
        return position
    return position_ids.long().flatten()[(start + position).clamp(max=tokens.total - 1)]
