"""Gradients of NSA's attention branches, written out: the oracle of the backward's kernels.

The forward in :mod:`nsa_gen.reference` is differentiable, and tests hold these formulas to autograd through it. What autograd cannot do is
sample: the gradient of a few keys of a long sequence needs every query, but only those keys. Conventions are those of that module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .reference import Lengths, bounds

#: Which keys queries see: packed tokens ``[S]``, positions ``[S]`` and key positions ``[N]`` → bool ``[S,1,N]`` or ``[S,Hkv,N]``.
Visible = Callable[[Tensor, Tensor, Tensor], Tensor]


def sees_compressed(block: int, stride: int) -> Visible:
    """Compressed token ``j`` ends at or before the query (paper eq. 8)."""
    return lambda tokens, position, key: (key * stride + block - 1 <= position[:, None])[:, None]


def sees_window(window: int) -> Visible:
    """``t - window < s <= t``."""
    return lambda tokens, position, key: ((key <= position[:, None]) & (key > position[:, None] - window))[:, None]


def sees_selected(block_indices: Tensor, selection_block: int) -> Visible:
    """``s <= t`` in the query's chosen blocks (paper eq. 12); ``block_indices [T,Hkv,n]``."""

    def visible(tokens: Tensor, position: Tensor, key: Tensor) -> Tensor:
        chosen = block_indices[tokens].long()  # [S, Hkv, n]
        blocks = int(key.max()) // selection_block + 1 if len(key) else 1
        chosen = torch.where((chosen < 0) | (chosen >= blocks), blocks, chosen)
        member = torch.zeros(*chosen.shape[:2], blocks + 1, dtype=torch.bool, device=key.device).scatter_(2, chosen, True)
        return member[..., key // selection_block] & (key <= position[:, None])[:, None]

    return visible


def attention_backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, visible: Visible,
                       scale: float, offsets: list[tuple[int, int]], cu_seqlens: Lengths = None, queries: Tensor | None = None,
                       keys: Tensor | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``dq``, ``dk``, ``dv`` of ``gate * softmax(scale * q @ k) @ v`` over the keys each query sees, given ``do`` of that product.

    With ``p = exp(logit - lse)`` and ``ds = gate * p * (do @ v - delta)``: ``dq = scale * ds @ k``, ``dk = scale * ds.T @ q`` and
    ``dv = (gate * p).T @ do``, where ``delta`` is ``do @ o`` less the gradient of ``lse``, both before the gate.

    Args:
        q, do: ``[T,Hq,·]``.
        k, v: ``[rows,Hkv,·]``.
        lse, delta: ``[T,Hq]``; lse natural log.
        gate: ``[T,Hq]``, None for 1.
        offsets: first row and number of keys of each sequence in k and v.
        queries: packed tokens ``[S]`` whose ``dq`` is wanted, default all.
        keys: rows ``[K]`` of k and v whose gradients are wanted, default all.

    Returns:
        ``dq [S,Hq,Dqk]``, ``dk [K,Hkv,Dqk]``, ``dv [K,Hkv,Dv]`` in ``dtype``; rows of k that belong to no sequence have 0.
    """
    dtype = dtype or q.dtype
    wide, heads = torch.promote_types(dtype, torch.float32), k.shape[1]
    dq = q.new_zeros(q.shape, dtype=wide)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    tokens = torch.arange(len(q), device=q.device) if queries is None else queries
    rows = torch.arange(len(k), device=q.device) if keys is None else keys
    for (start, end), (first, count) in zip(bounds(cu_seqlens, len(q)), offsets, strict=True):
        mine = tokens[(tokens >= start) & (tokens < end)]
        kept = rows[(rows >= first) & (rows < first + count)]
        whole = torch.arange(start, end, device=q.device), torch.arange(first, first + count, device=q.device)
        every = (mine, kept) if queries is None and keys is None else None
        for t, r in [every] if every else [(mine, whole[1]), (whole[0], kept)]:
            step = max(1, reference.SLAB_BYTES // max(len(r) * q.shape[1] * wide.itemsize * 2, 1))
            for part in t.split(step) if len(r) else ():
                seen = visible(part, part - start, r - first)[:, :, None]
                found = _slab(q, k, v, do, lse, delta, gate, seen, part, r, scale, heads, dtype, wide)
                if every or r is not kept:
                    dq[part] = found[0]
                if every or r is kept:
                    dk[r] += found[1]
                    dv[r] += found[2]
    return dq[tokens].to(dtype), dk[rows].to(dtype), dv[rows].to(dtype)


def _slab(q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor | None, seen: Tensor, tokens: Tensor,
          rows: Tensor, scale: float, heads: int, dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def grouped(x: Tensor, kind: torch.dtype) -> Tensor:
        return x[tokens].to(kind).unflatten(1, (heads, -1))

    q, do, k, v = grouped(q, dtype), grouped(do, dtype), k[rows].to(dtype), v[rows].to(dtype)
    logits = (torch.einsum("shgd,nhd->shgn", q, k) * scale).to(wide)
    prob = torch.where(seen, logits - grouped(lse, wide)[..., None], -torch.inf).exp()
    gated = prob if gate is None else prob * grouped(gate, wide)[..., None]
    ds = torch.einsum("shgd,nhd->shgn", do, v).to(wide) - grouped(delta, wide)[..., None]
    ds = (torch.where(seen, ds, 0.0) * gated).to(dtype)
    dq = torch.einsum("shgn,nhd->shgd", ds, k).flatten(1, 2) * scale
    dk = torch.einsum("shgn,shgd->nhd", ds, q) * scale
    return dq.to(wide), dk.to(wide), torch.einsum("shgn,shgd->nhd", gated.to(dtype), do).to(wide)
