"""``nsa-gen table``: the commands on tables of tuned configs, and options that other commands have too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console

table_app = typer.Typer(no_args_is_help=True, help="Tables of tuned configs.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Kernels = Annotated[list[str] | None, typer.Option("--kernels", "-k", help="Only these kernels (again for more, or comma-separated).")]


@table_app.command("show")
def table_show(
    where: Annotated[str | None, typer.Argument(metavar="[DEVICE|FILE|FOLDER]", help="Default: every shipped table.")] = None,
    kernels: Kernels = None,
    as_json: Json = False,
) -> None:
    """Rows of tuned tables."""
    from . import tables

    found = tables.select(tables.load(where), console.kernel_names(kernels))
    if as_json:
        return console.emit([{"device": t.device_slug, "kernel": t.kernel, "rows": [row.to_dict() for row in t.rows]} for t in found])
    for table in found:
        console.print_table(*tables.rows(table), title=f"{table.device_slug}/{table.kernel}")
    if not found:
        print(f"no tables in {where or tables.shipped()}")


@table_app.command("diff")
def table_diff(before: Path, after: Path, as_json: Json = False) -> None:
    """What changed between two table files or folders; exit 1 if anything did."""
    from . import tables

    changes = tables.diff(before, after)
    if as_json:
        console.emit([{"table": name, "change": str(change)} for name, change in changes])
    else:
        for name, change in changes:
            print(f"{name}: {change}")
    if changes:
        raise typer.Exit(1)


@table_app.command("merge")
def table_merge(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Table files or folders.")],
    into: Annotated[Path | None, typer.Option("--into", help="Folder to merge into (default: the shipped tables).")] = None,
    as_json: Json = False,
) -> None:
    """Merge tables: the newer row wins each shape; nothing is lost unsaid."""
    from . import tables

    reports = tables.merge(sources, into)
    if as_json:
        return console.emit(
            {name: {k: [str(r) for r in getattr(rep, k)] for k in ("added", "replaced", "trimmed", "kept")} for name, rep in reports}
        )
    for name, report in reports:
        print(f"{name}:\n{report}")


@table_app.command("lint")
def table_lint(
    where: Annotated[str | None, typer.Argument(metavar="[DEVICE|FILE|FOLDER]", help="Default: every shipped table.")] = None,
    as_json: Json = False,
) -> None:
    """Check tables: schema, sha, overlaps, legal configs, stale digests, evidence; exit 1 if something is wrong."""
    from . import tables

    faults = tables.lint(where)
    if as_json:
        console.emit(faults)
    else:
        print("\n".join(faults) if faults else "ok")
    if faults:
        raise typer.Exit(1)
