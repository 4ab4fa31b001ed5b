"""Native Sparse Attention in plain PyTorch: the oracle the kernels are held to (arXiv 2502.11089, eqs. 5-12).

Clear before fast. Every function takes packed tokens (``q [T,Hq,Dqk]``, ``k [T,Hkv,Dqk]``, ``v [T,Hkv,Dv]``; layouts as in docs/design.md),
computes in ``dtype`` (default: that of its first argument), and is differentiable by autograd wherever the maths is. Softmax and LSE are
at least float32. ``cu_seqlens`` is an int tensor or sequence ``[B+1]``, or None for one sequence of all tokens. ``queries`` (LongTensor
``[S]`` of packed token indices, any order) restricts the work to those rows: results then have S rows in that order. Queries are walked in
slabs of about ``SLAB_BYTES``, so sampled rows of very long sequences fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from .config import overlap_weights
from .errors import InputError, allowed
from .spec import POOLINGS, Spec

SLAB_BYTES = 2**30

Lengths = Tensor | Sequence[int] | None


def bounds(cu_seqlens: Lengths, total: int) -> list[tuple[int, int]]:
    """``(first, end)`` packed token of each sequence; without ``cu_seqlens``, one sequence of ``total`` tokens."""
    if cu_seqlens is None:
        return [(0, total)]
    cu = [int(c) for c in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
    if not cu or cu[0] != 0 or cu[-1] != total or any(a > b for a, b in pairwise(cu)):
        raise InputError(f"cu_seqlens must start at 0, not decrease and end at {total} (the number of tokens), got {cu[:8]} … {cu[-1:]}")
    return list(pairwise(cu))


def compressed_count(seqlen: int, block: int, stride: int) -> int:
    """Compressed tokens of a sequence: ``max(0, (seqlen - block)//stride + 1)``."""
    return max(0, (seqlen - block) // stride + 1)


def compressed_rows(total: int, stride: int) -> int:
    """Rows of a compressed tensor over ``total`` packed tokens."""
    return max(total // stride, 1)


def compressed_offsets(cu_seqlens: Lengths, total: int, block: int, stride: int) -> list[tuple[int, int]]:
    """``(first row, number of rows)`` of each sequence in a compressed tensor; rows between are gaps."""
    return [(start // stride, compressed_count(end - start, block, stride)) for start, end in bounds(cu_seqlens, total)]


def compress(x: Tensor, pooling: str, weights: tuple[Tensor, ...], block: int, stride: int, cu_seqlens: Lengths = None,
             dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """Compressed tokens of ``x`` (paper eq. 7): token ``j`` of a sequence is ``φ(x[j*stride : j*stride + block])``.

    Args:
        x: ``[T,Hkv,D]``.
        pooling: ``mean`` | ``weighted`` | ``linear`` | ``mlp``.
        weights: per KV head; mean ``()``; weighted ``([Hkv,l],)``; linear ``([Hkv,l*D,D],)``;
            mlp ``(w1 [Hkv,l*D,h], b1 [Hkv,h], w2 [Hkv,h,D], b2 [Hkv,D], pos [Hkv,l,D])``, exact GELU.

    Returns:
        ``[max(T//stride,1),Hkv,D]``; sequence ``b`` starts at row ``cu_seqlens[b]//stride``, gap rows are zero.

    Raises:
        InputError: unknown pooling, or weights of wrong shapes.
    """
    dtype = dtype or x.dtype
    total, heads, dim = x.shape
    weights = tuple(w.to(dtype) for w in weights)
    _check_weights(pooling, weights, heads, block, dim)
    out = torch.zeros(compressed_rows(total, stride), heads, dim, dtype=dtype, device=x.device)
    step = max(1, SLAB_BYTES // max(heads * dim * block * dtype.itemsize * 2, 1))
    for (start, _), (row, count) in zip(bounds(cu_seqlens, total), compressed_offsets(cu_seqlens, total, block, stride), strict=True):
        for j in range(0, count, step):
            n = min(step, count - j)
            part = x[start + j * stride : start + (j + n - 1) * stride + block].to(dtype)
            blocks = part.unfold(0, block, stride).permute(0, 1, 3, 2)  # [n, Hkv, l, D]
            out = out.index_copy(0, torch.arange(row + j, row + j + n, device=x.device), _pool(blocks, pooling, weights))
    return out


def _check_weights(pooling: str, weights: tuple[Tensor, ...], heads: int, block: int, dim: int) -> None:
    if pooling not in POOLINGS:
        raise InputError(f"pooling: {allowed(pooling, POOLINGS)}")
    hidden = weights[0].shape[-1] if pooling == "mlp" and weights else 0
    shapes: dict[str, list[tuple[int, ...]]] = {
        "mean": [],
        "weighted": [(heads, block)],
        "linear": [(heads, block * dim, dim)],
        "mlp": [(heads, block * dim, hidden), (heads, hidden), (heads, hidden, dim), (heads, dim), (heads, block, dim)],
    }
    given = [tuple(w.shape) for w in weights]
    if given != shapes[pooling]:
        raise InputError(f"{pooling} pooling needs weights of shapes {shapes[pooling]}, got {given}")


def _pool(x: Tensor, pooling: str, weights: tuple[Tensor, ...]) -> Tensor:
    """``x [n,Hkv,l,D]`` → ``[n,Hkv,D]``."""
    if pooling == "mean":
        return x.mean(2)
    if pooling == "weighted":
        return torch.einsum("nhld,hl->nhd", x, weights[0])
    if pooling == "linear":
        return torch.einsum("nhe,hed->nhd", x.flatten(2), weights[0])
    w1, b1, w2, b2, pos = weights
    hidden = functional.gelu(torch.einsum("nhe,hef->nhf", (x + pos).flatten(2), w1) + b1)
    return torch.einsum("nhf,hfd->nhd", hidden, w2) + b2


def compressed_attention(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, block: int, stride: int, scale: float | None = None,
                         cu_seqlens: Lengths = None, queries: Tensor | None = None,
                         dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to the compressed tokens that end at or before it (paper eq. 8).

    Args:
        q: ``[T,Hq,Dqk]``.
        k_cmp, v_cmp: ``[max(T//stride,1),Hkv,·]`` as :func:`compress` lays them out; gap rows are never read.

    Returns:
        ``o [S,Hq,Dv]`` and natural-log ``lse [S,Hq]``; a query that sees none has ``o`` 0 and ``lse`` -inf.
    """
    dtype = dtype or q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(slab: _Slab) -> tuple[Tensor, Tensor]:
        row, visible = _visible_compressed(slab, block, stride)
        k, v = (x[row : row + visible.shape[1]].to(dtype) for x in (k_cmp, v_cmp))
        logits = torch.einsum("shgd,nhd->shgn", _grouped(q, slab, k.shape[1], dtype), k) * scale
        prob, lse = _softmax(logits, visible[:, None, None])
        return torch.einsum("shgn,nhd->shgd", prob.to(dtype), v).flatten(1, 2), lse.flatten(1)

    o, lse = _over_queries(attend, bounds(cu_seqlens, len(q)), queries, _dense_bytes(q, block, stride, dtype), q.device)
    return o, lse


def importance(q: Tensor, k_cmp: Tensor, lse: Tensor, block: int, stride: int, selection_block: int, mapping: str = "overlap",
               scale: float | None = None, cu_seqlens: Lengths = None, queries: Tensor | None = None,
               dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """How much each selection block matters to each query (paper eqs. 9-10): compressed probabilities summed over a group's heads.

    Args:
        lse: ``[T,Hq]`` of :func:`compressed_attention`.

    Returns:
        ``[S,Hkv,NB]`` (float32 or float64, detached), ``NB = cdiv(longest sequence, selection_block)``; zero where nothing is seen.
    """
    dtype = dtype or q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = k_cmp.shape[1]
    weights = overlap_weights(block, stride, selection_block, mapping)
    per_block = selection_block // stride
    limits = bounds(cu_seqlens, len(q))
    blocks = max((-(-(end - start) // selection_block) for start, end in limits), default=0)

    def score(slab: _Slab) -> tuple[Tensor]:
        row, visible = _visible_compressed(slab, block, stride)
        n = visible.shape[1]
        logits = torch.einsum("shgd,nhd->shgn", _grouped(q, slab, heads, dtype), k_cmp[row : row + n].to(dtype)) * scale
        logits = logits.to(_wide(dtype)) - lse[slab.tokens].to(_wide(dtype)).unflatten(1, (heads, -1))[..., None]
        prob = torch.where(visible[:, None, None], logits, -torch.inf).exp().sum(2)  # [S, Hkv, n]
        prob = functional.pad(prob, (0, blocks * per_block - n)).unflatten(2, (blocks, per_block))
        scores = torch.zeros_like(prob[..., 0])
        for lag, weight in enumerate(weights[:blocks]):
            scores[..., lag:] += (prob * prob.new_tensor(weight)).sum(3)[..., : blocks - lag]
        return (scores,)

    with torch.no_grad():
        return _over_queries(score, limits, queries, _dense_bytes(q, block, stride, dtype), q.device)[0]


def select_blocks(scores: Tensor, selection_block: int, count: int, initial: int, local: int, cu_seqlens: Lengths = None,
                  queries: Tensor | None = None) -> Tensor:  # fmt: skip
    """The chosen blocks of each query (paper eq. 11): forced ones, then the best by score, ties to the smaller index.

    Args:
        scores: ``[S,Hkv,NB]``, one row per token, or per entry of ``queries``; only columns ``i <= t//selection_block`` are read.

    Returns:
        ``block_indices`` int32 ``[S,Hkv,count]``: ascending, distinct, -1 last.
    """
    if cu_seqlens is None:
        position = torch.arange(len(scores), device=scores.device) if queries is None else queries
    else:
        total = len(scores) if queries is None else int(cu_seqlens[-1])
        starts = torch.tensor([start for start, end in bounds(cu_seqlens, total) if end > start], device=scores.device, dtype=torch.long)
        tokens = torch.arange(total, device=scores.device) if queries is None else queries.to(scores.device)
        position = tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1] if total else tokens
    return select_at(scores, position, selection_block, count, initial, local)


def select_at(scores: Tensor, position: Tensor, selection_block: int, count: int, initial: int, local: int) -> Tensor:
    """:func:`select_blocks` for queries given by their ``position [S]`` inside their sequences."""
    _, heads, blocks = scores.shape
    column = torch.arange(blocks, device=scores.device)
    slot = torch.arange(count, device=scores.device)
    out = torch.empty(len(scores), heads, count, dtype=torch.int32, device=scores.device)
    step = max(1, SLAB_BYTES // max(heads * blocks * 48, 1))
    for i in range(0, len(scores), step):
        current = position[i : i + step, None].to(scores.device) // selection_block
        candidate = column <= current  # [S, NB]
        forced = candidate & ((column < initial) | (column > current - local))
        key = scores[i : i + step].masked_fill(~candidate[:, None], -torch.inf).masked_fill(forced[:, None], torch.inf)
        order = key.sort(dim=2, descending=True, stable=True).indices[..., :count]  # stable: of equal scores the smaller index first
        order = functional.pad(order, (0, count - order.shape[2]))
        order = order.masked_fill((slot > current)[:, None], blocks).sort(dim=2).values  # a query has current + 1 candidates
        out[i : i + step] = order.masked_fill(order == blocks, -1)
    return out


def selected_attention(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, selection_block: int, scale: float | None = None,
                       cu_seqlens: Lengths = None, queries: Tensor | None = None,
                       dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to the tokens ``s <= t`` of its chosen blocks (paper eq. 12).

    Args:
        block_indices: int ``[T,Hkv,n]``, distinct within a row, -1 for none.

    Returns:
        ``o [S,Hq,Dv]``, ``lse [S,Hq]``.
    """
    inside = torch.arange(selection_block, device=q.device)

    def tokens(slab: _Slab) -> tuple[Tensor, Tensor]:
        chosen = block_indices[slab.tokens].long()[..., None]
        position = (chosen * selection_block + inside).flatten(2)  # [S, Hkv, n*l']
        seen = (chosen >= 0).expand(*chosen.shape[:3], selection_block).flatten(2) & (position <= slab.position[:, None, None])
        return slab.start + position, seen

    keys = block_indices.shape[2] * selection_block
    return _attend_listed(tokens, keys, q, k, v, scale, cu_seqlens, queries, dtype)


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None, cu_seqlens: Lengths = None,
                      queries: Tensor | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to the last ``window`` tokens of its sequence, itself included: ``t - window < s <= t``.

    Returns:
        ``o [S,Hq,Dv]``, ``lse [S,Hq]``.
    """
    back = torch.arange(1 - window, 1, device=q.device)

    def tokens(slab: _Slab) -> tuple[Tensor, Tensor]:
        position = (slab.position[:, None] + back)[:, None].expand(-1, k.shape[1], -1)
        return slab.start + position, position >= 0

    return _attend_listed(tokens, window, q, k, v, scale, cu_seqlens, queries, dtype)


def sliding_merge(q: Tensor, k_slc: Tensor, v_slc: Tensor, k_swa: Tensor, v_swa: Tensor, part: Tensor, part_lse: Tensor, o_cmp: Tensor,
                  g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, window: int, selection_block: int, initial: int, local: int, count: int,
                  scale: float | None = None, cu_seqlens: Lengths = None, queries: Tensor | None = None,
                  dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """Sliding attention, the merge of selected attention's partial results with its initial and local blocks, and the gated sum of all
    branches (paper eqs. 5, 12): ``o [S,Hq,Dv]``.

    Args:
        part: ``[Hkv,parts,T,G,Dv]``, a query's attention over each of its other blocks, as many as it has, or (one part) over all of them.
        part_lse: ``[Hkv,parts,T,G]``, log2 of their softmax denominators.
    """
    dtype = dtype or q.dtype
    heads, slots = k_slc.shape[1], part.shape[1]
    starts = torch.tensor([start for start, end in bounds(cu_seqlens, len(q)) if end > start], device=q.device, dtype=torch.long)
    tokens = torch.arange(len(q), device=q.device)
    current = (tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1] if len(q) else tokens) // selection_block
    newest = current[:, None] - torch.arange(local - 1, -1, -1, device=q.device)
    dense = torch.cat([torch.arange(initial, device=q.device).expand(len(q), -1), newest], 1)
    dense[:, :initial].masked_fill_(dense[:, :initial] > (current - local)[:, None], -1)
    dense = dense.clamp(min=-1)[:, None].expand(-1, heads, -1)
    at = (scale, cu_seqlens, queries, dtype)
    o_dense, lse = selected_attention(q, k_slc, v_slc, dense, selection_block, *at)
    o_swa, _ = sliding_attention(q, k_swa, v_swa, window, *at)
    chosen = tokens if queries is None else queries
    filled = (current[chosen] + 1).clamp(max=count) - initial - local
    has = (torch.arange(slots, device=q.device) < filled[:, None])[:, None, None]  # [S,1,1,slots]
    o_part, lse_part = part[:, :, chosen].permute(2, 0, 3, 1, 4), part_lse[:, :, chosen].permute(2, 0, 3, 1)  # [S,Hkv,G,slots(,Dv)]
    lse_part = torch.where(has, lse_part.to(lse.dtype) * math.log(2), -torch.inf)
    all_lse = torch.cat([lse_part, lse.unflatten(1, (heads, -1))[..., None]], -1)
    weight = torch.nan_to_num((all_lse - all_lse.amax(-1, keepdim=True)).softmax(-1), nan=0.0).to(dtype)  # a query without any block: 0
    all_o = torch.cat([torch.where(has[..., None], o_part.to(dtype), 0.0), o_dense.unflatten(1, (heads, -1))[..., None, :]], -2)
    o_slc = (weight[..., None] * all_o).sum(-2).flatten(1, 2)
    gates = (g[chosen] for g in (g_cmp, g_slc, g_swa))
    return combine(o_cmp[chosen], o_slc, o_swa, *gates, dtype=dtype)


def combine(o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor,
            dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """``g_cmp*o_cmp + g_slc*o_slc + g_swa*o_swa`` (paper eq. 5); outputs ``[T,Hq,Dv]``, gates ``[T,Hq]`` already through their sigmoid."""
    dtype = dtype or o_cmp.dtype
    pairs = ((g_cmp, o_cmp), (g_slc, o_slc), (g_swa, o_swa))
    first, second, third = (gate.to(dtype)[..., None] * o.to(dtype) for gate, o in pairs)
    return first + second + third


def nsa_attention(q: Tensor, k: Tensor | tuple[Tensor, Tensor, Tensor], v: Tensor | tuple[Tensor, Tensor, Tensor], g_cmp: Tensor,
                  g_slc: Tensor, g_swa: Tensor, spec: Spec, weights_k: tuple[Tensor, ...] = (), weights_v: tuple[Tensor, ...] = (),
                  scale: float | None = None, cu_seqlens: Lengths = None, queries: Tensor | None = None,
                  compressed: tuple[Tensor, Tensor] | None = None, block_indices: Tensor | None = None,
                  dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """The whole operator (paper eqs. 5-12), ``o [S,Hq,Dv]``.

    Args:
        k, v: one tensor for all branches, or three (compressed, selected, sliding).
        g_cmp, g_slc, g_swa: ``[T,Hq]``, already through their sigmoid.
        weights_k, weights_v: of the pooling, as for :func:`compress`.
        compressed: ``(k_cmp, v_cmp)`` where the caller compressed by its own means; then the weights are not used.
        block_indices: ``[T,Hkv,n]``, to hold the discrete choice fixed.
    """
    dtype = dtype or q.dtype
    k_all, v_all = ((x, x, x) if isinstance(x, Tensor) else x for x in (k, v))
    c, s = spec.compression, spec.selection
    if compressed is None:
        k_cmp = compress(k_all[0], c.pooling, weights_k, c.block, c.stride, cu_seqlens, dtype)
        v_cmp = compress(v_all[0], c.pooling, weights_v, c.block, c.stride, cu_seqlens, dtype)
    else:
        k_cmp, v_cmp = compressed
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, c.block, c.stride, scale, cu_seqlens, queries, dtype)
    if block_indices is None:
        all_lse = _spread(lse.detach(), queries, len(q))
        scores = importance(q, k_cmp, all_lse, c.block, c.stride, s.block, s.mapping, scale, cu_seqlens, queries, dtype)
        block_indices = _spread(select_blocks(scores, s.block, s.count, s.initial, s.local, cu_seqlens, queries), queries, len(q))
    o_slc, _ = selected_attention(q, k_all[1], v_all[1], block_indices, s.block, scale, cu_seqlens, queries, dtype)
    o_swa, _ = sliding_attention(q, k_all[2], v_all[2], spec.window, scale, cu_seqlens, queries, dtype)
    gates = (g if queries is None else g[queries] for g in (g_cmp, g_slc, g_swa))
    return combine(o_cmp, o_slc, o_swa, *gates, dtype=dtype)


def _spread(rows: Tensor, queries: Tensor | None, total: int) -> Tensor:
    """Rows of sampled queries back at their tokens; other tokens get -1, which nothing reads."""
    return rows if queries is None else rows.new_full((total, *rows.shape[1:]), -1).index_copy(0, queries, rows)


# --- walking queries in slabs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slab:
    """Some queries of one sequence: their rows in the result, packed token indices and positions (each ``[S]``)."""

    rows: Tensor
    tokens: Tensor
    position: Tensor
    start: int


def _slabs(limits: list[tuple[int, int]], queries: Tensor | None, bytes_per_query: Callable[[int], int],
           device: torch.device) -> Iterator[_Slab]:  # fmt: skip
    for start, end in limits:
        if queries is None:
            rows = tokens = torch.arange(start, end, device=device)
        else:
            rows = ((queries >= start) & (queries < end)).nonzero().squeeze(1)
            tokens = queries[rows]
        step = max(1, SLAB_BYTES // max(bytes_per_query(end - start), 1))
        for i in range(0, len(rows), step):
            part = tokens[i : i + step]
            yield _Slab(rows[i : i + step], part, part - start, start)


def _over_queries(work: Callable[[_Slab], tuple[Tensor, ...]], limits: list[tuple[int, int]], queries: Tensor | None,
                  bytes_per_query: Callable[[int], int], device: torch.device) -> tuple[Tensor, ...]:  # fmt: skip
    """``work`` over slabs of queries, its results put together in the order of ``queries``."""
    if queries is not None:
        queries = queries.to(device)
        if len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < max((end for _, end in limits), default=0):
            raise InputError(f"queries must be packed token indices in [0, {limits[-1][1] if limits else 0})")
    slabs = list(_slabs(limits, queries, bytes_per_query, device))
    if not slabs:
        none = torch.empty(0, dtype=torch.long, device=device)
        slabs = [_Slab(none, none, none, 0)]
    results = [torch.cat(parts) for parts in zip(*map(work, slabs), strict=True)]
    if queries is not None:
        back = torch.cat([slab.rows for slab in slabs]).argsort()
        results = [result[back] for result in results]
    return tuple(results)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and LSE."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(q: Tensor, slab: _Slab, heads: int, dtype: torch.dtype) -> Tensor:
    """Query rows as ``[S,Hkv,G,D]``."""
    return q[slab.tokens].to(dtype).unflatten(1, (heads, -1))


def _dense_bytes(q: Tensor, block: int, stride: int, dtype: torch.dtype) -> Callable[[int], int]:
    return lambda seqlen: 4 * q.shape[1] * compressed_count(seqlen, block, stride) * _wide(dtype).itemsize


def _visible_compressed(slab: _Slab, block: int, stride: int) -> tuple[int, Tensor]:
    """First compressed row of the slab's sequence, and which rows from there each query sees ``[S,n]`` (as many as any query sees)."""
    seen = ((slab.position + 1 - block) // stride + 1).clamp(min=0)
    most = int(seen.max()) if len(seen) else 0
    return slab.start // stride, torch.arange(most, device=seen.device) < seen[:, None]


def _softmax(logits: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities over the last dim and natural-log LSE, in at least float32; rows that see nothing give 0 and -inf."""
    logits = torch.where(visible, logits.to(_wide(logits.dtype)), -torch.inf)
    if not logits.shape[-1]:
        return logits, logits.new_full(logits.shape[:-1], -torch.inf)
    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    prob = (logits - top).exp()
    total = prob.sum(-1, keepdim=True)
    some = total > 0
    total = torch.where(some, total, 1.0)
    lse = torch.where(some, total.log() + top, -torch.inf)
    return prob / total, lse.squeeze(-1)


def _attend_listed(list_tokens: Callable[[_Slab], tuple[Tensor, Tensor]], keys: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None,
                   cu_seqlens: Lengths, queries: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to its own list of packed tokens: ``list_tokens(slab)`` gives indices and which count, ``[S,Hkv,keys]``."""
    dtype = dtype or q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = k.shape[1]
    head = torch.arange(heads, device=q.device)[:, None]

    def attend(slab: _Slab) -> tuple[Tensor, Tensor]:
        index, seen = list_tokens(slab)
        index = torch.where(seen, index, slab.tokens[:, None, None])
        k_rows, v_rows = (x[index, head].to(dtype) for x in (k, v))  # [S, Hkv, keys, D]
        logits = torch.einsum("shgd,shnd->shgn", _grouped(q, slab, heads, dtype), k_rows) * scale
        prob, lse = _softmax(logits, seen[:, :, None])
        return torch.einsum("shgn,shnd->shgd", prob.to(dtype), v_rows).flatten(1, 2), lse.flatten(1)

    row = heads * keys * (k.shape[2] + v.shape[2]) * (dtype.itemsize + k.element_size()) + 4 * q.shape[1] * keys * _wide(dtype).itemsize
    o, lse = _over_queries(attend, bounds(cu_seqlens, len(q)), queries, lambda seqlen: row, q.device)
    return o, lse
