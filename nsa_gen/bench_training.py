"""The calls of a training step that ``nsa-gen bench --training`` measures: forward and backward, whole and by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .spec import Spec

WHOLE = "forward + backward"


def parts(spec: Spec, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Forward and backward, each of them, and the backward's parts, as calls without arguments.

    Autograd is left out: what it calls is called. A part's inputs are what the forward kept.

    Args:
        given: of ``bench.tensors``.
    """
    import torch

    from . import operators
    from .branches import combine, compression, forward, selection, sliding
    from .config import Shape

    q, gates = given["q"], [given[f"g_{branch}"] for branch in ("cmp", "slc", "swa")]
    k, v = (list(x) if isinstance(x, tuple) else [x] for x in (given["k"], given["v"]))
    phi_k, phi_v, total = list(given["phi_k"]), list(given["phi_v"]), q.shape[0]
    inputs = (q, k, v, *gates, phi_k, phi_v, None, None)
    sequences = (None, spec.key, 1, total)
    at = (*sequences, spec.head_dim.qk**-0.5)

    def keep() -> list[Any]:
        return list(operators.nsa_attention_saving(*inputs, *at, False)[1:])

    saved = keep()
    o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa, block_indices, k_cmp, v_cmp = saved
    do = torch.empty_like(o_cmp).normal_(generator=torch.Generator(q.device).manual_seed(1))
    shape = Shape(total, k[0].shape[1])

    def numbers() -> tuple[list[Any], list[Any], list[Any]]:
        return combine.numbers(do, (o_cmp, o_slc, o_swa), (gates[0], gates[1], gates[2]), shape)

    def backward(kept: list[Any]) -> Any:
        return operators.nsa_attention_backward(do, *inputs, kept, *at, False)

    deltas, factors, _ = numbers()
    k_slc, k_swa, v_slc, v_swa = forward.attended(k, v)
    dtype = torch.float32 if len(k) == 1 or len(v) == 1 else q.dtype
    # As in the whole backward: with the same K and V, sliding attention serves the local blocks.
    local = spec.selection.local if len(k) == len(v) == 1 else 0
    beside = (lse_slc, deltas[1], factors[1], spec.selection.block, local) if local else None

    def compress() -> None:
        compression.compress_bwd(k[0], phi_k, k_cmp, *sequences[:2], "k", *sequences[2:])
        compression.compress_bwd(v[0], phi_v, v_cmp, *sequences[:2], "v", *sequences[2:])

    return {
        WHOLE: lambda: backward(keep()),
        "forward": keep,
        "backward": lambda: backward(saved),
        "deltas and gates": numbers,
        "compress K and V": compress,
        "compressed attention": lambda: compression.compressed_attention_bwd(
            q, k_cmp, v_cmp, do, lse_cmp, deltas[0], factors[0], *at, False
        ),
        "selected attention": lambda: selection.selected_attention_bwd(
            q, k_slc, v_slc, block_indices, do, lse_slc, deltas[1], factors[1], *at, False, dtype, local
        ),
        "sliding attention": lambda: sliding.sliding_attention_bwd(
            q, k_swa, v_swa, do, lse_swa, deltas[2], factors[2], *at, selected=beside
        ),
    }


def with_gradients(attend: Callable[[Any, Any, Any], Any], q: Any, keys: Any, values: Any) -> Callable[[], Any]:
    """A forward and backward of full attention: gradients of q and of K and V as they are handed over."""
    import torch

    tensors = [x.detach().requires_grad_() for x in (q, keys, values)]
    do = torch.empty_like(attend(*tensors).detach()).normal_()
    return lambda: torch.autograd.grad(attend(*tensors), tensors, do)


def flops(spec: Spec, seqlen: int) -> dict[str, float]:
    """Useful arithmetic of the backward's parts: five products of visible queries and keys, whatever is computed again."""
    from . import inputs
    from .config import problem

    return {
        name: inputs.case(problem(f"{name.replace(' ', '_')}_bwd", spec), seqlens=(seqlen,), heads_kv=spec.heads.kv, device="meta").flops()
        for name in ("compressed attention", "selected attention", "sliding attention")
    }
