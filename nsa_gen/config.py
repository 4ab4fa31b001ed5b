"""Frozen values: what kernel is wanted (Problem), for what sizes (Shape), built how (Config)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import ConfigError, allowed
from .spec import Spec

Value = int | str | bool | None

#: The exact key of each kernel: every field that changes generated code. ``head_dim`` is that of the pooled tensor.
KEY_FIELDS: dict[str, tuple[str, ...]] = {
    "compress_fwd": ("dtype", "head_dim", "block", "stride", "pooling", "hidden", "varlen"),
    "compressed_attention_fwd": ("dtype", "group", "head_dim_qk", "head_dim_v", "block", "stride", "varlen"),
    "importance_fwd": ("dtype", "group", "head_dim_qk", "block", "stride", "selection_block", "mapping", "varlen"),
    "select_topk": ("selection_block", "count", "initial", "local", "varlen"),
    "selected_attention_fwd": (
        "dtype", "group", "head_dim_qk", "head_dim_v", "selection_block", "count", "initial", "local", "varlen",
    ),
    "sliding_attention_fwd": ("dtype", "group", "head_dim_qk", "head_dim_v", "window", "varlen"),
    "sliding_merge_fwd": (
        "dtype", "group", "head_dim_qk", "head_dim_v", "selection_block", "count", "initial", "local", "parts", "window", "varlen",
    ),
    "combine_fwd": ("dtype", "head_dim_v"),
    "compressed_attention_bwd": ("dtype", "group", "head_dim_qk", "head_dim_v", "block", "stride", "deterministic", "varlen"),
    "selected_attention_bwd": ("dtype", "group", "head_dim_qk", "head_dim_v", "selection_block", "count", "deterministic", "varlen"),
    "sliding_attention_bwd": ("dtype", "group", "head_dim_qk", "head_dim_v", "window", "varlen"),
    "combine_bwd": ("dtype", "head_dim_v"),
    "compress_bwd": ("dtype", "head_dim", "block", "stride", "pooling", "hidden", "varlen"),
    "decode_fwd": (
        "dtype", "storage", "group", "head_dim_qk", "head_dim_v", "block", "stride", "selection_block", "count", "initial", "local",
        "mapping", "window", "branches", "page_size", "tokens",
    ),
    "cache_append": (
        "dtype", "storage", "head_dim_qk", "head_dim_v", "block", "stride", "pooling", "hidden", "hidden_v", "branches", "page_size",
        "tokens",
    ),
}  # fmt: skip
#: Kernels that a spec alone needs, and those that serve from a KV cache.
KERNELS = tuple(kernel for kernel, fields in KEY_FIELDS.items() if "page_size" not in fields)
SERVING = tuple(kernel for kernel, fields in KEY_FIELDS.items() if "page_size" in fields)
#: What a cache may store besides the spec's dtype.
FP8 = "float8_e4m3fn"
#: What decoding counts of each new token and KV head (``arrived`` of ``branches.decode``).
COUNTERS = 6
#: New tokens of a sequence that are decoded at a time, at most: one, or what is speculated.
MOST_TOKENS = 8


class Cached(NamedTuple):
    """What the key of a serving kernel has besides a spec.

    Args:
        storage: dtype of what the cache holds.
        page_size: rows a page.
        tokens: new tokens of each sequence.
        branches: how many K and V a token has: one, or one for each branch.
    """

    storage: str
    page_size: int
    tokens: int = 1
    branches: int = 1


def cache_of(spec: Spec, storage: str | None = None, page_size: int | None = None, tokens: int = 1) -> Cached:
    """The cache of a spec.

    Args:
        storage: the spec's dtype (default), or ``FP8``.
        page_size: a multiple of the spec's selection block; default 64, or that block if it is longer.
        tokens: new tokens of each sequence, 1 to ``MOST_TOKENS``.

    Raises:
        ConfigError: there is no such cache.
    """
    block = spec.selection.block
    storage = storage or spec.dtype
    size = max(block, 64) if page_size is None else page_size
    if storage not in (spec.dtype, FP8):
        raise ConfigError(f"storage of a cache: {allowed(storage, (spec.dtype, FP8))}")
    if size < 1 or size % block:
        raise ConfigError(f"page size: got {size}, allowed: multiples of the selection block, {block}")
    if not 1 <= tokens <= MOST_TOKENS:
        raise ConfigError(f"new tokens of a sequence: got {tokens}, allowed: 1 to {MOST_TOKENS}")
    return Cached(storage, size, tokens, 3 if spec.kv == "per_branch" else 1)


class _Named:
    """Read access by name (``x["a"]``, ``x.a``) over a tuple of pairs; hashable, so it can key a cache."""

    kernel: str
    values: tuple[tuple[str, Value], ...]

    def __getitem__(self, name: str) -> Value:
        for key, value in self.values:
            if key == name:
                return value
        raise ConfigError(f"{self.kernel}: no field {name!r}, allowed: {', '.join(k for k, _ in self.values)}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except ConfigError as error:
            raise AttributeError(str(error)) from None

    def as_dict(self) -> dict[str, Value]:
        return dict(self.values)

    @property
    def digest(self) -> str:
        """12 hex digits over kernel name and values."""
        text = json.dumps([self.kernel, self.values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Problem(_Named):
    """A kernel and its exact key, e.g. ``sliding_attention_fwd`` with ``dtype, group, head_dim_qk, …``."""

    kernel: str
    values: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, kernel: str, fields: dict[str, Value]) -> Problem:
        names = key_fields(kernel)
        if set(fields) != set(names):
            raise ConfigError(f"{kernel}: key must have exactly the fields {', '.join(names)}; got {', '.join(sorted(fields))}")
        return cls(kernel, tuple((name, fields[name]) for name in names))


@dataclass(frozen=True)
class Config(_Named):
    """Named knob values of one kernel. The order of names does not matter: they are kept sorted."""

    kernel: str
    values: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, kernel: str, values: dict[str, Value]) -> Config:
        return cls(kernel, tuple(sorted(values.items())))

    def replace(self, **changes: Value) -> Config:
        return Config.of(self.kernel, self.as_dict() | changes)


@dataclass(frozen=True)
class Shape:
    """Sizes a table row holds a range of.

    Args:
        seqlen: tokens of the longest sequence.
        batch_heads: sequences × KV heads.
    """

    seqlen: int
    batch_heads: int


def key_fields(kernel: str) -> tuple[str, ...]:
    """Key field names of ``kernel``; raises ConfigError for an unknown kernel."""
    try:
        return KEY_FIELDS[kernel]
    except KeyError:
        raise ConfigError(f"unknown kernel: {allowed(kernel, KEY_FIELDS)}") from None


Which = str | int | Cached | None


def problem(kernel: str, spec: Spec, *, varlen: bool = False, which: Which = None) -> Problem:
    """The Problem of ``kernel`` for ``spec``.

    Args:
        kernel: one of ``KERNELS`` or ``SERVING``.
        spec: geometry and dtype.
        varlen: sequences of differing lengths given by ``cu_seqlens``.
        which: one of :func:`variants`; default the first. Of a serving kernel any ``Cached``.

    Raises:
        ConfigError: no such kernel or variant.
    """
    key_fields(kernel)
    known_variants = variants(kernel, spec)
    if which is None:
        which = known_variants[0]
    elif which not in known_variants and not (kernel in SERVING and isinstance(which, Cached)):
        raise ConfigError(f"{kernel}: which: {allowed(which, known_variants)}")
    cached = which if isinstance(which, Cached) else Cached(spec.dtype, 0)
    head_dim = spec.head_dim.v if which == "v" else spec.head_dim.qk
    pooling = spec.compression.pooling
    known: dict[str, Value] = {
        "dtype": spec.dtype,
        "group": spec.group,
        "head_dim": head_dim,
        "head_dim_qk": spec.head_dim.qk,
        "head_dim_v": spec.head_dim.v,
        "block": spec.compression.block,
        "stride": spec.compression.stride,
        "pooling": pooling,
        "hidden": (spec.compression.hidden or head_dim) if pooling == "mlp" else 0,
        "hidden_v": (spec.compression.hidden or spec.head_dim.v) if pooling == "mlp" else 0,
        "selection_block": spec.selection.block,
        "count": spec.selection.count,
        "initial": spec.selection.initial,
        "local": spec.selection.local,
        "parts": which,
        "deterministic": which,
        "mapping": spec.selection.mapping,
        "window": spec.window,
        "varlen": varlen,
        "storage": cached.storage,
        "page_size": cached.page_size,
        "tokens": cached.tokens,
        "branches": cached.branches,
    }
    return Problem.of(kernel, {name: known[name] for name in key_fields(kernel)})


def problems(spec: Spec, *, varlen: bool = False, deterministic: bool | None = None, cached: Cached | None = None) -> list[Problem]:
    """All distinct Problems of a spec (K and V of unequal head dims pool as two).

    Args:
        spec: geometry and dtype.
        varlen: sequences of differing lengths.
        deterministic: only kernels that serve such calls; None for all.
        cached: those of ``SERVING`` for such a cache instead (see :func:`cache_of`).
    """
    if cached is not None:
        return [problem(kernel, spec, which=cached) for kernel in SERVING]
    found = [problem(kernel, spec, varlen=varlen, which=which) for kernel in KERNELS for which in variants(kernel, spec)]
    return [p for p in dict.fromkeys(found) if deterministic in (None, p.as_dict().get("deterministic", deterministic))]


def variants(kernel: str, spec: Spec) -> tuple[Which, ...]:
    """What a spec needs a kernel for: ``compress_*`` for ``"k"`` and ``"v"``, the tensor that is pooled (its head dim is in the key);
    ``sliding_merge_fwd`` for the partial results that selected attention may give a query: one, or one for each listed block; some kernels
    of the backward for whether gradients are to be bit-equal run to run; serving kernels for what the cache is like.
    """
    if kernel in ("compress_fwd", "compress_bwd"):
        return "k", "v"
    if kernel == "sliding_merge_fwd":
        listed = spec.selection.count - spec.selection.initial - spec.selection.local
        return (listed, 1) if listed > 1 else (listed,)
    if "deterministic" in KEY_FIELDS[kernel]:
        return False, True
    if kernel in SERVING:
        return (cache_of(spec),)
    return (None,)


def overlap_weights(block: int, stride: int, selection_block: int, mapping: str) -> tuple[tuple[int, ...], ...]:
    """How compressed tokens count for selection blocks (paper eq. 9), as integer weights by lag.

    With ``c = selection_block // stride``, compressed token ``j = c*(i - lag) + r`` counts ``result[lag][r]`` times for selection
    block ``i``; a ``j`` below 0 does not exist. Trailing all-zero lags are dropped. ``overlap``: the stride units of compressed
    block ``j`` that lie in selection block ``i``. ``literal``: eq. 9 with 0-based indices, ``j = c*i - m - n`` for ``m < c``,
    ``n < block//stride``. 32/16/64 gives 1,2,2,2,1 on ``j = 4i-1 … 4i+3`` (overlap) or ``4i-4 … 4i`` (literal).

    Raises:
        ConfigError: unknown mapping, or ``stride`` divides not both blocks, or ``block > selection_block``.
    """
    if mapping not in ("overlap", "literal"):
        raise ConfigError(f"mapping: {allowed(mapping, ('overlap', 'literal'))}")
    if block % stride or selection_block % stride or block > selection_block:
        raise ConfigError(
            f"blocks {block}/{stride}/{selection_block}: stride must divide block and selection block, block <= selection block"
        )
    units, per_block = block // stride, selection_block // stride
    # shift = j - c*i. Overlap counts the stride units that token j and block i share: j + n = c*i + m.
    counts: dict[int, int] = {}
    for m in range(per_block):
        for n in range(units):
            shift = m - n if mapping == "overlap" else -m - n
            counts[shift] = counts.get(shift, 0) + 1
    lags = 1 - min(counts) // per_block  # the least shift is 0 or negative
    return tuple(tuple(counts.get(r - per_block * lag, 0) for r in range(per_block)) for lag in range(lags))
