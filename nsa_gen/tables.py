"""What ``nsa-gen table`` and ``nsa-gen report`` do with folders of tables: find, compare, merge, lint, and tell what tuning gained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import device as devices
from . import paths
from .config import Config, Problem
from .errors import TableError, TargetError
from .render import render
from .row import Row
from .table import Change, MergeReport, Table


def shipped() -> Path:
    """Folder of the shipped tables."""
    return paths.tuned()


def files(where: str | Path | None) -> list[Path]:
    """Table files of a device (slug or alias), a file, a folder (of one device or of several), or the shipped tables (None).

    Raises:
        TableError: there is nothing of that name.
    """
    if where is None:
        return sorted(shipped().glob("*/*.json"))
    path = Path(where)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted({*path.glob("*.json"), *path.glob("*/*.json")})
    try:
        return sorted((shipped() / devices.from_name(str(where)).slug).glob("*.json"))
    except TargetError as error:
        raise TableError(f"no table file, folder or device {str(where)!r}: {error}") from error


def load(where: str | Path | None) -> list[Table]:
    """Tables of :func:`files`, strictly read; raises TableError."""
    return [Table.load(path) for path in files(where)]


def select(tables: Iterable[Table], kernels: Sequence[str] | None) -> list[Table]:
    """The tables of these kernels (None: of all)."""
    return [table for table in tables if kernels is None or table.kernel in kernels]


def rows(table: Table) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows to print."""
    columns = ("key", "seqlen", "batch_heads", "config", "ms", "speed-up over default", "shared", "registers", "spills")
    return columns, [
        (
            _pairs(row.problem), _span(row.seqlen), _span(row.batch_heads), _pairs(row.config), f"{row.perf['median_ms']:.4g}", _gain(row),
            row.resources["shared"], row.resources["registers"], row.resources["spills"],
        )
        for row in table.rows
    ]  # fmt: skip


def _pairs(named: Problem | Config) -> str:
    return " ".join(f"{name}={value}" for name, value in named.values)


def _span(span: tuple[int, int]) -> str:
    return str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"


def _gain(row: Row) -> str:
    if row.perf["verdict"] == "default wins":
        return "default wins"
    return f"{row.perf['speedup']:.3f} [{row.perf['speedup_low']:.3f}, {row.perf['speedup_high']:.3f}]"


def diff(before: Path, after: Path) -> list[tuple[str, Change]]:
    """What changed from one file or folder to another, with the table's name (``device/kernel``).

    Raises:
        TableError: a table cannot be read.
    """
    sides = [{(t.device_slug, t.kernel): t for t in load(path)} for path in (before, after)]
    found = []
    for slug, kernel in sorted({*sides[0], *sides[1]}):
        none = Table(slug, kernel)
        old, new = (side.get((slug, kernel), none) for side in sides)
        found += [(f"{slug}/{kernel}", change) for change in old.diff(new)]
    return found


def merge(sources: Iterable[Path], into: Path | None) -> list[tuple[str, MergeReport]]:
    """Merge tables into a folder ``<device>/<kernel>.json``; files are rewritten whole, only where something changed.

    Returns:
        for each table its name and what happened to each row.

    Raises:
        TableError: a table cannot be read.
        CacheError: the folder cannot be written.
    """
    folder = into or shipped()
    reports = []
    for table in (table for source in sources for table in load(source)):
        path = folder / table.device_slug / f"{table.kernel}.json"
        old = Table.load(path) if path.exists() else Table(table.device_slug, table.kernel)
        merged, report = old.merge(table)
        if merged != old or not path.exists():
            merged.save(path)
        reports.append((f"{table.device_slug}/{table.kernel}", report))
    return reports


