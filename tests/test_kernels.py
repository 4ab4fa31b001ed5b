"""The run-time hot path: caching by cell, overrides, falling back from what does not load, devices of tensors."""

from __future__ import annotations

import logging
import timeit

import pytest
import torch
from triton.runtime.errors import OutOfResources

from nsa_gen import kernels, lookup, render, space, spec, table
from nsa_gen.config import Config, Problem, Shape
from nsa_gen.device import Device, from_name
from nsa_gen.errors import CompileError, ConfigError, InputError, NotTuned, TargetError
from nsa_gen.kernels import get, override
from nsa_gen.row import Row
from nsa_gen.space import Knob, Space
from nsa_gen.table import Table

KERNEL = "sliding_attention_fwd"
TEMPLATE = """{{ header }}
def sliding_attention_fwd(faults, x, scale=1.0):
    fault = faults.get({{ c.BLOCK_M }})
    if fault is not None:
        raise fault
    return ({{ c.BLOCK_M }}, x * scale)
"""
FAKE = Space(
    knobs=(Knob("BLOCK_M", (16, 32, 64)),),
    defaults={"": lambda p: {"BLOCK_M": 32}},
    safe=lambda p: {"BLOCK_M": 16},
)
GPU = Device("test-gpu", "Test GPU", "sm_90", 120, 100_000)
SHAPE = Shape(6000, 4)
TOO_LARGE, REFUSED = OutOfResources(300_000, 232_448, "shared memory"), CompileError("sliding for cuda:90: no such layout\ndump")


def problem(**changes: object) -> Problem:
    fields = {"dtype": "bfloat16", "group": 16, "head_dim_qk": 128, "head_dim_v": 128, "window": 512, "varlen": False}
    return Problem.of(KERNEL, fields | changes)  # type: ignore[arg-type]


def config(block: int) -> Config:
    return Config.of(KERNEL, {"BLOCK_M": block})


def ship(slug: str, *spans: tuple[tuple[int, int], int | Config], of: Problem | None = None) -> None:
    times = {"median_ms": 1.0, "spread": 0.01, "default_ms": 1.2, "speedup": 1.2, "speedup_low": 1.1, "speedup_high": 1.3}
    rows = [
        Row(
            problem=of or problem(),
            seqlen=seqlen,
            batch_heads=(1, 7),
            config=chosen,
            perf={**times, "verdict": "tuned wins"},
            resources={"shared": 65536, "registers": 128, "spills": 0},
            correctness={"max_rel_err": 1e-3, "reference": "float64", "cases": 4},
            environment={"triton": "3.6.0", "torch": "2.11.0", "driver": "580.1", "device": "Test GPU", "python": "3.12.1"},
            source_digest=kernels.digest_of(of or problem(), chosen),
            date="2025-06-01",
        )
        for seqlen, chosen in ((seqlen, block if isinstance(block, Config) else config(block)) for seqlen, block in spans)
    ]
    Table(slug, KERNEL, tuple(rows)).save(table.shipped_path(slug, KERNEL))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch, request):
    """Tables and cache of the test's own; but for tests on a GPU, a template and a space of its own too."""
    if "gpu" not in request.keywords:
        (tmp_path / "templates").mkdir()
        (tmp_path / "templates" / f"{KERNEL}.py.jinja").write_text(TEMPLATE)
        monkeypatch.setattr("nsa_gen.paths.templates", lambda: tmp_path / "templates")
        monkeypatch.setattr(render, "_environment", render.environment)
        monkeypatch.setitem(space.SPACES, KERNEL, FAKE)
    monkeypatch.setenv("NSA_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NSA_GEN_TUNED", str(tmp_path / "tuned"))
    monkeypatch.delenv("NSA_GEN_STRICT", raising=False)
    monkeypatch.setattr(lookup, "_logged", set())
    kernels.clear()
    yield
    kernels.clear()
    kernels.clear_override()


def run(kernel: object, **faults: Exception) -> int:
    """Calls the host function; ``b64=error`` makes the config of that block fail. Returns the block of the config that ran."""
    block, product = getattr(kernel, KERNEL)({int(name[1:]): fault for name, fault in faults.items()}, 3, scale=2.0)
    assert product == 6.0
    return block


def test_get_renders_loads_and_runs_the_resolved_config():
    ship("test-gpu", ((4096, 8191), 64))
    kernel = get(problem(), SHAPE, GPU)
    assert run(kernel) == 64
    assert kernel.resolution.exact and not kernel.resolution.stale
    assert kernel.module.__file__.endswith(f"{KERNEL}_{kernels.digest_of(problem(), config(64))}.py")


