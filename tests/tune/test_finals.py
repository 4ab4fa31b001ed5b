from __future__ import annotations

import itertools

import machine
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_gen.tune import finals
from nsa_gen.tune.backend import Final
from nsa_gen.tune.finals import DEFAULT, TUNED, decide, merge, ranges
from nsa_gen.tune.records import Built, Failure, Point

DEFAULT_CONFIG = machine.config()
FAST, OTHER = machine.config(BLOCK_M=64), machine.config(BLOCK_M=128)
POINT = Point(4096)


def final(*samples):
    return Final(tuple(s if isinstance(s, Failure) else tuple(s) for s in samples), (1e-3,) * len(samples))


def around(ms, noise=0.001, rounds=15):
    return [ms * (1 + noise * ((5 * r) % 7 - 3)) for r in range(rounds)]


def test_a_clear_win_wins():
    decision = decide(POINT, [DEFAULT_CONFIG, FAST], final(around(1.0), around(0.8)))
    assert decision.verdict == TUNED and decision.winner.config == FAST
    assert decision.winner.speedup == pytest.approx(1.25, rel=0.01)
    assert 1 < decision.winner.low <= decision.winner.speedup <= decision.winner.high


@pytest.mark.parametrize("challenger", [around(1.0), around(0.99), around(1.2), [0.9 if r % 2 else 1.1 for r in range(15)]])
def test_less_than_two_percent_or_noise_does_not(challenger):
    decision = decide(POINT, [DEFAULT_CONFIG, FAST], final(around(1.0), challenger))
    assert decision.verdict == DEFAULT and decision.winner.config == DEFAULT_CONFIG
    assert decision.winner.speedup == decision.winner.low == decision.winner.high == 1.0
    assert decision.challenger.config == FAST


def test_the_incumbent_stays_unless_beaten():
    configs = [DEFAULT_CONFIG, OTHER, FAST]
    close = decide(POINT, configs, final(around(1.0), around(0.80), around(0.795)), incumbent=OTHER)
    assert close.winner.config == OTHER
    beaten = decide(POINT, configs, final(around(1.0), around(0.80), around(0.7)), incumbent=OTHER)
    assert beaten.winner.config == FAST
    slow = decide(POINT, configs, final(around(1.0), around(1.5), around(0.9)), incumbent=OTHER)
    assert slow.winner.config == FAST


def test_failures_take_no_part():
    lost = Failure("crash", "gone")
    decision = decide(POINT, [DEFAULT_CONFIG, FAST, OTHER], final(around(1.0), lost, around(0.9)))
    assert decision.winner.config == OTHER and decision.failures == ((FAST, lost),) and decision.of(FAST) is None
    assert decide(POINT, [DEFAULT_CONFIG, FAST], final(lost, around(1.0))) is None


def decisions(*winners):
    table = {DEFAULT_CONFIG: 1.0, FAST: 0.8, OTHER: 0.8}
    found = []
    for n, winner in enumerate(winners):
        times = table | {winner: 0.7}
        configs = [DEFAULT_CONFIG, FAST, OTHER]
        found.append(decide(Point(1024 << n), configs, final(*(around(times[c]) for c in configs))))
    return found


def test_equal_winners_merge_unequal_ones_do_not():
    made = decisions(FAST, FAST, OTHER, OTHER, FAST)
    groups = merge(made, lambda config, at: at.of(config).ms / at.winner.ms)
    assert [(g.config, len(g.decisions)) for g in groups] == [(FAST, 2), (OTHER, 2), (FAST, 1)]


def test_a_neighbour_within_two_percent_is_taken_in():
    first, second, third = decisions(FAST, OTHER, FAST)
    within = merge([first, second, third], lambda config, at: 1.01 if config != at.winner.config else 1.0)
    assert [(g.config, len(g.decisions)) for g in within] == [(FAST, 3)]
    asked = []

    def one_way(config, at):  # OTHER serves the first point, FAST does not serve the second
        asked.append((config, at.point))
        return 1.01 if config == OTHER else 1.5

    assert [(g.config, len(g.decisions)) for g in merge([first, second], one_way)] == [(OTHER, 2)]
    assert asked == [(FAST, second.point), (OTHER, first.point)]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8, unique=True).map(sorted))
def test_ranges_are_adjacent_and_hold_their_values(values):
    found = ranges(values)
    spans = [found[v] for v in values]
    assert all(low <= v <= high for v, (low, high) in zip(values, spans, strict=True))
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(spans))


def row(group):
    return finals.row(
        machine.PROBLEM,
        group,
        seqlens=ranges([1024, 2048, 4096]),
        batch_heads=(1, 2),
        built=Built("d1", 4096, 128, 0),
        environment=machine.ENVIRONMENT,
        date="2026-01-01T00:00:00+00:00",
        trials=9,
        failures={"hang": 1},
    )


def test_a_row_says_what_was_measured():
    made = decisions(FAST, FAST, OTHER)
    groups = merge(made, lambda config, at: at.of(config).ms / at.winner.ms)
    first, second = map(row, groups)
    assert first.config == FAST and second.config == OTHER
    assert first.seqlen == (724, 2896) and second.seqlen == (2897, 5793)
    assert first.perf["verdict"] == TUNED and first.perf["speedup"] == pytest.approx(1 / 0.7, rel=0.01)
    assert first.perf["median_ms"] == pytest.approx(0.7, rel=0.01) and first.perf["default_ms"] == pytest.approx(1.0, rel=0.01)
    assert [p["seqlen"] for p in first.extra["points"]] == [1024, 2048]
    assert first.extra["search"] == {"tried": 9, "failures": {"hang": 1}}
    assert first.correctness == {"max_rel_err": 0.001, "reference": "float64", "cases": 2}
    assert first.resources == {"shared": 4096, "registers": 128, "spills": 0}


def test_a_row_where_the_default_wins_names_the_best_other():
    decision = decide(Point(1024), [DEFAULT_CONFIG, FAST], final(around(1.0), around(0.99)))
    made = row(merge([decision], lambda config, at: 1.0)[0])
    assert made.config == DEFAULT_CONFIG and made.perf["verdict"] == DEFAULT and made.perf["speedup"] == 1.0
    assert made.extra["challenger"]["config"] == FAST.as_dict()
    assert made.extra["challenger"]["speedup"] == pytest.approx(1.01, abs=0.005)
