"""From interleaved measurements to verdicts, and from verdicts to table rows with ranges. No measuring happens here."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import timing
from ..config import Config, Problem
from ..row import Row
from ..table import LEAST_SPEEDUP
from .backend import Final
from .records import Built, Failure, Point

TUNED, DEFAULT = "tuned wins", "default wins"
#: A config may serve a neighbour's shape if it is at most this much slower there than the neighbour's winner.
SHARE_WITHIN = 1.02


@dataclass(frozen=True)
class Standing:
    """One config in a final: median and spread in ms, and its speed-up over the baseline with a 95 % interval."""

    config: Config
    ms: float
    spread: float
    speedup: float
    low: float
    high: float
    max_rel_err: float

    @property
    def wins(self) -> bool:
        """Faster than the baseline beyond doubt (interval above 1) and by enough to matter (2 %)."""
        return self.low > 1 and self.speedup >= LEAST_SPEEDUP


@dataclass(frozen=True)
class Decision:
    """The outcome of a final at one point.

    Args:
        baseline: the default's standing (speed-up 1), or the safe config's where the default does not run.
        winner: the config a row will hold; the baseline's own standing when nothing beats it.
        standings: everything that ran, fastest first.
        failures: what did not run, and why.
    """

    point: Point
    baseline: Standing
    winner: Standing
    standings: tuple[Standing, ...]
    failures: tuple[tuple[Config, Failure], ...] = ()

    @property
    def verdict(self) -> str:
        return DEFAULT if self.winner.config == self.baseline.config else TUNED

    @property
    def challenger(self) -> Standing | None:
        """The fastest config that is not the baseline."""
        return next((s for s in self.standings if s.config != self.baseline.config), None)

    def of(self, config: Config) -> Standing | None:
        return next((s for s in self.standings if s.config == config), None)


def decide(point: Point, configs: Sequence[Config], final: Final, incumbent: Config | None = None) -> Decision | None:
    """Judge a final whose first config is the baseline; None if the baseline has no samples.

    The winner is the fastest config that :attr:`Standing.wins`. An incumbent that wins stays unless the fastest beats it in turn, interval
    above 1 and by 2 %: a table does not change for noise.
    """
    first = final.samples[0]
    if isinstance(first, Failure):
        return None
    standings, failures = [], []
    for config, samples, error in zip(configs, final.samples, final.max_rel_err, strict=True):
        if isinstance(samples, Failure):
            failures.append((config, samples))
            continue
        speedup, low, high = (1.0, 1.0, 1.0) if config == configs[0] else timing.speedup_interval(first, samples)
        low, high = min(low, speedup), max(high, speedup)
        standings.append(Standing(config, statistics.median(samples), _spread(samples), speedup, low, high, error))
    baseline = standings[0]
    winners = sorted((s for s in standings if s.wins), key=lambda s: (s.ms, s.config.digest))
    winner = winners[0] if winners else baseline
    held = next((s for s in winners if s.config == incumbent), None)
    if held is not None and held is not winner:
        samples = {c: s for c, s in zip(configs, final.samples, strict=True) if not isinstance(s, Failure)}
        speedup, low, _ = timing.speedup_interval(samples[held.config], samples[winner.config])
        if not (low > 1 and speedup >= LEAST_SPEEDUP):
            winner = held
    return Decision(point, baseline, winner, tuple(sorted(standings, key=lambda s: (s.ms, s.config.digest))), tuple(failures))


def _spread(samples: Sequence[float]) -> float:
    if len(samples) < 2:
        return 0.0
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return max(0.0, (fifths[3] - fifths[0]) / statistics.median(samples))


@dataclass
class Group:
    """Neighbouring points that share one config: what becomes a row."""

    config: Config
    decisions: list[Decision] = field(default_factory=list)


def merge(decisions: Sequence[Decision], slowdown: Callable[[Config, Decision], float]) -> list[Group]:
    """Join neighbours along the sequence length (decisions of one batch_heads, sorted).

    Args:
        slowdown: a config's time over the winner's at that decision's point, measured; infinite if it does not run there.

    A point joins the group on its left if the group's config is within 2 % of its winner at the point, or if its winner is within 2 % of
    the group's winners at all of the group's points (then the group takes that config).
    """
    groups: list[Group] = []
    for decision in decisions:
        config = decision.winner.config
        if groups:
            group = groups[-1]
            if group.config == config or slowdown(group.config, decision) <= SHARE_WITHIN:
                group.decisions.append(decision)
                continue
            if all(slowdown(config, earlier) <= SHARE_WITHIN for earlier in group.decisions):
                group.config = config
                group.decisions.append(decision)
                continue
        groups.append(Group(config, [decision]))
    return groups


def ranges(values: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Bucket of each value (sorted, distinct): edges are geometric means between neighbours; the outer ones reach half an octave on."""
    edges = [max(1, round(values[0] / math.sqrt(2)))]
    edges += [math.isqrt(a * b) + 1 for a, b in itertools.pairwise(values)]
    edges.append(math.ceil(values[-1] * math.sqrt(2)) + 1)
    return {value: (edges[i], edges[i + 1] - 1) for i, value in enumerate(values)}


