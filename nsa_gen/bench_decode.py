"""What ``nsa-gen bench --decode`` measures: a step from a filled cache, with and without the append, and full attention's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .config import Cached
from .geometry import TuneShape
from .spec import Spec

WHOLE = "decode step"
EAGER = "decode step, eager"


def filled(spec: Spec, cached: Cached, shape: TuneShape, given: dict[str, Any]) -> tuple[Any, Any]:
    """A cache of ``shape.batch`` sequences of ``shape.seqlen`` tokens, normal numbers, and the slots of these. ``given``: φ's weights."""
    import torch

    from .cache import PagedKVCache

    size = cached.page_size
    dtype = getattr(torch, cached.storage)
    rows = [shape.seqlen] * (3 if spec.kv == "per_branch" else 1) + [shape.seqlen // spec.compression.stride]
    pages = shape.batch * (sum(-(-n // size) for n in rows) + len(rows))
    scale = {"k_scale": 1 / 64, "v_scale": 1 / 64} if cached.storage != spec.dtype else {}
    cache = PagedKVCache(
        spec, pages, page_size=size, max_sequences=shape.batch, max_seqlen=shape.seqlen, storage=dtype, **scale,
        phi_k=given["phi_k"], phi_v=given["phi_v"], device="cuda",
    )  # fmt: skip
    sequences = [cache.create() for _ in range(shape.batch)]
    generator = torch.Generator("cuda").manual_seed(0)
    heads, branches = spec.heads.kv, 3 if spec.kv == "per_branch" else 1

    def normal(count: int, dim: int) -> Any:
        made = [torch.empty(count, heads, dim, dtype=cache.dtype, device="cuda").normal_(generator=generator) for _ in range(branches)]
        return tuple(made) if branches > 1 else made[0]

    for sequence in sequences:
        cache.append([sequence], normal(shape.seqlen, spec.head_dim.qk), normal(shape.seqlen, spec.head_dim.v))
    return cache, cache.slots(sequences)


def parts(spec: Spec, cached: Cached, shape: TuneShape, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A step, which writes the sequences' last tokens and attends from them, and what it consists of, as calls without arguments."""
    import torch

    from .serving import nsa_decode

    cache, slots = filled(spec, cached, shape, given)
    heads, tokens = spec.heads.query, cached.tokens
    made = {"dtype": cache.dtype, "device": "cuda"}
    q = torch.randn(shape.batch, tokens, heads, spec.head_dim.qk, **made)
    gates = [torch.rand(shape.batch, tokens, heads, **made) for _ in range(3)]
    count = shape.batch * tokens
    new = [
        tuple(torch.randn(count, spec.heads.kv, dim, **made) for _ in range(3 if cache.per_branch else 1))
        for dim in (spec.head_dim.qk, spec.head_dim.v)
    ]
    k, v = new if cache.per_branch else (x[0] for x in new)

    def append() -> None:
        cache.write(k, v, slots)

    def attend() -> Any:
        return nsa_decode(q, *gates, cache=cache, slots=slots, max_seqlen=shape.seqlen)

    def step() -> Any:
        append()
        return attend()

    return {WHOLE: step, "without the append": attend, "append": append}


def full_attention(spec: Spec, cached: Cached, shape: TuneShape, backend: str) -> Callable[[], Any]:
    """Full attention of the same queries to as many contiguous keys, in the spec's dtype, on torch's ``FLASH_ATTENTION`` or
    ``CUDNN_ATTENTION``: a group's query heads are handed over as rows of its KV head, so that each key is read once.

    Raises:
        RuntimeError: the backend takes not this geometry.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    made = {"dtype": getattr(torch, spec.dtype), "device": "cuda"}
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(rows: int, dim: int) -> Any:
        x = torch.empty(shape.batch, rows, spec.heads.kv, dim, **made)
        return x.normal_(generator=generator).transpose(1, 2)  # as engines hold it: [B, N, H, D]

    q = normal(spec.group * cached.tokens, spec.head_dim.qk)
    k, v = normal(shape.seqlen, spec.head_dim.qk), normal(shape.seqlen, spec.head_dim.v)

    def attend() -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    attend()
    torch.cuda.synchronize()
    return attend


def needed(spec: Spec, cached: Cached, shape: TuneShape) -> int:
    """Bytes of K and V that a step must read: all compressed tokens; one new token's blocks (others may choose the same); the window of all
    new tokens. With K and V shared between branches local blocks lie in the window and are read once."""
    size = {"float32": 4, "float8_e4m3fn": 1}.get(cached.storage, 2)
    each = spec.heads.kv * (spec.head_dim.qk + spec.head_dim.v) * size
    chosen, window = spec.selection, spec.window + cached.tokens - 1
    rows = max(shape.seqlen - spec.compression.block, -1) // spec.compression.stride + 1
    if spec.kv == "shared":
        rows += min(max((chosen.count - chosen.local) * chosen.block + window, chosen.count * chosen.block), shape.seqlen)
    else:  # of a token's own block only what is before it
        rows += min((chosen.count - 1) * chosen.block + 1, shape.seqlen) + min(window, shape.seqlen)
    return shape.batch * each * rows
