"""Whole runs on a machine that does not exist: in this process, and with real worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import machine
import pytest
from machine import Machine, config

from nsa_gen import config as configs
from nsa_gen import lookup, space, spec, table, tables
from nsa_gen.config import FP8, SERVING, Shape
from nsa_gen.device import from_name
from nsa_gen.errors import ConfigError, InputError, TableError, TargetError, TuneError
from nsa_gen.geometry import TuneShape
from nsa_gen.table import Table
from nsa_gen.tune import drive, plans, run
from nsa_gen.tune.drive import _same
from nsa_gen.tune.log import TrialLog
from nsa_gen.tune.plan import DECODE_SHAPES
from nsa_gen.tune.records import Failure, Measured, Point, Trial
from nsa_gen.tune.replay import ReplayBackend

SPEC = "gqa16-d128"
SEQLENS = [512, 1024, 2048, 4096, 16384, 65536]
EVERYTHING = 27  # configs in the machine's space


def tune(folder, backend=None, **options):
    options = {"kernels": [machine.KERNEL], "seqlens": SEQLENS, "trials": 2 * EVERYTHING, "rounds": 7, "progress": False} | options
    given = {"make": lambda *_: backend, "inline": True} if backend is not None else {}
    return run(SPEC, out=folder / "out", log=folder / "log", **given, **options)


def trials(folder):
    return [Trial.from_record(r) for r in TrialLog(folder / "log").read().records if r["event"] == "trial"]


def saved(folder):
    return Table.load(folder / "out" / "nvidia-h200" / f"{machine.KERNEL}.json")


def best_at(seqlen):
    return min(space.candidates(machine.PROBLEM), key=lambda c: machine.milliseconds(c, Point(seqlen, 1, 4)))


def same_rows(a, b):
    return [replace(r, date="2026-01-01", extra={}) for r in a] == [replace(r, date="2026-01-01", extra={}) for r in b]


def test_each_length_gets_its_winner_and_neighbours_share_rows(tmp_path):
    summary = tune(tmp_path, Machine())
    assert summary.complete and not summary.failures
    (result,) = summary.results
    assert [d.point.seqlen for d in result.decisions] == SEQLENS
    for decision in result.decisions:
        best = machine.milliseconds(best_at(decision.point.seqlen), decision.point)
        assert machine.milliseconds(decision.winner.config, decision.point) <= 1.02 * best
        assert decision.verdict == "tuned wins" and decision.winner.low > 1
    rows = saved(tmp_path)
    assert rows.rows == tuple(summary.rows) and len(rows.rows) == 2  # flat for the short ones, split for the long
    assert [r.config.loop for r in rows.rows] == ["flat", "split"]
    assert rows.rows[0].seqlen[1] + 1 == rows.rows[1].seqlen[0]
    assert rows.rows[0].seqlen[0] <= 512 and rows.rows[1].seqlen[1] >= 65536
    assert all(r.batch_heads[0] <= 4 <= r.batch_heads[1] for r in rows.rows)
    assert rows.lint(digest_of=Machine().digest, shared_bytes=machine.DEVICE.shared_bytes) == []
    text = summary.to_markdown()
    assert all(f"| {n} " in text for n in SEQLENS) and "tuned wins" in text and "none failed" in text
    assert summary.to_dict()["results"][0]["shapes"][0]["verdict"] == "tuned wins"


def test_a_row_serves_only_where_it_is_within_two_percent(tmp_path):
    summary = tune(tmp_path, Machine())
    for row in summary.rows:
        for n in SEQLENS:
            if row.seqlen[0] <= n <= row.seqlen[1]:
                here = Point(n, 1, 4)
                assert machine.milliseconds(row.config, here) <= 1.025 * machine.milliseconds(best_at(n), here)


def test_default_wins_is_recorded(tmp_path):
    summary = tune(tmp_path, Machine(model=lambda config, point: 1.0 if config == machine.config() else 0.99), seqlens=[4096])
    (row,) = summary.rows
    assert row.perf["verdict"] == "default wins" and row.config == config() and "challenger" in row.extra
    assert saved(tmp_path).lint(shared_bytes=machine.DEVICE.shared_bytes) == []


FAULTS = {
    config(BLOCK_M=64): "wrong",
    config(BLOCK_M=128): "illegal_access",
    config(BLOCK_M=64, num_stages=2): "memory",
    config(BLOCK_M=128, num_stages=2): "compile",
    config(BLOCK_M=64, num_stages=3): "shared",
    config(BLOCK_M=128, num_stages=3): "spills",
}
KINDS = {"wrong": 1, "illegal_access": 1, "memory": 1, "compile": 1, "shared_memory": 1, "spills": 1}


def test_failed_candidates_cost_one_trial_each_and_are_told_by_kind(tmp_path):
    backend = Machine(faults=FAULTS)
    summary = tune(tmp_path, backend, seqlens=[4096])
    assert summary.failures == KINDS and summary.results[0].tried == EVERYTHING
    found = trials(tmp_path)
    assert len(found) == len({t.config for t in found}) == EVERYTHING
    assert {t.config: t.outcome.kind for t in found if isinstance(t.outcome, Failure)} == {
        c: "shared_memory" if kind == "shared" else kind for c, kind in FAULTS.items()
    }
    evaluated = {call[1] for call in backend.calls if call[0] == "evaluate"}
    assert not evaluated & {c for c, kind in FAULTS.items() if kind in ("compile", "shared", "spills")}
    assert summary.rows[0].config not in FAULTS
    assert "6 failed" in summary.to_markdown()


def test_without_a_default_the_safe_config_is_the_baseline(tmp_path):
    safe = space.safe(machine.PROBLEM)
    summary = tune(tmp_path, Machine(faults={config(): "wrong"}), seqlens=[4096])
    (decision,) = summary.results[0].decisions
    assert decision.baseline.config == safe and decision.verdict == "tuned wins"
    neither = tune(tmp_path, Machine(faults={config(): "wrong", safe: "shared"}, version="2"), seqlens=[4096])
    assert not neither.complete and not neither.rows
    assert list(neither.results[0].missing) == [Point(4096, 1, 4)] and "not decided" in neither.to_markdown()


def test_a_contender_that_dies_in_the_final_costs_only_itself(tmp_path):
    winner = best_at(4096)

    class Late(Machine):
        def final(self, problem, configs, point, rounds):
            return Failure("crash", "died") if winner in configs else super().final(problem, configs, point, rounds)

    summary = tune(tmp_path, Late(), seqlens=[4096])
    (decision,) = summary.results[0].decisions
    assert decision.winner.config == config() and decision.verdict == "default wins"


def test_resume_measures_nothing_twice(tmp_path):
    first = tune(tmp_path, Machine())
    again = Machine()
    second = tune(tmp_path, again, resume=True)
    assert again.calls == [] and second.complete
    assert same_rows(first.rows, second.rows)


@pytest.mark.parametrize("change", ["source", "versions"])
def test_resume_does_not_trust_other_sources_or_versions(tmp_path, change):
    tune(tmp_path, Machine(), seqlens=[4096])
    again = Machine(version="2" if change == "source" else "1")
    if change == "versions":
        again.identify = lambda: replace(Machine().identify(), environment=machine.ENVIRONMENT | {"triton": "9"})
    tune(tmp_path, again, seqlens=[4096], resume=True)
    assert sum(call[0] == "evaluate" for call in again.calls) >= EVERYTHING


def test_without_resume_a_run_starts_anew(tmp_path):
    tune(tmp_path, Machine(), seqlens=[4096])
    again = Machine()
    tune(tmp_path, again, seqlens=[4096])
    assert sum(call[0] == "evaluate" for call in again.calls) == EVERYTHING
    assert sum(r["event"] == "run" for r in TrialLog(tmp_path / "log").read().records) == 2


def test_a_log_cut_at_any_byte_keeps_every_whole_trial(tmp_path):
    tune(tmp_path, Machine(), seqlens=[4096], trials=4, rounds=3)
    data = (tmp_path / "log").read_bytes()
    whole = _same(TrialLog(tmp_path / "log").read().records, machine.DEVICE, machine.ENVIRONMENT)
    lines = [i for i, byte in enumerate(data) if byte == ord("\n")]  # the byte after which a line needs nothing more
    cut_log = TrialLog(tmp_path / "cut")
    for cut in range(len(data) + 1):
        cut_log.path.write_bytes(data[:cut])
        kept = _same(cut_log.read().records, machine.DEVICE, machine.ENVIRONMENT)
        assert kept == whole[: max(0, min(sum(cut >= end for end in lines) - 1, len(whole)))], cut


@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_a_run_killed_anywhere_is_taken_up(tmp_path, share):
    whole = tune(tmp_path, Machine(), seqlens=[1024, 65536])
    done = trials(tmp_path)
    data = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(data[: int(share * len(data))])
    kept = {(t.point, t.config) for t in trials(tmp_path)}
    again = Machine()
    resumed = tune(tmp_path, again, seqlens=[1024, 65536], resume=True)
    measured = [(call[2], call[1]) for call in again.calls if call[0] == "evaluate"]
    assert len(measured) == len(set(measured)) == len({(t.point, t.config) for t in done} - kept)
    assert not kept & set(measured)
    assert same_rows(whole.rows, resumed.rows)


class Interrupting(Machine):
    """Sends this process a signal at its n-th evaluation."""

    def __init__(self, after, number=signal.SIGINT, **options):
        super().__init__(**options)
        self.after, self.number = after, number

    def evaluate(self, problem, config, point, best_ms):
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), self.number)
        return super().evaluate(problem, config, point, best_ms)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_finished(tmp_path, number):
    before = signal.getsignal(number)
    stopped = tune(tmp_path, Interrupting(EVERYTHING + 5, number), seqlens=[1024, 65536])
    assert not stopped.complete and "--resume" in stopped.to_markdown()
    assert signal.getsignal(number) is before
    assert set(stopped.results[0].missing) == {Point(1024, 1, 4), Point(65536, 1, 4)}
    again = Machine()
    resumed = tune(tmp_path, again, seqlens=[1024, 65536], resume=True)
    assert resumed.complete
    assert EVERYTHING - 5 <= sum(call[0] == "evaluate" for call in again.calls) <= EVERYTHING - 3


def test_a_signal_in_the_finals_writes_the_rows_decided_by_then(tmp_path):
    class Late(Machine):
        def final(self, problem, configs, point, rounds):
            if point.seqlen == 65536:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().final(problem, configs, point, rounds)

    stopped = tune(tmp_path, Late(), seqlens=[1024, 65536])
    assert not stopped.complete and next(d.point.seqlen for d in stopped.results[0].decisions) == 1024
    assert saved(tmp_path).rows[0].holds(Point(1024, 1, 4).shape)


def test_a_budget_ends_a_run_cleanly(tmp_path):
    began = time.monotonic()
    summary = tune(tmp_path, Machine(slow_s=0.05), seqlens=[1024, 65536], budget_s=1.5)
    assert time.monotonic() - began < 30
    assert summary.results[0].tried < 2 * EVERYTHING
    if summary.complete:
        assert summary.rows
    tuned = tune(tmp_path, Machine(), seqlens=[1024, 65536], resume=True)
    assert tuned.complete


def test_the_incumbent_is_tried_and_stays_where_nothing_is_better(tmp_path):
    first = tune(tmp_path, Machine(), seqlens=[4096])
    again = Machine(model=lambda c, p: machine.milliseconds(c, p) * (1.0 if c == first.rows[0].config else 1.001))
    second = tune(tmp_path, again, seqlens=[4096], trials=2)
    assert {call[1] for call in again.calls if call[0] == "evaluate"} == {config(), first.rows[0].config}
    assert second.rows[0].config == first.rows[0].config
    assert len(saved(tmp_path).rows) == 1


def test_what_another_device_of_the_arch_uses_is_tried(tmp_path, monkeypatch):
    first = tune(tmp_path, Machine(), seqlens=[4096])
    (row,) = first.rows
    other = replace(row, config=next(c for c in space.candidates(machine.PROBLEM) if c not in (config(), row.config)))
    monkeypatch.setattr(drive, "_elsewhere", lambda device, kernel: [other, replace(other, seqlen=(1, 2), config=row.config)])
    again = Machine()
    (tmp_path / "b").mkdir()
    tune(tmp_path / "b", again, seqlens=[4096], trials=2)
    assert {call[1] for call in again.calls if call[0] == "evaluate"} == {config(), other.config}


def test_replayed_results_give_the_same_rows(tmp_path):
    (tmp_path / "a").mkdir()
    recorded = tune(tmp_path / "a", Machine(faults=FAULTS), seqlens=[1024, 65536])
    replay = ReplayBackend(tmp_path / "a" / "log", machine.DEVICE, machine.ENVIRONMENT)
    again = tune(tmp_path, replay, seqlens=[1024, 65536])
    assert [(r.config, r.seqlen, r.perf["verdict"]) for r in again.rows] == [(r.config, r.seqlen, r.perf["verdict"]) for r in recorded.rows]
    assert again.failures == recorded.failures
    missing = replay.evaluate(machine.PROBLEM, config(), Point(7), None)
    assert isinstance(missing, Failure) and missing.message == "not recorded"


def test_without_out_rows_go_to_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_GEN_CACHE", str(tmp_path / "cache"))
    summary = run(
        SPEC, kernels=[machine.KERNEL], seqlens=[4096], trials=9, progress=False, make=lambda *_: Machine(), inline=True, rounds=5
    )
    assert [row for t in table.user_tables("nvidia-h200", machine.KERNEL) for row in t.rows] == summary.rows
    assert (tmp_path / "cache" / "tune" / "nvidia-h200" / "trials.jsonl").exists()


def test_progress_lines_name_trials_best_and_failures(tmp_path, capsys):
    tune(tmp_path, Machine(faults=FAULTS), seqlens=[4096], progress=True)
    text = capsys.readouterr().err
    assert f"{EVERYTHING}/{EVERYTHING} best" in text and "x default" in text and "1 illegal_access" in text


def test_bad_calls_are_told(tmp_path):
    with pytest.raises(ConfigError, match="unknown kernel"):
        tune(tmp_path, Machine(), kernels=["nonsense"])
    with pytest.raises(InputError, match="at least one spec"):
        run([], make=lambda *_: Machine(), inline=True, progress=False)
    with pytest.raises(TargetError, match="measures on the GPU that is here"):
        tune(tmp_path, Machine(), device=replace(machine.DEVICE, slug="other"))
    path = tmp_path / "out" / "nvidia-h200" / f"{machine.KERNEL}.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    backend = Machine()
    with pytest.raises(TableError, match="torn or edited"):
        tune(tmp_path, backend)
    assert backend.calls == []


def test_specs_of_equal_geometry_are_tuned_once():
    one = spec.load(SPEC)
    both = plans([one, one.replace(name="again")], shapes=None)
    assert [p.problem for p in both] == [p.problem for p in plans([one])]
    (sliding,) = plans([one], kernels=[machine.KERNEL])
    assert len(sliding.anchors) == 2 and set(sliding.anchors) < set(sliding.points)
    (combine,) = plans([one], kernels=["combine_fwd"])
    assert {p.heads_query for p in combine.points} == {one.heads.query}


# --- kernels that serve from a cache --------------------------------------------------------------------------------------------


def many(c):
    return c.as_dict().get("PROGRAMS", 64) >= 512


def decode_milliseconds(c, point):
    """Many pieces for one sequence, few for many."""
    return (1 if many(c) == (point.batch == 1) else 2) * point.seqlen * point.batch / 2**20


def test_decode_rows_are_found_by_the_lookup(tmp_path, monkeypatch):
    options = {"decode": True, "kv_dtype": FP8, "tokens": 2, "kernels": None, "seqlens": None, "trials": 80}
    summary = tune(tmp_path, Machine(model=decode_milliseconds), **options)
    assert summary.complete and {r.problem.kernel for r in summary.results} == set(SERVING)
    assert [(d.point.batch, d.point.seqlen) for d in summary.results[0].decisions] == sorted((s.batch, s.seqlen) for s in DECODE_SHAPES)
    monkeypatch.setenv("NSA_GEN_TUNED", str(tmp_path / "out"))
    monkeypatch.setenv("NSA_GEN_CACHE", str(tmp_path / "cache"))
    made = spec.load(SPEC)
    for problem in configs.problems(made, cached=configs.cache_of(made, FP8, tokens=2)):
        for shape in DECODE_SHAPES:
            found = lookup.resolve(problem, Shape(shape.seqlen, shape.batch * made.heads.kv), machine.DEVICE)
            assert found.exact and found.source == "device table" and found.row in summary.rows, found.reason
            if problem.kernel != "cache_append":
                assert many(found.config) == (shape.batch == 1)
        # lengths between those of a batch are one of its rows' too
        assert lookup.resolve(problem, Shape(20_000, made.heads.kv), machine.DEVICE).exact
        other = configs.problem(problem.kernel, made)
        assert lookup.resolve(other, Shape(65536, 4), machine.DEVICE).source == "default", "another storage: another key"
    found = tables.load(tmp_path / "out")
    assert [t.kernel for t in found] == sorted(SERVING)
    assert all(t.lint(digest_of=Machine().digest, shared_bytes=machine.DEVICE.shared_bytes) == [] for t in found)
    shown = [cells for t in found for cells in tables.rows(t)[1]]
    assert len(shown) == len(summary.rows) and all("storage=float8_e4m3fn" in cells[0] for cells in shown)
    text = tables.markdown(found)
    assert all(f"### {kernel}" in text for kernel in SERVING) and "page_size=64 tokens=2" in text
    assert len(tables.gains(found)) == len(shown)
    pytest.importorskip("matplotlib")
    tables.plot(found, tmp_path / "gains.svg")
    assert "<svg" in (tmp_path / "gains.svg").read_text()


def test_decode_rows_and_those_of_other_caches_stand_side_by_side(tmp_path):
    shapes = [TuneShape(batch=32, seqlen=8192)]
    chosen = {"decode": True, "kernels": ["decode_fwd"], "seqlens": None, "shapes": shapes, "trials": 6}
    for cache in ({}, {"kv_dtype": FP8}, {"tokens": 4}, {"page_size": 128}):
        summary = tune(tmp_path, Machine(model=decode_milliseconds), **chosen, **cache)
        assert [(d.point.batch, d.point.seqlen) for d in summary.results[0].decisions] == [(32, 8192)]
    rows = Table.load(tmp_path / "out" / "nvidia-h200" / "decode_fwd.json").rows
    keys = {(r.problem.storage, r.problem.page_size, r.problem.tokens) for r in rows}
    assert keys == {("bfloat16", 64, 1), (FP8, 64, 1), ("bfloat16", 64, 4), ("bfloat16", 128, 1)}
    assert all(r.batch_heads[0] <= 128 <= r.batch_heads[1] for r in rows)


def test_points_of_decoding():
    one, many = spec.load(SPEC), spec.load("mha-d128")
    found = {p.problem.kernel: p for p in plans([one], decode=True)}
    assert list(found) == list(SERVING)
    for plan in found.values():
        assert {(p.batch, p.seqlen) for p in plan.points} == {(s.batch, s.seqlen) for s in DECODE_SHAPES}
        assert [p.batch for p in plan.anchors] == [1, 32]  # latency, and bandwidth
    fewer = plans([many], decode=True)[0].points
    assert {(p.batch, p.seqlen // 1024) for p in fewer} == {(1, 8), (1, 64), (32, 8), (64, 8)}, "a case of more does not fit a GPU"
    given = plans([many], decode=True, shapes=[TuneShape(batch=32, seqlen=65536)])
    assert [p.shape for p in given[0].points] == [Shape(65536, 32 * 32)]
    paper, coarse = spec.load("nsa-paper"), one.replace(selection={"block": 128})
    (append,) = plans([paper], kernels=["cache_append"], decode=True, kv_dtype=FP8, page_size=256, tokens=8)
    assert (append.problem.storage, append.problem.page_size, append.problem.tokens, append.problem.branches) == (FP8, 256, 8, 3)
    assert {p.problem.page_size for p in plans([coarse], decode=True)} == {128}
    assert {p.problem for p in plans([one, one.replace(name="again")], decode=True)} == {p.problem for p in found.values()}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"decode": True, "kernels": ["sliding_attention_fwd"]}, ConfigError, "allowed: decode_fwd.*without decode also"),
        ({"kernels": ["decode_fwd"]}, ConfigError, "with decode also: .*decode_fwd"),
        ({"decode": True, "kernels": None, "kv_dtype": "int8"}, ConfigError, "got 'int8', allowed: bfloat16, float8_e4m3fn"),
        ({"decode": True, "kernels": None, "page_size": 96}, ConfigError, "got 96, allowed: multiples of the selection block, 64"),
        ({"decode": True, "kernels": None, "tokens": 0}, ConfigError, "got 0, allowed: 1 to 8"),
        ({"kv_dtype": FP8, "tokens": 1}, InputError, "kv_dtype, tokens: only with decode"),
        ({"decode": True, "varlen": True}, InputError, "without varlen"),
    ],
)
def test_bad_calls_about_caches_are_told(tmp_path, options, error, said):
    backend = Machine()
    with pytest.raises(error, match=said):
        tune(tmp_path, backend, **options)
    assert backend.calls == []


def test_a_gpu_without_fp8_is_told_at_once(tmp_path):
    backend = Machine()
    backend.identify = lambda: replace(Machine().identify(), device=from_name("nvidia-a100-80gb"))
    with pytest.raises(TargetError, match=r"sm_80.* has no float8_e4m3fn"):
        tune(tmp_path, backend, decode=True, kernels=None, kv_dtype=FP8)
    assert backend.calls == []


# --- with processes ------------------------------------------------------------------------------------------------------------

PROCESS_FAULTS = FAULTS | {
    config(loop="split", BLOCK_M=64, CHUNK=256): "hang",
    config(loop="split", BLOCK_M=64, CHUNK=512): "crash",
    config(loop="split", BLOCK_M=64, CHUNK=1024): "killed",
    config(loop="split", BLOCK_M=128, CHUNK=256): "compiler crash",
    config(loop="split", BLOCK_M=128, CHUNK=512): "raise",
}


def test_processes_survive_hangs_crashes_and_faults(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    options = {"seqlens": [4096], "workers": 2, "deadline_s": 2.0, "rounds": 7}
    summary = tune(tmp_path / "a", make=partial(Machine, faults=PROCESS_FAULTS), **options)
    assert summary.complete and summary.results[0].tried == EVERYTHING
    assert summary.failures == KINDS | {"hang": 1, "crash": 3, "error": 1}
    messages = {t.config: t.outcome.message for t in trials(tmp_path / "a") if isinstance(t.outcome, Failure)}
    assert "exit status 7" in messages[config(loop="split", BLOCK_M=64, CHUNK=512)]
    assert "SIGKILL" in messages[config(loop="split", BLOCK_M=64, CHUNK=1024)]
    assert "SIGSEGV" in messages[config(loop="split", BLOCK_M=128, CHUNK=256)]
    assert messages[config(loop="split", BLOCK_M=128, CHUNK=512)] == "RuntimeError: something odd with a second line"
    timed = [t for t in trials(tmp_path / "a") if isinstance(t.outcome, Measured)]
    assert summary.rows[0].config == min(timed, key=lambda t: t.ms).config


def test_a_worker_that_cannot_start_is_an_error(tmp_path):
    with pytest.raises(TuneError, match="cannot measure here"):
        tune(tmp_path, make=partial(Machine, nonsense=1))


def test_a_coordinator_killed_outright_is_taken_up(tmp_path):
    script = tmp_path / "go.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\n"
        "import machine\nfrom functools import partial\nfrom pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    from nsa_gen import space\n    from test_run import tune\n"
        "    space.SPACES[machine.KERNEL] = machine.SPACE\n"
        "    tune(Path(sys.argv[1]), make=partial(machine.Machine, slow_s=0.2), seqlens=[4096], workers=1)\n"
    )
    process = subprocess.Popen([sys.executable, script, tmp_path])
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and len(trials(tmp_path)) < 3:
        time.sleep(0.05)
    process.kill()
    process.wait(10)
    kept = len(trials(tmp_path))
    assert 3 <= kept < EVERYTHING
    again = Machine()
    assert tune(tmp_path, again, seqlens=[4096], resume=True).complete
    assert sum(call[0] == "evaluate" for call in again.calls) == EVERYTHING - kept
