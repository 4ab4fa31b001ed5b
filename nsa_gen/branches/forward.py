"""The whole forward: all branches and their gated sum (paper eqs. 5-12), for inference in a bounded workspace, or keeping every part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import paths
from ..config import Shape
from . import compression, selection
from ._inputs import check_values, geometry, is_ready, kernel, module, ready

_At = tuple[str, Tensor, Tensor | None, Shape]


def inference(
    q: Tensor, k: list[Tensor], v: list[Tensor], g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, phi_k: list[Tensor], phi_v: list[Tensor],
    k_cmp: Tensor | None, v_cmp: Tensor | None, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """``o [R,Hq,Dv]`` of all branches; ``k``, ``v``: one tensor or three. ``q`` and gates are of the packed tokens from ``first`` on.

    Queries go chunk after chunk through all branches, so that what is allocated besides the result, ``k_cmp`` and ``v_cmp`` (and copies of
    K and V that kernels cannot read in place) stays below ``paths.workspace_bytes()`` at any length. A chunk has at least
    ``selection.CHUNK`` queries, even where the bound is too small for them. The result does not depend on the chunks. The compressed branch
    writes to the result, and the selected branch, with what is left to do (``_Rest``), turns it into the gated sum of all three.
    """
    total, heads_q = q.shape[:2]
    k_slc, k_swa, v_slc, v_swa = attended(k, v)
    k_cmp, v_cmp = (ready(x) for x in _compressed(k, v, phi_k, phi_v, k_cmp, v_cmp, cu_seqlens, key, batch, max_seqlen))
    heads, dim = k_slc.shape[1], v_slc.shape[2]
    o = torch.empty((total, heads_q, dim), dtype=q.dtype, device=q.device)
    if not total:
        return o
    g, shape = geometry(key), Shape(max_seqlen, batch * heads)
    at = (key, q, cu_seqlens, shape)
    compressed, topk = (kernel(name, *at) for name in ("compressed_attention_fwd", "select_topk"))
    importance = kernel("importance_fwd", *at) if max_seqlen > g.count * g.selection_block else None
    selected = module("selected_attention_fwd", *at)

    columns, bound = selection.score_columns(max_seqlen, g), paths.workspace_bytes()
    query_bytes = heads_q * 4 + heads * g.count * 4
    query_bytes += 0 if is_ready(q) else heads_q * q.shape[2] * q.element_size()
    scratch = selected.workspace(heads, q.element_size(), k_slc.shape[0], batch, True)
    chunk, scored = chunk_sizes(total, query_bytes, heads * columns * 4, bound, scratch)
    rows, scored = min(chunk, total), min(scored, total)
    left = bound - rows * query_bytes - scored * heads * columns * 4
    lse = torch.empty((rows, heads_q), dtype=torch.float32, device=q.device)
    scores = torch.empty((scored, heads, columns), dtype=torch.float32, device=q.device)
    block_indices = torch.empty((rows, heads, g.count), dtype=torch.int32, device=q.device)
    if importance is None:
        scores.zero_()  # a query may have all its candidates, whatever they score
    whole, sequences = (q, o, g_cmp, g_slc, g_swa), (cu_seqlens, batch, max_seqlen)
    for start in range(0, total, chunk):
        size = min(rows, total - start)
        q, o_cmp, *gates = whole if size == total else (x[start : start + size] for x in whole)
        if size < rows:
            lse, block_indices = lse[:size], block_indices[:size]
        q = ready(q)
        compressed(q, k_cmp, v_cmp, o_cmp, lse, scale, first + start, *sequences)
        for i in range(0, size, scored):
            part, some, some_lse, chosen = scores, q, lse, block_indices
            if scored != size:
                some, some_lse, chosen = (x[i : i + scored] for x in (q, lse, block_indices))
                part = scores[: size - i]
            if importance is not None:
                importance(some, k_cmp, some_lse, part, scale, first + start + i, *sequences)
            topk(part, chosen, first + start + i, *sequences)
        finish(at, q, k_slc, v_slc, k_swa, v_swa, block_indices, o_cmp, gates, lse, scale, left, first + start, sequences)
    return o


def finish(
    at: _At, q: Tensor, k_slc: Tensor, v_slc: Tensor, k_swa: Tensor, v_swa: Tensor, block_indices: Tensor, o_cmp: Tensor,
    gates: list[Tensor], lse: Tensor, scale: float, workspace_bytes: int, start: int, sequences: tuple[Tensor | None, int, int],
    kept: tuple[Tensor, ...] = (),
) -> None:  # fmt: skip
    """Selected and sliding attention of the queries ``[start, start + R)``, and the gated sum, written over ``o_cmp [R,Hq,Dv]``.

    Args:
        at: what chooses kernels: the geometry's key, a tensor like ``q``, ``cu_seqlens``, the call's sizes.
        block_indices: ``[R,Hkv,n]`` as ``select_topk`` makes them.
        lse: ``[R,Hq]`` fp32, an argument of the kernel that neither loop order writes here.
        sequences: ``cu_seqlens``, batch, longest sequence.
        kept: written besides: ``o_slc``, ``o_swa``, ``lse_slc``, ``lse_swa``, and last the gated sum, which then leaves ``o_cmp`` alone.
    """
    rest = _Rest(at, q, k_slc, v_slc, k_swa, v_swa, o_cmp, gates, scale, start, sequences, kept)
    run = kernel("selected_attention_fwd", *at)
    run(q, k_slc, v_slc, block_indices, o_cmp, lse, scale, workspace_bytes, start, *sequences, rest)


@dataclass(frozen=True)
class _Rest:
    """What the gated sum of some queries needs besides the partial results of their selected branch."""

    at: _At
    q: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_swa: Tensor
    v_swa: Tensor
    o_cmp: Tensor
    gates: list[Tensor]
    scale: float
    start: int
    sequences: tuple[Tensor | None, int, int]
    kept: tuple[Tensor, ...]

    def merge(self, begin: int, end: int, part: Tensor, part_lse: Tensor) -> None:
        """Write the gated sum of the queries [begin, end), given the partial results of their selected branch."""
        q, o_cmp, *gates = (self.q, self.o_cmp, *self.gates)
        kept = self.kept
        if end - begin < q.shape[0]:
            q, o_cmp, *gates = (x[begin:end] for x in (q, o_cmp, *gates))
            kept = tuple(x[begin:end] for x in kept)
        run = kernel("sliding_merge_fwd", *self.at, part.shape[1])
        given = (q, self.k_slc, self.v_slc, self.k_swa, self.v_swa, part, part_lse, o_cmp, *gates)
        *branches, o = kept or (o_cmp,)
        run(*given, o, self.scale, self.start + begin, *self.sequences, tuple(branches) or None)


def chunk_sizes(total: int, query_bytes: int, score_bytes: int, bound: int, scratch: tuple[int, int, int]) -> tuple[int, int]:
    """Queries of a chunk, and queries whose scores are made at a time: multiples of ``selection.CHUNK``, the second no more than the first.

    Scores are as wide as the sequence is long and live only until blocks are chosen, while selected attention gains by large chunks: where
    not everything fits, scores get an eighth of the workspace.

    Args:
        total: all queries.
        query_bytes, score_bytes: what one query takes, and its scores.
        bound: bytes of the workspace.
        scratch: of selected attention, as :func:`selection.query_chunk` takes it.
    """
    chunk = selection.query_chunk(total, query_bytes + score_bytes, bound, scratch)
    scored = max(bound // 8 // (score_bytes * selection.CHUNK), 1) * selection.CHUNK
    if chunk >= total or chunk <= scored:
        return chunk, chunk
    chunk = selection.query_chunk(total, query_bytes, bound - scored * score_bytes, scratch)
    return chunk, min(scored, chunk)


def training(
    q: Tensor, k: list[Tensor], v: list[Tensor], g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, phi_k: list[Tensor], phi_v: list[Tensor],
    k_cmp: Tensor | None, v_cmp: Tensor | None, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``o, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa, block_indices, k_cmp, v_cmp``: what a backward needs, each over all queries."""
    sequences = (cu_seqlens, key, batch, max_seqlen, scale)
    q = ready(q)
    total, heads_q = q.shape[:2]
    k_slc, k_swa, v_slc, v_swa = attended(k, v)
    k_cmp, v_cmp = _compressed(k, v, phi_k, phi_v, k_cmp, v_cmp, cu_seqlens, key, batch, max_seqlen)
    o_cmp, lse_cmp = compression.compressed_attention_fwd(q, k_cmp, v_cmp, *sequences)
    block_indices = selection.select_blocks_fwd(q, k_cmp, lse_cmp, *sequences)
    o, o_slc, o_swa = (torch.empty(o_cmp.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    lse_slc, lse_swa = (torch.empty((total, heads_q), dtype=torch.float32, device=q.device) for _ in range(2))
    if total:
        at, gates = (key, q, cu_seqlens, Shape(max_seqlen, batch * k_slc.shape[1])), [g_cmp, g_slc, g_swa]
        given = (block_indices, o_cmp, gates, lse_cmp, scale, paths.workspace_bytes(), 0, (cu_seqlens, batch, max_seqlen))
        finish(at, q, k_slc, v_slc, k_swa, v_swa, *given, (o_slc, o_swa, lse_slc, lse_swa, o))
    return o, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa, block_indices, k_cmp, v_cmp


def attended(k: list[Tensor], v: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K of the selected and the sliding branch, then V of both, as kernels read them."""
    pairs = (tuple(map(ready, x[1:])) if len(x) == 3 else (ready(x[0]),) * 2 for x in (k, v))
    (k_slc, k_swa), (v_slc, v_swa) = pairs
    return k_slc, k_swa, v_slc, v_swa


def _compressed(
    k: list[Tensor], v: list[Tensor], phi_k: list[Tensor], phi_v: list[Tensor], k_cmp: Tensor | None, v_cmp: Tensor | None,
    cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``k_cmp`` and ``v_cmp``, made where not given."""
    if k_cmp is None:
        k_cmp = compression.compress_fwd(k[0], phi_k, cu_seqlens, key, "k", batch, max_seqlen)
    if v_cmp is None:
        v_cmp = compression.compress_fwd(v[0], phi_v, cu_seqlens, key, "v", batch, max_seqlen)
    check_values(cu_seqlens, k[0].shape[0], max_seqlen)
    return k_cmp, v_cmp
