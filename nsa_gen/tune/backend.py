"""What the tuner asks of the machine: compile a config, measure it, compare a few. ``TritonBackend`` does it for real.

The coordinator only calls :meth:`Backend.digest`. Everything else runs in spawned processes: ``compile`` in the pool, where no GPU is
visible, the rest in the process that owns the GPU. Modules that reach torch or Triton are imported inside the methods for that reason.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

from ..config import Config, Problem, Shape
from ..device import Device
from ..errors import CompileError, RenderError
from ..render import render
from .records import Built, Failure, Measured, Point

SPILL_LIMIT = 256  # bytes a thread on the stack; past it a kernel has never been seen to win
STOP_AT = 1.3  # a candidate this much slower than the best is not measured to the end
QUERIES = 256
_LOCAL = 2  # local blocks that the backward of selected attention is timed without: sliding attention's serves them
_WINDOW_BLOCKS = 8  # selection blocks in the window that selected attention is timed with
FLOOR_MS = 1e-5  # timings with the flush of the L2 cache subtracted may come out at nothing; ratios need more than that
CONTEXT_LOST = re.compile(
    r"illegal memory access|misaligned address|unspecified launch failure|illegal instruction|device-side assert|"
    r"invalid (?:program counter|address space)|hardware stack error|CUDA error|HIP error|cudaError|hipError",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Identity:
    """The device a process owns and the versions it measures with."""

    device: Device
    environment: dict[str, str]


@dataclass(frozen=True)
class Final:
    """An interleaved comparison: for each config, in the order given, its milliseconds by round (or why it has none).

    ``max_rel_err`` is each config's largest relative error against the reference, on inputs other than those of the search.
    """

    samples: tuple[tuple[float, ...] | Failure, ...]
    max_rel_err: tuple[float, ...]


class Backend(Protocol):
    """See the module's docstring. A candidate's failure is returned, never raised."""

    def digest(self, problem: Problem, config: Config) -> str:
        """Digest of what rendering gives today: results of another digest are not reused."""

    def identify(self) -> Identity | Failure:
        """The device, asked of the process that owns it."""

    def compile(self, problem: Problem, config: Config, point: Point) -> Built | Failure:
        """Compile for the device without touching one."""

    def evaluate(self, problem: Problem, config: Config, point: Point, best_ms: float | None) -> Measured | Failure:
        """Check against the reference on poisoned outputs, then time; timing may stop early when far behind ``best_ms``."""

    def final(self, problem: Problem, configs: Sequence[Config], point: Point, rounds: int) -> Final | Failure:
        """Check each config again on other inputs, then time all of them in turn, ``rounds`` times."""


def failure_of(error: BaseException) -> Failure:
    """The kind of failure an exception stands for."""
    name, text = type(error).__name__, " ".join(str(error).split())
    message = f"{name}: {text}"[:500]
    if isinstance(error, RenderError):
        return Failure("render", message)
    if name == "OutOfResources" or "out of resource" in text.lower():
        return Failure("shared_memory" if "shared memory" in text.lower() else "launch", message)
    if isinstance(error, CompileError):
        return Failure("compile", message)
    if name == "OutOfMemoryError" or "out of memory" in text.lower():
        return Failure("memory", message)
    if name == "AcceleratorError" or CONTEXT_LOST.search(text):
        return Failure("illegal_access", message)
    return Failure("error", message)


class TritonBackend:
    """Compiles and measures rendered kernels.

    Args:
        device: what to compile for; None in the process that identifies it.
        index: CUDA index of the GPU that ``evaluate`` and ``final`` use.
        workspace_bytes: workspace the kernels may use, None for the default.
    """

    def __init__(self, device: Device | None = None, index: int = 0, workspace_bytes: int | None = None):
        self.device, self.index = device, index
        self._limits = {} if workspace_bytes is None else {"workspace_bytes": workspace_bytes}
        self._cases: dict[Any, Any] = {}

    def digest(self, problem: Problem, config: Config) -> str:
        return render(problem, config).digest

    def identify(self) -> Identity | Failure:
        import torch
        import triton

        from .. import device

        try:
            found = device.current(self.index)
        except Exception as error:
            return failure_of(error)
        environment = {
            "device": torch.cuda.get_device_name(self.index),
            "driver": _driver(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        return Identity(found, environment)

    def compile(self, problem: Problem, config: Config, point: Point) -> Built | Failure:
        from .. import inputs, loader

        assert self.device is not None
        try:
            source = render(problem, config)
            module = loader.load(source)
            case = inputs.case(problem, **_sizes(point), **self._limits, device="meta")
            found = loader.compile_all(lambda: case.run(module), self.device.triton_target())
        except Exception as error:
            return failure_of(error)
        return Built(
            source.digest,
            max((r.shared for r in found), default=0),
            max((r.registers for r in found if r.registers is not None), default=None),
            max((r.spills for r in found if r.spills is not None), default=None),
        )

    def evaluate(self, problem: Problem, config: Config, point: Point, best_ms: float | None) -> Measured | Failure:
        from .. import loader, timing

        try:
            self._use_device()
            case, queries = self._case(problem, point, seed=0)
            module = loader.load(render(problem, config))
            error = _checked(case, module, queries)
            if isinstance(error, Failure):
                return error
            limit = None if best_ms is None else STOP_AT * best_ms
            timed = timing.measure(_call(case, module, self.device), cold_l2=True, graph=True, early_stop_ms=limit)
        except Exception as fault:
            return failure_of(fault)
        median = max(timed.median_ms, FLOOR_MS)
        return Measured(median, max(0.0, (timed.p80 - timed.p20) / median), error, timed.stopped)

    def final(self, problem: Problem, configs: Sequence[Config], point: Point, rounds: int) -> Final | Failure:
        from .. import loader, timing

        outcome: dict[int, Failure | float] = {}
        modules = {}
        try:
            self._use_device()
            case, queries = self._case(problem, point, seed=1)
            for i, config in enumerate(configs):
                try:
                    modules[i] = loader.load(render(problem, config))
                    outcome[i] = _checked(case, modules[i], queries)
                except Exception as fault:
                    outcome[i] = failure_of(fault)
                found = outcome[i]
                if isinstance(found, Failure) and found.fatal:
                    return found
            sound = [i for i, found in outcome.items() if not isinstance(found, Failure)]
            times = timing.interleaved([_call(case, modules[i], self.device) for i in sound], rounds=rounds) if sound else []
        except Exception as fault:
            return failure_of(fault)
        by_config = dict(zip(sound, times, strict=True))
        samples = tuple(
            found if isinstance(found, Failure) else tuple(max(ms, FLOOR_MS) for ms in by_config[i]) for i, found in sorted(outcome.items())
        )
        return Final(samples, tuple(0.0 if isinstance(found, Failure) else found for _, found in sorted(outcome.items())))

    def _use_device(self) -> None:
        import torch

        torch.cuda.set_device(self.index)

    def _case(self, problem: Problem, point: Point, seed: int) -> tuple[Any, Any]:
        """Inputs and the queries to check, built once for each (problem, point, seed) with their references; the last two are held."""
        import torch

        from .. import inputs

        key = (problem, point, seed)
        if key not in self._cases:
            while len(self._cases) >= 2:
                del self._cases[next(iter(self._cases))]
            torch.cuda.empty_cache()
            case = inputs.case(problem, **_sizes(point), **self._limits, device="cuda", seed=seed)
            queries = inputs.sample_queries(case.seqlens, QUERIES, seed)
            if problem.kernel == "importance_fwd":  # its buffer ends up holding the last chunk
                start, stop = case.chunks[-1]
                queries = queries[(queries >= start) & (queries < stop)]
            case.expected = _remembered(case.expected)
            self._cases[key] = case, queries
        return self._cases[key]


def _sizes(point: Point) -> dict[str, Any]:
    return {"seqlens": (point.seqlen,) * point.batch, "heads_kv": point.heads_kv, "heads_query": point.heads_query or None}


def _remembered(expected: Any) -> Any:
    """The reference's answer by dtype: a case is always checked on the same queries, and the reference costs more than the kernel."""
    found: dict[Any, Any] = {}

    def once(queries: Any = None, *dtype: Any) -> Any:
        if dtype not in found:
            found[dtype] = expected(queries, *dtype)
        return found[dtype]

    return once


