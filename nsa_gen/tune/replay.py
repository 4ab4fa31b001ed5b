"""A backend that answers from a trial log: judge a recorded run again under other rules, or test the tuner, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import Config, Problem
from ..device import Device
from .backend import Final, Identity
from .log import TrialLog
from .records import Built, Failure, Measured, Point, Trial


class ReplayBackend:
    """Serves the trials of the log at ``path``; what was not recorded fails with kind ``error``.

    A final replays each config's recorded median, spread evenly over ± half its recorded spread: a log of trials holds no drift.
    """

    def __init__(self, path: Path, device: Device, environment: dict[str, str] | None = None):
        self.device, self.environment = device, environment or {}
        self._trials: dict[tuple[Problem, Config, Point], Trial] = {}
        self._digests: dict[tuple[Problem, Config], str] = {}
        for record in TrialLog(path).read().records:
            if record.get("event") == "trial":
                trial = Trial.from_record(record)
                self._trials[trial.problem, trial.config, trial.point] = trial
                self._digests[trial.problem, trial.config] = trial.digest

    def digest(self, problem: Problem, config: Config) -> str:
        return self._digests.get((problem, config), config.digest)

    def identify(self) -> Identity | Failure:
        return Identity(self.device, self.environment)

    def compile(self, problem: Problem, config: Config, point: Point) -> Built | Failure:
        found = [t for (p, c, _), t in self._trials.items() if (p, c) == (problem, config)]
        built = next((t.built for t in found if t.built is not None), None)
        failed = next((t.outcome for t in found if isinstance(t.outcome, Failure)), None)
        return built or failed or Failure("error", "not recorded")

    def evaluate(self, problem: Problem, config: Config, point: Point, best_ms: float | None) -> Measured | Failure:
        trial = self._trials.get((problem, config, point))
        return trial.outcome if trial is not None else Failure("error", "not recorded")

    def final(self, problem: Problem, configs: Sequence[Config], point: Point, rounds: int) -> Final | Failure:
        found = [self.evaluate(problem, config, point, None) for config in configs]
        samples = tuple(
            f if isinstance(f, Failure) else tuple(f.ms * (1 + f.spread * (r / max(rounds - 1, 1) - 0.5)) for r in range(rounds))
            for f in found
        )
        return Final(samples, tuple(0.0 if isinstance(f, Failure) else f.max_rel_err for f in found))
