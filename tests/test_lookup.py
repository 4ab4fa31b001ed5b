"""Which config serves a call: the order of sources, distances, overrides, strict mode, shared memory."""

from __future__ import annotations

import itertools
import logging
import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_gen import lookup, space, table
from nsa_gen.config import FP8, Config, Problem, Shape, cache_of
from nsa_gen.config import problem as problem_of
from nsa_gen.device import Device, from_name
from nsa_gen.errors import ConfigError, NotTuned
from nsa_gen.lookup import Resolution, override, resolve
from nsa_gen.row import Row
from nsa_gen.space import Knob, Space
from nsa_gen.spec import load
from nsa_gen.table import Table

KERNEL = "sliding_attention_fwd"
FAKE = Space(
    knobs=(Knob("BLOCK_M", (16, 32, 64)), Knob("num_warps", (1, 2, 4))),
    defaults={"": lambda p: {"BLOCK_M": 32, "num_warps": 2}, "sm_90": lambda p: {"BLOCK_M": 32, "num_warps": 4}},
    safe=lambda p: {"BLOCK_M": 16, "num_warps": 1},
    illegal=lambda p, c: "64 rows on one warp" if (c.BLOCK_M, c.num_warps) == (64, 1) else None,
)
GPU = Device("test-gpu", "Test GPU", "sm_90", 120, 100_000, aliases=("Test GPU",), fallbacks=("nvidia-l4", "nvidia-b200"))
SHAPE = Shape(6000, 4)
BLOCKS = st.sampled_from((16, 32, 64))


def problem(**changes: object) -> Problem:
    fields = {"dtype": "bfloat16", "group": 16, "head_dim_qk": 128, "head_dim_v": 128, "window": 512, "varlen": False}
    return Problem.of(KERNEL, fields | changes)  # type: ignore[arg-type]


def config(block: int, warps: int = 4) -> Config:
    return Config.of(KERNEL, {"BLOCK_M": block, "num_warps": warps})


def row(seqlen=(4096, 8191), batch_heads=(1, 7), *, block=64, warps=4, shared=65536, date="2025-06-01", of=None, digest="0" * 16) -> Row:
    times = {"median_ms": 1.0, "spread": 0.01, "default_ms": 1.2, "speedup": 1.2, "speedup_low": 1.1, "speedup_high": 1.3}
    return Row(
        problem=of or problem(),
        seqlen=seqlen,
        batch_heads=batch_heads,
        config=config(block, warps),
        perf={**times, "verdict": "tuned wins"},
        resources={"shared": shared, "registers": 128, "spills": 0},
        correctness={"max_rel_err": 1e-3, "reference": "float64", "cases": 4},
        environment={"triton": "3.6.0", "torch": "2.11.0", "driver": "580.1", "device": "Test GPU", "python": "3.12.1"},
        source_digest=digest,
        date=date,
    )


def ship(slug: str, *rows: Row) -> None:
    Table(slug, KERNEL, rows).save(table.shipped_path(slug, KERNEL))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setitem(space.SPACES, KERNEL, FAKE)
    monkeypatch.setenv("NSA_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NSA_GEN_TUNED", str(tmp_path / "tuned"))
    monkeypatch.delenv("NSA_GEN_STRICT", raising=False)
    monkeypatch.setattr(table, "_parsed", {})
    monkeypatch.setattr(lookup, "_logged", set())
    yield
    lookup.clear_override()


def took(found: Resolution) -> tuple[str, int, bool]:
    return found.source, found.config.BLOCK_M, found.exact


# --- the order -----------------------------------------------------------------------------------------------------------------


