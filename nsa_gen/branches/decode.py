"""Decoding from a paged cache: a few new tokens of each sequence through all branches, in two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Cached, Shape
from ._inputs import geometry, kernel, ready, ready_flat

#: Tables of a cache by what K and V are: those of the selected, the sliding and the compressed branch.
STREAMS = {2: (0, 0, 1), 4: (1, 2, 3)}


def decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, slots: Tensor, lengths: Tensor, arrived: Tensor, scales: list[Tensor],
    g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, key: str, max_seqlen: int, scale: float,
) -> Tensor:  # fmt: skip
    """``q [S,n,Hq,Dqk]`` → ``o [S,n,Hq,Dv]``, of the last n tokens of each sequence, which the cache holds already.

    Args:
        k_pages, v_pages, tables, slots, lengths: of a ``PagedKVCache``; slots of S sequences.
        arrived: int32, 0, at least ``config.COUNTERS*S*n*Hkv``; left so.
        scales: none, or of fp8 storage: K's and V's ``[3,Hkv]``, of the compressed, the selected and the sliding branch.
        g_cmp, g_slc, g_swa: ``[S,n,Hq]``, all of q's dtype or all of float32.
        max_seqlen: no sequence is longer.
    """
    sequences, tokens, heads_query = q.shape[:3]
    o = torch.empty((sequences, tokens, heads_query, v_pages.shape[3]), dtype=q.dtype, device=q.device)
    if not sequences:
        return o
    shape = Shape(max_seqlen, sequences * k_pages.shape[1])
    which = Cached(str(k_pages.dtype).removeprefix("torch."), k_pages.shape[2], tokens, tables.shape[0] - 1)
    host = kernel("decode_fwd", key, q, None, shape, which)
    selected, sliding, compressed = (tables[i] for i in STREAMS[tables.shape[0]])
    block_indices = torch.empty((sequences, tokens, k_pages.shape[1], geometry(key).count), dtype=torch.int32, device=q.device)
    gates = map(ready_flat, (g_cmp, g_slc, g_swa))
    host(
        ready(q), k_pages, v_pages, *(scales or (None, None)), compressed, selected, sliding, slots, lengths, arrived, *gates,
        block_indices, o, max_seqlen, scale,
    )  # fmt: skip
    return o


def append(
    slots: Tensor, k: tuple[Tensor, ...], v: tuple[Tensor, ...], k_pages: Tensor, v_pages: Tensor, tables: Tensor,
    scales: tuple[Tensor, ...], lengths: Tensor, phi_k: tuple[Tensor, ...], phi_v: tuple[Tensor, ...], key: str, max_seqlen: int,
) -> tuple[()]:  # fmt: skip
    """Write the last n tokens of S sequences, and the compressed tokens that they complete, where ``lengths`` and ``tables`` say.

    Args:
        k, v: one each, or one for each branch, ``[S*n,Hkv,D]``.
        k_pages, v_pages, tables, slots, lengths: of a ``PagedKVCache``, whose lengths count these tokens already.
        scales: none, or K's and V's, ``[streams,Hkv]``.
    """
    sequences = slots.shape[0]
    if not k[0].shape[0]:
        return ()
    which = Cached(str(k_pages.dtype).removeprefix("torch."), k_pages.shape[2], k[0].shape[0] // sequences, len(k))
    host = kernel("cache_append", key, k[0], None, Shape(max_seqlen, sequences * k_pages.shape[1]), which)
    new = [[ready(x) for x in given] for given in (k, v)]
    new = [given if len({x.stride() for x in given}) == 1 else [x.contiguous() for x in given] for given in new]
    weights = ([ready_flat(x) for x in w] for w in (phi_k, phi_v))
    host(*new, k_pages, v_pages, tables, *(scales or (None, None)), slots, lengths, *weights)
    return ()


def decode_fake(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, slots: Tensor, lengths: Tensor, arrived: Tensor, scales: list[Tensor],
    g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, key: str, max_seqlen: int, scale: float,
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:3], v_pages.shape[3]))
