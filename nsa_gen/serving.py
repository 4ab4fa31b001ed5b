"""Attention for serving engines: new tokens of many sequences against a :class:`~nsa_gen.cache.PagedKVCache`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from torch import Tensor

from .branches import decode, forward
from .branches._inputs import check, on_device_of, query_heads, scale_of
from .cache import MOST_TOKENS, PagedKVCache
from .config import COUNTERS
from .errors import InputError
from .register import register
from .replay import Repeats, replayed

__all__ = ["nsa_decode", "nsa_prefill"]

_decode = replayed(decode.decode)
_repeats = Repeats()
_nsa_decode = register(
    "nsa_decode",
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor tables, Tensor slots, Tensor lengths, Tensor arrived, Tensor[] scales, "
    "Tensor g_cmp, Tensor g_slc, Tensor g_swa, str key, int max_seqlen, float scale) -> Tensor",
    _decode,
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
    layer: int = 0,
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
        layer: of the cache.

    Calls on one cache share counters: they must follow each other, on one stream.

    Returns:
        ``[S,Hq,Dv]`` or ``[S,n,Hq,Dv]`` in q's dtype. Not differentiable.

    Raises:
        InputError: a wrong argument; the message names it, what was given and what is allowed.
        UnknownSequence: a sequence is not in the cache.
        NotTuned: ``NSA_GEN_STRICT=1`` and no exact tuned row.
    """
    g = cache.geometry
    key = None
    if sequences is None:
        key, record = _repeats.find((q, g_cmp, g_slc, g_swa, slots), cache.serial, layer, max_seqlen, scale)
        if record is not None:
            held = *cache.layer(layer), cache.tables, slots, cache.lengths, cache.arrived, *cache.scales[layer]
            if (o := record(q, *held, g_cmp, g_slc, g_swa)) is not None:
                return o.squeeze(1) if q.dim() == 3 else o
    if not isinstance(q, Tensor) or q.dim() not in (3, 4):
        raise InputError(f"q must be [S, Hq, Dqk] or [S, n, Hq, Dqk], got {list(q.shape) if isinstance(q, Tensor) else type(q).__name__}")
    single = q.dim() == 3
    if single:
        q, g_cmp, g_slc, g_swa = (x.unsqueeze(1) if isinstance(x, Tensor) else x for x in (q, g_cmp, g_slc, g_swa))
    count, tokens = q.shape[:2]
    if not 1 <= tokens <= MOST_TOKENS:
        raise InputError(f"q has {tokens} new tokens a sequence, allowed are 1 to {MOST_TOKENS}")
    _check(cache, q, {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}, "[S, n, Hq]")
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
    elif max_seqlen is None:
        max_seqlen = cache.max_seqlen
    if not isinstance(max_seqlen, int) or not 0 <= max_seqlen <= cache.max_seqlen or (count and not max_seqlen):
        raise InputError(f"max_seqlen must be a whole number from 1 to the cache's, {cache.max_seqlen}, got {max_seqlen!r}")
    if (given := cache.check_slots(slots)) != count:
        raise InputError(f"slots must be int32 [{count}], for each sequence of q, got [{given}]")
    most = cache.arrived.numel() // (COUNTERS * tokens * cache.heads_kv)
    if count > most:
        raise InputError(f"q has {count} sequences of {tokens} tokens, the cache counts for {most}: give it more max_sequences")
    assert slots is not None
    if g_cmp.dtype is not g_slc.dtype or g_cmp.dtype is not g_swa.dtype:
        key, g_cmp, g_slc, g_swa = None, g_cmp.float(), g_slc.float(), g_swa.float()
    args = (
        q, *cache.layer(layer), cache.tables, slots, cache.lengths, cache.arrived, cache.scales[layer], g_cmp, g_slc, g_swa, g.key,
        max_seqlen, scale_of(scale, g),
    )  # fmt: skip
    o = _nsa_decode(*args)
    _repeats.note(key, _decode, *args)
    return o.squeeze(1) if single else o