def test_order_of_sources_from_the_last_to_the_first(monkeypatch):
    """Each source added goes before all that were there."""
    monkeypatch.setitem(space.SPACES, KERNEL, Space(FAKE.knobs, {"": lambda p: {"BLOCK_M": 8, "num_warps": 2}}, FAKE.safe))
    assert took(resolve(problem(), SHAPE, GPU)) == ("safe", 16, False)
    monkeypatch.setitem(space.SPACES, KERNEL, FAKE)
    found = resolve(problem(), SHAPE, GPU)
    assert took(found) == ("default", 32, False) and found.config.num_warps == 4 and "default for sm_90" in found.reason
    ship("nvidia-b200", row(block=16))
    found = resolve(problem(), SHAPE, GPU)
    assert took(found) == ("arch fallback", 16, False) and "nvidia-b200" in found.reason
    ship("nvidia-l4", row(block=64))
    assert took(resolve(problem(), SHAPE, GPU)) == ("arch fallback", 64, False)
    ship("nvidia-h200", row(block=16))
    assert took(resolve(problem(), SHAPE, GPU)) == ("same arch", 16, False)
    ship("nvidia-h100-pcie", row(block=64))
    found = resolve(problem(), SHAPE, GPU)
    assert took(found) == ("same arch", 64, False) and "of nvidia-h100-pcie" in found.reason, "114 SMs are nearer to 120 than 132"
    assert found.tried == ("test-gpu: no row of this key",) and "not taken: test-gpu" in found.reason
    ship("test-gpu", row(of=problem(varlen=True), block=16))
    found = resolve(problem(), SHAPE, GPU)
    assert took(found) == ("device table", 16, False) and "measured with varlen=True, borrowed" in found.reason
    ship("test-gpu", row(of=problem(varlen=True), block=16), row((65536, 131071), block=64))
    found = resolve(problem(), SHAPE, GPU)
    assert took(found) == ("device table", 64, False) and "nearest row to seqlen 6000, batch_heads 4" in found.reason
    ship("test-gpu", row((65536, 131071)), row(block=16))
    found = resolve(problem(), SHAPE, GPU)
    assert took(found) == ("device table", 16, True) and found.row == row(block=16)
    table.save_user_row("test-gpu", row(block=64))
    assert took(resolve(problem(), SHAPE, GPU)) == ("user cache", 64, True)
    with override(config(32)):
        assert took(resolve(problem(), SHAPE, GPU)) == ("override", 32, True)


def test_a_key_without_rows_borrows_those_of_nearly_the_same_code():
    """First the other varlen's, then the other deterministic's; of these only configs that are legal."""
    kernel, made = "compressed_attention_bwd", {}
    for deterministic, varlen in ((True, True), (True, False), (False, True), (False, False)):
        key = {"dtype": "bfloat16", "group": 16, "head_dim_qk": 128, "head_dim_v": 128, "block": 32, "stride": 16}
        made[deterministic, varlen] = Problem.of(kernel, key | {"deterministic": deterministic, "varlen": varlen})
    wanted = made[True, True]
    separate = space.default(wanted, "sm_90")
    kept = ("SPLITS", "KEYS", "ROWS", "dkv_mask", "dkv_stages", "dkv_warps")
    atomic = Config.of(kernel, {"dq": "atomic"} | {name: separate[name] for name in kept})
    space.check(made[False, True], atomic)
    given = {(True, False): separate, (False, True): atomic, (False, False): separate.replace(SPLITS=8)}
    rows = {key: replace(row(), problem=made[key], config=one) for key, one in given.items()}
    for lenders, config, said in (
        ([(False, True), (False, False), (True, False)], separate, "measured with varlen=False, borrowed"),
        ([(False, True), (False, False)], given[False, False], "measured with deterministic=False, varlen=False, borrowed"),
        ([(False, True)], separate, "default for sm_90"),
    ):
        Table("test-gpu", kernel, tuple(rows[key] for key in lenders)).save(table.shipped_path("test-gpu", kernel))
        found = resolve(wanted, SHAPE, GPU)
        assert found.config == config and said in found.reason and not found.exact


def test_shipped_row_for_the_shape_goes_before_a_users_row_near_it():
    table.save_user_row("test-gpu", row((8192, 16383), block=16))
    ship("test-gpu", row(block=64))
    assert took(resolve(problem(), SHAPE, GPU)) == ("device table", 64, True)
    assert took(resolve(problem(), Shape(9000, 4), GPU)) == ("user cache", 16, True)


def test_nearest_counts_octaves_of_seqlen_before_batch_heads():
    ship("test-gpu", row((1024, 2047), (1, 7), block=16), row((8192, 16383), (64, 127), block=32), row((65536, 131071), (1, 7), block=64))
    assert resolve(problem(), Shape(4500, 4), GPU).config.BLOCK_M == 32
    assert resolve(problem(), Shape(2048, 4), GPU).config.BLOCK_M == 16
    assert resolve(problem(), Shape(1, 4), GPU).config.BLOCK_M == 16
    assert resolve(problem(), Shape(2**20, 1000), GPU).config.BLOCK_M == 64
    ship("test-gpu", row((1024, 2047), (1, 1), block=16), row((1024, 2047), (32, 63), block=64))
    assert resolve(problem(), Shape(1500, 2), GPU).config.BLOCK_M == 16
    assert resolve(problem(), Shape(1500, 16), GPU).config.BLOCK_M == 64


