"""``tune.run``: from specs to table rows."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from .. import paths, table
from ..config import FP8
from ..device import Device, same_arch
from ..errors import TargetError, TuneError
from ..geometry import Spec, TuneShape
from ..row import Row
from ..table import Table
from . import finals
from . import plan as planning
from . import progress as shown
from .backend import Backend, Identity, TritonBackend
from .log import TrialLog
from .plan import Plan
from .records import Failure
from .summary import Result, Summary
from .tuner import Options, Tuner
from .worker import InlinePool, Pool, Request, wait

_BUILDER_ENV = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1"}
_GPU_ENV = {"TRITON_INTERPRET": None}


def run(
    specs: Spec | str | Path | Sequence[Spec | str | Path],
    device: Device | None = None,
    kernels: Iterable[str] | None = None,
    shapes: Sequence[TuneShape] | None = None,
    trials: int = 64,
    budget_s: float | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool | shown.Silent = True,
    *,
    seqlens: Sequence[int] | None = None,
    varlen: bool = False,
    deterministic: bool = False,
    decode: bool = False,
    kv_dtype: str | None = None,
    page_size: int | None = None,
    tokens: int | None = None,
    storage: str | None = None,
    log: Path | str | None = None,
    workers: int | None = None,
    gpus: Sequence[int] | int = (0,),
    rounds: int = 15,
    deadline_s: float = 30.0,
    seed: int = 0,
    make: Callable[..., Backend] = TritonBackend,
    inline: bool = False,
) -> Summary:
    """Tune the kernels of some specs on this machine's GPU and write the table rows.

    Rows are written as each kernel is decided; a signal (SIGINT, SIGTERM) or the end of the budget leaves what is decided by then written,
    and the log lets a later run with ``resume`` go on. A second signal ends at once.

    Args:
        specs: names, paths or Specs.
        device: what to compile for; default the GPU that is found. Naming another than the GPU's own is an error.
        kernels: only these.
        shapes: batches and lengths instead of the specs' own; ``seqlens`` is short for batches of one.
        trials: configs tried for each problem (kernel and exact key), over its anchor lengths.
        budget_s: seconds for everything, shared evenly by the problems that are left.
        out: folder of tables to write (``<out>/<device>/<kernel>.json``, merged with what is there); default the user's cache.
        resume: take over the log's results where source, versions and device are the same.
        progress: bars or lines on stderr.
        varlen: tune the variant for ``cu_seqlens`` calls.
        deterministic: tune the variant for ``deterministic`` calls. A variant without rows of its own borrows the other's.
        decode, kv_dtype, page_size, tokens: tune the kernels that serve from a KV cache, and what it is like; see :func:`.plan.plans`.
        storage: Optuna storage URL (e.g. ``sqlite:///study.db``) that several tuners share.
        log: the trial log; default in the cache.
        workers: compile processes, default the CPU count less one for each GPU.
        gpus: CUDA indices to measure on.
        rounds: interleaved rounds of a final.
        deadline_s: for one evaluation; past it the process is killed.
        make: gives the :class:`Backend`, called as ``make()`` for the GPU's process and ``make(device)`` for compiling; must be picklable.
        inline: run the backend in this process (replays).

    Raises:
        TargetError: there is no GPU, another than ``device``, or one that cannot read ``kv_dtype``.
        TuneError: the worker does not start, or the shared study cannot be opened.
        TableError: a table in ``out`` is torn or edited; nothing is tuned then.
    """
    began = time.monotonic()
    given = [specs] if isinstance(specs, (Spec, str, Path)) else list(specs)
    if seqlens:
        shapes = [TuneShape(batch=1, seqlen=n) for n in seqlens]
    variant = {"varlen": varlen, "deterministic": deterministic}
    cache = {"decode": decode, "kv_dtype": kv_dtype, "page_size": page_size, "tokens": tokens}
    todo = planning.plans([_loaded(spec) for spec in given], kernels=kernels, shapes=shapes, **variant, **cache)
    options = Options(trials=trials, rounds=rounds, deadline_s=deadline_s, storage=storage, seed=seed)
    indices = [gpus] if isinstance(gpus, int) else list(gpus)
    show = shown.make(progress)
    with _stop_flag() as stopped, _pools(make, device, indices, workers, inline) as (identity, backend, builders, gpu_pool):
        found, environment = identity.device, identity.environment
        if kv_dtype == FP8 and not found.fp8:
            raise TargetError(f"{found.slug} ({found.arch}) has no {FP8}: that needs an NVIDIA GPU from sm_89 on")
        folder = Path(out) / found.slug if out is not None else None
        journal = TrialLog(Path(log) if log is not None else paths.cache() / "tune" / found.slug / "trials.jsonl")
        reading = journal.read()
        known = _same(reading.records, found, environment) if resume else []
        summary = Summary(found.slug, environment, skipped_lines=reading.skipped)
        journal.append({"event": "run", "device": found.slug, "environment": environment, "resume": resume, "date": _now()})
        concerned = {plan.problem.kernel for plan in todo}
        tuner = Tuner(
            backend,
            builders,
            gpu_pool,
            found,
            journal,
            options=options,
            rows={kernel: _rows(folder, found.slug, kernel) for kernel in concerned},
            elsewhere={kernel: _elsewhere(found, kernel) for kernel in concerned},
            known=known,
            progress=show,
            stop=stopped,
            deadline=began + budget_s if budget_s is not None else float("inf"),
        )
        show.start(sum(max(1, trials // len(p.anchors)) * len(p.anchors) + len(p.points) for p in todo), budget_s)
        try:
            for number, plan in enumerate(todo):
                share = (tuner.deadline - time.monotonic()) / (len(todo) - number)
                result = tuner.tune(plan, todo[number + 1 :], share)
                result.rows = _written(tuner, plan, result, environment, folder)
                summary.results.append(result)
                summary.complete &= not result.stopped and not result.missing
                if result.stopped:
                    summary.complete = False
                    break
        finally:
            show.stop()
            summary.seconds = time.monotonic() - began
        journal.append({"event": "end", "complete": summary.complete, "seconds": round(summary.seconds, 1)})
    return summary


def _loaded(spec: Spec | str | Path) -> Spec:
    if isinstance(spec, Spec):
        return spec
    from .. import spec as loading

    return loading.load(spec)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _same(records: Iterable[dict[str, Any]], device: Device, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Trials and finals that runs with this device and these versions wrote."""
    kept, holds = [], False
    for record in records:
        if record.get("event") == "run":
            holds = record.get("device") == device.slug and record.get("environment") == environment
        elif holds:
            kept.append(record)
    return kept


def _rows(folder: Path | None, slug: str, kernel: str) -> list[Row]:
    """Rows incumbents come from: the table that will be written, and those that serve calls today."""
    own: Sequence[Row] = ()
    if folder is not None and (path := folder / f"{kernel}.json").exists():
        own = Table.load(path).rows
    serving = [*table.user_tables(slug, kernel), *table.shipped_tables(slug, kernel)]
    return [*own, *(row for found in serving for row in found.rows)]


def _elsewhere(device: Device, kernel: str) -> list[Row]:
    """Shipped rows of the other devices of the arch, those of the nearest first."""
    return [row for other in same_arch(device) for found in table.shipped_tables(other.slug, kernel) for row in found.rows]


def _written(tuner: Tuner, plan: Plan, result: Result, environment: dict[str, str], folder: Path | None) -> list[Row]:
    """The rows of a result, saved."""
    heads = finals.ranges(sorted({p.shape.batch_heads for p in plan.points}))
    # Each batch_heads has lengths of its own, which between them hold every length.
    seqlens = {n: finals.ranges(sorted({p.seqlen for p in plan.points if p.shape.batch_heads == n})) for n in heads}
    rows, date = [], _now()
    for group in result.groups:
        built = tuner.resources(plan.problem, group.config)
        if built is None:
            continue
        batch_heads = group.decisions[0].point.shape.batch_heads
        rows.append(
            finals.row(
                plan.problem,
                group,
                seqlens=seqlens[batch_heads],
                batch_heads=heads[batch_heads],
                built=built,
                environment=environment,
                date=date,
                trials=result.tried,
                failures=dict(result.failures),
            )
        )
    slug, kernel = tuner.device.slug, plan.problem.kernel
    if folder is None:
        for row in rows:
            table.save_user_row(slug, row)
    elif rows:
        path = folder / f"{kernel}.json"
        old = Table.load(path) if path.exists() else Table(slug, kernel)
        old.merge(Table(slug, kernel, tuple(rows)))[0].save(path)
    return rows


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came. The second one raises KeyboardInterrupt."""
    seen = threading.Event()

    def handle(number: int, frame: object) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    before = {}
    with suppress(ValueError):  # not the main thread: signals are its business
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _pools(
    make: Callable[..., Backend], device: Device | None, gpus: Sequence[int], workers: int | None, inline: bool
) -> Iterator[tuple[Identity, Backend, Pool | InlinePool, Pool | InlinePool]]:
    """The process that owns each GPU is started and asked what it is; then those that compile for it."""
    if inline:
        backend = make()
        yield _identified(backend.identify(), device), backend, InlinePool(backend), InlinePool(backend)
        return
    gpu_pool = Pool([partial(make, device, index) for index in gpus], env=_GPU_ENV)
    builders: Pool | None = None
    try:
        gpu_pool.submit(Request("identify", deadline_s=120.0))
        answers: list[tuple[int, Any]] = []
        while not answers:
            wait([gpu_pool], 1.0)
            answers = gpu_pool.collect()
        identity = _identified(answers[0][1], device)
        backend = make(identity.device)
        builders = Pool([partial(make, identity.device)] * (workers or max(1, (os.cpu_count() or 1) - len(gpus))), env=_BUILDER_ENV)
        yield identity, backend, builders, gpu_pool
    finally:
        gpu_pool.close()
        if builders is not None:
            builders.close()


def _identified(answer: Identity | Failure, wanted: Device | None) -> Identity:
    if isinstance(answer, Failure):
        raise (TargetError if "TargetError" in answer.message else TuneError)(f"cannot measure here: {answer.message}")
    if wanted is not None and answer.device.slug != wanted.slug:
        raise TargetError(f"tuning measures on the GPU that is here, {answer.device.slug}: got {wanted.slug!r}")
    return answer
