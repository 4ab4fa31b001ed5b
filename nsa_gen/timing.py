"""How a kernel is timed: warm-up, cold L2, CUDA graph, median and spread; and how two timings are compared.

**Method.** What is wanted is device time of one call as it runs inside a busy stream: without host launch cost (which a user hides, or
removes by a graph) and with the inputs outside L2 (in a model, other layers run between two calls).

* *Graph* (the default): one graph holds ``n`` repetitions of "overwrite the L2 cache, call", a second one ``n`` overwrites alone. A
  sample is ``(first - second) / n``, each replayed once between two events. A replay's own 5-7 µs and the overwrites cancel in the
  difference; unrolling divides what does not. Events inside the graph would be simpler, but recording one costs microseconds of device
  time, and nothing cancels those.
* *Eager* (``graph=False``, or where the call cannot be captured): overwrite, event, call, event. The overwrite keeps the device busy while
  the host enqueues the call, so that its first launch is hidden; calls of many small kernels still show their launch gaps.
* *Streamed*: many calls between two events, as fast as the host can launch them.

The overwritten buffer is twice the L2 cache, so that lines of either half of a split cache are displaced. Importing this needs no GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .errors import InputError, TargetError

_UNROLLED_MS = 0.5  # device time of the calls in one replay: about a hundred times what the difference of two replays is off
_MOST_UNROLLED = 50
_LAUNCH_MS = 0.3  # host time an eager call may add to its device time


@dataclass(frozen=True)
class Timing:
    """Device time of one call.

    Args:
        median_ms, p20, p80: of the samples, milliseconds.
        samples: milliseconds a call; under a graph each is a mean over the unrolled calls.
        graph: whether a CUDA graph was timed (False: eager, asked for or because capture failed).
        stopped: whether measuring ended early because the call is slower than ``early_stop_ms``.
    """

    median_ms: float
    p20: float
    p80: float
    samples: tuple[float, ...]
    graph: bool = False
    stopped: bool = False

    @classmethod
    def of(cls, samples: Sequence[float], *, graph: bool = False, stopped: bool = False) -> Timing:
        """Summary of at least one sample. Raises InputError without samples."""
        if not samples:
            raise InputError("a timing needs at least one sample")
        low, high = quantile(samples, 0.2), quantile(samples, 0.8)
        return cls(statistics.median(samples), low, high, tuple(samples), graph, stopped)


def quantile(samples: Sequence[float], q: float) -> float:
    """The ``q`` quantile (0 to 1) with linear interpolation between order statistics."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def measure(
    fn: Callable[[], object],
    *,
    cold_l2: bool = True,
    graph: bool = True,
    min_ms: float = 50.0,
    max_reps: int = 200,
    early_stop_ms: float | None = None,
) -> Timing:
    """Time ``fn`` on the current device.

    Args:
        fn: launches work on the current stream; to be captured it must not synchronise.
        cold_l2: overwrite the L2 cache before every call.
        graph: time under a CUDA graph; falls back to eager if capture fails.
        min_ms: sample until this much device time of ``fn`` itself was measured (at least 5 samples) …
        max_reps: … or this many samples were taken.
        early_stop_ms: give up once 3 samples all exceed it, or a warm-up call far exceeds it: for losers of a search.

    Raises:
        TargetError: no GPU is present.
    """
    first = _warm_up(fn)
    if early_stop_ms is not None and first > 2 * early_stop_ms + _LAUNCH_MS:
        return Timing.of([first], stopped=True)
    timer = _timer(fn, cold_l2, graph, first)
    samples: list[float] = []
    spent = 0.0
    while len(samples) < max_reps and (spent < min_ms or len(samples) < 5):
        samples.append(timer.sample())
        spent += max(samples[-1], 0.0) * timer.calls
        if early_stop_ms is not None and len(samples) >= 3 and min(samples) > early_stop_ms:
            return Timing.of(samples, graph=timer.graph, stopped=True)
    return Timing.of(samples, graph=timer.graph)


def streamed(fn: Callable[[], object], *, calls: int = 50, samples: int = 25) -> Timing:
    """Time a call of ``fn`` where ``calls`` of them are launched one after the other and none is waited for: as without graphs.

    The longer one of host and device time, then: neither hides, and what a call leaves in L2 the next one finds.

    Raises:
        TargetError: no GPU is present.
    """
    _warm_up(fn)

    def many() -> None:
        for _ in range(calls):
            fn()

    return Timing.of([_between(many) / calls for _ in range(samples)])


def interleaved(fns: Sequence[Callable[[], object]], rounds: int, *, cold_l2: bool = True, graph: bool = True) -> list[list[float]]:
    """``rounds`` samples (ms a call) of each function, taken in turn so that drift of clocks and heat meets all alike.

    The order is rotated and reversed between rounds, so that none always follows the same neighbour. Entry ``[f][r]`` is function ``f`` in
    round ``r``: samples of one round are pairs for :func:`speedup_interval`. All are timed alike: if one cannot be captured, all are timed
    eagerly.

    Raises:
        TargetError: no GPU is present.
    """
    first = [_warm_up(fn) for fn in fns]
    timers = [_timer(fn, cold_l2, graph, ms) for fn, ms in zip(fns, first, strict=True)]
    if not all(timer.graph for timer in timers):
        timers = [_Eager(fn, cold_l2) for fn in fns]
    samples: list[list[float]] = [[] for _ in fns]
    for order in rotations(len(fns), rounds):
        for f in order:
            samples[f].append(timers[f].sample())
    return samples