def test_newest_of_competing_user_entries_serves():
    table.save_user_row("test-gpu", row(block=16, date="2025-06-02"))
    table.save_user_row("test-gpu", row(block=32, date="2025-06-01"))
    assert resolve(problem(), SHAPE, GPU).config.BLOCK_M == 16


def test_other_keys_never_serve():
    ship("test-gpu", *(row(of=problem(**change)) for change in ({"dtype": "float16"}, {"window": 256}, {"group": 8})))
    assert resolve(problem(), SHAPE, GPU).source == "default"


def test_a_device_is_never_matched_by_part_of_its_name():
    ship("nvidia-h100", row())
    ship("nvidia-h100-pcie", row(block=16))
    found = resolve(problem(), SHAPE, from_name("NVIDIA H100 80GB HBM3"))
    assert took(found) == ("same arch", 16, False) and "of nvidia-h100-pcie" in found.reason
    ship("gpu", row())
    ship("test", row())
    assert "of nvidia-h100-pcie" in resolve(problem(), SHAPE, GPU).reason


def test_arch_as_target_borrows_from_its_devices():
    ship("nvidia-h200", row())
    assert took(resolve(problem(), SHAPE, from_name("sm_90"))) == ("same arch", 64, False)
    assert resolve(problem(), SHAPE, from_name("interpreter")).source == "default"


# --- what is passed over -------------------------------------------------------------------------------------------------------


def test_row_that_chains_its_launches_is_for_gpus_that_can(monkeypatch):
    """Programmatic dependent launch: sm_80 may borrow from larger GPUs, but does not assemble such a kernel."""
    monkeypatch.setitem(space.SPACES, KERNEL, Space((*FAKE.knobs, Knob("chain", (False, True))), FAKE.defaults, FAKE.safe))

    def chained(made: Row, chain: bool) -> Row:
        return replace(made, config=Config.of(KERNEL, made.config.as_dict() | {"chain": chain}))

    ship("test-gpu", chained(row(), True), chained(row((65536, 131071), block=16), False))
    assert resolve(problem(), SHAPE, GPU).config.chain
    found = resolve(problem(), SHAPE, replace(GPU, arch="sm_80"))
    assert found.config.BLOCK_M == 16 and "chains its launches, test-gpu does not" in found.reason


def test_row_that_needs_more_shared_memory_is_never_taken():
    ship("test-gpu", row(shared=100_001), row((65536, 131071), block=16, shared=100_000))
    found = resolve(problem(), SHAPE, GPU)
    assert took(found) == ("device table", 16, False)
    assert "needs 100001 bytes of shared memory, test-gpu has 100000" in found.reason
    ship("test-gpu", row(shared=100_001))
    ship("nvidia-h200", row(shared=200_000))
    assert resolve(problem(), SHAPE, GPU).source == "default"


def test_illegal_config_is_passed_over_with_one_warning(caplog):
    ship("test-gpu", row(block=64, warps=1), row((65536, 131071), block=16))
    with caplog.at_level(logging.WARNING, "nsa_gen"):
        for _ in range(3):
            assert took(resolve(problem(), SHAPE, GPU)) == ("device table", 16, False)
    assert len(caplog.records) == 1 and "64 rows on one warp" in caplog.text


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 200_000), st.sampled_from((16, 32, 64)), st.integers(1, 2**18)), max_size=4), st.integers(1, 2**18)
)
def test_whatever_the_table_a_config_fits_and_is_legal(rows, seqlen):
    ship("test-gpu", *(row((low, low), block=block, warps=1, shared=shared) for shared, block, low in rows))
    found = resolve(problem(), Shape(seqlen, 4), GPU)
    space.check(problem(), found.config)
    assert found.row is None or found.row.resources["shared"] <= GPU.shared_bytes
    assert found.exact == (found.row is not None and found.row.seqlen[0] == seqlen)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40), BLOCKS, st.booleans()), max_size=4))