def lint(where: str | Path | None) -> list[str]:
    """Everything wrong with the tables, one line each; a file that cannot be read is one of them."""
    found = []
    for path in files(where):
        try:
            table = Table.load(path)
        except TableError as error:
            found.append(str(error))
            continue
        if path.parent.parent.name == "tuned" and (path.parent.name, path.stem) != (table.device_slug, table.kernel):
            found.append(f"{path}: is of {table.device_slug}/{table.kernel}, so it is never read from here")
        try:
            shared = devices.from_name(table.device_slug).shared_bytes
        except TargetError:
            shared = None  # a GPU without a name here: its own rows are all there is to know
        found += table.lint(digest_of=_digest, shared_bytes=shared)
    return found


@lru_cache(maxsize=4096)
def _digest(problem: Problem, config: Config) -> str:
    return render(problem, config).digest


def gains(tables: Iterable[Table]) -> list[dict[str, Any]]:
    """For each row: what was measured of the winner against the default."""
    return [
        {
            "device": table.device_slug,
            "kernel": table.kernel,
            "key": row.problem.as_dict(),
            "seqlen": list(row.seqlen),
            "batch_heads": list(row.batch_heads),
            "config": row.config.as_dict(),
            **{name: row.perf[name] for name in ("median_ms", "default_ms", "speedup", "speedup_low", "speedup_high", "verdict")},
        }
        for table in tables
        for row in table.rows
    ]


def markdown(tables: Sequence[Table]) -> str:
    """A Markdown report: a summary line and one table of rows for each kernel of each device."""
    lines = ["# Tuned configs against the defaults", ""]
    if not any(table.rows for table in tables):
        return "\n".join([*lines, "No tuned rows.", ""])
    for slug in dict.fromkeys(table.device_slug for table in tables):
        lines += [f"## {slug}", "", "| kernel | rows | tuned wins | median speed-up | best |", "|---|---|---|---|---|"]
        mine = [table for table in tables if table.device_slug == slug and table.rows]
        for table in mine:
            speedups = sorted(_speedup(row) for row in table.rows)
            won = sum(row.perf["verdict"] == "tuned wins" for row in table.rows)
            middle = (speedups[(len(speedups) - 1) // 2] + speedups[len(speedups) // 2]) / 2
            lines.append(f"| {table.kernel} | {len(speedups)} | {won} | {middle:.2f} | {speedups[-1]:.2f} |")
        for table in mine:
            lines += ["", f"### {table.kernel}", "", "| key | seqlen | batch_heads | config | ms | default ms | speed-up [95 %] |"]
            lines.append("|---|---|---|---|---|---|---|")
            for row in table.rows:
                cells = _pairs(row.problem), _span(row.seqlen), _span(row.batch_heads), _pairs(row.config)
                lines.append(f"| {' | '.join(cells)} | {row.perf['median_ms']:.4g} | {row.perf['default_ms']:.4g} | {_gain(row)} |")
        lines.append("")
    return "\n".join(lines)


def _speedup(row: Row) -> float:
    return row.perf["speedup"] if row.perf["verdict"] == "tuned wins" else 1.0


def plot(tables: Sequence[Table], path: Path) -> None:
    """Speed-up over the default against sequence length, one panel a kernel; needs matplotlib.

    Raises:
        TableError: there are no rows to draw.
    """
    from matplotlib.figure import Figure

    drawn = [table for table in tables if table.rows]
    if not drawn:
        raise TableError("no tuned rows to draw; tune first: nsa-gen tune SPEC")
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * lines), layout="constrained")
    for number, table in enumerate(drawn, 1):
        axes = figure.add_subplot(lines, columns, number, title=f"{table.kernel}\n{table.device_slug}", xlabel="sequence length")
        axes.set_xscale("log", base=2)
        axes.axhline(1.0, color="0.6", linewidth=0.8)
        for line in dict.fromkeys((row.problem, row.batch_heads) for row in table.rows):
            mine = sorted((row for row in table.rows if (row.problem, row.batch_heads) == line), key=lambda row: row.seqlen)
            axes.plot([row.seqlen[0] for row in mine], [_speedup(row) for row in mine], marker="o", markersize=3)
        axes.set_ylabel("speed-up over default")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
