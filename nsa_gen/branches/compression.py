"""Compression φ of keys and values (paper eq. 7) and attention to the compressed tokens (eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import paths
from ..config import Shape
from ..errors import InputError
from ._inputs import Geometry, check, check_values, geometry, kernel, ready, ready_flat


def rows_of(total: int, stride: int) -> int:
    """Rows of a compressed tensor over ``total`` packed tokens: sequence ``b`` starts at row ``cu_seqlens[b] // stride``."""
    return torch.sym_max(total // stride, 1)


def check_weights(name: str, weights: tuple[Tensor, ...], x: Tensor, g: Geometry) -> None:
    """Hold the weights of φ to the pooling of the spec and the heads and head dim of ``x [...,Hkv,D]``.

    Raises:
        InputError: too many or few, wrong shapes, dtype or device.
    """
    heads, dim = x.shape[-2:]
    hidden, reach = g.hidden or dim, g.block * dim
    wanted = {
        "mean": (),
        "weighted": (("weight", (heads, g.block), "[Hkv, l]"),),
        "linear": (("weight", (heads, reach, dim), "[Hkv, l*D, D]"),),
        "mlp": (
            ("w1", (heads, reach, hidden), "[Hkv, l*D, hidden]"),
            ("b1", (heads, hidden), "[Hkv, hidden]"),
            ("w2", (heads, hidden, dim), "[Hkv, hidden, D]"),
            ("b2", (heads, dim), "[Hkv, D]"),
            ("pos", (heads, g.block, dim), "[Hkv, l, D]"),
        ),
    }[g.pooling]
    if not isinstance(weights, tuple | list) or len(weights) != len(wanted):
        given = f"{len(weights)}" if isinstance(weights, tuple | list) else type(weights).__name__
        need = ", ".join(part for part, _, _ in wanted)
        raise InputError(f"{name}: pooling {g.pooling} of the spec takes {len(wanted)} tensors ({need}), got {given}")
    for (part, shape, axes), weight in zip(wanted, weights, strict=True):
        check(f"{name} ({part})", weight, x, shape, axes)


def compress_fwd(x: Tensor, weights: list[Tensor], cu_seqlens: Tensor | None, key: str, which: str, batch: int, max_seqlen: int) -> Tensor:
    """``x [T,Hkv,D]`` → ``[max(T//d,1),Hkv,D]``."""
    total, heads, dim = x.shape
    check_values(cu_seqlens, total, max_seqlen)
    out = torch.empty((max(total // geometry(key).stride, 1), heads, dim), dtype=x.dtype, device=x.device)
    if total and batch:
        run = kernel("compress_fwd", key, x, cu_seqlens, Shape(max_seqlen, batch * heads), which)
        run(ready(x), tuple(map(ready_flat, weights)), out, cu_seqlens, batch, max_seqlen)
    else:
        out.zero_()
    return out


def compress_bwd(
    x: Tensor, weights: list[Tensor], dout: Tensor, cu_seqlens: Tensor | None, key: str, which: str, batch: int, max_seqlen: int,
    dx_add: Tensor | None = None, dx_dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of ``x [T,Hkv,D]`` and of the weights of φ, given that of the result, ``dout [max(T//d,1),Hkv,D]``.

    Args:
        dx_add: ``[T,Hkv,D]`` in x's dtype or float32, is added to the gradient of x.
        dx_dtype: of the gradient of x: x's (default) or float32.

    Returns:
        ``dx [T,Hkv,D]``, and the gradients of the weights in their dtype.
    """
    total, heads, _ = x.shape
    check_values(cu_seqlens, total, max_seqlen)
    dx = torch.empty(x.shape, dtype=dx_dtype or x.dtype, device=x.device)
    dweights = [torch.empty(weight.shape, dtype=weight.dtype, device=x.device) for weight in weights]
    if total and batch:
        run = kernel("compress_bwd", key, x, cu_seqlens, Shape(max_seqlen, batch * heads), which)
        given = ready(x), tuple(map(ready_flat, weights)), ready_flat(dout)
        run(*given, dx, tuple(dweights), None if dx_add is None else ready_flat(dx_add), cu_seqlens, batch, max_seqlen)
    else:  # no token: dx is empty
        for dweight in dweights:
            dweight.zero_()
    return dx, dweights


def compress_fake(x: Tensor, weights: list[Tensor], cu_seqlens: Tensor | None, key: str, which: str, batch: int, max_seqlen: int) -> Tensor:
    return x.new_empty((rows_of(x.shape[0], geometry(key).stride), *x.shape[1:]))


def compressed_attention_fwd(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """``q [T,Hq,Dqk]``, ``k_cmp``, ``v_cmp [max(T//d,1),Hkv,·]`` → ``o [T,Hq,Dv]``, ``lse [T,Hq]``."""
    total, heads = q.shape[:2]
    check_values(cu_seqlens, total, max_seqlen)
    o = torch.empty((total, heads, v_cmp.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty((total, heads), dtype=torch.float32, device=q.device)
    if total:
        run = kernel("compressed_attention_fwd", key, q, cu_seqlens, Shape(max_seqlen, batch * k_cmp.shape[1]))
        run(ready(q), ready(k_cmp), ready(v_cmp), o, lse, scale, 0, cu_seqlens, batch, max_seqlen)
    return o, lse


def attention_fake(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` of any branch."""
    total, heads = q.shape[:2]
    return q.new_empty((total, heads, v.shape[2])), q.new_empty((total, heads), dtype=torch.float32)


def compressed_attention_fake(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    return attention_fake(q, v_cmp)


def compressed_attention_bwd(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gate: Tensor, cu_seqlens: Tensor | None, key: str,
    batch: int, max_seqlen: int, scale: float, deterministic: bool, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``gate * compressed_attention``: ``dq [T,Hq,Dqk]``, ``dk_cmp``, ``dv_cmp`` as ``k_cmp``, ``v_cmp``.

    Args:
        do: ``[T,Hq,Dv]`` of that product.
        lse, delta, gate: fp32 ``[T,Hq]``; delta is ``do @ o`` less the gradient of lse.
        deterministic: the same bits in every run.
        dq: contiguous; the gradient is added to it in place.
    """
    added, dq = dq, torch.empty(q.shape, dtype=q.dtype, device=q.device) if dq is None else dq
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k_cmp, v_cmp))
    if q.shape[0]:
        run = kernel("compressed_attention_bwd", key, q, cu_seqlens, Shape(max_seqlen, batch * k_cmp.shape[1]), deterministic)
        given = (ready(q), ready(k_cmp), ready(v_cmp), ready(do), lse, delta, gate)
        run(*given, dq, dk, dv, added, scale, paths.workspace_bytes(), cu_seqlens, batch, max_seqlen)
    else:
        dk.zero_()
        dv.zero_()
    return dq, dk, dv
