"""Operators of ``torch.library``: defined here, called by :mod:`nsa_gen.ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .branches._inputs import on_device_of
from .errors import NSAError
from .replay import replayed

#: ``torch.ops.nsa_gen``; a generated package has a namespace of its own.
NAMESPACE = (__package__ or "nsa_gen").replace(".", "_")
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., tuple[Any, ...]] | None = None,
    keep: slice = slice(None),
) -> Callable[..., Any]:
    """Define ``<NAMESPACE>::<name>`` and return what calls it.

    ``Library.define`` costs less per call than ``custom_op``, and calls that need no gradient pass below the autograd formula.

    Args:
        backward: ``backward(inputs, outputs, grads)`` gives a gradient for each input (a list for a list); an output whose gradient nobody
            asked for has None among ``grads``. Without it, asking for a gradient is an error.
        keep: which outputs ``backward`` needs. Inputs are all kept.
    """
    _library.define(name + schema)
    run = run if isinstance(run, replayed) else replayed(run)

    def on_device(first: Tensor, *args: Any) -> Any:
        other = on_device_of(first)
        if other is None:
            return run(first, *args)
        with other:
            return run(first, *args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, on_device, key)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if backward is not None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors: list[Tensor] = []
            ctx.form = _taken_apart((inputs, outputs[keep]), tensors)
            ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, *grads: Any) -> Any:
        if backward is None:
            raise NSAError(f"{qualified} has no backward: call it under torch.no_grad(), or on tensors that do not require gradients")
        inputs, outputs = _put_together(ctx.form, ctx.saved_tensors)
        return backward(inputs, outputs, grads)

    torch.library.register_autograd(qualified, gradients, setup_context=setup_context, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and requires_grad(args)):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def requires_grad(args: Sequence[Any]) -> bool:
    """Whether a tensor among the arguments, or in a list among them, wants a gradient."""
    for x in args:
        if isinstance(x, Tensor):
            if x.requires_grad:
                return True
        elif type(x) is list and x and requires_grad(x):
            return True
    return False


class _Place(int):
    """Where a tensor was, as a number in the list of all."""


def _taken_apart(x: Any, tensors: list[Tensor]) -> Any:
    """``x`` with a ``_Place`` for each tensor in its tuples and lists; the tensors are appended to ``tensors``."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return _Place(len(tensors) - 1)
    return type(x)(_taken_apart(y, tensors) for y in x) if type(x) in (tuple, list) else x


def _put_together(x: Any, tensors: Sequence[Tensor]) -> Any:
    if type(x) is _Place:
        return tensors[x]
    return type(x)(_put_together(y, tensors) for y in x) if type(x) in (tuple, list) else x