def nsa_prefill(
    q: Tensor,
    g_cmp: Tensor,
    g_slc: Tensor,
    g_swa: Tensor,
    *,
    cache: PagedKVCache,
    sequences: Sequence[int],
    tokens: Sequence[int] | None = None,
    scale: float | None = None,
    layer: int = 0,
) -> Tensor:
    """Native Sparse Attention of many new tokens of each sequence, on top of what was cached before (paper eqs. 5-12): prompts, chunks of
    them, what follows a shared prefix. The cache holds the new tokens already.

    The result is that of :func:`nsa_gen.nsa_attention` on the whole sequence, in the rows of these tokens: the same kernels read K and V as
    the cache stored them, copied out of its pages, a sequence after the other; sequences without a prefix go together.

    Args:
        q: ``[T,Hq,Dqk]``: of each sequence its last tokens, one sequence after the other.
        g_cmp, g_slc, g_swa: ``[T,Hq]``, already through their sigmoid; in q's dtype or float32.
        cache: holds the sequences, new tokens included (:meth:`PagedKVCache.append`). Where K and V are per branch, the new tokens must be
            those of the last ``append``: rows that earlier ones read are given up at the next.
        sequences: ids, each once.
        tokens: new tokens of each sequence, T in all; default as many of each.
        scale: factor on q·k, positive; default ``Dqk**-0.5``.
        layer: of the cache.

    Returns:
        ``[T,Hq,Dv]`` in q's dtype. Not differentiable.

    Raises:
        InputError: a wrong argument; the message names it, what was given and what is allowed.
        UnknownSequence: a sequence is not in the cache.
        NotTuned: ``NSA_GEN_STRICT=1`` and no exact tuned row.
    """
    if not isinstance(q, Tensor) or q.dim() != 3:
        raise InputError(f"q must be [T, Hq, Dqk], got {list(q.shape) if isinstance(q, Tensor) else type(q).__name__}")
    gates = {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
    _check(cache, q, gates, "[T, Hq]")
    cache.layer(layer)
    total, factor = q.shape[0], scale_of(scale, cache.geometry)
    counts = cache.counts(sequences, total, tokens)
    for sequence, count in counts.items():
        if cache.length(sequence) < count:
            raise InputError(f"{count} new tokens of sequence {sequence}, which has {cache.length(sequence)}")
    o = torch.empty((total, q.shape[1], cache.geometry.v), dtype=q.dtype, device=q.device)
    at = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
    whole = [s for s, n in counts.items() if n and n == cache.length(s)]
    groups = [[s] for s, n in counts.items() if n and s not in whole] + ([whole] if whole else [])
    for group in groups:
        rows = [slice(at[s], at[s] + counts[s]) for s in group]
        given = [x[rows[0]] if len(rows) == 1 else torch.cat([x[r] for r in rows]) for x in (q, *gates.values())]
        with torch.no_grad(), on_device_of(q) or nullcontext():
            found = _prefill(cache, group, counts[group[0]], given, factor, layer)
        for part, r in zip(found.split([counts[s] for s in group]), rows, strict=True):
            o[r] = part
    return o


def _prefill(cache: PagedKVCache, sequences: list[int], new: int, given: list[Tensor], scale: float, layer: int) -> Tensor:
    """The new tokens of one sequence, ``new`` of them, or all tokens of several."""
    g, lengths = cache.geometry, [cache.length(s) for s in sequences]
    total, longest = sum(lengths), max(lengths)
    pairs = []  # K and V of the stream of all tokens; or per branch of the selected branch, then of the sliding one
    for number in (1, 2) if cache.per_branch else (0,):
        low = max(lengths[0] - new - g.window + 1, 0) if number == 2 else 0  # rows that no window holds may be given up
        pair = cache.gather(number, [(s, low, n) for s, n in zip(sequences, lengths, strict=True)], layer)
        pairs.append([torch.cat([x.new_zeros(low, *x.shape[1:]), x]) if low else x for x in pair])
    pairs = pairs[:1] + pairs if cache.per_branch else pairs  # compressed tokens are there: what they came from is not read
    k, v = (list(several) for several in zip(*pairs, strict=True))
    last = len(cache.streams) - 1
    counted = [cache.rows(s, last) for s in sequences]
    found = cache.gather(last, [(s, 0, n) for s, n in zip(sequences, counted, strict=True)], layer)
    compressed = [x.new_zeros(max(total // g.stride, 1), *x.shape[1:]) for x in found]
    starts = list(accumulate(lengths, initial=0))
    for x, y in zip(compressed, found, strict=True):
        for part, start in zip(y.split(counted), starts, strict=False):
            x[start // g.stride : start // g.stride + part.shape[0]] = part
    cu_seqlens = None if len(sequences) == 1 else torch.tensor(starts, dtype=torch.int32, device=cache.device)
    q, *gates = given
    return forward.inference(
        q, k, v, gates[0], gates[1], gates[2], [], [], *compressed, cu_seqlens, g.key, len(sequences), longest, scale,
        lengths[0] - new if len(sequences) == 1 else 0,
    )  # fmt: skip


def _check(cache: PagedKVCache, q: Tensor, gates: dict[str, Tensor], axes: str) -> None:
    g = cache.geometry
    if q.dtype != cache.dtype or q.device != cache.device:
        raise InputError(f"q must be {cache.dtype} on {cache.device} like the cache, got {q.dtype} on {q.device}")
    if query_heads(q, g) != cache.heads_kv or q.shape[-1] != g.qk:
        raise InputError(f"q must be [..., Hq, Dqk] = [..., {cache.heads_kv * g.group}, {g.qk}], got {list(q.shape)}")
    for name, gate in gates.items():
        check(name, gate, q, tuple(q.shape[:-1]), axes, (q.dtype, torch.float32))
