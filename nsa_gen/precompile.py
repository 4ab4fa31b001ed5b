"""Compile many kernels for a device without a GPU, in worker processes: what ``generate --check`` and ``demo`` show."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from .config import Config, Problem
from .device import Device
from .errors import NSAError


@dataclass(frozen=True)
class Build:
    """One kernel to compile: a problem built as ``config`` says, for ``target``.

    ``seqlen`` is the sequence length of the call that is recorded; only kernels with per-call constants depend on it.
    """

    problem: Problem
    config: Config
    target: Device
    seqlen: int


@dataclass(frozen=True)
class Built:
    """What came of a :class:`Build`. Resources are the largest over the kernel's jit functions.

    Args:
        shared: bytes of shared memory a block.
        registers: per thread, ``spills`` in bytes; None where no disassembler reads the binary.
        limit: bytes of shared memory the device offers a block.
        error: why it did not compile, or None.
        seconds: wall time of rendering and compiling.
    """

    build: Build
    functions: int
    shared: int
    registers: int | None
    spills: int | None
    limit: int
    error: str | None
    seconds: float

    @property
    def fits(self) -> bool:
        """Compiled, and within the device's shared memory."""
        return self.error is None and self.shared <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        build = self.build
        return {
            "kernel": build.problem.kernel,
            "key": build.problem.as_dict(),
            "config": build.config.as_dict(),
            "target": build.target.slug,
            "functions": self.functions,
            "shared": self.shared,
            "shared_limit": self.limit,
            "registers": self.registers,
            "spills": self.spills,
            "fits": self.fits,
            "error": self.error,
            "seconds": round(self.seconds, 3),
        }


def compile_one(build: Build) -> Built:
    """Render, load and compile one build in this process (which must not be under the interpreter)."""
    from . import inputs, loader, render

    start = time.perf_counter()
    device = build.target
    try:
        module = loader.load(render.render(build.problem, build.config))
        case = inputs.case(build.problem, seqlens=(build.seqlen,), heads_kv=1, device="meta")
        found = loader.compile_all(lambda: case.run(module), device.triton_target())
    except NSAError as error:
        first = str(error).strip().splitlines()[0]
        return Built(build, 0, 0, None, None, device.shared_bytes, first, time.perf_counter() - start)
    registers = [r.registers for r in found if r.registers is not None]
    spills = [r.spills for r in found if r.spills is not None]
    return Built(
        build,
        functions=len(found),
        shared=max((r.shared for r in found), default=0),
        registers=max(registers, default=None),
        spills=max(spills, default=None),
        limit=device.shared_bytes,
        error=None,
        seconds=time.perf_counter() - start,
    )


def compile_many(builds: Iterable[Build], processes: int | None = None) -> Iterator[Built]:
    """Compile every distinct build and yield results as they come.

    The workers are spawned without ``TRITON_INTERPRET`` (they need the real compiler) and without a visible GPU.
    """
    distinct = list(dict.fromkeys(builds))
    processes = min(processes or os.cpu_count() or 1, max(len(distinct), 1))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_compiler_only) as pool:
        try:
            for future in as_completed([pool.submit(compile_one, build) for build in distinct]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _compiler_only() -> None:
    """No interpreter, no GPU, and no garbage collection: walking what the compiler holds takes a tenth of the time, to free little."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gc.disable()


def for_device(problems: Iterable[Problem], device: Device, seqlens: Iterable[int], batch_heads: int) -> list[Build]:
    """The builds a device's tables (or defaults) give for these problems at these sequence lengths, each once."""
    from . import lookup
    from .config import Shape

    found = {}
    for problem in problems:
        for seqlen in seqlens:
            config = lookup.resolve(problem, Shape(seqlen, batch_heads), device).config
            found.setdefault((problem, config), Build(problem, config, device, seqlen))
    return list(found.values())
