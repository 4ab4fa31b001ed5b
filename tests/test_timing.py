"""Statistics of timings everywhere; timing itself where there is a GPU, or against a simulated one."""

from __future__ import annotations

import random
import statistics
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_gen import timing
from nsa_gen.errors import InputError, TargetError

TIMES = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40)


@given(TIMES, st.floats(0, 1))
def test_quantile_is_torchs(samples, q):
    expected = float(torch.tensor(samples, dtype=torch.float64).quantile(q))
    assert timing.quantile(samples, q) == pytest.approx(expected, rel=1e-9)


@given(TIMES)
def test_summary(samples):
    found = timing.Timing.of(samples, graph=True)
    assert found.samples == tuple(samples) and found.graph and not found.stopped
    assert min(samples) <= found.p20 <= found.median_ms <= found.p80 <= max(samples)
    assert found.median_ms == statistics.median(samples)


def test_summary_of_nothing():
    with pytest.raises(InputError, match="at least one sample"):
        timing.Timing.of([])


def drifting(speedup: float, noise: float, rounds: int = 40, seed: int = 0):
    """Pairs that share a large drift: clocks fall by a third over the rounds."""
    draw = random.Random(seed)
    drift = [1 + r / (2 * rounds) for r in range(rounds)]
    base = [3.0 * d * (1 + draw.gauss(0, noise)) for d in drift]
    return base, [3.0 / speedup * d * (1 + draw.gauss(0, noise)) for d in drift]


def test_speedup_is_found_under_shared_drift():
    estimate, low, high = timing.speedup_interval(*drifting(1.05, 0.01))
    assert low < 1.05 < high and low <= estimate <= high
    assert low > 1.03 and high < 1.07  # unpaired, the drift alone would spread 1.0 to 1.5


def test_no_speedup_is_not_found():
    inside = sum(low <= 1 <= high for _, low, high in (timing.speedup_interval(*drifting(1.0, 0.02, seed=s)) for s in range(60)))
    assert inside >= 52  # of 60 at 95 %: 57 expected


