"""The operators as ``torch.library`` has them: schema, kernels, fake kernel, backward. :mod:`nsa_gen.ops` checks arguments and calls these.

An operator's backward is an operator too, so that ``torch.compile`` sees one node each and CUDA graphs can hold a training step. None can
be differentiated twice. All end in the same arguments: ``cu_seqlens``, the geometry's ``key``, batch, longest sequence, where they have
one ``scale``, and, where gradients may differ in their last bits from run to run, ``deterministic``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .branches import backward, combine, compression, forward, selection, sliding
from .branches._inputs import geometry
from .config import Shape
from .register import register

_SEQUENCES = "Tensor? cu_seqlens, str key, SymInt batch, SymInt max_seqlen"
_AT = f"{_SEQUENCES}, float scale"
_DETERMINISTIC = f"{_AT}, bool deterministic"
_GRADIENTS = "-> (Tensor, Tensor, Tensor)"


def _last_left_out(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` without the last argument: ``deterministic`` is for the backward."""
    return lambda *args: call(*args[:-1])


# --- compression φ -----------------------------------------------------------------------------------------------------------------

_WHICH = "Tensor? cu_seqlens, str key, str which, SymInt batch, SymInt max_seqlen"


def _compress_bwd(dout: Tensor, x: Tensor, weights: list[Tensor], *at: Any) -> tuple[Tensor, ...]:
    dx, dweights = compression.compress_bwd(x, weights, dout, *at)
    return dx, *dweights


_compress_backward = register(
    "compress_bwd",
    f"(Tensor dout, Tensor x, Tensor[] weights, {_WHICH}) -> Tensor[]",
    _compress_bwd,
    lambda dout, x, weights, *at: tuple(y.new_empty(y.shape) for y in (x, *weights)),
)


