"""The coordinator: asks studies for candidates, keeps the compile pool ahead of the GPU, logs, and holds the finals.

It never touches CUDA. One problem is at hand at a time, because its inputs and references are what costs memory and set-up on the GPU;
while that one is searched, the pool already compiles the first candidates of the problems to come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import space
from ..config import Config, Problem
from ..device import Device
from ..row import Row
from . import finals
from .backend import SPILL_LIMIT, Backend, Final
from .finals import Decision
from .log import TrialLog
from .plan import Plan, borrowed, incumbent
from .progress import Silent
from .records import Built, Failure, Measured, Point, Trial
from .study import Study, legal
from .summary import Result
from .worker import InlinePool, Pool, Request, wait

#: Share of a problem's time that goes to the search; the rest is for the finals.
SEARCH_SHARE = 0.6
CARRIED = 8  # the best of one anchor that the next one starts with
SCREENED = 4  # the best of each anchor that are measured at the other points
CONTENDERS = 3  # of those, how many meet default and incumbent in a final
GIVE_UP = 8  # failures in a row that kill the worker, before anything ran
LOOK_AHEAD = 6  # first candidates compiled for problems to come


class Stopped(Exception):
    """The run was asked to end (signal or budget); what is finished is kept."""


@dataclass(frozen=True)
class Options:
    """How a run goes.

    Args:
        trials: configs tried for each problem, over its anchors.
        rounds: interleaved rounds of a final.
        deadline_s: for one compile or one evaluation; ``grace_s`` more for the first of a point (inputs and references are built).
        storage: Optuna storage URL, or None.
        seed: of the samplers.
    """

    trials: int = 64
    rounds: int = 15
    deadline_s: float = 30.0
    grace_s: float = 120.0
    compile_deadline_s: float = 180.0
    storage: str | None = None
    seed: int = 0


@dataclass
class Search:
    """A study and what of it is under way. ``queue`` holds configs asked for, whose build is awaited or done."""

    plan: Plan
    point: Point
    study: Study
    queue: deque[Config]
    abandoned: str = ""


class Tuner:
    """See the module's docstring.

    Args:
        backend: this process's: only ``digest`` is called on it.
        builders, gpus: pools that serve a :class:`Backend`; every request is a call of one of its methods.
        rows: the tables' rows by kernel, for incumbents.
        elsewhere: rows of other devices of the arch by kernel, whose configs are tried first.
        known: trials and finals of earlier runs that still hold.
        stop: whether to end now; asked several times a second.
        deadline: ``time.monotonic()`` at which the run ends, or infinity.
    """

    def __init__(
        self,
        backend: Backend,
        builders: Pool | InlinePool,
        gpus: Pool | InlinePool,
        device: Device,
        log: TrialLog,
        *,
        options: Options = Options(),
        rows: dict[str, Sequence[Row]] | None = None,
        elsewhere: dict[str, Sequence[Row]] | None = None,
        known: Sequence[dict[str, Any]] = (),
        progress: Silent | None = None,
        stop: Callable[[], bool] = lambda: False,
        deadline: float = float("inf"),
    ):
        self.backend, self.builders, self.gpus, self.device, self.log = backend, builders, gpus, device, log
        self.options, self.progress = options, progress or Silent()
        self._stop, self.deadline = stop, deadline
        self._rows, self._elsewhere = rows or {}, elsewhere or {}
        # By point too: a constant that follows the length (the width of a top-k row) makes another binary. Else it is a cache hit.
        self.built: dict[tuple[Problem, Point, Config], Built | Failure] = {}
        self._building: dict[int, tuple[Problem, Point, Config]] = {}
        self._answers: dict[int, Any] = {}
        self.trials: dict[tuple[Problem, Point], dict[Config, Trial]] = {}
        self._finals: dict[str, dict[str, Any]] = {}
        self._coming: deque[Plan] = deque()
        self._searches: dict[tuple[Problem, Point], Search] = {}
        self._digests: dict[tuple[Problem, Config], str] = {}
        self._held: dict[tuple[Problem, Point], Config | None] = {}
        for record in known:
            self._recall(record)

    # --- earlier results ---

    def _recall(self, record: dict[str, Any]) -> None:
        if record.get("event") == "final":
            self._finals[record["what"]] = record
        elif record.get("event") == "incumbent":
            kernel, config = record["kernel"], record["config"]
            where = Problem.of(kernel, record["key"]), Point(**record["point"])
            self._held[where] = Config.of(kernel, config) if config is not None else None
        elif record.get("event") == "trial":
            trial = Trial.from_record(record)
            if trial.digest == self._digest(trial.problem, trial.config):
                self.trials.setdefault((trial.problem, trial.point), {})[trial.config] = trial

    def _digest(self, problem: Problem, config: Config) -> str:
        key = problem, config
        if key not in self._digests:
            try:
                space.check(problem, config)
                self._digests[key] = self.backend.digest(problem, config)
            except Exception:  # a config that left the space, or a template that no longer renders: its results do not hold
                self._digests[key] = ""
        return self._digests[key]

    # --- the event loop ---

    def pump(self) -> None:
        """Let time pass: hand out compile work, take in what processes answered. Raises Stopped."""
        if self._stop() or time.monotonic() >= self.deadline:
            raise Stopped
        self._look_ahead()
        wait([self.builders, self.gpus], 0.2)
        for ticket, answer in self.builders.collect():
            problem, point, config = self._building.pop(ticket)
            self.built[problem, point, config] = self._vetted(problem, config, answer)
        self._answers.update(self.gpus.collect())

    def _vetted(self, problem: Problem, config: Config, answer: Built | Failure) -> Built | Failure:
        """Prune what cannot run or has never been seen to win, with the reason."""
        if isinstance(answer, Failure):
            return answer
        if answer.shared > self.device.shared_bytes:
            return Failure("shared_memory", f"needs {answer.shared} bytes of shared memory, the device has {self.device.shared_bytes}")
        if (answer.spills or 0) > SPILL_LIMIT and config not in self._given(problem):
            return Failure("spills", f"spills {answer.spills} bytes a thread")
        return answer

    def _given(self, problem: Problem) -> list[Config]:
        return [space.default(problem, self.device.arch), space.safe(problem)]

    def want(self, problem: Problem, config: Config, point: Point, priority: int = 0) -> None:
        """Have a config compiled, unless it is or will be."""
        key = problem, point, config
        if key in self.built or key in self._building.values():
            return
        request = Request("compile", (problem, config, point), self.options.compile_deadline_s, grace_s=60)
        self._building[self.builders.submit(request, priority)] = key

    def build_all(self, problem: Problem, configs: Sequence[Config], point: Point) -> None:
        """Compile all of these now."""
        for config in configs:
            self.want(problem, config, point)
        while any((problem, point, config) not in self.built for config in configs):
            self.pump()

    def _look_ahead(self) -> None:
        for order, plan in enumerate(self._coming, 1):
            if self.builders.load >= 2 * len(self.builders):
                return
            search = self._search_of(plan, plan.anchors[0])
            if len(search.queue) < min(LOOK_AHEAD, search.study.target):
                self._fill(search, 1, order)

    def _gpu(self, requests: Sequence[Request]) -> list[Any]:
        tickets = [self.gpus.submit(request) for request in requests]
        while any(ticket not in self._answers for ticket in tickets):
            self.pump()
        return [self._answers.pop(ticket) for ticket in tickets]

    # --- search ---

    def _search_of(self, plan: Plan, point: Point, carried: Sequence[Config] = ()) -> Search:
        key = plan.problem, point
        if key not in self._searches:
            known = {c: t.ms for c, t in self.trials.get(key, {}).items()}
            others = borrowed(self._elsewhere.get(plan.problem.kernel, ()), plan.problem, point)
            first = legal(plan.problem, [*self._given(plan.problem)[:1], self._incumbent(plan.problem, point), *others, *carried])
            study = Study(
                plan.problem,
                f"{self.device.slug}-{point}",
                first=first,
                trials=max(1, self.options.trials // len(plan.anchors)),
                known=known.items(),
                storage=self.options.storage,
                seed=self.options.seed,
            )
            self._searches[key] = Search(plan, point, study, deque())
        return self._searches[key]

    def _incumbent(self, problem: Problem, point: Point) -> Config | None:
        """What the tables held when this run (or the one it resumes) came to the point, so that resuming repeats its decisions."""
        key = problem, point
        if key not in self._held:
            held = incumbent(self._rows.get(problem.kernel, ()), problem, point)
            where = {"kernel": problem.kernel, "key": problem.as_dict(), "point": asdict(point)}
            self.log.append({"event": "incumbent", **where, "config": held.as_dict() if held else None})
            self._held[key] = held
        return next(iter(legal(problem, [self._held[key]])), None)

    def _fill(self, search: Search, count: int, priority: int = 0) -> None:
        """Ask for up to ``count`` more configs and have them compiled."""
        for _ in range(count):
            config = search.study.ask()
            if config is None:
                return
            search.queue.append(config)
            self.want(search.plan.problem, config, search.point, priority)

    def search(self, search: Search, until: float, result: Result) -> None:
        """Run a study to its end or until ``until``; what is asked and not told by then is given back."""
        problem, study = search.plan.problem, search.study
        self.progress.begin(f"{problem.kernel} {search.point}", study.target)
        for _ in study.seen:
            self._advance(search, result)
        ahead = max(2 * len(self.gpus), min(2 * len(self.builders), study.target // 4))
        deaths = 0
        try:
            while time.monotonic() < until:
                self._fill(search, ahead - len(search.queue))
                if not search.queue:
                    break
                ready = [c for c in search.queue if (problem, search.point, c) in self.built]
                failed = [c for c in ready if isinstance(self.built[problem, search.point, c], Failure)]
                for config in failed:
                    self._finish(search, config, self.built[problem, search.point, config], result)
                batch = [c for c in ready if c not in failed][: len(self.gpus)]
                if not batch:
                    if not failed:
                        self.pump()
                    continue
                for config, answer in zip(batch, self._evaluate(problem, batch, search.point, study.best), strict=True):
                    self._finish(search, config, answer, result)
                    deaths = deaths + 1 if isinstance(answer, Failure) and answer.fatal else 0
                if deaths >= GIVE_UP and study.best is None:
                    search.abandoned = f"the first {deaths} candidates each killed the worker"
                    break
        finally:
            study.abandon()
            search.queue.clear()
            self.progress.end()

    def _evaluate(self, problem: Problem, configs: Sequence[Config], point: Point, best: tuple[Config, float] | None) -> list[Any]:
        best_ms = best[1] if best else None
        return self._gpu(
            [
                Request("evaluate", (problem, c, point, best_ms), self.options.deadline_s, self.options.grace_s, (problem, point))
                for c in configs
            ]
        )

    def _finish(self, search: Search, config: Config, outcome: Measured | Failure | Built, result: Result) -> None:
        """Log a trial, then tell the study: a killed run never knows more than its log."""
        search.queue.remove(config)
        ms = self._record(search.plan.problem, search.point, config, outcome, result)
        search.study.tell(config, ms)
        self._advance(search, result)

    def _record(self, problem: Problem, point: Point, config: Config, outcome: Any, result: Result) -> float | None:
        built = self.built.get((problem, point, config))
        trial = Trial(problem, point, config, self._digest(problem, config), built if isinstance(built, Built) else None, outcome)
        self.log.append(trial.to_record())
        self.trials.setdefault((problem, point), {})[config] = trial
        if isinstance(outcome, Failure):
            result.failures[outcome.kind] += 1
        result.tried += 1
        return trial.ms

    def _advance(self, search: Search, result: Result) -> None:
        best = search.study.best
        default = self.trials.get((search.plan.problem, search.point), {}).get(self._given(search.plan.problem)[0])
        speedup = default.ms / best[1] if best and default and default.ms else None
        self.progress.advance(best[1] if best else None, speedup, dict(result.failures))

    # --- finals ---

    def decide(self, plan: Plan, point: Point, hurried: bool, result: Result) -> Decision | None:
        """Screen the searches' best at ``point``, then the interleaved final of the best few, the default and the incumbent."""
        problem = plan.problem
        default, safe = self._given(problem)
        held = self._incumbent(problem, point)
        pool = [c for anchor in plan.anchors for c in self._search_of(plan, anchor).study.top(SCREENED)]
        pool = list(dict.fromkeys(c for c in pool if c not in (default, held)))
        known = self.trials.setdefault((problem, point), {})
        if not hurried:
            wanted = [c for c in pool if c not in known]
            self.build_all(problem, wanted, point)
            for config in wanted:
                timed = [t.ms for t in known.values() if t.ms is not None]
                best = (config, min(timed)) if timed else None
                outcome = self.built[problem, point, config]
                if isinstance(outcome, Built):
                    outcome = self._evaluate(problem, [config], point, best)[0]
                self._record(problem, point, config, outcome, result)
            ranked = sorted((t.ms, c.digest, c) for c, t in known.items() if t.ms is not None and c not in (default, held))
            pool = [c for _, _, c in ranked]
        contenders = list(dict.fromkeys(c for c in (default, held, *pool[: 1 if hurried else CONTENDERS]) if c is not None))
        rounds = self.options.rounds if not hurried else max(5, self.options.rounds // 2)
        why = "neither the default nor the safe config runs"
        for baseline in dict.fromkeys((default, safe)):
            others = [c for c in contenders if c not in (baseline, default)]
            for configs in dict.fromkeys(((baseline, *others), (baseline, *others[:1]), (baseline,))):
                final = self.final(problem, configs, point, rounds)
                if isinstance(final, Failure):  # the process died of one of them: try fewer
                    why = final.message
                    continue
                decision = finals.decide(point, configs, final, held)
                if decision is not None:
                    return decision
                break
        result.missing[point] = why
        return None

    def final(self, problem: Problem, configs: Sequence[Config], point: Point, rounds: int) -> Final | Failure:
        """Interleaved samples of ``configs``, from the log if an earlier run took the same."""
        what = f"{problem.digest} {point} {rounds} " + " ".join(f"{c.digest}:{self._digest(problem, c)}" for c in configs)
        if what in self._finals:
            record = self._finals[what]
            samples = [Failure(**s) if isinstance(s, dict) else tuple(s) for s in record["samples"]]
            return Final(tuple(samples), tuple(record["max_rel_err"]))
        self.build_all(problem, configs, point)
        unfit = {c: b for c in configs if isinstance(b := self.built[problem, point, c], Failure)}
        fit = [c for c in configs if c not in unfit]
        if not fit:
            return next(iter(unfit.values()))
        # seconds for each contender's check, beside its rounds
        deadline = self.options.deadline_s * (1 + len(fit))
        request = Request("final", (problem, fit, point, rounds), deadline, self.options.grace_s, (problem, point, "final"))
        answer = self._gpu([request])[0]
        if isinstance(answer, Failure):
            return answer
        timed = dict(zip(fit, zip(answer.samples, answer.max_rel_err, strict=True), strict=True))
        rows = [timed.get(c) or (unfit[c], 0.0) for c in configs]
        final = Final(tuple(s for s, _ in rows), tuple(e for _, e in rows))
        plain = [{"kind": s.kind, "message": s.message} if isinstance(s, Failure) else list(s) for s in final.samples]
        self.log.append(
            {
                "event": "final",
                "what": what,
                "kernel": problem.kernel,
                "key": problem.as_dict(),
                "point": str(point),
                "configs": [c.as_dict() for c in configs],
                "samples": plain,
                "max_rel_err": list(final.max_rel_err),
            }
        )
        return final

    def _slowdown(self, problem: Problem, decisions: dict[Point, Decision], measure: bool) -> Callable[[Config, Decision], float]:
        """For :func:`finals.merge`: measures a neighbour's winner where it has not been, and adds it to that point's standings."""

        def slowdown(config: Config, at: Decision) -> float:
            decision = decisions[at.point]
            if measure and decision.of(config) is None and config not in {c for c, _ in decision.failures}:
                configs = tuple(dict.fromkeys((decision.baseline.config, decision.winner.config, config)))
                final = self.final(problem, configs, at.point, self.options.rounds)
                again = finals.decide(at.point, configs, final) if isinstance(final, Final) else None
                here, winner = (again.of(config), again.of(decision.winner.config)) if again else (None, None)
                if here is not None and winner is not None:
                    # on the scale of the first final, so that standings of one point compare
                    here = replace(here, ms=here.ms * decision.winner.ms / winner.ms)
                    decisions[at.point] = decision = replace(decision, standings=(*decision.standings, here))
            standing = decision.of(config)
            return standing.ms / decision.winner.ms if standing else float("inf")

        return slowdown

    def _groups(self, plan: Plan, decisions: dict[Point, Decision], measure: bool) -> list[finals.Group]:
        """Neighbours along seqlen merged, for each batch_heads; a point without a decision parts its neighbours."""
        slowdown = self._slowdown(plan.problem, decisions, measure)
        groups: list[finals.Group] = []
        for heads in sorted({point.shape.batch_heads for point in plan.points}):
            run: list[Decision] = []
            for point in [*sorted(p for p in plan.points if p.shape.batch_heads == heads), None]:
                if point is not None and point in decisions:
                    run.append(decisions[point])
                else:
                    groups += finals.merge(run, slowdown)
                    run = []
        for group in groups:  # with what the cross-check added
            group.decisions = [decisions[d.point] for d in group.decisions]
        return groups

    # --- a whole problem ---

    def tune(self, plan: Plan, coming: Sequence[Plan] = (), share_s: float = float("inf")) -> Result:
        """Search and decide one problem within about ``share_s`` seconds, while the pool compiles ahead for ``coming``.

        If the run is stopped meanwhile, the result has ``stopped`` set and holds what was decided by then.
        """
        self._coming = deque(coming)
        result, decisions = Result(plan.problem), {}
        began = time.monotonic()
        groups: list[finals.Group] | None = None
        try:
            carried: list[Config] = []
            for number, point in enumerate(plan.anchors, 1):
                search = self._search_of(plan, point, carried)
                self.search(search, began + share_s * SEARCH_SHARE * number / len(plan.anchors), result)
                carried = search.study.top(min(CARRIED, max(1, search.study.target // 4)))
            self.progress.begin(f"{plan.problem.kernel} finals", len(plan.points))
            try:
                for point in sorted(plan.points, key=lambda p: (p not in plan.anchors, p)):
                    decision = self.decide(plan, point, time.monotonic() > began + share_s, result)
                    if decision is not None:
                        decisions[point] = decision
                        self.progress.advance(decision.winner.ms, decision.winner.speedup, dict(result.failures))
                groups = self._groups(plan, decisions, measure=True)
            finally:
                self.progress.end()
        except Stopped:
            result.stopped = True
            for point in plan.points:
                if point not in decisions:
                    result.missing.setdefault(point, "the run ended before")
        if groups is None:
            groups = self._groups(plan, decisions, measure=False)
        result.decisions = [decisions[point] for point in sorted(decisions, key=lambda p: (p.shape.batch_heads, p))]
        result.groups = groups
        return result

    def resources(self, problem: Problem, config: Config) -> Built | None:
        """What a config was built into, in this run or a known one: the largest use over the points."""
        found = [b for (p, _, c), b in self.built.items() if (p, c) == (problem, config) and isinstance(b, Built)]
        trials = [t[config] for (p, _), t in self.trials.items() if p == problem and config in t]
        found += [t.built for t in trials if t.built is not None]
        if not found:
            return None
        shared, registers, spills = ([v for b in found if (v := getattr(b, n)) is not None] for n in ("shared", "registers", "spills"))
        return Built(found[0].digest, max(shared), max(registers, default=None), max(spills, default=None))
