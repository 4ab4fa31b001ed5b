"""The run-time hot path: problem, shape and device to an imported kernel; warm, two look-ups and two bisections.

Nothing is tuned here. A config that turns out not to fit the device when it is first launched (Triton's ``OutOfResources``), or that was
borrowed or a default and does not compile there, is replaced by the default for the arch or the safe config with one warning, and
the call goes on (:func:`fallback`). An override is taken at its word: its errors reach the caller.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from contextlib import suppress
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from . import device as _device
from . import loader, lookup, space
from . import spec as _spec
from .config import Config, Problem, Shape, Which
from .config import problem as problem_of
from .device import Device
from .errors import CompileError, ConfigError, InputError
from .launch import OutOfResources
from .lookup import Overrides, Resolution, clear_override, override, set_override
from .render import Source, render
from .table import log

__all__ = (
    "Kernel", "Resolution", "clear", "clear_override", "default_device", "device_of", "digest_of", "fallback", "get", "interpreting",
    "override", "resolve", "set_override",
)  # fmt: skip

source_of = lru_cache(maxsize=4096)(render)


def digest_of(problem: Problem, config: Config) -> str:
    """The digest of what rendering gives today."""
    return source_of(problem, config).digest


class Kernel:
    """A rendered module in use: the host function is an attribute named like the kernel, as it is in the module, whose other names can be
    read here too.

    ``resolution`` says which config it is and why, ``module`` is the imported file.
    """

    problem: Problem
    device: Device
    resolution: Resolution
    module: ModuleType

    def __init__(self, problem: Problem, device: Device, resolution: Resolution):
        self.problem, self.device = problem, device
        self._use(_fitting(problem, device, resolution))

    def _use(self, resolution: Resolution) -> None:
        source: Source = source_of(self.problem, resolution.config)
        module = loader.load(source)
        run = getattr(module, self.problem.kernel)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except (OutOfResources, CompileError) as error:
                self._use(fallback(self.problem, self.device, resolution, error))
            return getattr(self, self.problem.kernel)(*args, **kwargs)

        self.resolution, self.module = resolution, module
        setattr(self, self.problem.kernel, call)

    def __getattr__(self, name: str) -> Any:
        if "module" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.module, name)

    def __repr__(self) -> str:
        return f"<Kernel {self.problem.kernel} on {self.device.slug}: {self.resolution.reason}>"


class _Plan:
    """The kernels of one problem on one device under one set of overrides, by cell of the grid on which the lookup is constant."""

    __slots__ = ("cells", "heads", "seqlens")

    def __init__(self, problem: Problem, device: Device):
        self.seqlens, self.heads = lookup.cuts(problem, device)
        self.cells: dict[tuple[int, int], Kernel] = {}


_plans: dict[tuple[Problem, str, Overrides], _Plan] = {}
_unfit: dict[tuple[Problem, str, Config], Resolution] = {}
_devices: dict[int, Device] = {}
_remembered: list[dict[Any, Any]] = []
#: What else a choice of kernels depends on, as a value that can key a cache.
state = lookup.active_overrides


def get(problem: Problem, shape: Shape, device: Device) -> Kernel:
    """The kernel for a call; its host function is ``getattr(get(…), problem.kernel)``.

    Tables and ``NSA_GEN_STRICT`` are read when a problem and device are first met, and again after :func:`clear`. Overrides take
    effect at once.

    Raises:
        NotTuned: ``NSA_GEN_STRICT=1`` and no exact row.
        ConfigError: an override is illegal for ``problem``.
        RenderError: a template is broken.
    """
    try:
        plan = _plans[problem, device.slug, lookup.active_overrides()]
        return plan.cells[bisect_right(plan.seqlens, shape.seqlen), bisect_right(plan.heads, shape.batch_heads)]
    except KeyError:
        return _first(problem, shape, device)


def _first(problem: Problem, shape: Shape, device: Device) -> Kernel:
    key = (problem, device.slug, lookup.active_overrides())
    plan = _plans.get(key) or _plans.setdefault(key, _Plan(problem, device))
    cell = bisect_right(plan.seqlens, shape.seqlen), bisect_right(plan.heads, shape.batch_heads)
    at_least_one = Shape(max(1, shape.seqlen), max(1, shape.batch_heads))
    found = Kernel(problem, device, lookup.resolve(problem, at_least_one, device, digest_of=digest_of))
    return plan.cells.setdefault(cell, found)


def fallback(problem: Problem, device: Device, resolution: Resolution, error: Exception) -> Resolution:
    """What to use instead of a config that did not load on ``device``: the default for its arch after a tuned or borrowed row, else the
    safe config. Later calls of :func:`get` and :func:`resolve` use it too.

    Args:
        error: Triton's ``OutOfResources`` (any config), or ``CompileError`` (a config not measured on this device).

    Raises:
        the ``error`` itself: the config was an override or the safe one, or an exact tuned row that does not compile.
    """
    measured = resolution.exact and not isinstance(error, OutOfResources)
    failed = {config for known, slug, config in _unfit if (known, slug) == (problem, device.slug)} | {resolution.config}
    choices = [("safe", space.safe(problem))]
    if resolution.row is not None:
        with suppress(ConfigError):
            choices.insert(0, ("default", space.default(problem, device.arch)))
    choices = [choice for choice in choices if choice[1] not in failed]
    if resolution.source == "override" or measured or not choices:
        raise error
    source, config = choices[0]
    first_line = str(error).partition("\n")[0]
    reason = f"{source} config: the one of {resolution.source} does not load on {device.slug}: {type(error).__name__}: {first_line}"
    found = Resolution(config, source, reason, False, tried=(*resolution.tried, resolution.reason))
    if _unfit.setdefault((problem, device.slug, resolution.config), found) is found:
        log.warning("%s on %s: %s", problem.kernel, device.slug, reason)
    return found


def _fitting(problem: Problem, device: Device, resolution: Resolution) -> Resolution:
    if resolution.source == "override":
        return resolution
    while (known := _unfit.get((problem, device.slug, resolution.config))) is not None:
        resolution = known
    return resolution


def clear() -> None:
    """Forget every kernel, device and lookup of this process, so that changed tables and environment variables are read anew."""
    for cache in (_plans, _unfit, _devices, *_remembered):
        cache.clear()
    source_of.cache_clear()


def remember(cache: dict[Any, Any]) -> dict[Any, Any]:
    """``cache``, which :func:`clear` empties: what is remembered of calls whose kernels were chosen here."""
    _remembered.append(cache)
    return cache


def resolve(
    kernel: str,
    spec: Any,
    *,
    seqlen: int,
    batch_heads: int | None = None,
    varlen: bool = False,
    device: Device | str | None = None,
    which: Which = None,
) -> Resolution:
    """Which config serves a kernel of a spec, and why. Compiles nothing.

    Args:
        kernel: one of ``config.KERNELS`` or ``config.SERVING``.
        spec: a name in ``specs/``, a path, or a ``Spec``.
        seqlen: tokens of the longest sequence.
        batch_heads: sequences times KV heads; default: one sequence.
        varlen: whether ``cu_seqlens`` is given.
        device: a ``Device``, a slug, alias or arch; default :func:`default_device`.
        which: one of ``config.variants``, default the first; of a serving kernel any ``config.Cached``.

    Raises:
        SpecError, TargetError, ConfigError: no such spec, device, kernel.
        InputError: sizes below 1.
        NotTuned: ``NSA_GEN_STRICT=1`` and no exact row.
    """
    spec = _spec.load(spec)
    shape = Shape(seqlen, spec.heads.kv if batch_heads is None else batch_heads)
    if shape.seqlen < 1 or shape.batch_heads < 1:
        raise InputError(f"seqlen and batch_heads must be at least 1, got {shape.seqlen} and {shape.batch_heads}")
    if not isinstance(device, Device):
        device = default_device() if device is None else _device.from_name(device)
    problem = problem_of(kernel, spec, varlen=varlen, which=which)
    found = lookup.resolve(problem, shape, device, digest_of=digest_of)
    return _fitting(problem, device, found)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def default_device() -> Device:
    """The current GPU, or the pseudo device ``interpreter`` under ``TRITON_INTERPRET=1`` or without a GPU."""
    if interpreting() or not torch.cuda.is_available():
        return _device.from_name("interpreter")
    return _device.current(torch.cuda.current_device())


def device_of(tensor: torch.Tensor) -> Device:
    """The Device a tensor lies on, remembered for each index; in the interpreter the pseudo device ``interpreter``.

    Raises:
        InputError: a tensor that is on no GPU, outside the interpreter.
        TargetError: a GPU nothing can be generated for.
    """
    index = tensor.get_device()
    found = _devices.get(index)
    if found is None:
        if interpreting():
            found = _device.from_name("interpreter")
        elif tensor.device.type != "cuda":
            raise InputError(f"tensors must be on a GPU, got {tensor.device}; on the CPU set TRITON_INTERPRET=1 before importing triton")
        else:
            found = _device.current(index)
        _devices[index] = found
    return found