def _of_compress(inputs: tuple[Any, ...], outputs: tuple[Any, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    dx, *dweights = _compress_backward(*grads, *inputs)
    return dx, dweights, *(None,) * 5


compress = register(
    "compress",
    f"(Tensor x, Tensor[] weights, {_WHICH}) -> Tensor",
    compression.compress_fwd,
    compression.compress_fake,
    _of_compress,
)

# --- attention of one branch -------------------------------------------------------------------------------------------------------


def _shape(k: Tensor, batch: int, max_seqlen: int) -> Shape:
    return Shape(max_seqlen, batch * k.shape[1])


def _gradients_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _compressed_attention_bwd(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None, cu_seqlens: Tensor | None, key: str,
    batch: int, max_seqlen: int, scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = combine.delta(do, o, dlse, _shape(k_cmp, batch, max_seqlen))
    at = (cu_seqlens, key, batch, max_seqlen, scale, deterministic)
    return compression.compressed_attention_bwd(q, k_cmp, v_cmp, do, lse, *delta, *at)


_ATTENDED = "Tensor o, Tensor lse, Tensor? dlse"
_compressed_attention_backward = register(
    "compressed_attention_bwd",
    f"(Tensor do, Tensor q, Tensor k_cmp, Tensor v_cmp, {_ATTENDED}, {_DETERMINISTIC}) {_GRADIENTS}",
    _compressed_attention_bwd,
    _gradients_fake,
)


def _of_attention(backward: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The backward of an operator with ``q``, ``k``, ``v`` first and ``o``, ``lse`` as results, which takes ``tensors`` tensors."""

    def gradients(inputs: tuple[Any, ...], outputs: tuple[Any, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
        o, lse = outputs
        do, dlse = grads
        do = torch.zeros_like(o) if do is None else do
        dq, dk, dv = backward(do, *inputs[:tensors], o, lse, dlse, *inputs[tensors:])
        return dq, dk, dv, *(None,) * (len(inputs) - 3)

    return gradients


compressed_attention = register(
    "compressed_attention",
    f"(Tensor q, Tensor k_cmp, Tensor v_cmp, {_DETERMINISTIC}) -> (Tensor, Tensor)",
    _last_left_out(compression.compressed_attention_fwd),
    _last_left_out(compression.compressed_attention_fake),
    _of_attention(_compressed_attention_backward, 3),
)


def _selected_attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None,
    cu_seqlens: Tensor | None, key: str, batch: int, max_seqlen: int, scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = combine.delta(do, o, dlse, _shape(k, batch, max_seqlen))
    at = (cu_seqlens, key, batch, max_seqlen, scale, deterministic)
    return selection.selected_attention_bwd(q, k, v, block_indices, do, lse, *delta, *at, q.dtype)


_selected_attention_backward = register(
    "selected_attention_bwd",
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor block_indices, {_ATTENDED}, {_DETERMINISTIC}) {_GRADIENTS}",
    _selected_attention_bwd,
    _gradients_fake,
)
selected_attention = register(
    "selected_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor block_indices, {_DETERMINISTIC}) -> (Tensor, Tensor)",
    _last_left_out(selection.selected_attention_fwd),
    _last_left_out(selection.selected_attention_fake),
    _of_attention(_selected_attention_backward, 4),
)


def _sliding_attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None, cu_seqlens: Tensor | None, key: str,
    batch: int, max_seqlen: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = combine.delta(do, o, dlse, _shape(k, batch, max_seqlen))
    return sliding.sliding_attention_bwd(q, k, v, do, lse, *delta, cu_seqlens, key, batch, max_seqlen, scale)


_sliding_attention_backward = register(
    "sliding_attention_bwd",
    f"(Tensor do, Tensor q, Tensor k, Tensor v, {_ATTENDED}, {_AT}) {_GRADIENTS}",
    _sliding_attention_bwd,
    _gradients_fake,
)
sliding_attention = register(
    "sliding_attention",
    f"(Tensor q, Tensor k, Tensor v, {_AT}) -> (Tensor, Tensor)",
    sliding.sliding_attention_fwd,
    sliding.sliding_attention_fake,
    _of_attention(_sliding_attention_backward, 3),
)

# --- selection, and the gated sum --------------------------------------------------------------------------------------------------

#: No gradient flows through it (paper section 3.3.2): it is called on detached tensors.
select_blocks = register(
    "select_blocks",
    f"(Tensor q, Tensor k_cmp, Tensor lse, {_AT}) -> Tensor",
    selection.select_blocks_fwd,
    selection.select_blocks_fake,
)
_SUMMED = "Tensor o_cmp, Tensor o_slc, Tensor o_swa, Tensor g_cmp, Tensor g_slc, Tensor g_swa"
_combine_backward = register(
    "combine_bwd",
    f"(Tensor do, {_SUMMED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    combine.combine_bwd,
    combine.combine_bwd_fake,
)
combine_branches = register(
    "combine",
    f"({_SUMMED}) -> Tensor",
    combine.combine_fwd,
    combine.combine_fake,
    lambda inputs, outputs, grads: _combine_backward(*grads, *inputs),
)

# --- the whole ---------------------------------------------------------------------------------------------------------------------

_GIVEN = (
    "Tensor q, Tensor[] k, Tensor[] v, Tensor g_cmp, Tensor g_slc, Tensor g_swa, Tensor[] phi_k, Tensor[] phi_v, Tensor? k_cmp, "
    "Tensor? v_cmp"
)
_K_CMP, _CU_SEQLENS = 8, 10  # places of arguments


def _nsa_attention_fake(q: Tensor, k: list[Tensor], v: list[Tensor], *rest: Any) -> Tensor:
    return compression.attention_fake(q, v[-1])[0]


def _nsa_attention_save(*args: Any) -> tuple[Tensor, ...]:
    """All of :func:`forward.training`; ``k_cmp`` and ``v_cmp`` empty where given, as an operator must not return its arguments."""
    *made, k_cmp, v_cmp = forward.training(*args[:-1])
    if args[_K_CMP] is not None:
        k_cmp, v_cmp = k_cmp.new_empty(0), v_cmp.new_empty(0)
    return *made, k_cmp, v_cmp


def _nsa_attention_save_fake(
    q: Tensor, k: list[Tensor], v: list[Tensor], g_cmp: Tensor, g_slc: Tensor, g_swa: Tensor, phi_k: list[Tensor], phi_v: list[Tensor],
    k_cmp: Tensor | None, v_cmp: Tensor | None, cu_seqlens: Tensor | None, key: str, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    g, total = geometry(key), q.shape[0]
    attended = [compression.attention_fake(q, v[-1]) for _ in range(3)]
    block_indices = q.new_empty((total, k[0].shape[1], g.count), dtype=torch.int32)
    rows = compression.rows_of(total, g.stride)
    made = (x[0].new_empty((rows, *x[0].shape[1:]) if given is None else (0,)) for given, x in ((k_cmp, k), (v_cmp, v)))
    o = torch.empty_like(attended[0][0])
    return o, *(o for o, _ in attended), *(lse for _, lse in attended), block_indices, *made


nsa_attention_backward = register(
    "nsa_attention_bwd",
    f"(Tensor do, {_GIVEN}, Tensor[] saved, {_DETERMINISTIC}) -> Tensor[]",
    backward.gradients,
    backward.gradients_fake,
)


def _of_nsa_attention(inputs: tuple[Any, ...], outputs: tuple[Any, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """``outputs``: what the forward kept; nothing to run it again. Of ``grads`` only the first can be asked for."""
    _, k, v, _, _, _, phi_k, phi_v, k_cmp, _ = inputs[:_CU_SEQLENS]
    found = iter(nsa_attention_backward(grads[0], *inputs[:_CU_SEQLENS], list(outputs), *inputs[_CU_SEQLENS:]))
    dq, dk, dv = next(found), [next(found) for _ in k], [next(found) for _ in v]
    dgates = next(found), next(found), next(found)
    dphi = [next(found) for _ in phi_k], [next(found) for _ in phi_v]
    compressed = (None, None) if k_cmp is None else (next(found), next(found))
    return dq, dk, dv, *dgates, *dphi, *compressed, *(None,) * (len(inputs) - _CU_SEQLENS)


#: For inference, and for training that runs the forward again in the backward: ``o`` alone.
nsa_attention = register(
    "nsa_attention_fwd",
    f"({_GIVEN}, {_DETERMINISTIC}) -> Tensor",
    _last_left_out(forward.inference),
    _nsa_attention_fake,
    _of_nsa_attention,
    keep=slice(0),
)
#: For training: ``o, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa, block_indices, k_cmp, v_cmp``.
nsa_attention_saving = register(
    "nsa_attention_save",
    f"({_GIVEN}, {_DETERMINISTIC}) -> ({', '.join(['Tensor'] * (1 + backward.SAVED))})",
    _nsa_attention_save,
    _nsa_attention_save_fake,
    _of_nsa_attention,
    keep=slice(1, None),
)