def rotations(count: int, rounds: int) -> list[list[int]]:
    """The order of ``count`` functions in each round: rotated every second round, odd rounds reversed."""
    orders = []
    for r in range(rounds):
        shift = (r // 2) % max(count, 1)
        order = [*range(shift, count), *range(shift)]
        orders.append(order[::-1] if r % 2 else order)
    return orders


def speedup_interval(
    baseline: Sequence[float], candidate: Sequence[float], confidence: float = 0.95, *, resamples: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """How many times faster the candidate is: ``(estimate, low, high)``.

    The estimate is the median over pairs of ``baseline[r] / candidate[r]``; the interval is a percentile bootstrap over pairs, so a drift
    that both share cancels. Deterministic.

    Args:
        baseline, candidate: positive times of equal length, paired by round.
        confidence: coverage of the interval, between 0 and 1.

    Raises:
        InputError: fewer than 2 pairs, unequal lengths, times that are not positive and finite, or a bad confidence.
    """
    if len(baseline) != len(candidate) or len(baseline) < 2:
        raise InputError(f"paired timings need equal lengths of at least 2, got {len(baseline)} and {len(candidate)}")
    if not all(math.isfinite(x) and x > 0 for x in (*baseline, *candidate)):
        raise InputError("timings must be positive and finite")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}")
    ratios = torch.tensor([b / c for b, c in zip(baseline, candidate, strict=True)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(ratios), (resamples, len(ratios)), generator=generator)
    medians = ratios[pick].quantile(0.5, dim=1).tolist()
    tail = (1 - confidence) / 2
    return statistics.median(ratios.tolist()), quantile(medians, tail), quantile(medians, 1 - tail)


# --- on the device -------------------------------------------------------------------------------------------------------------


def _warm_up(fn: Callable[[], object]) -> float:
    """Milliseconds of the second call (the first compiles, loads and allocates)."""
    if not torch.cuda.is_available():
        raise TargetError("timing needs a GPU: none is present")
    fn()
    torch.cuda.synchronize()
    return _between(fn)


def _between(work: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def flush_bytes(device: int | None = None) -> int:
    """Size of the buffer that displaces the L2 cache of ``device``: twice the cache, at least 32 MiB."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if device is None else device)
    return max(2 * getattr(properties, "L2_cache_size", 0), 2**25)


class _Eager:
    """One call between two events, after the L2 cache was overwritten."""

    graph, calls = False, 1

    def __init__(self, fn: Callable[[], object], cold_l2: bool):
        self.fn = fn
        self.flush = torch.empty(flush_bytes(), dtype=torch.int8, device="cuda") if cold_l2 else None

    def sample(self) -> float:
        if self.flush is not None:
            self.flush.zero_()
        return _between(self.fn)


class _Graph:
    """Unrolled calls in a graph, less what the same graph takes without them."""

    graph = True

    def __init__(self, fn: Callable[[], object], cold_l2: bool, estimate_ms: float):
        self.flush = torch.empty(flush_bytes(), dtype=torch.int8, device="cuda") if cold_l2 else None
        self.pad = torch.zeros(1, device="cuda")
        self.calls = unrolled(estimate_ms)
        self._build(fn)
        better = unrolled(self.sample())  # the estimate was eager: for short calls mostly host time
        if better > 2 * self.calls:
            self.calls = better
            self._build(fn)

    def _build(self, fn: Callable[[], object]) -> None:
        self.full, self.empty = self._capture(fn), self._capture(lambda: None)
        for _ in range(2):
            self.full.replay()
            self.empty.replay()
        torch.cuda.synchronize()

    def _capture(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        captured = torch.cuda.CUDAGraph()
        outer = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(captured):
                self.pad.zero_()  # so that no graph is empty
                for _ in range(self.calls):
                    if self.flush is not None:
                        self.flush.zero_()
                    call()
        finally:
            torch.cuda.set_stream(outer)  # a failed capture leaves its own stream current
        return captured

    def sample(self) -> float:
        spent = _between(self.full.replay) - _between(self.empty.replay)
        return max(spent / self.calls, 1e-5)  # the clock's noise may exceed an (almost) empty call


def unrolled(estimate_ms: float) -> int:
    """Calls in one graph for a call of about ``estimate_ms``: enough to drown the error of one replay, no more than 50."""
    return max(1, min(_MOST_UNROLLED, math.ceil(_UNROLLED_MS / max(estimate_ms, 1e-6))))


def _timer(fn: Callable[[], object], cold_l2: bool, graph: bool, estimate_ms: float) -> _Eager | _Graph:
    if graph:
        try:
            return _Graph(fn, cold_l2, estimate_ms)
        except RuntimeError:  # a call that synchronises or allocates outside torch cannot be captured
            torch.cuda.synchronize()
    return _Eager(fn, cold_l2)
