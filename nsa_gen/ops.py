"""The operators of Native Sparse Attention (arXiv 2502.11089): checked, registered with ``torch.library``, run by tuned kernels.

Tensors come packed (``q [T,Hq,Dqk]``, with ``cu_seqlens`` int32 ``[B+1]`` where there are several sequences) or batched
(``[B,S,Hq,Dqk]``); results have the same form. ``Hq = G * Hkv`` with the spec's group ``G``; the number of heads may differ from the
spec's (a tensor-parallel shard). Tensors may be bfloat16, float16 or float32, all of one dtype; the spec's ``dtype`` is what tables are
tuned for and does not bind a call. Any strides work; what kernels cannot read in place (last dim not contiguous, data not 16-byte aligned,
strides not multiples of 8 elements) is copied. Arguments that every operator takes:

* ``spec``: a name in ``specs/``, a path, or a ``Spec``. Files are read once a process.
* ``cu_seqlens``: int32 ``[B+1]`` on the tensors' device, from 0 to T; empty sequences are allowed.
* ``max_seqlen``: tokens of the longest sequence (an upper bound will do), with ``cu_seqlens`` only. It sizes grids and score buffers and
  chooses the tuned row; without it T is taken, as reading ``cu_seqlens`` would stall the GPU.
* ``scale``: factor on q·k, positive; default ``Dqk**-0.5``.

Wrong arguments raise ``InputError`` (``SpecError`` for the spec). Values on the GPU are only checked with ``NSA_GEN_DEBUG=1``. Nothing
synchronises with the device, so operators can be captured in CUDA graphs; ``torch.compile(fullgraph=True)`` keeps each as one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import operators
from .branches import _inputs, compression
from .branches._inputs import Geometry, SpecLike, Tokens, check, check_heads
from .errors import InputError
from .register import requires_grad

__all__ = ["combine", "compress", "compressed_attention", "nsa_attention", "select_blocks", "selected_attention", "sliding_attention"]

# --- what users call -------------------------------------------------------------------------------------------------------------

Branches = Tensor | tuple[Tensor, Tensor, Tensor]


def nsa_attention(
    q: Tensor,
    k: Branches,
    v: Branches,
    g_cmp: Tensor,
    g_slc: Tensor,
    g_swa: Tensor,
    *,
    spec: SpecLike,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    phi_k: Sequence[Tensor] = (),
    phi_v: Sequence[Tensor] = (),
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    deterministic: bool | None = None,
    recompute: bool = False,
) -> Tensor:
    """Native Sparse Attention, whole (paper eqs. 5-12): ``g_cmp*o_cmp + g_slc*o_slc + g_swa*o_swa``.

    Args:
        q: ``[T,Hq,Dqk]`` or ``[B,S,Hq,Dqk]``.
        k: ``[T,Hkv,Dqk]`` (or batched), or three of these for the compressed, selected and sliding branch (paper section 3.3.3).
        v: ``[T,Hkv,Dv]`` (or batched), or three.
        g_cmp, g_slc, g_swa: ``[T,Hq]`` (or ``[B,S,Hq]``), already through their sigmoid; in q's dtype or float32, NaN passes through.
        spec, cu_seqlens, max_seqlen, scale: see the module. Without gradients, all scratch memory stays below ``NSA_GEN_WORKSPACE`` at any
            length: queries go through the branches in chunks, which changes no bit of the result.
        phi_k, phi_v: weights of φ for keys and values, see :func:`compress`.
        k_cmp, v_cmp: compressed keys and values made by other means, both or neither, laid out as :func:`compress` does; φ is then
            skipped and its weights must be left out.
        deterministic: whether gradients are to have the same bits in every run; default as torch has it
            (``torch.use_deterministic_algorithms``). Sums of dk and dv over a block's queries are then made in a fixed order: slower
            (docs/training.md). The forward is deterministic in any case.
        recompute: keep nothing for the backward but the arguments: it runs the forward again. Otherwise the branches' outputs, LSEs and
            block indices are kept: three tensors like the result, and little besides.

    Differentiable in q, k, v, the gates, φ's weights, k_cmp and v_cmp, once; no gradient flows through the choice of blocks.

    Returns:
        ``[T,Hq,Dv]`` (or ``[B,S,Hq,Dv]``) in q's dtype.

    Raises:
        InputError: a wrong argument; the message names it, what was given and what is allowed.
        SpecError: no such spec, or a broken one.
        NotTuned: ``NSA_GEN_STRICT=1`` and no exact tuned row.
    """
    g, tokens, heads = _begin(q, spec, cu_seqlens, max_seqlen)
    k, v = _three("k", k), _three("v", v)
    for name, given, dim, axes in (("k", k, g.qk, "[..., Hkv, Dqk]"), ("v", v, g.v, "[..., Hkv, Dv]")):
        for x in given:
            _check_kv(name, x, q, tokens, heads, dim, g, axes)
    lead = tokens.lead()
    for name, gate in (("g_cmp", g_cmp), ("g_slc", g_slc), ("g_swa", g_swa)):
        check(name, gate, q, (*lead, q.shape[-2]), "[..., Hq]", (q.dtype, torch.float32))
    if (k_cmp is None) != (v_cmp is None):
        raise InputError(f"k_cmp and v_cmp go together, got {'v_cmp' if k_cmp is None else 'k_cmp'} only")
    if k_cmp is not None:
        if len(phi_k) or len(phi_v):
            raise InputError("phi_k and phi_v are weights of φ, which k_cmp and v_cmp skip: give one or the other")
        _check_compressed(q, tokens, heads, g, k_cmp=k_cmp, v_cmp=v_cmp)
    else:
        compression.check_weights("phi_k", phi_k, k[0], g)
        compression.check_weights("phi_v", phi_v, v[0], g)
    pack = tokens.pack
    args = (
        pack(q), [pack(x) for x in k], [pack(x) for x in v], pack(g_cmp), pack(g_slc), pack(g_swa), list(phi_k), list(phi_v), k_cmp, v_cmp,
        cu_seqlens, g.key, tokens.batch, tokens.max_seqlen, _inputs.scale_of(scale, g), _deterministic(deterministic),
    )  # fmt: skip
    if torch.is_grad_enabled() and not recompute and requires_grad(args):
        return tokens.unpack(operators.nsa_attention_saving(*args)[0])
    return tokens.unpack(operators.nsa_attention(*args))


def compress(
    x: Tensor,
    weights: Sequence[Tensor] = (),
    *,
    spec: SpecLike,
    which: str = "k",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Compressed keys or values: token ``j`` of a sequence is φ(x[j*d : j*d + l]) (paper eq. 7).

    Args:
        x: ``[T,Hkv,D]`` or ``[B,S,Hkv,D]``, ``D`` that of ``which``.
        weights: of φ, per KV head, in x's dtype. mean ``()``; weighted ``(weight [Hkv,l],)``; linear ``(weight [Hkv,l*D,D],)``; mlp
            ``(w1 [Hkv,l*D,hidden], b1 [Hkv,hidden], w2 [Hkv,hidden,D], b2 [Hkv,D], pos [Hkv,l,D])``:
            ``gelu((x + pos).flatten() @ w1 + b1) @ w2 + b2`` with the exact GELU.
        which: ``k`` or ``v``: whose head dim x has.
        spec, cu_seqlens, max_seqlen: see the module.

    Returns:
        ``[max(T//d,1),Hkv,D]``, packed also for a batched call. The compressed tokens of sequence ``b`` start at row
        ``cu_seqlens[b] // d`` (``b*S // d``); rows between sequences are zero.

    Raises:
        InputError, SpecError, NotTuned: as :func:`nsa_attention`.
    """
    if which not in ("k", "v"):
        raise InputError(f"which must be 'k' or 'v', got {which!r}")
    g = _inputs.geometry_of(spec)
    tokens = _inputs.tokens_of("x", x, cu_seqlens, max_seqlen)
    dim = g.qk if which == "k" else g.v
    check("x", x, x, (*x.shape[:-1], dim), f"[..., Hkv, {'Dqk' if which == 'k' else 'Dv'}]")
    compression.check_weights("weights", weights, x, g)
    return operators.compress(tokens.pack(x), list(weights), cu_seqlens, g.key, which, tokens.batch, tokens.max_seqlen)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    spec: SpecLike,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query ``t`` to the compressed tokens ``j`` with ``j*d + l - 1 <= t`` (paper eq. 8).

    Args:
        q: ``[T,Hq,Dqk]`` or ``[B,S,Hq,Dqk]``.
        k_cmp, v_cmp: ``[max(T//d,1),Hkv,Dqk]`` and ``[max(T//d,1),Hkv,Dv]``, laid out as by :func:`compress`; rows between sequences
            are never used.
        spec, cu_seqlens, max_seqlen, scale: see the module.
        deterministic: see :func:`nsa_attention`.

    Returns:
        ``o [T,Hq,Dv]`` and the natural-log ``lse [T,Hq]`` in float32 (or batched). A query that sees no token has 0 and -inf.

    Raises:
        InputError, SpecError, NotTuned: as :func:`nsa_attention`.
    """
    g, tokens, heads = _begin(q, spec, cu_seqlens, max_seqlen)
    _check_compressed(q, tokens, heads, g, k_cmp=k_cmp, v_cmp=v_cmp)
    at = (*_tail(tokens, g, scale), _deterministic(deterministic))
    return _unpacked(tokens, operators.compressed_attention(tokens.pack(q), k_cmp, v_cmp, *at))


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    spec: SpecLike,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The ``n`` blocks each query reads: the initial and local ones, then those of most importance (paper eqs. 9-11).

    Importance is the softmax of :func:`compressed_attention` mapped to selection blocks and summed over a group's heads, in float32; ties
    go to the smaller index. Its scores are made for as many queries at a time as fit in the workspace (``NSA_GEN_WORKSPACE``).

    Args:
        q: ``[T,Hq,Dqk]`` or ``[B,S,Hq,Dqk]``.
        k_cmp: ``[max(T//d,1),Hkv,Dqk]``.
        lse: ``[T,Hq]`` float32 (or batched) of :func:`compressed_attention` with the same ``q``, ``k_cmp`` and ``scale``.
        spec, cu_seqlens, max_seqlen, scale: see the module.

    Returns:
        ``block_indices`` int32 ``[T,Hkv,n]`` (or batched): ascending, distinct, -1 last. No gradient flows through it.

    Raises:
        InputError, SpecError, NotTuned: as :func:`nsa_attention`.
    """
    g, tokens, heads = _begin(q, spec, cu_seqlens, max_seqlen)
    _check_compressed(q, tokens, heads, g, k_cmp=k_cmp)
    check("lse", lse, q, q.shape[:-1], "[..., Hq]", (torch.float32,))
    args = (tokens.pack(q).detach(), k_cmp.detach(), tokens.pack(lse).detach())
    with torch.no_grad():  # none flows through the choice (paper section 3.3.2)
        return tokens.unpack(operators.select_blocks(*args, *_tail(tokens, g, scale)))


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    spec: SpecLike,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query ``t`` to the tokens ``s <= t`` of its chosen blocks (paper eq. 12).

    Args:
        q: ``[T,Hq,Dqk]`` or ``[B,S,Hq,Dqk]``.
        k, v: ``[T,Hkv,Dqk]`` and ``[T,Hkv,Dv]`` (or batched).
        block_indices: int32 ``[T,Hkv,n]`` (or batched): ascending, distinct, -1 last, none past the query's own block. The forced blocks
            need not be among them.
        spec, cu_seqlens, max_seqlen, scale: see the module.
        deterministic: see :func:`nsa_attention`.

    Returns:
        ``o [T,Hq,Dv]`` and the natural-log ``lse [T,Hq]`` in float32 (or batched).

    Raises:
        InputError, SpecError, NotTuned: as :func:`nsa_attention`.
    """
    g, tokens, heads = _begin(q, spec, cu_seqlens, max_seqlen)
    _check_kv("k", k, q, tokens, heads, g.qk, g, "[..., Hkv, Dqk]")
    _check_kv("v", v, q, tokens, heads, g.v, g, "[..., Hkv, Dv]")
    check("block_indices", block_indices, q, (*tokens.lead(), heads, g.count), "[..., Hkv, n]", (torch.int32,))
    pack = tokens.pack
    at = (*_tail(tokens, g, scale), _deterministic(deterministic))
    return _unpacked(tokens, operators.selected_attention(pack(q), pack(k), pack(v), pack(block_indices), *at))


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: SpecLike,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query ``t`` to the tokens ``t - window < s <= t`` (paper section 3.3.3): ``window`` keys, itself included.

    Args:
        q: ``[T,Hq,Dqk]`` or ``[B,S,Hq,Dqk]``.
        k, v: ``[T,Hkv,Dqk]`` and ``[T,Hkv,Dv]`` (or batched).
        spec, cu_seqlens, max_seqlen, scale: see the module.

    Returns:
        ``o [T,Hq,Dv]`` and the natural-log ``lse [T,Hq]`` in float32 (or batched).

    Raises:
        InputError, SpecError, NotTuned: as :func:`nsa_attention`.
    """
    g, tokens, heads = _begin(q, spec, cu_seqlens, max_seqlen)
    _check_kv("k", k, q, tokens, heads, g.qk, g, "[..., Hkv, Dqk]")
    _check_kv("v", v, q, tokens, heads, g.v, g, "[..., Hkv, Dv]")
    pack = tokens.pack
    return _unpacked(tokens, operators.sliding_attention(pack(q), pack(k), pack(v), *_tail(tokens, g, scale)))


def combine(o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor) -> Tensor:
    """``g_cmp*o_cmp + g_slc*o_slc + g_swa*o_swa``, in float32 (paper eq. 5).

    Args:
        o_cmp, o_slc, o_swa: ``[T,Hq,Dv]`` or ``[B,S,Hq,Dv]``, ``Dv`` a multiple of 16 from 16 to 256.
        g_cmp, g_slc, g_swa: ``[T,Hq]`` (or ``[B,S,Hq]``), already through their sigmoid; in the outputs' dtype or float32,
            NaN passes through.

    Returns:
        ``[T,Hq,Dv]`` (or batched), in the branches' dtype.

    Raises:
        InputError, NotTuned: as :func:`nsa_attention`.
    """
    tokens = _inputs.tokens_of("o_cmp", o_cmp, None, None)
    dim = o_cmp.shape[-1]
    if dim % 16 or not 16 <= dim <= 256:
        raise InputError(f"o_cmp must have a head dim that is a multiple of 16 from 16 to 256, got {dim}")
    for name, x in (("o_slc", o_slc), ("o_swa", o_swa)):
        check(name, x, o_cmp, o_cmp.shape, "[..., Hq, Dv]")
    for name, gate in (("g_cmp", g_cmp), ("g_slc", g_slc), ("g_swa", g_swa)):
        check(name, gate, o_cmp, o_cmp.shape[:-1], "[..., Hq]", (o_cmp.dtype, torch.float32))
    return tokens.unpack(operators.combine_branches(*map(tokens.pack, (o_cmp, o_slc, o_swa, g_cmp, g_slc, g_swa))))


# --- what they share -------------------------------------------------------------------------------------------------------------


def _begin(q: Tensor, spec: SpecLike, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[Geometry, Tokens, int]:
    """The geometry, the sequences, and the number of KV heads of a call with queries ``q``."""
    g = _inputs.geometry_of(spec)
    tokens = _inputs.tokens_of("q", q, cu_seqlens, max_seqlen)
    check("q", q, q, (*q.shape[:-1], g.qk), "[..., Hq, Dqk]")
    return g, tokens, _inputs.query_heads(q, g)


def _tail(tokens: Tokens, g: Geometry, scale: float | None) -> tuple[Any, ...]:
    return tokens.cu_seqlens, g.key, tokens.batch, tokens.max_seqlen, _inputs.scale_of(scale, g)


def _deterministic(asked: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if asked is None else bool(asked)


def _unpacked(tokens: Tokens, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tokens.unpack(found[0]), tokens.unpack(found[1])


def _three(name: str, given: Any) -> tuple[Any, ...]:
    """One tensor, or three: (compressed, selected, sliding)."""
    if isinstance(given, tuple | list):
        if len(given) != 3:
            raise InputError(f"{name} must be a tensor, or three for the compressed, selected and sliding branch; got {len(given)}")
        return tuple(given)
    return (given,)


def _check_kv(name: str, x: Any, q: Tensor, tokens: Tokens, heads: int, dim: int, g: Geometry, axes: str) -> None:
    check_heads(name, x, q.shape[-2], heads, g)
    check(name, x, q, (*tokens.lead(), heads, dim), axes)


def _check_compressed(q: Tensor, tokens: Tokens, heads: int, g: Geometry, **given: Any) -> None:
    rows = compression.rows_of(tokens.total, g.stride)
    for name, x in given.items():
        check_heads(name, x, q.shape[-2], heads, g)
        dim = g.qk if name == "k_cmp" else g.v
        check(name, x, q, (rows, heads, dim), f"[max(T//{g.stride}, 1), Hkv, {'Dqk' if name == 'k_cmp' else 'Dv'}]")