def test_get_agrees_with_the_lookup_at_every_edge_whatever_was_asked_first():
    ship("test-gpu", ((1000, 5000), 64), ((5001, 6000), 16), ((9000, 9000), 32))
    lengths = [1, 999, 1000, 4095, 4096, 5000, 5001, 6000, 6001, 8191, 8192, 8999, 9000, 9001, 10**6]
    for order in (lengths, lengths[::-1]):
        kernels.clear()
        for seqlen in order:
            shape = Shape(seqlen, 4)
            assert get(problem(), shape, GPU).resolution.config == lookup.resolve(problem(), shape, GPU).config, seqlen


def test_same_cell_same_kernel_and_tables_are_read_once(monkeypatch):
    ship("test-gpu", ((4096, 8191), 64))
    first = get(problem(), SHAPE, GPU)
    monkeypatch.setattr(lookup, "resolve", lambda *a, **k: pytest.fail("resolved again"))
    assert get(problem(), Shape(6001, 4), GPU) is first
    assert get(problem(), Shape(4096, 7), GPU) is first


def test_empty_input_is_served():
    assert run(get(problem(), Shape(0, 0), GPU)) == 32


def test_clear_reads_tables_anew():
    assert run(get(problem(), SHAPE, GPU)) == 32
    ship("test-gpu", ((4096, 8191), 64))
    assert run(get(problem(), SHAPE, GPU)) == 32
    kernels.clear()
    assert run(get(problem(), SHAPE, GPU)) == 64


def test_override_takes_effect_at_once_and_ends_at_once():
    assert run(get(problem(), SHAPE, GPU)) == 32
    with override(config(64)):
        assert run(get(problem(), SHAPE, GPU)) == 64
        with override(config(16)):
            assert run(get(problem(), SHAPE, GPU)) == 16
    assert run(get(problem(), SHAPE, GPU)) == 32
    kernels.set_override(config(64))
    assert run(get(problem(), SHAPE, GPU)) == 64
    kernels.clear_override()
    assert run(get(problem(), SHAPE, GPU)) == 32
    with override(Config.of(KERNEL, {"BLOCK_M": 48})), pytest.raises(ConfigError):
        get(problem(), SHAPE, GPU)


def test_strict(monkeypatch):
    monkeypatch.setenv("NSA_GEN_STRICT", "1")
    with pytest.raises(NotTuned):
        get(problem(), SHAPE, GPU)
    ship("test-gpu", ((4096, 8191), 64))
    kernels.clear()
    assert run(get(problem(), SHAPE, GPU)) == 64


def test_table_of_another_rendering_is_stale(tmp_path):
    ship("test-gpu", ((4096, 8191), 64))
    path = tmp_path / "templates" / f"{KERNEL}.py.jinja"
    path.write_text(path.read_text() + "# changed\n")
    kernels.clear()
    kernel = get(problem(), SHAPE, GPU)
    assert kernel.resolution.stale and run(kernel) == 64


# --- what does not load --------------------------------------------------------------------------------------------------------


def test_too_large_row_gives_way_to_the_default_then_to_the_safe_config(caplog):
    ship("test-gpu", ((4096, 8191), 64), ((8192, 16383), 64))
    kernel = get(problem(), SHAPE, GPU)
    with caplog.at_level(logging.WARNING, "nsa_gen"):
        assert run(kernel, b64=TOO_LARGE) == 32
        assert run(kernel) == 32, "64 is not tried again"
        assert kernel.resolution.source == "default" and not kernel.resolution.exact
        assert "300000" in kernel.resolution.reason and "does not load on test-gpu" in kernel.resolution.reason
        other = get(problem(), Shape(9000, 4), GPU)
        assert other is not kernel and run(other) == 32, "other shapes know of it"
        assert run(other, b32=TOO_LARGE) == 16
        assert run(kernel, b32=TOO_LARGE) == 16
    assert len(caplog.records) == 2
    assert get(problem(), SHAPE, GPU).resolution.source == "safe"


def test_default_that_is_too_large_gives_way_and_the_safe_config_has_no_substitute():
    kernel = get(problem(), SHAPE, GPU)
    assert run(kernel, b32=TOO_LARGE) == 16
    with pytest.raises(OutOfResources):
        run(kernel, b16=TOO_LARGE)


def test_borrowed_row_may_fail_to_compile_an_exact_one_may_not():
    ship("nvidia-h200", ((4096, 8191), 64))
    assert run(get(problem(), SHAPE, GPU), b64=REFUSED) == 32
    kernels.clear()
    ship("test-gpu", ((4096, 8191), 64))
    with pytest.raises(CompileError):
        run(get(problem(), SHAPE, GPU), b64=REFUSED)


