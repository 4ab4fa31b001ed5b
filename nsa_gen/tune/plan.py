"""What is tuned: the distinct problems of some specs, the points of each, and where the search is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .. import config as configs
from ..config import Config, Problem
from ..errors import ConfigError, InputError, allowed
from ..geometry import Spec, TuneShape
from ..row import Row
from .records import Point

#: Points of a spec that names none.
SHAPES = tuple(TuneShape(batch=1, seqlen=2**power) for power in range(12, 18))


@dataclass(frozen=True)
class Plan:
    """One problem and the points its table rows shall hold."""

    problem: Problem
    points: tuple[Point, ...]

    @property
    def anchors(self) -> tuple[Point, ...]:
        """The points searched at; the winners of a search are then measured at all others.

        A config is one binary at every length, so a candidate compiled and checked at one point is a candidate at all. Lengths pull in
        different directions (few tokens: occupancy; many: bandwidth), hence two anchors: at a quarter and at three quarters of the points
        in order of size. Two points or fewer are all anchors.
        """
        ordered = sorted(self.points, key=lambda p: (p.seqlen * p.shape.batch_heads, p))
        if len(ordered) <= 2:
            return tuple(ordered)
        return ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]


def plans(
    specs: Sequence[Spec],
    *,
    kernels: Iterable[str] | None = None,
    shapes: Sequence[TuneShape] | None = None,
    varlen: bool = False,
    deterministic: bool = False,
) -> list[Plan]:
    """The distinct problems of ``specs`` with their points; problems that specs share are tuned once, at the points of all.

    Args:
        kernels: only these; default all.
        shapes: instead of the specs' own.
        varlen, deterministic: which calls the kernels serve.

    Raises:
        ConfigError: an unknown kernel.
        InputError: no spec or no shape.
    """
    wanted = tuple(kernels) if kernels else configs.KERNELS
    for kernel in wanted:
        if kernel not in configs.KERNELS:
            raise ConfigError(f"unknown kernel: {allowed(kernel, configs.KERNELS)}")
    if not specs:
        raise InputError("tune: needs at least one spec")
    found: dict[Problem, dict[tuple[int, int], Point]] = {}
    for spec in specs:
        for problem in configs.problems(spec, varlen=varlen, deterministic=deterministic):
            if problem.kernel not in wanted:
                continue
            heads_query = 0 if "group" in problem.as_dict() or problem.kernel != "combine_fwd" else spec.heads.query
            for shape in shapes or spec.tune or SHAPES:
                point = Point(shape.seqlen, shape.batch, spec.heads.kv, heads_query)
                found.setdefault(problem, {}).setdefault((point.seqlen, point.shape.batch_heads), point)
    return [Plan(problem, tuple(sorted(points.values()))) for problem, points in found.items()]


def borrowed(rows: Iterable[Row], problem: Problem, point: Point) -> list[Config]:
    """Configs of other devices' rows for a problem at a point: what serves its calls as long as nothing is measured here."""
    return list(dict.fromkeys(row.config for row in rows if row.problem == problem and row.holds(point.shape)))


def incumbent(rows: Iterable[Row], problem: Problem, point: Point) -> Config | None:
    """The config a table holds for a problem at a point (the row of the highest rank), or None."""
    held = [row for row in rows if row.problem == problem and row.holds(point.shape)]
    return max(held, key=lambda row: row.rank).config if held else None
