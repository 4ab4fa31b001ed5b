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


def register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``<NAMESPACE>::<name>`` and return what calls it.

    ``Library.define`` costs less per call than ``custom_op``, and calls that need no gradient pass below the autograd formula.
    """
    _library.define(name + schema)
    run = replayed(run)

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

    def no_backward(ctx: Any, *grads: Any) -> Any:
        raise NSAError(f"{qualified} has no backward: call it under torch.no_grad(), or on tensors that do not require gradients")

    torch.library.register_autograd(qualified, no_backward, lib=_library)
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