def test_answer_is_constant_between_cuts(rows):
    spans = [row((low, low + more), (1, 3), block=block, of=problem(varlen=varlen)) for low, more, block, varlen in rows]
    ship("test-gpu", *Table("test-gpu", KERNEL, tuple(spans)).merge(Table("test-gpu", KERNEL))[0].rows)
    seqlens, heads = lookup.cuts(problem(), GPU)
    for low, high in itertools.pairwise(seqlens):
        if low > 90:
            break
        answers = {(f.config, f.source, f.exact, f.row) for s in range(low, high) for f in [resolve(problem(), Shape(s, 2), GPU)]}
        assert len(answers) == 1
    assert {1, 2, 4} <= set(heads)


# --- stale, strict, logged once ------------------------------------------------------------------------------------------------


def test_stale_row_still_serves_and_says_so():
    ship("test-gpu", row(digest="a" * 16))
    fresh = resolve(problem(), SHAPE, GPU, digest_of=lambda p, c: "a" * 16)
    stale = resolve(problem(), SHAPE, GPU, digest_of=lambda p, c: "b" * 16)
    assert (fresh.stale, stale.stale) == (False, True) and fresh.config == stale.config
    assert "stale" in stale.reason and "stale" not in fresh.reason
    assert resolve(problem(), SHAPE, GPU).stale is False


def test_strict_raises_below_exact_and_names_key_and_command(monkeypatch):
    monkeypatch.setenv("NSA_GEN_STRICT", "1")
    ship("test-gpu", row())
    assert resolve(problem(), SHAPE, GPU).exact
    for shape, key in ((Shape(60000, 4), problem()), (SHAPE, problem(varlen=True)), (SHAPE, problem(window=256))):
        with pytest.raises(NotTuned) as caught:
            resolve(key, shape, GPU)
        text = str(caught.value)
        assert f"window={key.window}" in text and f"seqlen {shape.seqlen}" in text and "test-gpu" in text
        assert f"nsa-gen tune SPEC --kernels {KERNEL}" in text and "\n" not in text
        with override(config(16)):
            assert resolve(key, shape, GPU).config == config(16)
    served = problem_of("decode_fwd", load("tiny"), which=cache_of(load("tiny"), FP8, 32, 4))
    with pytest.raises(NotTuned, match="--kernels decode_fwd --decode --kv-dtype float8_e4m3fn --page-size 32 --tokens 4, or"):
        resolve(served, SHAPE, GPU)
    monkeypatch.setenv("NSA_GEN_STRICT", "0")
    assert resolve(problem(window=256), SHAPE, GPU).source == "default"


def test_below_exact_is_logged_once(caplog):
    ship("test-gpu", row())
    with caplog.at_level(logging.INFO, "nsa_gen"):
        for seqlen in (5000, 6000, 60000, 60001, 60002):
            resolve(problem(), Shape(seqlen, 4), GPU)
            resolve(problem(window=256), Shape(seqlen, 4), GPU)
            resolve(problem(window=256), Shape(seqlen, 4), from_name("interpreter"))
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO", "INFO"]
    assert "default for sm_90" in caplog.records[0].message and "nearest row" in caplog.records[2].message


# --- overrides -----------------------------------------------------------------------------------------------------------------


def test_overrides_nest_and_end():
    lookup.set_override(config(16))
    with override(config(32)):
        with override(config(64), problem=problem()):
            assert resolve(problem(), SHAPE, GPU).config == config(64)
            assert resolve(problem(window=256), SHAPE, GPU).config == config(32)
        assert resolve(problem(), SHAPE, GPU).config == config(32)
    assert resolve(problem(), SHAPE, GPU).config == config(16)
    lookup.clear_override()
    assert resolve(problem(), SHAPE, GPU).source == "default"
    assert lookup.active_overrides() == ()


def test_override_ends_on_error_and_stays_in_its_thread():
    seen = []

    def look() -> None:
        seen.append(resolve(problem(), SHAPE, GPU).source)

    with pytest.raises(KeyError), override(config(64)):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
        raise KeyError
    look()
    assert seen == ["default", "override", "default"]


def test_illegal_override_is_an_error():
    with override(config(64, 1)), pytest.raises(ConfigError, match="64 rows on one warp"):
        resolve(problem(), SHAPE, GPU)
    with pytest.raises(ConfigError, match="a config of combine_fwd"), override(Config.of("combine_fwd", {}), problem=problem()):
        pass
