"""What a run found: per kernel and shape, default against tuned, with intervals; and what failed, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import Problem
from ..row import Row
from .finals import Decision, Group, Standing
from .progress import kinds
from .records import Point


@dataclass
class Result:
    """One problem: its decisions in order of size, merged into groups and rows; how candidates failed; the points without a decision."""

    problem: Problem
    tried: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    decisions: list[Decision] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    missing: dict[Point, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass
class Summary:
    """Outcome of :func:`nsa_gen.tune.run`.

    ``complete`` is False when a budget, signal or error ended the run before every point had its decision.
    """

    device: str
    environment: dict[str, str]
    results: list[Result] = field(default_factory=list)
    complete: bool = True
    seconds: float = 0.0
    skipped_lines: int = 0

    @property
    def rows(self) -> list[Row]:
        """All rows written."""
        return [row for result in self.results for row in result.rows]

    @property
    def failures(self) -> Counter[str]:
        """Failed candidates by kind, over all problems."""
        return sum((result.failures for result in self.results), Counter())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        found = []
        for result in self.results:
            shapes = [
                {
                    "seqlen": d.point.seqlen,
                    "batch_heads": d.point.shape.batch_heads,
                    "verdict": d.verdict,
                    "config": d.winner.config.as_dict(),
                    "median_ms": d.winner.ms,
                    "default_ms": d.baseline.ms,
                    "speedup": d.winner.speedup,
                    "speedup_low": d.winner.low,
                    "speedup_high": d.winner.high,
                }
                for d in result.decisions
            ]
            found.append(
                {
                    "kernel": result.problem.kernel,
                    "key": result.problem.as_dict(),
                    "tried": result.tried,
                    "failures": dict(result.failures),
                    "shapes": shapes,
                    "missing": {str(point): why for point, why in result.missing.items()},
                    "rows": [row.to_dict() for row in result.rows],
                }
            )
        head = {"device": self.device, "environment": self.environment, "complete": self.complete, "seconds": round(self.seconds, 1)}
        return {**head, "results": found}

    def to_markdown(self) -> str:
        """A table for people: one line a kernel and shape."""
        head = ("kernel", "seqlen", "batch x heads", "default ms", "tuned ms", "speed-up (95 %)", "verdict", "config")
        lines = []
        for result in self.results:
            for d in result.decisions:
                shown = d.winner if d.winner is not d.baseline else d.challenger or d.baseline
                shape = d.point.shape
                config = " ".join(f"{k}={v}" for k, v in d.winner.config.values)
                cells = (result.problem.kernel, shape.seqlen, shape.batch_heads, f"{d.baseline.ms:.4g}", f"{d.winner.ms:.4g}")
                lines.append((*map(str, cells), _interval(shown, d), d.verdict, config))
        failed = [f"* {r.problem.kernel}: {r.tried} tried, {kinds(r.failures) or 'none failed'}" for r in self.results]
        missing = [f"* {r.problem.kernel} at {point}: not decided: {why}" for r in self.results for point, why in r.missing.items()]
        state = "" if self.complete else "; not complete: run again with --resume"
        versions = ", ".join(f"{name} {value}" for name, value in sorted(self.environment.items()))
        title = f"Tuned on {self.device} in {self.seconds:.0f} s ({versions}){state}."
        return "\n".join([title, "", _markdown(head, lines), "", *failed, *missing])


def _interval(standing: Standing, decision: Decision) -> str:
    note = "" if standing is decision.winner else " (best other)"
    return f"{standing.speedup:.3f} [{standing.low:.3f}, {standing.high:.3f}]{note}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
    rows = [head, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows)
