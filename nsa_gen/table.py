"""Tuned tables: reading and writing one file, merging, comparing and linting; the user's own entries.

``tuned/<device slug>/<kernel>.json`` is plain JSON: keys sorted, one row a line, and last a sha256 over every byte before it. A file is
written whole or not at all. A file that is torn, edited or of another schema is an error to :meth:`Table.load` and a miss with one
warning to :func:`read`, which is what a running program uses. Which row serves a call is decided in ``nsa_gen.lookup``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import paths, space
from .config import Config, Problem, Shape
from .errors import ConfigError, TableError, allowed
from .row import Range, Row, canonical

SCHEMA = 1
#: What ``Row.environment`` must name for a table to pass :meth:`Table.lint`.
ENVIRONMENT = ("triton", "torch", "driver", "device", "python")
#: A win below this is noise: the row must say ``default wins``.
LEAST_SPEEDUP = 1.02

DigestOf = Callable[[Problem, Config], str]
log = logging.getLogger("nsa_gen")


@dataclass(frozen=True)
class MergeReport:
    """What :meth:`Table.merge` did, row by row; ``str()`` gives one line for each.

    ``added``: only in the other table, now in the result. ``replaced``: left with no shape of its own, so no longer in the result.
    ``trimmed``: kept for part of its shapes. ``kept``: as it was.
    """

    added: tuple[Row, ...] = ()
    replaced: tuple[Row, ...] = ()
    trimmed: tuple[Row, ...] = ()
    kept: tuple[Row, ...] = ()

    def __str__(self) -> str:
        named = (("added", self.added), ("replaced", self.replaced), ("trimmed", self.trimmed))
        return "\n".join([f"{word}: {row}" for word, rows in named for row in rows] + [f"{len(self.kept)} kept"])


@dataclass(frozen=True)
class Change:
    """One difference between two tables: ``before`` or ``after`` is None where the row is in one of them only."""

    before: Row | None
    after: Row | None

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"+ {self.after}" if self.before is None else f"- {self.before}"
        old, new = self.before.to_dict(), self.after.to_dict()
        names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        return f"~ {self.before}: " + "; ".join(f"{n} {canonical(old.get(n))} -> {canonical(new.get(n))}" for n in names)


@dataclass(frozen=True)
class Table:
    """The rows of one kernel on one device, kept sorted by key and ranges."""

    device_slug: str
    kernel: str
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        strange = [row for row in self.rows if row.problem.kernel != self.kernel]
        if strange:
            raise TableError(f"a row of {strange[0].problem.kernel} in a table of {self.kernel}")
        if not all(before.place < after.place for before, after in pairwise(self.rows)):
            object.__setattr__(self, "rows", tuple(sorted(self.rows, key=_order)))

    def of(self, problem: Problem) -> tuple[Row, ...]:
        """The rows of one key."""
        return self._by_problem.get(problem, ())

    @cached_property
    def _by_problem(self) -> dict[Problem, tuple[Row, ...]]:
        found: dict[Problem, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.problem, []).append(row)
        return {problem: tuple(rows) for problem, rows in found.items()}

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read a file; every fault is an error that names it (see :func:`read` for run time).

        Raises:
            TableError: unreadable, torn, edited, another schema or an impossible row.
        """
        try:
            return cls.loads(Path(path).read_bytes())
        except OSError as error:
            raise TableError(f"{path}: {error.strerror or error}") from error
        except TableError as error:
            raise TableError(f"{path}: {error}") from error

    @classmethod
    def loads(cls, data: bytes) -> Table:
        """The table of a file's bytes; raises TableError."""
        body, mark, tail = data.rpartition(_SHA)
        if not mark or tail != hashlib.sha256(body).hexdigest().encode() + _END:
            raise TableError("torn or edited: the content does not match its sha256; restore the file or write it anew from its rows")
        try:
            content = json.loads(data)
            schema, slug, kernel, rows = (content[name] for name in ("schema", "device", "kernel", "rows"))
            numbered = list(enumerate(rows, 1))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TableError(f"not a table: {type(error).__name__}: {error}") from error
        if schema != SCHEMA:
            raise TableError(f"schema: {allowed(schema, [SCHEMA])}")
        if not isinstance(slug, str) or not isinstance(kernel, str):
            raise TableError("device and kernel must be texts")
        found = []
        for number, row in numbered:
            try:
                found.append(Row.from_dict(kernel, row))
            except TableError as error:
                raise TableError(f"row {number}: {error}") from error
        return cls(slug, kernel, tuple(found))

    def dumps(self) -> str:
        """Canonical text: the same rows give the same bytes in whatever order they came."""
        rows = ",\n".join(canonical(row.to_dict()) for row in self.rows)
        head = f'{{\n"device": {canonical(self.device_slug)},\n"kernel": {canonical(self.kernel)},\n'
        body = f'{head}"rows": [\n{rows}{chr(10) if rows else ""}],\n"schema": {SCHEMA},\n'
        return body + (_SHA + hashlib.sha256(body.encode()).hexdigest().encode() + _END).decode()

    def save(self, path: Path) -> None:
        """Write atomically; raises CacheError where that is impossible."""
        paths.write_atomic(Path(path), self.dumps())

    def merge(self, other: Table) -> tuple[Table, MergeReport]:
        """Both tables' rows with every overlap resolved: each shape belongs to the row of the highest :attr:`Row.rank` among those that
        held it (the newer; on the same date, the one with the higher ``speedup_low``). A row that loses part of its shapes is trimmed
        to the rest. So the result is commutative, associative and idempotent.

        Raises:
            TableError: the tables are of two devices or kernels.
        """
        if (self.device_slug, self.kernel) != (other.device_slug, other.kernel):
            raise TableError(f"cannot merge {other.device_slug}/{other.kernel} into {self.device_slug}/{self.kernel}")
        merged: list[Row] = []
        outcome: dict[str, list[Row]] = {"added": [], "replaced": [], "trimmed": [], "kept": []}
        ours = {row.identity for row in self.rows}
        for problem in {**self._by_problem, **other._by_problem}:
            for row, before, after in _resolve_overlaps([*self.of(problem), *other.of(problem)]):
                merged += after
                if not after:
                    outcome["replaced"].append(row)
                elif sum(map(_area, after)) < before:
                    outcome["trimmed"].append(row)
                else:
                    outcome["kept" if row.identity in ours else "added"] += after
        return Table(self.device_slug, self.kernel, tuple(merged)), MergeReport(**{k: tuple(v) for k, v in outcome.items()})

    def diff(self, after: Table) -> list[Change]:
        """Rows gone, new or changed from this table to ``after``, matched by key and ranges, in file order."""

        def place(row: Row) -> tuple[Any, ...]:
            return row.problem, row.seqlen, row.batch_heads

        old: dict[Any, list[Row | None]] = {}
        new: dict[Any, list[Row | None]] = {}
        for rows, places in ((self.rows, old), (after.rows, new)):
            for row in rows:
                places.setdefault(place(row), []).append(row)
        found = []
        for where in dict.fromkeys(place(row) for row in sorted((*self.rows, *after.rows), key=_order)):
            left = [row for row in old.get(where, []) if row not in new.get(where, [])]
            right = [row for row in new.get(where, []) if row not in old.get(where, [])]
            size = max(len(left), len(right))
            pairs = zip(left + [None] * (size - len(left)), right + [None] * (size - len(right)), strict=True)
            found += [Change(before, now) for before, now in pairs]
        return found

    def lint(self, *, digest_of: DigestOf | None = None, shared_bytes: int | None = None) -> list[str]:
        """What is wrong with the rows, one line each; empty when nothing is.

        Args:
            digest_of: the digest of what rendering gives today; a row of another digest is stale.
            shared_bytes: the device's shared memory a block.
        """
        found = []
        for number, row in enumerate(self.rows, 1):
            for fault in self._faults(row, digest_of, shared_bytes):
                found.append(f"{self.device_slug}/{self.kernel} row {number}: {fault}")
            for other, later in enumerate(self.rows[number:], number + 1):
                if row.problem == later.problem and _meet(row.seqlen, later.seqlen) and _meet(row.batch_heads, later.batch_heads):
                    found.append(f"{self.device_slug}/{self.kernel} rows {number} and {other}: overlap, both hold shapes in {row.where}")
        return found

    @staticmethod
    def _faults(row: Row, digest_of: DigestOf | None, shared_bytes: int | None) -> Iterator[str]:
        try:
            space.check(row.problem, row.config)
        except ConfigError as error:
            yield f"illegal config: {error}"
        else:
            if digest_of is not None and (now := digest_of(row.problem, row.config)) != row.source_digest:
                yield f"stale: measured source {row.source_digest}, rendering gives {now}"
        absent = [name for name in ENVIRONMENT if not row.environment.get(name)]
        if absent:
            yield f"environment lacks {', '.join(absent)}"
        if shared_bytes is not None and row.resources["shared"] > shared_bytes:
            yield f"needs {row.resources['shared']} bytes of shared memory, the device has {shared_bytes}"
        if not row.correctness["cases"]:
            yield "correctness: no case was checked"
        wins = row.perf["speedup_low"] > 1 and row.perf["speedup"] >= LEAST_SPEEDUP
        if row.perf["verdict"] == "tuned wins" and not wins:
            yield f"'tuned wins' needs speedup_low > 1 and speedup >= {LEAST_SPEEDUP}"


