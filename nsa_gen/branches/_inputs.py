"""What the operators accept, and the way from a checked call to a kernel.

Checks of ranks, shapes, dtypes and devices cost no synchronisation and are always made. Checks of *values* on the device
(``cu_seqlens``, ``block_indices``) are made where that is free, on CPU tensors (the interpreter), and on a GPU only with
``NSA_GEN_DEBUG=1``, which costs a synchronisation a call and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from os import PathLike, fspath
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels, paths
from ..config import Problem, Shape
from ..config import problem as problem_of
from ..errors import InputError, allowed
from ..launch import current_device
from ..spec import Spec, load

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SpecLike = Spec | str | PathLike[str]

# --- the geometry of a call --------------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """A spec's ``key`` taken apart: operators of torch.library take the text, ``torch.compile`` folds the numbers to constants."""

    key: str
    query: int
    kv: int
    qk: int
    v: int
    block: int
    stride: int
    hidden: int
    selection_block: int
    count: int
    initial: int
    local: int
    window: int
    pooling: str
    mapping: str
    group: int


_named = SimpleNamespace()  # spec by name or path
_geometries: dict[str, Geometry] = {}
_problems: dict[tuple[str, str | int | None, str, torch.dtype, bool], Problem] = {}


def geometry_of(spec: SpecLike) -> Geometry:
    """The geometry of a name, path or Spec. A file is read once a process."""
    if not isinstance(spec, Spec):
        if not isinstance(spec, str | PathLike):
            raise InputError(f"spec must be a name, a path or a Spec, got {type(spec).__name__}")
        name = fspath(spec)
        _load(name)
        spec = getattr(_named, name)
    return _parse(spec.key) if torch.compiler.is_compiling() else geometry(spec.key)


def _load(name: str) -> bool:
    """Have ``_named`` hold the spec. (``torch.compile`` runs this once, and reads the attribute: it cannot take a Spec for a constant.)"""
    if name not in _named.__dict__:
        setattr(_named, name, load(name))
    return True


# What torch.compiler.assume_constant_result does, which would import all of torch._dynamo, a second or more, for calls that never compile.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def geometry(key: str) -> Geometry:
    """The geometry with this ``key``, which another process may have written into a compiled graph."""
    found = _geometries.get(key)
    if found is None:
        found = _geometries[key] = _parse(key)
    return found


