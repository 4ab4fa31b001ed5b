"""``nsa-gen demo``: the whole pipeline on any machine: render, compile without a GPU, run against the reference, resolve from the tables.

Kernels are compiled for several architectures in worker processes. The forward runs in Triton's interpreter, in a process of its own; with
a GPU one kernel is also tuned for a minute and a forward runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import device as devices
from . import lookup, precompile
from . import spec as specs
from .config import Shape, problems
from .console import print_table
from .errors import TargetError
from .render import render

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Specs whose backward is compiled too. (Of every spec, twice the modules and thrice the time; tests and `generate --check` do that.)
TRAINED = ("gqa16-d128", "tiny")
#: Length at which configs are chosen, and the table and spec that are shown.
SEQLEN, TABLE, SHOWN = 65536, "nvidia-h200", "gqa16-d128"
#: The forward in the interpreter: two sequences, the first with more blocks than a query of 'tiny' reads.
LENGTHS = (72, 21)
_TUNE_SECONDS = 60.0


def run(targets: Sequence[str] | None, jobs: int | None, progress: Callable[[], Any]) -> bool:
    """Go through the steps and print each; True if all went well.

    Args:
        targets: devices or archs to compile for (default ``TARGETS``).
        jobs: processes that compile (default: one a core).
        progress: makes a ``rich`` progress bar.

    Raises:
        TargetError: an unknown target.
    """
    start = time.perf_counter()
    wanted = [devices.from_name(name) for name in targets or TARGETS]
    good = [_compile(wanted, jobs, progress), _interpret()]
    _resolve()
    try:
        here = devices.current()
    except TargetError:
        print("\n4. No GPU here: nothing to tune. On a GPU: nsa-gen tune SPEC --budget 5m")
    else:
        good.append(_on_gpu(here))
    print(f"\n{'done' if all(good) else 'FAILED'} in {time.perf_counter() - start:.0f} s")
    return all(good)


def _compile(targets: list[devices.Device], jobs: int | None, progress: Callable[[], Any]) -> bool:
    chosen = [specs.load(name) for name in specs.names()]
    builds: dict[precompile.Build, None] = {}
    sources = set()
    for spec in chosen:
        for target in targets:
            wanted = [p for p in problems(spec) if spec.name in TRAINED or not p.kernel.endswith("_bwd")]
            found = precompile.for_device(wanted, target, (SEQLEN,), spec.heads.kv)
            builds |= dict.fromkeys(found)
            sources |= {render(build.problem, build.config).digest for build in found}
    print(
        f"1. {len(chosen)} specs render to {len(sources)} kernel modules (the backward of {' and '.join(TRAINED)}); "
        f"compiling {len(builds)} for {', '.join(t.slug for t in targets)}"
    )
    sys.stdout.flush()
    built: list[precompile.Built] = []
    said = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("compiling", total=len(builds))
        for one in precompile.compile_many(builds, jobs):
            built.append(one)
            bar.update(task, advance=1, description=f"{one.build.target.slug:7s} {one.build.problem.kernel}")
            if bar.disable and time.perf_counter() - said > 15:  # a log that stays silent for minutes looks like a hang
                said = time.perf_counter()
                print(f"   {len(built)} of {len(builds)} compiled", flush=True)
    rows = []
    for target in targets:
        mine = [one for one in built if one.build.target == target]
        largest = max(mine, key=lambda one: one.shared)
        spilled = sum(bool(one.spills) for one in mine)
        wrong = sum(not one.fits for one in mine)
        rows.append((target.slug, len(mine), f"{largest.shared} of {largest.limit}", largest.build.problem.kernel, spilled, wrong))
    print_table(("target", "modules", "most shared bytes", "in", "with spills", "failed"), rows)
    for one in built:
        if not one.fits:
            key = " ".join(f"{name}={value}" for name, value in one.build.problem.values)
            why = one.error or f"needs {one.shared} bytes of shared memory, there are {one.limit}"
            print(f"   {one.build.target.slug} {one.build.problem.kernel} [{key}]: {why}")
    return all(one.fits for one in built)


def _interpret() -> bool:
    """The forward of ``tiny`` in a process under the interpreter: triton reads its switch when it is imported."""
    print(f"\n2. A forward of the spec 'tiny' in Triton's interpreter, sequences of {LENGTHS[0]} and {LENGTHS[1]} tokens:")
    sys.stdout.flush()
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(_search_path()), "CUDA_VISIBLE_DEVICES": ""}
    code = f"from nsa_gen import demo; demo.forward('tiny', {LENGTHS!r}, 'cpu')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"   failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return False
    return _show_forward(json.loads(done.stdout.splitlines()[-1]))


def _search_path() -> list[str]:
    """This package's parent first, so that the process finds the same nsa_gen from any folder."""
    return [str(Path(__file__).resolve().parent.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _show_forward(found: dict[str, float]) -> bool:
    good = found["error"] <= 2 * found["eager"] + found["floor"]
    verdict = "right" if good else "WRONG"
    print(f"   relative error against the float64 reference {found['error']:.1e}: {verdict}, in {found['seconds']:.1f} s")
    print(f"   plain PyTorch in {found['dtype']} has {found['eager']:.1e}")
    return good


def forward(name: str, lengths: Sequence[int], device: str) -> dict[str, Any]:
    """One NSA forward of a spec against the reference; prints and returns the errors as JSON.

    ``error`` and ``eager``: Frobenius norm of the difference from the float64 reference over its norm, of the operator and of the
    reference evaluated in the spec's dtype. ``floor``: one rounding of that dtype.
    """
    import torch

    from . import ops, reference
    from .bench import tensors

    spec = specs.load(name)
    given = tensors(spec, sum(lengths), device)
    cu = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
    start = time.perf_counter()
    o = ops.nsa_attention(**given, spec=spec, cu_seqlens=cu.to(device), max_seqlen=max(lengths))
    if o.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    weights = {"weights_k": given.pop("phi_k"), "weights_v": given.pop("phi_v")}
    exact, eager = (
        reference.nsa_attention(**given, **weights, spec=spec, cu_seqlens=cu, dtype=dtype) for dtype in (torch.float64, o.dtype)
    )

    def off(x: torch.Tensor) -> float:
        return float((x.double() - exact.double()).norm() / exact.double().norm())

    found = {"error": off(o), "eager": off(eager), "floor": torch.finfo(o.dtype).eps, "dtype": spec.dtype, "seconds": seconds}
    print(json.dumps(found))
    return found


def _resolve() -> None:
    spec, device = specs.load(SHOWN), devices.from_name(TABLE)
    print(f"\n3. What {SHOWN} runs at {SEQLEN} tokens on {device.slug}, and why:")
    rows = []
    for problem in problems(spec):
        found = lookup.resolve(problem, Shape(SEQLEN, spec.heads.kv), device, digest_of=lambda p, c: render(p, c).digest)
        knobs = " ".join(f"{name}={value}" for name, value in found.config.values)
        measured = f"{found.row.perf['median_ms']:.3g} ms on {found.row.environment['device']}" if found.row else None
        if found.stale:
            measured = f"{measured}, an older rendering"
        why = found.row.where if found.row else found.source
        rows.append((problem.kernel, why, measured, knobs))
    print_table(("kernel", "row", "measured", "config"), rows)


def _on_gpu(device: devices.Device) -> bool:
    print(f"\n4. On this GPU ({device.name}): tuning sliding attention of {SHOWN} for up to {_TUNE_SECONDS:.0f} s, then a forward")
    sys.stdout.flush()
    from . import tune

    with tempfile.TemporaryDirectory(prefix="nsa-gen-demo-") as folder:
        options = {"kernels": ["sliding_attention_fwd"], "seqlens": [16384], "budget_s": _TUNE_SECONDS, "out": Path(folder)}
        print(tune.run([specs.load(SHOWN)], **options).to_markdown())
    return _show_forward(forward(SHOWN, (4096, 1500), "cuda"))