_SHA, _END = b'"sha256": "', b'"\n}\n'


def _order(row: Row) -> tuple[Any, ...]:
    return (*row.place, row.identity)


def _meet(a: Range, b: Range) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def _area(row: Row) -> int:
    return (row.seqlen[1] - row.seqlen[0] + 1) * (row.batch_heads[1] - row.batch_heads[0] + 1)


def _resolve_overlaps(rows: list[Row]) -> Iterator[tuple[Row, int, list[Row]]]:
    """For each distinct row of one problem: itself, the number of shapes it held, and the rows that cover what it keeps.

    Shapes are cells of the grid that all range edges cut; a cell belongs to the row of the highest rank. What a row keeps is given back
    as maximal runs along batch_heads of maximal runs along seqlen, a form that depends on the kept shapes only.
    """
    seqlens, heads = (sorted({e for r in rows for e in (getattr(r, n)[0], getattr(r, n)[1] + 1)}) for n in ("seqlen", "batch_heads"))
    same: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.rank, reverse=True):
        same.setdefault(row.identity, []).append(row)
    free = [[True] * (len(heads) - 1) for _ in seqlens[1:]]
    for alike in same.values():
        held, columns = 0, []
        for i, first in enumerate(seqlens[:-1]):
            mine = [any(r.holds(Shape(first, h)) for r in alike) for h in heads[:-1]]
            held += (seqlens[i + 1] - first) * sum(heads[j + 1] - h for j, h in enumerate(heads[:-1]) if mine[j])
            columns.append(tuple(m and f for m, f in zip(mine, free[i], strict=True)))
            free[i] = [f and not m for m, f in zip(mine, free[i], strict=True)]
        kept = []
        for low, high, column in _runs(columns):
            for start, stop, taken in _runs(column):
                if taken:
                    span = (seqlens[low], seqlens[high] - 1), (heads[start], heads[stop] - 1)
                    kept.append(replace(alike[0], seqlen=span[0], batch_heads=span[1]))
        yield alike[0], held, kept