def row(
    problem: Problem,
    group: Group,
    *,
    seqlens: dict[int, tuple[int, int]],
    batch_heads: tuple[int, int],
    built: Built,
    environment: dict[str, str],
    date: str,
    trials: int,
    failures: dict[str, int],
) -> Row:
    """The table row of a group.

    ``perf`` is that of the longest point at which the row's config wins (of the longest point, where the default does); ``points`` lists
    all of them, ``search`` how many configs were tried and how those that failed did.
    """
    standings = [(d, s) for d in group.decisions if (s := d.of(group.config)) is not None]
    tuned = group.config != group.decisions[-1].baseline.config
    lead, best = ([(d, s) for d, s in standings if s.wins] or standings)[-1]
    points = []
    for decision, standing in standings:
        shape = decision.point.shape
        points.append(
            {
                "seqlen": shape.seqlen,
                "batch_heads": shape.batch_heads,
                "median_ms": _rounded(standing.ms),
                "default_ms": _rounded(decision.baseline.ms),
                "speedup": _rounded(standing.speedup),
                "speedup_low": _rounded(standing.low),
                "speedup_high": _rounded(standing.high),
            }
        )
    extra: dict[str, Any] = {"points": points, "search": {"tried": trials, "failures": dict(sorted(failures.items()))}}
    if not tuned and (challenger := lead.challenger) is not None:
        extra["challenger"] = {
            "config": challenger.config.as_dict(),
            "speedup": _rounded(challenger.speedup),
            "speedup_low": _rounded(challenger.low),
            "speedup_high": _rounded(challenger.high),
        }
    return Row(
        problem=problem,
        seqlen=(seqlens[group.decisions[0].point.seqlen][0], seqlens[group.decisions[-1].point.seqlen][1]),
        batch_heads=batch_heads,
        config=group.config,
        perf={
            "median_ms": _rounded(best.ms),
            "spread": _rounded(best.spread),
            "default_ms": _rounded(lead.baseline.ms),
            "speedup": _rounded(best.speedup),
            "speedup_low": _rounded(best.low),
            "speedup_high": _rounded(best.high),
            "verdict": TUNED if tuned and best.wins else DEFAULT,
        },
        resources={"shared": built.shared, "registers": built.registers, "spills": built.spills},
        correctness={
            "max_rel_err": float(f"{max(s.max_rel_err for _, s in standings):.3g}"),
            "reference": "float64",
            "cases": len(standings),
        },
        environment=dict(environment),
        source_digest=built.digest,
        date=date,
        measured_by="nsa-gen tune",
        extra=extra,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
