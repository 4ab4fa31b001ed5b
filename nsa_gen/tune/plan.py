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
#: Points of the kernels that serve from a KV cache, whatever the spec names: sequences, and tokens that the cache has of each.
DECODE_SHAPES = tuple(
    TuneShape(batch=batch, seqlen=thousands * 1024)
    for batch, thousands in ((1, 8), (1, 64), (32, 8), (64, 8), (64, 32), (32, 64), (32, 128))
)
#: Bytes of K and V, in the spec's dtype, that such a point may have: a case of the kernels takes twice as much, and a worker holds two.
LARGEST_CACHE = 12 * 2**30


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
    decode: bool = False,
    kv_dtype: str | None = None,
    page_size: int | None = None,
    tokens: int | None = None,
) -> list[Plan]:
    """The distinct problems of ``specs`` with their points; problems that specs share are tuned once, at the points of all.

    Args:
        kernels: only these; default all.
        shapes: instead of the specs' own.
        varlen, deterministic: which calls the kernels serve.
        decode: the kernels that serve from a KV cache instead, by default at those of ``DECODE_SHAPES`` that ``LARGEST_CACHE`` allows.
        kv_dtype, page_size, tokens: what the cache stores, rows a page, new tokens of a sequence; defaults as of ``config.cache_of``.

    Raises:
        ConfigError: an unknown kernel, or no such cache.
        InputError: no spec, or options that do not go together.
    """
    serving = {name: value for name, value in (("kv_dtype", kv_dtype), ("page_size", page_size), ("tokens", tokens)) if value is not None}
    if serving and not decode:
        raise InputError(f"tune: {', '.join(serving)}: only with decode")
    if decode and (varlen or deterministic):
        raise InputError("tune: decode has kernels of its own, without varlen or deterministic")
    choices, others = (configs.SERVING, configs.KERNELS) if decode else (configs.KERNELS, configs.SERVING)
    wanted = tuple(kernels) if kernels else choices
    for kernel in wanted:
        if kernel not in choices:
            hint = f" ({'without' if decode else 'with'} decode also: {', '.join(others)})" if kernel in others else ""
            raise ConfigError(f"unknown kernel: {allowed(kernel, choices)}{hint}")
    if not specs:
        raise InputError("tune: needs at least one spec")
    found: dict[Problem, dict[tuple[int, int], Point]] = {}
    for spec in specs:
        cached = configs.cache_of(spec, kv_dtype, page_size, 1 if tokens is None else tokens) if decode else None
        default = _cache_shapes(spec) if decode else spec.tune or SHAPES
        for problem in configs.problems(spec, varlen=varlen, deterministic=deterministic, cached=cached):
            if problem.kernel not in wanted:
                continue
            heads_query = 0 if "group" in problem.as_dict() or problem.kernel != "combine_fwd" else spec.heads.query
            for shape in shapes or default:
                point = Point(shape.seqlen, shape.batch, spec.heads.kv, heads_query)
                found.setdefault(problem, {}).setdefault((point.seqlen, point.shape.batch_heads), point)
    return [Plan(problem, tuple(sorted(points.values()))) for problem, points in found.items()]


def _cache_shapes(spec: Spec) -> tuple[TuneShape, ...]:
    """``DECODE_SHAPES`` whose K and V are no more than ``LARGEST_CACHE``."""
    token = spec.heads.kv * (spec.head_dim.qk + spec.head_dim.v) * (4 if spec.dtype == "float32" else 2)
    return tuple(shape for shape in DECODE_SHAPES if shape.batch * shape.seqlen * token <= LARGEST_CACHE)


def borrowed(rows: Iterable[Row], problem: Problem, point: Point) -> list[Config]:
    """Configs of other devices' rows for a problem at a point: what serves its calls as long as nothing is measured here."""
    return list(dict.fromkeys(row.config for row in rows if row.problem == problem and row.holds(point.shape)))


def incumbent(rows: Iterable[Row], problem: Problem, point: Point) -> Config | None:
    """The config a table holds for a problem at a point (the row of the highest rank), or None."""
    held = [row for row in rows if row.problem == problem and row.holds(point.shape)]
    return max(held, key=lambda row: row.rank).config if held else None
