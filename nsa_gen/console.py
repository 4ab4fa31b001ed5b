"""How the command line prints tables, JSON and progress, and reads lengths, times and lists."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from .geometry import TuneShape


def emit(data: Any) -> None:
    print(json.dumps(data, indent=1, sort_keys=True, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def progress(quiet: bool = False) -> Progress:
    """A bar on stderr: what is done, of how many, and the time left. Nothing where stderr is no terminal, or if ``quiet``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty(), transient=True)


def split(values: Iterable[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def lengths(values: Iterable[str] | None) -> list[int]:
    """``8192`` and ``8k``."""
    return [_count(text, text, "a positive number, or one with k (64k is 65536)") for text in split(values)]


def shapes(values: Iterable[str] | None) -> list[TuneShape]:
    """``64k``, and ``32x64k``: 32 sequences of as many tokens."""
    from .geometry import TuneShape

    found = []
    for text in split(values):
        batch, times, seqlen = text.rpartition("x")
        rule = "positive numbers, LENGTH or BATCHxLENGTH, with or without k (32x64k is 32 sequences of 65536)"
        found.append(TuneShape(batch=_count(batch if times else "1", text, rule), seqlen=_count(seqlen, text, rule)))
    return found


def _count(number: str, text: str, rule: str) -> int:
    digits, factor = (number[:-1], 1024) if number[-1:] in ("k", "K") else (number, 1)
    if not digits.isdecimal() or int(digits) < 1:
        raise InputError(f"--seqlen: got {text!r}, allowed: {rule}")
    return int(digits) * factor


def seconds(text: str | None) -> float | None:
    """``90``, ``90s``, ``5m`` or ``2h`` in seconds."""
    if text is None:
        return None
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        value = float(text[:-1] if factor else text) * (factor or 1)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise InputError(f"--budget: got {text!r}, allowed: a time such as 90s, 5m, 2h")
    return value


def kernel_names(values: Iterable[str] | None) -> list[str] | None:
    from .config import key_fields

    names = split(values)
    for name in names:
        key_fields(name)
    return names or None