def test_override_is_taken_at_its_word():
    with override(config(64)):
        for fault in (TOO_LARGE, REFUSED):
            with pytest.raises(type(fault)):
                run(get(problem(), SHAPE, GPU), b64=fault)
    ship("test-gpu", ((4096, 8191), 64))
    kernels.clear()
    assert run(get(problem(), SHAPE, GPU), b64=TOO_LARGE) == 32
    with override(config(64)):
        assert run(get(problem(), SHAPE, GPU)) == 64


def test_other_errors_reach_the_caller():
    with pytest.raises(ZeroDivisionError):
        run(get(problem(), SHAPE, GPU), b32=ZeroDivisionError())


@pytest.mark.gpu
def test_row_too_large_for_the_gpu_gives_the_right_result_all_the_same():
    """The real kernel, with a row that claims less shared memory than it takes."""
    device = kernels.default_device()
    of = problem(group=4, head_dim_qk=256, head_dim_v=256, window=64)
    ship(device.slug, ((1, 4095), max(space.candidates(of), key=lambda c: (c.BLOCK_N, c.num_stages, c.BLOCK_M))), of=of)
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, heads, 256, device="cuda", dtype=torch.bfloat16) for heads in (4, 1, 1))

    def forward() -> tuple[torch.Tensor, str]:
        kernel = get(of, Shape(300, 1), device)
        o, lse = torch.full_like(q, torch.nan), torch.full((300, 4), torch.nan, device="cuda")
        kernel.sliding_attention_fwd(q, k, v, o, lse, 256**-0.5, 0, None, 1, 300)
        return o, kernel.resolution.source

    o, source = forward()
    assert source in ("default", "safe")
    scores = torch.einsum("thd,sd->hts", q.double(), k[:, 0].double()) * 256**-0.5
    age = torch.arange(300, device="cuda")[:, None] - torch.arange(300, device="cuda")
    weights = scores.masked_fill((age < 0) | (age >= 64), -torch.inf).softmax(-1)
    expected = torch.einsum("hts,sd->thd", weights, v[:, 0].double())
    torch.testing.assert_close(o.double(), expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(forward()[0], o)


# --- the public resolve, devices, speed ----------------------------------------------------------------------------------------


def test_resolve_by_names():
    tiny = spec.load("tiny")
    of = Problem.of(KERNEL, {"dtype": tiny.dtype, "group": tiny.group, "head_dim_qk": tiny.head_dim.qk, "head_dim_v": tiny.head_dim.v,
                             "window": tiny.window, "varlen": True})  # fmt: skip
    ship("nvidia-h200", ((64, 127), 64), of=of)
    found = kernels.resolve(KERNEL, "tiny", seqlen=100, varlen=True, device="NVIDIA H200")
    assert (found.source, found.config.BLOCK_M, found.exact) == ("device table", 64, True)
    assert kernels.resolve(KERNEL, tiny, seqlen=100, device=from_name("nvidia-h200")).reason.endswith("borrowed")
    assert kernels.resolve(KERNEL, tiny, seqlen=100, batch_heads=100, varlen=True, device="nvidia-h200").exact is False
    with pytest.raises(TargetError):
        kernels.resolve(KERNEL, "tiny", seqlen=100, device="H2")
    with pytest.raises(ConfigError):
        kernels.resolve("sliding", "tiny", seqlen=100)
    with pytest.raises(InputError):
        kernels.resolve(KERNEL, "tiny", seqlen=0)


def test_device_of_a_cpu_tensor(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.device_of(torch.zeros(1)).slug == "interpreter" == kernels.default_device().slug
    kernels.clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="set TRITON_INTERPRET=1"):
        kernels.device_of(torch.zeros(1))


def test_default_device_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.default_device().slug == "interpreter"


@pytest.mark.gpu
def test_device_of_a_gpu_tensor(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = kernels.device_of(torch.zeros(1, device="cuda"))
    assert found == kernels.default_device() and found.backend in ("cuda", "hip")
    assert kernels.device_of(torch.zeros(1, device="cuda")) is found


def test_a_warm_get_costs_microseconds():
    of = problem()
    get(of, SHAPE, GPU)
    best = min(timeit.repeat(lambda: get(of, SHAPE, GPU), number=2000, repeat=5)) / 2000
    assert best < 20e-6, "an order of magnitude above what it costs, so that a loaded machine does not fail it"
