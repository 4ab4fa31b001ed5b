"""Which blocks a query reads (paper eqs. 9-11) and attention to them (eq. 12)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import paths
from ..config import Shape
from ..errors import InputError
from ._inputs import Geometry, check_values, geometry, kernel, ready, ready_flat
from .compression import attention_fake

#: Queries a chunk has at least, and a multiple of: what a kernel's tile needs to be worth its launch, and rows of any chunk stay aligned.
CHUNK = 64


def query_chunk(total: int, query_bytes: int, bound: int, scratch: tuple[int, int, int] = (0, 0, 0)) -> int:
    """Queries whose buffers fit in ``bound`` bytes: chunks of nearly one size, in multiples of ``CHUNK``.

    At least ``CHUNK``, even where that takes more than ``bound``.

    Args:
        total: all queries.
        query_bytes: what one query of a chunk takes.
        scratch: of selected attention (``workspace`` of its rendered module): bytes whatever the chunk, bytes a query, and the most queries
            it works on at once.
    """
    fixed, each, most = scratch
    room = max(bound - fixed, 0)
    fit = room // (query_bytes + each)
    if fit > most:
        fit = (room - each * most) // query_bytes
    fit = max(fit // CHUNK, 1) * CHUNK
    chunks = -(-total // fit)
    return -(-total // (chunks * CHUNK)) * CHUNK if chunks else CHUNK


def score_columns(max_seqlen: int, g: Geometry) -> int:
    """Columns of a score buffer: the blocks of the longest sequence, in multiples of 8."""
    return (-(-max_seqlen // g.selection_block) + 7) & ~7


def select_blocks_fwd(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float
) -> Tensor:
    """``q [T,Hq,Dqk]``, ``k_cmp [max(T//d,1),Hkv,Dqk]``, ``lse [T,Hq]`` → ``block_indices`` int32 ``[T,Hkv,n]``.

    The score buffer takes ``total * Hkv * blocks * 4`` bytes whole; it is made for as many queries at a time as fit in the workspace.
    """
    total, heads = q.shape[0], k_cmp.shape[1]
    check_values(cu_seqlens, total, max_seqlen)
    g = geometry(key)
    block_indices = torch.empty((total, heads, g.count), dtype=torch.int32, device=q.device)
    if not total:
        return block_indices
    shape = Shape(max_seqlen, batch * heads)
    topk = kernel("select_topk", key, q, cu_seqlens, shape)
    columns = score_columns(max_seqlen, g)
    chunk = query_chunk(total, heads * columns * 4, paths.workspace_bytes())
    scores = torch.empty((min(chunk, total), heads, columns), dtype=torch.float32, device=q.device)
    importance = None
    if max_seqlen > g.count * g.selection_block:
        importance = kernel("importance_fwd", key, q, cu_seqlens, shape)
        q, k_cmp, lse = ready(q), ready(k_cmp), ready_flat(lse)
    else:
        scores.zero_()  # a query may have all its candidates, whatever they score
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        part = scores[: stop - start]
        if importance is not None:
            importance(q[start:stop], k_cmp, lse[start:stop], part, scale, start, cu_seqlens, batch, max_seqlen)
        topk(part, block_indices[start:stop], start, cu_seqlens, batch, max_seqlen)
    return block_indices


def select_blocks_fake(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float
) -> Tensor:
    return q.new_empty((q.shape[0], k_cmp.shape[1], geometry(key).count), dtype=torch.int32)


def check_indices(block_indices: Tensor, cu_seqlens: Tensor | None, key: str, max_seqlen: int) -> None:
    """Hold given block indices to what the kernels rely on, where their values may be read (on the CPU, or with ``NSA_GEN_DEBUG=1``).

    Raises:
        InputError: not ascending and distinct with -1 last, or a block that begins after its query's token.
    """
    if not block_indices.numel() or (block_indices.is_cuda and not paths.debug()):
        return
    token = torch.arange(block_indices.shape[0], device=block_indices.device)
    start = token - token % max_seqlen if cu_seqlens is None else cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
    position = token - start
    last = (position // geometry(key).selection_block)[:, None, None]
    following = block_indices.roll(-1, 2)
    following[..., -1] = -1
    wrong = (block_indices < -1) | (block_indices > last) | ((following >= 0) & (following <= block_indices))
    wrong |= (block_indices == -1) & (following >= 0)
    if bool(wrong.any()):
        t, h, _ = wrong.nonzero()[0].tolist()
        raise InputError(
            f"block_indices must be ascending and distinct with -1 last, none past the query's own block; at token {t}, KV head {h} "
            f"(own block {int(last[t])}) they are {block_indices[t, h].tolist()}"
        )


def selected_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``q [T,Hq,Dqk]``, ``k [T,Hkv,Dqk]``, ``v [T,Hkv,Dv]``, ``block_indices [T,Hkv,n]`` → ``o [T,Hq,Dv]``, ``lse [T,Hq]``."""
    total, heads = q.shape[:2]
    check_values(cu_seqlens, total, max_seqlen)
    check_indices(block_indices, cu_seqlens, key, max_seqlen)
    o = torch.empty((total, heads, v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty((total, heads), dtype=torch.float32, device=q.device)
    if total:
        run = kernel("selected_attention_fwd", key, q, cu_seqlens, Shape(max_seqlen, batch * k.shape[1]))
        block_indices, bound = ready_flat(block_indices), paths.workspace_bytes()
        run(ready(q), ready(k), ready(v), block_indices, o, lse, scale, bound, 0, cu_seqlens, batch, max_seqlen)
    return o, lse


def selected_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return attention_fake(q, v)


def selected_attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor,
    cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float, deterministic: bool, dtype: torch.dtype, local: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``gate * selected_attention``: ``dq [T,Hq,Dqk]``, and ``dk [T,Hkv,Dqk]``, ``dv [T,Hkv,Dv]`` in ``dtype``.

    Args:
        do, lse, delta, gate, deterministic: as for ``compressed_attention_bwd``.
        local: how many blocks of a query, its own the last, to leave out (of indices as ``select_blocks_fwd`` makes them).
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    if q.shape[0]:
        run = kernel("selected_attention_bwd", key, q, cu_seqlens, Shape(max_seqlen, batch * k.shape[1]), deterministic)
        given = (ready(q), ready(k), ready(v), ready_flat(block_indices), ready(do), lse, delta, gate)
        run(*given, dq, dk, dv, None, scale, paths.workspace_bytes(), cu_seqlens, batch, max_seqlen, local)
    return dq, dk, dv