def _runs(values: Iterable[Any]) -> list[tuple[int, int, Any]]:
    """Maximal runs of equal values: ``(start, stop, value)``."""
    found: list[tuple[int, int, Any]] = []
    for index, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], index + 1, value)
        else:
            found.append((index, index + 1, value))
    return found


# --- files at run time ---------------------------------------------------------------------------------------------------------

_parsed: dict[Path, tuple[tuple[int, int, int], Table | None]] = {}


def shipped_path(device_slug: str, kernel: str) -> Path:
    """Where the shipped table of a kernel on a device is."""
    return paths.tuned() / device_slug / f"{kernel}.json"


def user_folder(device_slug: str, kernel: str) -> Path:
    """Folder of the user's entries for a kernel on a device."""
    return paths.cache() / "tuned" / device_slug / kernel


def read(path: Path, device_slug: str, kernel: str) -> Table | None:
    """A table at run time: None if there is none, or if it is torn, edited or of another device or kernel (one warning, no error).

    A file is parsed once and again only when it changes.
    """
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _warn_once(f"{path}: {error.strerror or error}: ignored")
        return None
    state = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    known = _parsed.get(path)
    if known is None or known[0] != state:
        table = None
        try:
            table = Table.load(path)
            if (table.device_slug, table.kernel) != (device_slug, kernel):
                raise TableError(f"{path}: says it is of {table.device_slug}/{table.kernel}, not {device_slug}/{kernel}")
        except TableError as error:
            table = None
            log.warning("%s: ignored", error)
        known = _parsed[path] = (state, table)
    return known[1]


def shipped_tables(device_slug: str, kernel: str) -> list[Table]:
    """The shipped table of a kernel on a device; none if there is no sound one."""
    table = read(shipped_path(device_slug, kernel), device_slug, kernel)
    return [table] if table else []


def user_tables(device_slug: str, kernel: str) -> list[Table]:
    """The user's entries, a table of one row each, but for those that are not sound."""
    folder = user_folder(device_slug, kernel)
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".json"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _warn_once(f"{folder}: {error.strerror or error}: ignored")
        return []
    return [table for name in names if (table := read(folder / name, device_slug, kernel))]


def save_user_row(device_slug: str, row: Row) -> Path:
    """Add a row to the user's entries: one file, named by its content, so writers at the same time lose nothing.

    Returns:
        the file's path.

    Raises:
        CacheError: the cache cannot be written.
    """
    table = Table(device_slug, row.problem.kernel, (row,))
    name = f"{row.problem.digest}-{hashlib.sha256(table.dumps().encode()).hexdigest()[:16]}.json"
    path = user_folder(device_slug, row.problem.kernel) / name
    table.save(path)
    return path


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        log.warning(message)