def _call(case: Any, module: Any, device: Device | None) -> Any:
    """What is timed: the kernel as a call of the whole operator has it. To selected attention belongs the fused end of the forward, to
    which its loop orders leave different work.
    """
    if case.problem.kernel == "selected_attention_bwd":
        timed = copy(case)
        timed.tensors = case.tensors | {"local": min(_LOCAL, case.problem.count - 1)}
        return lambda: timed.run(module)
    if case.problem.kernel != "selected_attention_fwd":
        return lambda: case.run(module)
    import torch

    from .. import kernels

    t, o, shared = case.tensors, case.outputs["o"], case.problem.as_dict()
    window = _WINDOW_BLOCKS * case.problem.selection_block  # no part of the key, and one cost for all
    gate = torch.ones(o.shape[:2], dtype=o.dtype, device=o.device)
    sequences = (t["cu_seqlens"], len(case.seqlens), case.max_seqlen)
    shape = Shape(case.max_seqlen, len(case.seqlens) * case.heads_kv)

    class Rest:
        def merge(self, begin: int, end: int, part: Any, part_lse: Any) -> None:
            merged = Problem.of("sliding_merge_fwd", shared | {"window": window, "parts": part.shape[1]})
            run = kernels.get(merged, shape, device or kernels.default_device()).sliding_merge_fwd
            rows, gates = o[begin:end], (gate[begin:end],) * 3
            run(t["q"][begin:end], *(t[x] for x in "kvkv"), part, part_lse, rows, *gates, rows, t["scale"], begin, *sequences)

    run = module.selected_attention_fwd
    return lambda: run(
        *(t[x] for x in ("q", "k", "v", "block_indices")), o, case.outputs["lse"], t["scale"], t["workspace_bytes"], 0, *sequences, Rest()
    )


def _checked(case: Any, module: Any, queries: Any) -> float | Failure:
    """Run on poisoned outputs and compare: the largest relative error, or why it is wrong."""
    import torch

    case.poison()
    case.run(module)
    torch.cuda.synchronize()
    check = case.check(queries)
    if not check.ok:
        return Failure("wrong", check.message)
    return max((float(error.get("rel_fro", 0.0)) for error in check.errors.values()), default=0.0)


def _driver() -> str:
    """Version of the GPU driver: from the driver's own library, else what the toolkit names."""
    import ctypes

    import torch

    if torch.version.hip:
        return f"hip {torch.version.hip}"
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0:
            try:
                if nvml.nvmlSystemGetDriverVersion(text, 96) == 0:
                    return text.value.decode()
            finally:
                nvml.nvmlShutdown()
    except (OSError, AttributeError):
        pass
    return f"cuda {torch.version.cuda}"
