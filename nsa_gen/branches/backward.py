"""The whole backward: gradients of all branches and of their gated sum (paper eqs. 5-12)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Shape
from . import combine, compression, forward, selection, sliding
from ._inputs import geometry, ready

#: How many tensors :func:`forward.training` gives beside the result: three outputs, three LSEs, block indices, compressed K and V.
SAVED = 9


def gradients(
    do: Tensor, q: Tensor, k: list[Tensor], v: list[Tensor], g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, phi_k: list[Tensor],
    phi_v: list[Tensor], k_cmp: Tensor | None, v_cmp: Tensor | None, saved: list[Tensor], cu_seqlens: Tensor | None, key: str, batch: int,
    max_seqlen: int, scale: float, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of ``q``, each of ``k``, each of ``v``, the three gates, then of ``k_cmp`` and ``v_cmp`` where given, else of each weight
    of φ, ``phi_k`` first.

    ``delta`` and the gates come from one pass over ``do`` and the branches' outputs; gated gradients are never written. dq is added up
    branch by branch in its own memory. Where branches share K and V, selected and sliding attention add up their gradients in float32, and
    φ's come on top as it writes the result.

    Args:
        do: ``[T,Hq,Dv]``.
        saved: what :func:`forward.training` gave beside the result, k_cmp and v_cmp empty where given; nothing to run the forward again.
    """
    given, q, do = k_cmp is not None, ready(q), ready(do)
    if not saved:
        saved = list(
            forward.training(q, k, v, g_cmp, g_slc, g_swa, phi_k, phi_v, k_cmp, v_cmp, cu_seqlens, key, batch, max_seqlen, scale)[1:]
        )
    *outputs, lse_cmp, lse_slc, lse_swa, block_indices, made_k, made_v = saved
    made_k, made_v = (made_k, made_v) if k_cmp is None or v_cmp is None else (k_cmp, v_cmp)
    shape, sequences = Shape(max_seqlen, batch * k[0].shape[1]), (cu_seqlens, key, batch, max_seqlen)
    deltas, gates, dgates = combine.numbers(do, tuple(outputs), (g_cmp, g_slc, g_swa), shape)
    k_slc, k_swa, v_slc, v_swa = forward.attended(k, v)
    shared_k, shared_v = len(k) == 1, len(v) == 1
    dtype = torch.float32 if shared_k or shared_v else q.dtype
    # With the same K and V, selected attention's local blocks are sliding attention's keys too.
    g = geometry(key)
    local = g.local if shared_k and shared_v else 0
    selected = (lse_slc, deltas[1], gates[1], g.selection_block, local) if local else None
    dq, dk_slc, dv_slc = selection.selected_attention_bwd(
        q, k_slc, v_slc, block_indices, do, lse_slc, deltas[1], gates[1], *sequences, scale, deterministic, dtype, local
    )
    # φ's gradients are added to float32 sums; without φ, sliding attention writes the result.
    dk, dv = (dk_slc if shared_k else None), (dv_slc if shared_v else None)
    dq, dk, dv = sliding.sliding_attention_bwd(
        q, k_swa, v_swa, do, lse_swa, deltas[2], gates[2], *sequences, scale, dq, dk, dv, q.dtype if given else dtype, selected
    )
    dq, dk_cmp, dv_cmp = compression.compressed_attention_bwd(
        q, made_k, made_v, do, lse_cmp, deltas[0], gates[0], *sequences, scale, deterministic, dq
    )
    dphi: list[Tensor] = []
    dks, dvs = ([dx] if shared else [dx_slc, dx] for dx, dx_slc, shared in ((dk, dk_slc, shared_k), (dv, dv_slc, shared_v)))
    if not given:
        for which, x, weights, dout, found in (("k", k, phi_k, dk_cmp, dks), ("v", v, phi_v, dv_cmp, dvs)):
            added = found.pop() if len(x) == 1 else None
            dx, dweights = compression.compress_bwd(x[0], weights, dout, cu_seqlens, key, which, batch, max_seqlen, added, q.dtype)
            found.insert(0, dx)
            dphi += dweights
    else:  # the compressed branch has no K and V of its own
        for x, found in ((k, dks), (v, dvs)):
            if len(x) == 3:
                found.insert(0, torch.empty(x[0].shape, dtype=q.dtype, device=q.device).zero_())
    dks, dvs = ([dx if dx.dtype is q.dtype else dx.to(q.dtype) for dx in found] for found in (dks, dvs))
    return dq, *dks, *dvs, *dgates, *((dk_cmp, dv_cmp) if given else dphi)


def gradients_fake(
    do: Tensor, q: Tensor, k: list[Tensor], v: list[Tensor], g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, phi_k: list[Tensor],
    phi_v: list[Tensor], k_cmp: Tensor | None, v_cmp: Tensor | None, *rest: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    compressed = (*phi_k, *phi_v) if k_cmp is None or v_cmp is None else (k_cmp, v_cmp)
    return tuple(x.new_empty(x.shape) for x in (q, *k, *v, g_cmp, g_slc, g_swa, *compressed))
