"""Which blocks a query reads (paper eqs. 9-11) and attention to them (eq. 12)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import paths
from ..config import Shape
from ..errors import InputError
from ._inputs import check_values, geometry, kernel, ready, ready_flat
from .compression import attention_fake

#: Queries a chunk of importance scores has at least, and a multiple of: no smaller than the kernels' tiles.
CHUNK = 256


def query_chunk(total: int, row_bytes: int, bound: int) -> int:
    """Queries whose score rows, ``row_bytes`` each, fit in ``bound`` bytes: chunks of nearly one size, in multiples of ``CHUNK``.

    At least ``CHUNK``, the least the kernels use well, even where that takes more than ``bound``.
    """
    most = max(bound // (row_bytes * CHUNK), 1) * CHUNK
    chunks = -(-total // most)
    return -(-total // (chunks * CHUNK)) * CHUNK if chunks else CHUNK


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
    blocks = -(-max_seqlen // g.selection_block)
    columns = (blocks + 7) & ~7
    chunk = query_chunk(total, heads * columns * 4, paths.workspace_bytes())
    scores = torch.empty((min(chunk, total), heads, columns), dtype=torch.float32, device=q.device)
    importance = None
    if blocks > g.count:
        importance = kernel("importance_fwd", key, q, cu_seqlens, shape)
        q, k_cmp, lse = ready(q), ready(k_cmp), ready_flat(lse)
    else:
        scores.zero_()  # a query may have all its candidates, whatever they score
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        part = scores if stop - start == len(scores) else scores[: stop - start]
        if importance is not None:
            importance(q, k_cmp, lse, part, scale, start, stop, cu_seqlens, batch, max_seqlen)
        topk(part, block_indices, start, stop, cu_seqlens, batch, max_seqlen)
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
    scale: float, gated: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``q [T,Hq,Dqk]``, ``k [T,Hkv,Dqk]``, ``v [T,Hkv,Dv]``, ``block_indices [T,Hkv,n]`` → ``o [T,Hq,Dv]``, ``lse [T,Hq]``.

    With ``gated`` = ``(o_cmp, o_swa, g_cmp, g_slc, g_swa)``, ``o`` is the gated sum of the three branches and overwrites ``o_cmp``: what
    needs no branch output of its own saves a pass over all of them.
    """
    total, heads = q.shape[:2]
    check_values(cu_seqlens, total, max_seqlen)
    check_indices(block_indices, cu_seqlens, key, max_seqlen)
    o = torch.empty((total, heads, v.shape[2]), dtype=q.dtype, device=q.device) if gated is None else gated[0]
    lse = torch.empty((total, heads), dtype=torch.float32, device=q.device)
    if total:
        run = kernel("selected_attention_fwd", key, q, cu_seqlens, Shape(max_seqlen, batch * k.shape[1]))
        block_indices, bound = ready_flat(block_indices), paths.workspace_bytes()
        run(ready(q), ready(k), ready(v), block_indices, o, lse, scale, bound, cu_seqlens, batch, max_seqlen, gated)
    return o, lse


def selected_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return attention_fake(q, v)
