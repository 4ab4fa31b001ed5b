"""Which config to try next: one Optuna study for one (kernel, exact key, point).

The first candidates are given (default, incumbent, winners of other lengths). A space no larger than the number of trials is then
walked whole. Elsewhere Optuna's TPE (multivariate, grouped, so that conditional knobs are modelled together) proposes, and every third
proposal is instead an untried neighbour of the best: one knob changed. No config is tried twice: TPE repeats itself on small discrete
spaces, so a repeated or illegal proposal is told to Optuna as failed and asked again.

A failed candidate is told as pruned, which TPE ranks behind everything that ran. With ``storage`` set, any number of processes on any
number of machines share the study through Optuna's own storage and split its trials.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from .. import space
from ..config import Config, Problem, Value
from ..errors import ConfigError, TuneError

_REPEATS = 12  # proposals asked before an untried config is drawn instead
_LOCAL_EVERY = 3
_STARTUP = 12
_LISTED = 2000  # a space of at most this many configs is listed
_DRAWS = 500


class _Sampler(optuna.samplers.BaseSampler):
    """TPE, except that a config given in ``forced`` is taken as it is."""

    def __init__(self, base: optuna.samplers.BaseSampler):
        self._base = base
        self.forced: Config | None = None

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {} if self.forced else self._base.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        return {} if self.forced else self._base.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        if self.forced:
            return self.forced[name]
        return self._base.sample_independent(study, trial, name, distribution)

    def before_trial(self, study: Any, trial: Any) -> None:
        self._base.before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self._base.after_trial(study, trial, state, values)


class Study:
    """Suggestions for one problem at one point. ``target`` is how many configs will be tried if nothing stops it.

    Args:
        problem: what is tuned.
        label: what else tells studies apart: device and point.
        first: configs tried before any other, in order.
        trials: how many configs are tried in all, those known included.
        known: ``(config, milliseconds or None if it failed)`` of an earlier run.
        storage: an Optuna storage URL shared by several tuners, or None for memory.
        seed: of the sampler.

    Raises:
        TuneError: the storage cannot be opened.
    """

    def __init__(
        self,
        problem: Problem,
        label: str,
        *,
        first: Sequence[Config] = (),
        trials: int,
        known: Iterable[tuple[Config, float | None]] = (),
        storage: str | None = None,
        seed: int = 0,
    ):
        self.problem, self.trials = problem, trials
        found = list(itertools.islice(space.candidates(problem), max(trials, _LISTED) + 1))
        self._whole = len(found) <= trials
        self.target = min(trials, len(found))
        self._knobs = space.knobs(problem.kernel)
        self._random = random.Random(seed)
        self._shared = storage is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "group" is marked experimental
            self._sampler = _Sampler(
                optuna.samplers.TPESampler(
                    seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=min(_STARTUP, max(4, trials // 4))
                )
            )
        try:
            self._study = optuna.create_study(
                study_name=self._name(label), storage=storage, sampler=self._sampler, load_if_exists=True, direction="minimize"
            )
        except Exception as error:  # the storage's driver raises its own types
            raise TuneError(f"cannot open the study in storage {storage!r}: {type(error).__name__}: {error}") from error
        self._running: dict[Config, Any] = {}
        self.seen: dict[Config, float | None] = {}
        self._refresh()
        for config, ms in known:
            self._remember(config, ms)
        self._first = legal(problem, first)
        self._rest = found if len(found) <= max(trials, _LISTED) else []  # a space of millions is drawn from, not listed
        self._random.shuffle(self._rest)
        self._proposed = 0

    def _name(self, label: str) -> str:
        knobs = json.dumps([[k.name, k.values, sorted(k.when.items())] for k in space.knobs(self.problem.kernel)], sort_keys=True)
        digest = hashlib.sha256(knobs.encode()).hexdigest()[:8]  # a study cannot change its knobs' values
        return f"{self.problem.kernel}-{self.problem.digest}-{label}-{digest}"

    @property
    def running(self) -> int:
        """Configs asked for and not yet told."""
        return len(self._running)

    @property
    def best(self) -> tuple[Config, float] | None:
        """The fastest config told so far with its milliseconds."""
        timed = [(ms, config.digest, config) for config, ms in self.seen.items() if ms is not None]
        return (min(timed)[2], min(timed)[0]) if timed else None

    def top(self, count: int) -> list[Config]:
        """The ``count`` fastest configs told so far, fastest first."""
        timed = sorted((ms, config.digest, config) for config, ms in self.seen.items() if ms is not None)
        return [config for _, _, config in timed[:count]]

    def ask(self) -> Config | None:
        """A config not tried before, or None when all trials are given out or the space is exhausted."""
        if self._shared:
            self._refresh()
        if len(self._taken()) >= self.target:
            return None
        forced = self._next_given()
        if forced is None and not self._whole:
            self._proposed += 1
            if self._proposed % _LOCAL_EVERY == 0:
                forced = self._neighbour()
            if forced is None:
                for _ in range(_REPEATS):
                    trial, config = self._propose(None)
                    if config not in self._taken() and legal(self.problem, [config]):
                        self._running[config] = trial
                        return config
                    self._study.tell(trial, state=TrialState.FAIL)
        if forced is None:
            forced = self._neighbour() or self._untried()
        if forced is None:
            return None
        trial, config = self._propose(forced)
        self._running[config] = trial
        return config

    def tell(self, config: Config, ms: float | None) -> None:
        """Result of a config that :meth:`ask` gave: its milliseconds, or None if it failed."""
        trial = self._running.pop(config)
        self.seen[config] = ms
        if ms is None:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, ms)

    def abandon(self) -> None:
        """Give back configs that were asked for and will not be told: another tuner, or a resumed run, may try them."""
        for trial in self._running.values():
            self._study.tell(trial, state=TrialState.FAIL)
        self._running.clear()

    def _taken(self) -> set[Config]:
        return {*self.seen, *self._running}

    def _next_given(self) -> Config | None:
        taken = self._taken()
        return next((c for c in (*self._first, *(self._rest if self._whole else ())) if c not in taken), None)

    def _neighbour(self) -> Config | None:
        if self.best is None:
            return None
        taken = self._taken()
        untried = [c for c in space.neighbours(self.problem, self.best[0]) if c not in taken]
        return self._random.choice(untried) if untried else None

    def _untried(self) -> Config | None:
        """Some legal config: from the list of all, or of a space too large to list, a few draws."""
        taken = self._taken()
        if self._rest:
            return next((c for c in self._rest if c not in taken), None)
        for _ in range(_DRAWS):
            chosen: dict[str, Value] = {}
            for knob in self._present(chosen):
                chosen[knob.name] = self._random.choice(knob.values)
            config = Config.of(self.problem.kernel, chosen)
            if config not in taken and legal(self.problem, [config]):
                return config
        return None

    def _present(self, chosen: dict[str, Value]) -> Iterator[space.Knob]:
        """The knobs that exist, while ``chosen`` is being filled in."""
        return (knob for knob in self._knobs if all(chosen.get(name) in values for name, values in knob.when.items()))

    def _propose(self, forced: Config | None) -> tuple[Any, Config]:
        self._sampler.forced = forced
        try:
            trial = self._study.ask()
            chosen: dict[str, Value] = {}
            for knob in self._present(chosen):
                chosen[knob.name] = trial.suggest_categorical(knob.name, knob.values)
        finally:
            self._sampler.forced = None
        return trial, Config.of(self.problem.kernel, chosen)

    def _remember(self, config: Config, ms: float | None) -> None:
        """Add an earlier run's result to the study, unless it is there."""
        if config in self.seen or not legal(self.problem, [config]):
            return
        self.seen[config] = ms
        values = {knob.name: optuna.distributions.CategoricalDistribution(knob.values) for knob in self._knobs}
        params = config.as_dict()
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if ms is None else TrialState.COMPLETE,
                value=ms,
                params=params,
                distributions={name: values[name] for name in params},
            )
        )

    def _refresh(self) -> None:
        """Take over what other tuners have put into the shared study."""
        for trial in self._study.get_trials(deepcopy=False):
            config = Config.of(self.problem.kernel, dict(trial.params))
            if config in self._running or config in self.seen or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
                continue
            if not legal(self.problem, [config]):
                continue
            if trial.state is TrialState.COMPLETE:
                self.seen[config] = trial.value
            else:
                self.seen[config] = None


def legal(problem: Problem, configs: Iterable[Config | None]) -> list[Config]:
    """Those of ``configs`` that are in the space, each once, in order."""
    found = []
    for config in dict.fromkeys(configs):
        if config is None:
            continue
        try:
            space.check(problem, config)
        except ConfigError:
            continue
        found.append(config)
    return found