def _parse(key: str) -> Geometry:
    *numbers, pooling, mapping = key.split(" ")
    n = [int(number) for number in numbers]
    return Geometry(key, *n, pooling, mapping, n[0] // n[1])


def _spec(g: Geometry, dtype: torch.dtype) -> Spec:
    """A spec of this geometry; its name means nothing."""
    pooling: dict[str, Any] = {"block": g.block, "stride": g.stride, "pooling": g.pooling} | ({"hidden": g.hidden} if g.hidden else {})
    chosen = {"block": g.selection_block, "count": g.count, "initial": g.initial, "local": g.local, "mapping": g.mapping}
    return Spec.from_dict(
        {
            "schema": 1, "name": "operator", "dtype": str(dtype).removeprefix("torch."), "heads": {"query": g.query, "kv": g.kv},
            "head_dim": {"qk": g.qk, "v": g.v}, "compression": pooling, "selection": chosen, "window": g.window,
        }
    )  # fmt: skip


def module(name: str, key: str, x: Tensor, cu_seqlens: Tensor | None, shape: Shape, which: str | int | None = None) -> Any:
    """The rendered module of kernel ``name`` for tensors like ``x``. The dtype is that of ``x``: a spec's own is what it is tuned for."""
    exact = (name, which, key, x.dtype, cu_seqlens is not None)
    problem = _problems.get(exact)
    if problem is None:
        problem = _problems[exact] = problem_of(name, _spec(geometry(key), x.dtype), varlen=exact[4], which=which)
    return kernels.get(problem, shape, kernels.device_of(x))


def kernel(name: str, key: str, x: Tensor, cu_seqlens: Tensor | None, shape: Shape, which: str | int | None = None) -> Callable[..., None]:
    """The host function of :func:`module`."""
    return getattr(module(name, key, x, cu_seqlens, shape, which), name)


# --- layout ----------------------------------------------------------------------------------------------------------------------


def is_ready(x: Tensor) -> bool:
    """Whether kernels can read ``x [...,H,D]`` in place: last dim contiguous, 16-byte aligned, other strides multiples of 8."""
    *strides, last = x.stride()
    return last == 1 and not any(s & 7 and n > 1 for s, n in zip(strides, x.shape, strict=False)) and not x.data_ptr() & 15


def ready(x: Tensor) -> Tensor:
    """``x [...,H,D]`` as kernels read it; a copy where :func:`is_ready` says no."""
    return x if is_ready(x) else x.clone(memory_format=torch.contiguous_format)


def ready_flat(x: Tensor) -> Tensor:
    """``x`` contiguous and 16-byte aligned; a copy where it is not so."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() & 15 else x


def on_device_of(x: Tensor) -> Any:
    """A context in which kernels launch on the GPU of ``x``, or None if they do already (kernels launch on the current one)."""
    if x.is_cuda and x.get_device() != current_device():
        return torch.cuda.device(x.get_device())
    return None


# --- checks ----------------------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """How the tokens of a call lie in sequences. ``form`` is ``(B, S)`` of a batched call, None of a packed one."""

    total: int
    batch: int
    max_seqlen: int
    cu_seqlens: Tensor | None
    form: tuple[int, int] | None

    def pack(self, x: Tensor) -> Tensor:
        """``[B,S,…]`` → ``[T,…]``."""
        return x if self.form is None else x.flatten(0, 1)

    def unpack(self, x: Tensor) -> Tensor:
        """``[T,…]`` → ``[B,S,…]``."""
        return x if self.form is None else x.unflatten(0, self.form)

    def lead(self) -> tuple[int, ...]:
        """Leading dimensions of every per-token argument."""
        return (self.total,) if self.form is None else self.form


def tokens_of(name: str, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, rank: int = 3) -> Tokens:
    """The sequences of a call whose first argument is ``x`` (``[T,H,D]``, or batched ``[B,S,H,D]``).

    Raises:
        InputError: not a tensor, wrong rank, dtype or device; ``cu_seqlens`` of wrong rank, dtype, device; ``max_seqlen`` impossible.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise InputError(f"{name}.dtype: {allowed(x.dtype, DTYPES)}")
    if x.dim() == rank + 1:
        batch, seqlen = x.shape[:2]
        if cu_seqlens is not None:
            raise InputError(f"{name} is batched ({_shape(x)}): cu_seqlens goes with packed tensors [T, ...] only")
        if max_seqlen is not None and max_seqlen != seqlen:
            raise InputError(f"max_seqlen: got {max_seqlen}, a batched call has sequences of {seqlen} tokens: leave it out")
        return Tokens(batch * seqlen, batch, seqlen, None, (batch, seqlen))
    if x.dim() != rank:
        raise InputError(f"{name} must be packed [T, H, D] or batched [B, S, H, D]{'' if rank == 3 else ' less D'}, got {_shape(x)}")
    total = x.shape[0]
    if cu_seqlens is None:
        if max_seqlen is not None and max_seqlen != total:
            raise InputError(f"max_seqlen: got {max_seqlen}, without cu_seqlens the {total} tokens are one sequence: leave it out")
        return Tokens(total, 1, total, None, None)
    if not isinstance(cu_seqlens, Tensor):
        raise InputError(f"cu_seqlens must be an int32 tensor [B + 1], got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype is not torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.device != x.device:
        raise InputError(
            f"cu_seqlens must be int32 [B + 1] on {x.device}, got {cu_seqlens.dtype} {_shape(cu_seqlens)} on {cu_seqlens.device}"
        )
    batch = cu_seqlens.shape[0] - 1
    if batch < 0:
        raise InputError("cu_seqlens must have B + 1 entries, [0] for no sequence; got none")
    if batch == 0 and total:
        raise InputError(f"cu_seqlens [0] has no sequence, {name} has {total} tokens")
    if max_seqlen is None:
        max_seqlen = total
    elif not isinstance(max_seqlen, int | torch.SymInt) or max_seqlen < 0:
        raise InputError(f"max_seqlen must be a whole number from 0, got {max_seqlen!r}")
    elif max_seqlen * batch < total:
        raise InputError(f"max_seqlen: got {max_seqlen}, but {total} tokens in {batch} sequences need at least {-(-total // batch)}")
    return Tokens(total, batch, max_seqlen, cu_seqlens, None)


def query_heads(q: Tensor, g: Geometry) -> int:
    """KV heads of a call with queries ``q [...,Hq,D]``: any number, the group is the spec's.

    Raises:
        InputError: the query heads are no whole number of groups.
    """
    heads = q.shape[-2]
    if heads % g.group:
        raise InputError(f"q has {heads} heads, the spec has groups of {g.group} query heads: allowed are multiples of {g.group}")
    return heads // g.group


def check(name: str, x: Any, like: Tensor, shape: tuple[int, ...], axes: str, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """Hold argument ``x`` to a shape, and to the device and dtype of ``like`` (or to ``dtypes``).

    Raises:
        InputError: names the argument, what was given and what is allowed (``axes`` names the shape's sides).
    """
    if (
        isinstance(x, Tensor)
        and x.shape == shape
        and (x.dtype == like.dtype if dtypes is None else x.dtype in dtypes)
        and x.device == like.device
    ):
        return
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != len(shape):
        raise InputError(f"{name} must have {len(shape)} dimensions, {axes} = {_sides(shape)}, got {_shape(x)}")
    if x.shape != shape:
        raise InputError(f"{name} must be {axes} = {_sides(shape)}, got {_shape(x)}")
    if x.device != like.device:
        raise InputError(f"{name} is on {x.device}, the first argument on {like.device}: all must be on one device")
    raise InputError(f"{name}.dtype: {allowed(x.dtype, dtypes or (like.dtype,))}" + ("" if dtypes else " (the first argument's)"))


def check_heads(name: str, x: Any, heads_query: int, heads: int, g: Geometry) -> None:
    """Hold the KV heads of ``x [...,Hkv,D]`` to ``heads``, with the group in the message.

    Raises:
        InputError: another number of heads.
    """
    if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[-2] == heads:
        return
    given = x.shape[-2]
    whole = "" if given and heads_query % given == 0 else ", which is no whole group"
    raise InputError(f"{name} has {given} heads for {heads_query} query heads{whole}; the spec has groups of {g.group}: allowed is {heads}")


def scale_of(scale: float | None, g: Geometry) -> float:
    """The factor on q·k; default ``Dqk**-0.5``.

    Raises:
        InputError: not a positive finite number.
    """
    if scale is None:
        return g.qk**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (0 < scale < math.inf):
        raise InputError(f"scale must be a positive finite number, got {scale!r}")
    return float(scale)


def check_values(cu_seqlens: Tensor | None, total: int, max_seqlen: int) -> None:
    """Hold the values of ``cu_seqlens`` to the call, where they may be read (see the module's docstring).

    Raises:
        InputError: does not start at 0, decreases, does not end at ``total``, or a sequence is longer than ``max_seqlen``.
    """
    if cu_seqlens is None or (cu_seqlens.is_cuda and not paths.debug()):
        return
    cu = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(cu)]
    shown = f"{cu[:6]}{' ... ' + str(cu[-1]) if len(cu) > 6 else ''}"
    if cu[0] != 0 or cu[-1] != total or min(lengths, default=0) < 0:
        raise InputError(f"cu_seqlens must start at 0, not decrease and end at {total} (the number of tokens), got {shown}")
    if max(lengths, default=0) > max_seqlen:
        raise InputError(f"max_seqlen: got {max_seqlen}, but cu_seqlens has a sequence of {max(lengths)} tokens")


def _shape(x: Tensor) -> str:
    return _sides(tuple(x.shape))


def _sides(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(side) for side in shape) + "]"
