"""Bind a ``@triton.jit`` function to one binary per device and launch it with little host work.

``JITFunction.run`` specialises every integer on its value on every call. Rendered kernels never need that: integer types come
from annotations, pointers are 16-byte aligned and parameters named ``stride_*`` are multiples of 8 by convention (docs/design.md). The
compiler is told so in the signature, as ``tl.multiple_of`` on a kernel's own parameter is lost, and with it wide loads and pipelining. So
a kernel is compiled once from an explicit signature, and a launch is one dictionary look-up and one call of the compiled kernel. The
same signature code serves ahead-of-time compilation without a GPU: under :func:`recording`, launches become :class:`Job` s.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import versions
from .errors import CacheError, CompileError, UnsupportedVersion

try:
    import triton
    from triton.compiler import ASTSource
    from triton.runtime.errors import OutOfResources
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise UnsupportedVersion(f"triton is missing or too old ({error}): {versions.mend('triton')}") from error
versions.require(torch=torch.__version__, triton=triton.__version__)

__all__ = [
    "Job", "Launcher", "OutOfResources", "TensorDescriptor", "compile_job", "current_device", "current_stream", "recording", "watched_by",
]  # fmt: skip

_DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
#: What the system says of a folder that cannot be written.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC)
_recording: list[Job] | None = None
_watcher: Callable[..., None] | None = None
#: What ``torch.cuda.current_device`` and ``current_stream`` come down to: a launch has tensors on the GPU, so CUDA is initialised.
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@dataclass(frozen=True)
class Job:
    """One kernel to compile: what :func:`compile_job` needs, for any target.

    ``constants`` are the constexpr values, ``options`` the launch options (``num_warps`` …).
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


def compile_job(job: Job, target: Any) -> Any:
    """Compile for ``target`` (a ``triton.backends.compiler.GPUTarget``); returns Triton's CompiledKernel. No GPU needed.

    Raises:
        CompileError: Triton refused the kernel; the message names kernel and target.
        CacheError: Triton cannot write its cache.
    """
    names = list(job.signature)
    aligned = {
        (i,): [["tt.divisibility", 16 if job.signature[name].startswith("*") else 8]]
        for i, name in enumerate(names)
        if job.signature[name].startswith("*") or (name.startswith("stride_") and job.signature[name] != "constexpr")
    }
    try:
        source = ASTSource(fn=job.kernel, signature=job.signature, constexprs=job.constants, attrs=aligned)
        return triton.compile(source, target=target, options=job.options)
    except Exception as error:  # Triton raises many types, from ValueError to RuntimeError with an MLIR dump
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            mend = "set TRITON_CACHE_DIR to a writable folder"
            raise CacheError(f"triton cannot write its cache: {error.filename}: {error.strerror}; {mend}") from error
        raise CompileError(f"{job.name} for {target.backend}:{target.arch}: {type(error).__name__}: {error}") from error


@contextmanager
def recording() -> Iterator[list[Job]]:
    """Collect launches as jobs instead of running them. Host functions may then be called with ``meta`` tensors."""
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer


@contextmanager
def watched_by(watcher: Callable[..., None]) -> Iterator[None]:
    """Have every launch, of any thread, told to ``watcher(run, function, metadata, grid, args, tail)`` once it is made."""
    global _watcher
    outer, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = outer