def test_interval_is_deterministic_and_nested():
    pairs = drifting(1.1, 0.05, rounds=12)
    assert timing.speedup_interval(*pairs) == timing.speedup_interval(*pairs)
    (e50, low50, high50), (e99, low99, high99) = (timing.speedup_interval(*pairs, confidence=c) for c in (0.5, 0.99))
    assert e50 == e99 and low99 <= low50 <= high50 <= high99
    assert timing.speedup_interval([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0, 2.0)


@given(TIMES)
def test_interval_of_equal_timings_is_one(samples):
    assert timing.speedup_interval(samples, samples) == (1.0, 1.0, 1.0)


def test_an_outlier_does_not_move_the_estimate():
    base, candidate = drifting(1.2, 0.005)
    base[3] *= 100
    estimate, low, high = timing.speedup_interval(base, candidate)
    assert 1.19 < low <= estimate <= high < 1.21


@pytest.mark.parametrize(
    ("baseline", "candidate", "options"),
    [([1.0], [1.0], {}), ([1.0, 2.0], [1.0], {}), ([1.0, 0.0], [1.0, 1.0], {}), ([1.0, 2.0], [1.0, float("nan")], {}),
     ([1.0, 2.0], [1.0, 2.0], {"confidence": 95})],
)  # fmt: skip
def test_bad_pairs(baseline, candidate, options):
    with pytest.raises(InputError):
        timing.speedup_interval(baseline, candidate, **options)


def test_rotations_are_fair():
    orders = timing.rotations(4, 16)
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    for f in range(4):
        assert sorted(order.index(f) for order in orders) == sorted(list(range(4)) * 4)
    assert timing.rotations(0, 3) == [[], [], []] and timing.rotations(1, 2) == [[0], [0]]


def test_unrolled():
    assert timing.unrolled(30.0) == 1 and timing.unrolled(0.1) == 5 and timing.unrolled(0.001) == timing.unrolled(0.0) == 50


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu():
    with pytest.raises(TargetError, match="needs a GPU"):
        timing.measure(lambda: None)
    with pytest.raises(TargetError, match="needs a GPU"):
        timing.interleaved([lambda: None], 3)
    with pytest.raises(TargetError, match="needs a GPU"):
        timing.streamed(lambda: None)


class Device:
    """A device with a clock of its own; functions are advances of the clock."""

    def __init__(self, monkeypatch, capturable=True):
        self.now, self.log = 0.0, []
        device = self

        class Timer:
            def __init__(self, fn, cold_l2, *rest):
                self.fn, self.graph, self.calls = fn, bool(rest), timing.unrolled(rest[0]) if rest else 1

            def sample(self):
                return device.between(self.fn)

        monkeypatch.setattr(timing, "_warm_up", lambda fn: (fn(), self.between(fn))[1])
        monkeypatch.setattr(timing, "_between", self.between)
        monkeypatch.setattr(timing, "_Eager", Timer)
        monkeypatch.setattr(timing, "_timer", lambda fn, cold, graph, ms: Timer(fn, cold, ms) if graph and capturable else Timer(fn, cold))

    def between(self, fn):
        start = self.now
        fn()
        return self.now - start

    def work(self, ms, name=""):
        def run():
            self.now += ms
            self.log.append(name)

        return run


def test_measure_stops_when_it_knows_enough(monkeypatch):
    device = Device(monkeypatch)
    assert len(timing.measure(device.work(30.0)).samples) == 5
    found = timing.measure(device.work(2.0))
    assert len(found.samples) == 25 and found.graph and not found.stopped and found.median_ms == pytest.approx(2.0)
    assert len(timing.measure(device.work(0.001), max_reps=40).samples) == 40  # 40 x 50 calls are 2 ms
    assert len(timing.measure(device.work(2.0), min_ms=20).samples) == 10
    assert not timing.measure(device.work(1.0), graph=False).graph


def test_measure_gives_up_on_losers(monkeypatch):
    device = Device(monkeypatch)
    found = timing.measure(device.work(3.0), early_stop_ms=2.0)
    assert found.stopped and len(found.samples) == 3
    found = timing.measure(device.work(50.0), early_stop_ms=2.0)
    assert found.stopped and found.samples == (pytest.approx(50.0),)
    assert not timing.measure(device.work(1.9), early_stop_ms=2.0).stopped


def test_a_stream_of_calls_is_timed_as_one(monkeypatch):
    device = Device(monkeypatch)
    found = timing.streamed(device.work(2.0, "a"), calls=4, samples=3)
    assert found.samples == (2.0, 2.0, 2.0) and not found.graph
    assert len(device.log) == 2 + 4 * 3  # warm-up, then samples


@pytest.mark.parametrize("capturable", [True, False])
def test_interleaved_pairs_rounds(monkeypatch, capturable):
    device = Device(monkeypatch, capturable)
    fns = [device.work(1.0, "a"), device.work(2.0, "b"), device.work(3.0, "c")]
    samples = timing.interleaved(fns, 6)
    assert [len(s) for s in samples] == [6, 6, 6]
    assert [round(statistics.median(s), 6) for s in samples] == [1.0, 2.0, 3.0]
    rounds = device.log[6:]
    assert ["".join(rounds[i : i + 3]) for i in range(0, 18, 3)] == ["abc", "cba", "bca", "acb", "cab", "bac"]


# --- on a GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_copy_is_timed_at_memory_speed():
    x = torch.zeros(2**28, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    cold, eager = (timing.measure(lambda: y.copy_(x), graph=graph) for graph in (True, False))
    assert cold.graph and not eager.graph
    assert 0.8 < cold.median_ms / eager.median_ms < 1.2
    assert 2**29 / cold.median_ms * 1e3 < 20e12  # bytes a second: no device moves 20 TB/s


@pytest.mark.gpu
def test_a_graph_times_short_calls_without_launches():
    x = torch.zeros(1024, device="cuda")

    def many():
        for _ in range(10):
            x.add_(1)

    cold = timing.measure(many, max_reps=20)
    assert cold.graph and 0.005 < cold.median_ms < 0.1
    one = timing.measure(lambda: x.add_(1), max_reps=20)
    assert 4 < cold.median_ms / one.median_ms < 20


@pytest.mark.gpu
def test_a_stream_of_calls_takes_host_time_where_that_is_longer():
    x = torch.zeros(1024, device="cuda")
    short, slow = (timing.streamed(work, calls=20).median_ms for work in (lambda: x.add_(1), lambda: (x.add_(1), time.sleep(0.002))))
    assert short < 0.2 and 2 < slow < 10
    y = torch.zeros(2**28, device="cuda")
    assert 0.5 < timing.streamed(lambda: y.add_(1), calls=5).median_ms / timing.measure(lambda: y.add_(1)).median_ms < 1.5


@pytest.mark.gpu
def test_cold_is_slower_than_warm():
    x = torch.zeros(2**22, device="cuda")  # 16 MiB: fits L2
    y = torch.empty_like(x)
    warm, cold = (timing.measure(lambda: torch.add(x, 1, out=y), cold_l2=c, max_reps=30).median_ms for c in (False, True))
    assert cold > 1.1 * warm


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_eagerly():
    x = torch.zeros(1024, device="cuda")
    stream = torch.cuda.current_stream()
    found = timing.measure(lambda: x.sum().item(), max_reps=5)
    assert not found.graph and found.median_ms > 0
    assert torch.cuda.current_stream() == stream
    assert timing.measure(lambda: x.add_(1), max_reps=5).graph  # and the device still captures
    samples = timing.interleaved([lambda: x.add_(1), lambda: x.sum().item()], 4)
    assert all(len(s) == 4 and min(s) > 0 for s in samples)
