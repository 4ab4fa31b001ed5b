"""Attention for serving engines: new tokens of many sequences against a :class:`~nsa_gen.cache.PagedKVCache`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .branches import decode
from .branches._inputs import check, query_heads, scale_of
from .cache import MOST_TOKENS, PagedKVCache
from .errors import InputError
from .register import register

__all__ = ["nsa_decode"]

_nsa_decode = register(
    "nsa_decode",
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor tables, Tensor slots, Tensor lengths, Tensor arrived, Tensor[] scales, "
    "Tensor g_cmp, Tensor g_slc, Tensor g_swa, str key, int max_seqlen, float scale) -> Tensor",
    decode.decode,
    decode.decode_fake,
)


def nsa_decode(
    q: Tensor,
    g_cmp: Tensor,
    g_slc: Tensor,
    g_swa: Tensor,
    *,
    cache: PagedKVCache,
    sequences: Sequence[int] | None = None,
    slots: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Native Sparse Attention of each sequence's last tokens, which the cache holds already (paper eqs. 5-12): two kernels.

    The result is that of :func:`nsa_gen.nsa_attention` on the whole sequence, in the rows of these tokens.

    Args:
        q: ``[S,Hq,Dqk]``, the last token of each of S sequences; or ``[S,n,Hq,Dqk]``, its last n (1 to 8: speculation), in order.
        g_cmp, g_slc, g_swa: ``[S,Hq]`` or ``[S,n,Hq]``, already through their sigmoid; in q's dtype or float32.
        cache: holds the sequences, new tokens included (:meth:`PagedKVCache.append`).
        sequences: ids of the S sequences.
        slots: instead of ``sequences``: int32 ``[S]`` on the device, as :meth:`PagedKVCache.slots` gives them. Nothing of the call then
            depends on what the host knows of lengths: captured in a CUDA graph, it serves the same sequences at any later length, and
            other ones once their slots are copied into the tensor.
        max_seqlen: no sequence is longer; sizes scratch memory and chooses the tuned row. Default: the longest of ``sequences``, to the
            next power of two; with ``slots`` the cache's.
        scale: factor on q·k, positive; default ``Dqk**-0.5``.

    Calls on one cache share counters: they must follow each other, on one stream.

    Returns:
        ``[S,Hq,Dv]`` or ``[S,n,Hq,Dv]`` in q's dtype. Not differentiable.

    Raises:
        InputError: a wrong argument; the message names it, what was given and what is allowed.
        UnknownSequence: a sequence is not in the cache.
        NotTuned: ``NSA_GEN_STRICT=1`` and no exact tuned row.
    """
    g = cache.geometry
    if not isinstance(q, Tensor) or q.dim() not in (3, 4):
        raise InputError(f"q must be [S, Hq, Dqk] or [S, n, Hq, Dqk], got {list(q.shape) if isinstance(q, Tensor) else type(q).__name__}")
    single = q.dim() == 3
    if single:
        q, g_cmp, g_slc, g_swa = (x.unsqueeze(1) if isinstance(x, Tensor) else x for x in (q, g_cmp, g_slc, g_swa))
    count, tokens = q.shape[:2]
    if q.dtype != cache.dtype or q.device.type != cache.device.type:
        raise InputError(f"q must be {cache.dtype} on {cache.device} like the cache, got {q.dtype} on {q.device}")
    if not 1 <= tokens <= MOST_TOKENS:
        raise InputError(f"q has {tokens} new tokens a sequence, allowed are 1 to {MOST_TOKENS}")
    if query_heads(q, g) != cache.heads_kv or q.shape[3] != g.qk:
        raise InputError(f"q must be [..., Hq, Dqk] = [..., {cache.heads_kv * g.group}, {g.qk}], got {list(q.shape)}")
    for name, gate in (("g_cmp", g_cmp), ("g_slc", g_slc), ("g_swa", g_swa)):
        check(name, gate, q, tuple(q.shape[:3]), "[S, n, Hq]", (q.dtype, torch.float32))
    if (sequences is None) == (slots is None):
        raise InputError("give sequences or slots, one of them")
    if sequences is not None:
        lengths = [cache.length(sequence) for sequence in sequences]
        if min(lengths, default=tokens) < tokens:
            raise InputError(f"q has {tokens} new tokens a sequence, sequence {sequences[lengths.index(min(lengths))]} has {min(lengths)}")
        slots = cache.slots(sequences)
        longest = 1 << (max(lengths, default=1) - 1).bit_length()
        max_seqlen = min(longest, cache.max_seqlen) if max_seqlen is None else max_seqlen
        if max_seqlen < max(lengths, default=0):
            raise InputError(f"max_seqlen: got {max_seqlen}, a sequence has {max(lengths)} tokens")
    assert slots is not None
    if slots.dtype is not torch.int32 or slots.shape != (count,) or slots.device.type != q.device.type:
        raise InputError(f"slots must be int32 [{count}] on {q.device}, got {slots.dtype} {list(slots.shape)} on {slots.device}")
    if g_cmp.dtype is not g_slc.dtype or g_cmp.dtype is not g_swa.dtype:
        g_cmp, g_slc, g_swa = g_cmp.float(), g_slc.float(), g_swa.float()
    o = _nsa_decode(
        q, cache.k_pages, cache.v_pages, cache.tables, slots, cache.lengths, cache.arrived, list(cache.scales), g_cmp, g_slc, g_swa, g.key,
        cache.max_seqlen if max_seqlen is None else max_seqlen, scale_of(scale, g),
    )  # fmt: skip
    return o.squeeze(1) if single else o