class Launcher:
    """A jit function with its constexpr values and launch options.

    Args:
        kernel: a ``@triton.jit`` function whose integer parameters are annotated ``tl.int32`` or ``tl.int64`` and
            floats ``tl.float32``; pointers carry no annotation.
        constants: constexpr values by parameter name.
        options: ``num_warps``, ``num_stages``, ``maxnreg`` (``None`` values are dropped).
    """

    __slots__ = ("_bound", "_interpreted", "constants", "kernel", "options")

    def __init__(self, kernel: Any, constants: dict[str, Any] | None = None, **options: Any):
        self.kernel = kernel
        self.constants = constants or {}
        self.options = {name: value for name, value in options.items() if value is not None}
        self._bound: dict[Any, Any] = {}
        self._interpreted = not isinstance(kernel, triton.JITFunction)

    def __call__(self, grid: tuple[int, ...], *args: Any, **extra: Any) -> None:
        """Launch on the current stream of the current device.

        Args:
            grid: 1 to 3 program counts; a zero count launches nothing.
            args: run-time arguments in signature order (all constexpr parameters come after them).
            extra: constexpr values that differ from call to call (one binary for each distinct set).
        """
        if _recording is not None:
            _recording.append(self.job(args, extra))
            return
        grid_x, grid_y, grid_z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        if not grid_x * grid_y * grid_z:
            return
        if self._interpreted:
            self.kernel[grid](*args, **self.constants, **extra)
            return
        device = current_device()
        run, function, metadata, tail = self._binary(device, args, extra)
        run(grid_x, grid_y, grid_z, current_stream(device), function, metadata, None, None, None, *args, *tail)
        watcher = _watcher  # read once: its thread may be done with it at any time
        if watcher is not None:
            watcher(run, function, metadata, (grid_x, grid_y, grid_z), args, tail)

    def load(self, *args: Any, **extra: Any) -> None:
        """Compile and load what a call with such arguments launches, so that it does not fail after another kernel has run.

        Raises:
            what the call would: ``CompileError``, or ``OutOfResources``.
        """
        if _recording is None and not self._interpreted:
            self._binary(current_device(), args, extra)

    @staticmethod
    def in_rows(x: torch.Tensor) -> torch.Tensor:
        """``x [rows, heads, D]``, or a copy, as :meth:`rows` needs it: the heads of a row within its stride, a multiple of 16 bytes."""
        stride_row, stride_head, _ = x.stride()
        if stride_row % 8 or stride_row < (x.shape[1] - 1) * stride_head + x.shape[2]:
            return x.new_empty(x.shape).copy_(x)
        return x

    @staticmethod
    def rows(x: torch.Tensor, block_rows: int) -> TensorDescriptor:
        """2-D descriptor argument over ``x [rows, heads, D]``, loaded in tiles of ``[block_rows, D]`` at ``[row, head * x.stride(1)]``.

        Rows past the last read as 0. ``x`` is as :meth:`in_rows` leaves it, its last dim contiguous, ``D`` a power of two.
        """
        rows, heads, dim = x.shape
        if not rows:  # the driver describes no empty tensor; nothing is read
            rows, x = 1, x.new_empty((1, heads, dim))
        stride_row, stride_head, _ = x.stride()
        return TensorDescriptor(x, [rows, (heads - 1) * stride_head + dim], [stride_row, 1], [block_rows, dim])

    def job(self, args: tuple[Any, ...], extra: dict[str, Any] | None = None) -> Job:
        """The compile job for these run-time arguments (tensors on any device, ``meta`` included)."""
        constants = {**self.constants, **(extra or {})}
        signature: dict[str, str] = {}
        runtime = iter(args)
        for param in self.kernel.params:
            if param.name in constants or param.is_constexpr:
                signature[param.name] = "constexpr"
                constants.setdefault(param.name, param._param.default)
                continue
            value = next(runtime)
            if value is None:
                signature[param.name], constants[param.name] = "constexpr", None
            elif isinstance(value, torch.Tensor):
                signature[param.name] = "*" + _DTYPES[value.dtype]
            elif isinstance(value, TensorDescriptor):
                signature[param.name] = f"tensordesc<{_DTYPES[value.base.dtype]}{list(value.block_shape)}>"
            elif param.annotation_type:
                signature[param.name] = param.annotation_type
            else:
                raise CompileError(f"{self.kernel.__name__}: parameter {param.name!r} needs a type annotation such as tl.int32")
        return Job(self.kernel, signature, constants, self.options)

    def _binary(self, device: int, args: tuple[Any, ...], extra: dict[str, Any]) -> tuple[Any, Any, Any, tuple[Any, ...]]:
        key = (device, *extra.values()) if extra else device
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(args, extra)
        return bound

    def _bind(self, args: tuple[Any, ...], extra: dict[str, Any]) -> tuple[Any, Any, Any, tuple[Any, ...]]:
        job = self.job(args, extra)
        compiled = compile_job(job, triton.runtime.driver.active.get_current_target())
        run = compiled.run  # loads the binary: raises OutOfResources if it does not fit
        tail = tuple(job.constants[name] for name in self.kernel.arg_names[len(args) :])
        return run, compiled.function, compiled.packed_metadata, tail
