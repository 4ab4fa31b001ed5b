"""One row of a tuned table: its fields, what they may be, and how rows are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from .config import Config, Problem, Shape
from .errors import ConfigError, TableError

Range = tuple[int, int]
VERDICTS = ("tuned wins", "default wins")

_POSITIVE = ("a number > 0", lambda v: _finite(v) and v > 0)
_NOT_NEGATIVE = ("a number >= 0", lambda v: _finite(v) and v >= 0)
_COUNT = ("an integer >= 0", lambda v: type(v) is int and v >= 0)
_COUNT_OR_NULL = ("an integer >= 0 or null", lambda v: v is None or (type(v) is int and v >= 0))
_TEXT = ("a text", lambda v: isinstance(v, str) and v != "")
_FIELDS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "perf": {
        **dict.fromkeys(("median_ms", "default_ms", "speedup", "speedup_low", "speedup_high"), _POSITIVE),
        "spread": _NOT_NEGATIVE,
        "verdict": (" or ".join(VERDICTS), lambda v: v in VERDICTS),
    },
    "resources": {"shared": _COUNT, "registers": _COUNT_OR_NULL, "spills": _COUNT_OR_NULL},
    "correctness": {"max_rel_err": _NOT_NEGATIVE, "reference": _TEXT, "cases": _COUNT},
    "environment": {},
}
_NAMES = ("key", "seqlen", "batch_heads", "config", *_FIELDS, "source_digest", "date", "measured_by")


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def canonical(value: Any) -> str:
    """JSON on one line, keys sorted; raises TableError for what is not plain finite JSON."""
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TableError(f"not plain finite JSON: {error}") from error


@dataclass(frozen=True)
class Row:
    """One measured result: for which problem and shapes, which config, how fast, and on what evidence.

    Args:
        problem: kernel and exact key.
        seqlen: first and last longest-sequence length it holds for, both included.
        batch_heads: the same for sequences times KV heads.
        config: the winner's knobs (the default's where ``perf["verdict"]`` is ``default wins``).
        perf: ``median_ms``, ``spread`` (p80 - p20, over the median), ``default_ms``, ``speedup`` over the default with its confidence
            interval ``speedup_low … speedup_high``, ``verdict``.
        resources: ``shared`` bytes a block, ``registers`` a thread, ``spills`` in bytes: the largest over the kernel's functions.
        correctness: ``max_rel_err`` against ``reference`` over ``cases`` cases.
        environment: versions of ``triton torch driver python`` and the ``device`` name.
        source_digest: ``render.Source.digest`` of what was measured.
        date: ISO 8601, UTC unless it says otherwise.
        measured_by: free text: who or what measured it.
        extra: further fields of the row, kept as they are.

    Raises:
        TableError: a field is missing or has an impossible value.
    """

    problem: Problem
    seqlen: Range
    batch_heads: Range
    config: Config
    perf: Mapping[str, Any] = field(hash=False)
    resources: Mapping[str, Any] = field(hash=False)
    correctness: Mapping[str, Any] = field(hash=False)
    environment: Mapping[str, Any] = field(hash=False)
    source_digest: str
    date: str
    measured_by: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("seqlen", "batch_heads"):
            span = getattr(self, name)
            if not (isinstance(span, tuple) and len(span) == 2 and all(type(v) is int for v in span) and 1 <= span[0] <= span[1]):
                raise TableError(f"{name} must be [first, last] with 1 <= first <= last, got {span!r}")
        for what in ("problem", "config"):
            values = getattr(self, what).as_dict()
            wrong = [name for name, value in values.items() if not isinstance(value, int | str | None)]
            if wrong:
                raise TableError(f"{what}: {wrong[0]} must be an integer, text, boolean or null, got {values[wrong[0]]!r}")
        if self.config.kernel != self.problem.kernel:
            raise TableError(f"a config of {self.config.kernel} in a row of {self.problem.kernel}")
        for group, fields in _FIELDS.items():
            given = getattr(self, group)
            if not isinstance(given, Mapping):
                raise TableError(f"{group} must be an object, got {given!r}")
            for name, (rule, holds) in fields.items():
                if name not in given or not holds(given[name]):
                    raise TableError(f"{group}.{name} must be {rule}, got {given.get(name, 'nothing')!r}")
        if not self.perf["speedup_low"] <= self.perf["speedup"] <= self.perf["speedup_high"]:
            raise TableError("perf: needs speedup_low <= speedup <= speedup_high")
        if set(self.extra) & set(_NAMES):
            raise TableError(f"extra: {sorted(set(self.extra) & set(_NAMES))[0]!r} is a field of its own")
        if not (isinstance(self.source_digest, str) and self.source_digest and isinstance(self.measured_by, str)):
            raise TableError("source_digest must be a text that is not empty, measured_by a text")
        try:
            _when(self.date)
        except (TypeError, ValueError):
            raise TableError(f"date must be ISO 8601, got {self.date!r}") from None

    @classmethod
    def from_dict(cls, kernel: str, data: Any) -> Row:
        """A row from its JSON object; raises TableError."""
        if not isinstance(data, dict):
            raise TableError(f"a row must be an object, got {data!r}")
        missing = [name for name in _NAMES if name not in data]
        if missing:
            raise TableError(f"a row lacks {', '.join(missing)}")
        if not isinstance(data["key"], dict) or not isinstance(data["config"], dict):
            raise TableError("key and config must be objects")
        try:
            problem = Problem.of(kernel, data["key"])
        except ConfigError as error:
            raise TableError(str(error)) from error
        spans = {n: tuple(data[n]) if isinstance(data[n], list) else data[n] for n in ("seqlen", "batch_heads")}
        plain = {name: data[name] for name in (*_FIELDS, "source_digest", "date", "measured_by")}
        extra = {name: value for name, value in data.items() if name not in _NAMES}
        return cls(problem=problem, config=Config.of(kernel, data["config"]), extra=extra, **spans, **plain)

    def to_dict(self) -> dict[str, Any]:
        """The row as a JSON object; :meth:`from_dict` takes it back."""
        plain = {name: getattr(self, name) for name in ("source_digest", "date", "measured_by")}
        groups = {name: dict(getattr(self, name)) for name in _FIELDS}
        spans = {"seqlen": list(self.seqlen), "batch_heads": list(self.batch_heads)}
        return {"key": self.problem.as_dict(), "config": self.config.as_dict(), **spans, **groups, **plain, **self.extra}

    def holds(self, shape: Shape) -> bool:
        """Whether ``shape`` lies in the row's ranges."""
        spans = (self.seqlen, shape.seqlen), (self.batch_heads, shape.batch_heads)
        return all(low <= value <= high for (low, high), value in spans)

    def distance(self, shape: Shape) -> tuple[bool, int, int]:
        """How far ``shape`` is from the ranges: outside at all, then octaves in seqlen, then octaves in batch_heads."""
        return (not self.holds(shape), _octaves(self.seqlen, shape.seqlen), _octaves(self.batch_heads, shape.batch_heads))

    @cached_property
    def rank(self) -> tuple[datetime, float, str]:
        """Order of preference where rows compete for one shape: the newer, then the higher lower bound of the speed-up; the rest of the
        row settles what is left, so that the order of merging never matters."""
        return (_when(self.date), self.perf["speedup_low"], self.identity)

    @cached_property
    def identity(self) -> str:
        """All of the row but its ranges."""
        return canonical({k: v for k, v in self.to_dict().items() if k not in ("seqlen", "batch_heads")})

    @cached_property
    def place(self) -> tuple[Any, ...]:
        """Where it stands in a file: by key, numbers as numbers, then ranges. Rows of one place follow their ``identity``."""
        return (*(_sortable(value) for _, value in self.problem.values), self.batch_heads, self.seqlen)

    def __str__(self) -> str:
        key = " ".join(f"{k}={v}" for k, v in self.problem.values)
        knobs = " ".join(f"{k}={v}" for k, v in self.config.values)
        return f"{self.problem.kernel} [{key}] {self.where}: {knobs}"

    @property
    def where(self) -> str:
        """The ranges in words: ``seqlen 4096-8191, batch_heads 1-8``."""
        spans = (("seqlen", self.seqlen), ("batch_heads", self.batch_heads))
        return ", ".join(f"{name} {low}" if low == high else f"{name} {low}-{high}" for name, (low, high) in spans)


def _when(date: str) -> datetime:
    when = datetime.fromisoformat(date)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _octaves(span: Range, value: int) -> int:
    low, high = (edge.bit_length() for edge in span)
    return max(low - value.bit_length(), value.bit_length() - high, 0)


def _sortable(value: Any) -> tuple[int, Any]:
    return (0, 0) if value is None else (2, value) if isinstance(value, str) else (1, value)
