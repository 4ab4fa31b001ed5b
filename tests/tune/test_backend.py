"""The real backend: compiling without a GPU in a worker process; checking in the interpreter; kinds of failure."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import pytest

from nsa_gen import space, spec
from nsa_gen.config import SERVING, problem
from nsa_gen.device import from_name
from nsa_gen.errors import CompileError, RenderError
from nsa_gen.tune.backend import Final, TritonBackend, failure_of
from nsa_gen.tune.drive import _BUILDER_ENV
from nsa_gen.tune.records import KINDS, Built, Failure, Measured, Point
from nsa_gen.tune.worker import Pool, Request, wait


class OutOfResources(Exception):
    """Named as Triton's."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RenderError("x"), "render"),
        (CompileError("kernel for cuda:90: CompilationError: …"), "compile"),
        (OutOfResources("out of resource: shared memory, Required: 300000, Hardware limit: 232448"), "shared_memory"),
        (OutOfResources("out of resource: threads"), "launch"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "illegal_access"),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), "illegal_access"),
        (RuntimeError("CUDA error: unspecified launch failure"), "illegal_access"),
        (ValueError("odd"), "error"),
    ],
)
def test_exceptions_have_their_kind(error, kind):
    found = failure_of(error)
    assert found.kind == kind and kind in KINDS and type(error).__name__ in found.message
    assert found.fatal == (kind == "illegal_access")


@pytest.mark.parametrize(("kernel", "point"), [("sliding_attention_fwd", Point(8192, 1, 4)), ("decode_fwd", Point(131072, 32, 4))])
def test_a_pool_compiles_for_a_gpu_that_is_not_here(tmp_path, kernel, point):
    device = from_name("nvidia-h200")
    wanted = problem(kernel, spec.load("gqa16-d128"))
    config = space.default(wanted, device.arch)
    env = {**_BUILDER_ENV, "NSA_GEN_CACHE": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    pool = Pool([partial(TritonBackend, device)], env=env)
    try:
        pool.submit(Request("compile", (wanted, config, point), 120))
        found = []
        while not found:
            wait([pool], 5.0)
            found = pool.collect()
    finally:
        pool.close()
    built = found[0][1]
    assert isinstance(built, Built), built
    assert built.digest == TritonBackend(device).digest(wanted, config)
    assert 0 < built.shared <= device.shared_bytes and built.registers and built.spills is not None
    assert any((tmp_path / "triton").iterdir())


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")


@pytest.fixture
def on_cpu(monkeypatch):
    """The cases that are made, all on the CPU, and when timing is to stop early; it finds 2 ms."""
    import torch

    from nsa_gen import inputs, timing

    real = inputs.case
    made, stops = [], []

    def case(*args, **options):
        made.append(real(*args, **options | {"device": "cpu"}))
        return made[-1]

    monkeypatch.setattr(inputs, "case", case)
    for name in ("set_device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    def measure(fn, **options):
        fn()
        stops.append(options["early_stop_ms"])
        return SimpleNamespace(median_ms=2.0, p20=1.9, p80=2.1, stopped=False)

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "interleaved", lambda fns, rounds: [[1.0 + i] * rounds for i, fn in enumerate(fns) if fn() is None])
    return made, stops


@interpreted
def test_evaluate_and_final_check_against_the_reference(on_cpu):
    made, stops = on_cpu
    sliding = problem("sliding_attention_fwd", spec.load("tiny"))
    config, point = space.safe(sliding), Point(24, 2, 1)
    backend = TritonBackend(from_name("interpreter"))
    for best in (None, 2.0):
        found = backend.evaluate(sliding, config, point, best)
        assert isinstance(found, Measured), found
        assert found.ms == 2.0 and found.spread == pytest.approx(0.1) and 0 <= found.max_rel_err < 1e-4
    assert stops == [None, pytest.approx(2.6)]
    assert len(made) == 1  # inputs and references are kept

    final = backend.final(sliding, [config, config.replace(num_stages=2)], point, 4)
    assert isinstance(final, Final) and final.samples == ((1.0,) * 4, (2.0,) * 4)
    assert len(made) == 2 and made[1].seed != made[0].seed

    made[0].run = lambda module: made[0].outputs["o"].zero_()  # writes something else than attention
    wrong = backend.evaluate(sliding, config, point, None)
    assert isinstance(wrong, Failure) and wrong.kind == "wrong" and wrong.message
    made[0].run = lambda module: None  # writes nothing: the poison shows
    assert backend.evaluate(sliding, config, point, None).kind == "wrong"


@interpreted
@pytest.mark.parametrize("kernel", SERVING)
def test_what_serves_from_a_cache_is_checked_too(kernel, on_cpu):
    made, _ = on_cpu
    wanted = problem(kernel, spec.load("tiny"))
    config, point = space.safe(wanted), Point(70, 2, 1)
    backend = TritonBackend(from_name("interpreter"))
    assert isinstance(backend.evaluate(wanted, config, point, None), Measured)
    if kernel != "cache_append":
        made[0].tensors["arrived"].fill_(1)  # as a candidate leaves it that failed
    found = backend.evaluate(wanted, config, point, 2.0)
    assert isinstance(found, Measured) and len(made) == 1 and found.max_rel_err < 1e-4, found
    final = backend.final(wanted, [config, config.replace(num_warps=8)], point, 4)
    assert isinstance(final, Final) and final.samples == ((1.0,) * 4, (2.0,) * 4)
    for case in made:
        case.run = lambda module: None
    assert backend.evaluate(wanted, config, point, None).kind == "wrong"
