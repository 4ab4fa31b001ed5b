"""How a run shows: bars on a terminal, plain lines elsewhere, nothing when silent."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


def kinds(failures: dict[str, int]) -> str:
    """``3 failed (2 compile, 1 hang)``, or an empty text."""
    if not failures:
        return ""
    return f"{sum(failures.values())} failed ({', '.join(f'{n} {kind}' for kind, n in sorted(failures.items()))})"


class Silent:
    """Shows nothing; the interface of the others.

    ``begin`` and ``end`` frame a stage (a search or the finals of a problem), ``advance`` counts one trial or final of it.
    """

    def start(self, total: int, budget_s: float | None) -> None:
        """``total`` trials and finals are planned."""

    def begin(self, label: str, total: int) -> None: ...

    def advance(self, best_ms: float | None, speedup: float | None, failures: dict[str, int]) -> None: ...

    def end(self, message: str = "") -> None: ...

    def note(self, message: str) -> None: ...

    def stop(self) -> None: ...


class Lines(Silent):
    """One line a stage, and one every ten seconds within it."""

    def __init__(self, file: TextIO | None = None):
        self._file = file or sys.stderr
        self._label, self._total, self._done, self._last, self._begun = "", 0, 0, 0.0, 0.0

    def begin(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._last = self._begun = time.monotonic()

    def advance(self, best_ms: float | None, speedup: float | None, failures: dict[str, int]) -> None:
        self._done += 1
        self._text = _status(best_ms, speedup, failures)
        if time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            self.note(f"{self._label}: {self._done}/{self._total} {self._text}")

    def end(self, message: str = "") -> None:
        if self._done:
            text = message or f"{self._done}/{self._total} {self._text}"
            self.note(f"{self._label}: {text} [{_clock(time.monotonic() - self._begun)}]")

    def note(self, message: str) -> None:
        print(message.rstrip(), file=self._file, flush=True)


def _status(best_ms: float | None, speedup: float | None, failures: dict[str, int]) -> str:
    parts = [
        f"best {best_ms:.4g} ms" if best_ms is not None else "",
        f"{speedup:.2f}x default" if speedup is not None else "",
        kinds(failures),
    ]
    return ", ".join(part for part in parts if part)


class Bars(Silent):
    """Two bars: the stage at hand, and all of the run with the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
        )
        self._budget: float | None = None

    def start(self, total: int, budget_s: float | None) -> None:
        self._begun, self._budget, self._total, self._done = time.monotonic(), budget_s, total, 0
        self._all = self._progress.add_task("all", total=total, status="")
        self._stage: Any = None
        self._progress.start()

    def begin(self, label: str, total: int) -> None:
        self._expected, self._advanced = total, 0
        self._stage = self._progress.add_task(label, total=total, status="")

    def advance(self, best_ms: float | None, speedup: float | None, failures: dict[str, int]) -> None:
        self._advanced += 1
        self._done += 1
        self._progress.update(self._stage, advance=1, status=_status(best_ms, speedup, failures))
        self._progress.update(self._all, advance=1, status=self._left())

    def _left(self) -> str:
        elapsed = time.monotonic() - self._begun
        left = elapsed / max(self._done, 1) * max(self._total - self._done, 0)
        if self._budget is not None:
            left = min(left, self._budget - elapsed)
        return f"{_clock(left)} left"

    def end(self, message: str = "") -> None:
        if self._stage is None:
            return
        skipped = max(self._expected - self._advanced, 0)  # a stage that ended early leaves less to do
        self._total = max(self._total - skipped, self._done)
        self._progress.update(self._all, total=self._total, status=self._left())
        self._progress.remove_task(self._stage)
        self._stage = None

    def note(self, message: str) -> None:
        self._progress.console.print(message, highlight=False, markup=False)

    def stop(self) -> None:
        self._progress.stop()


def make(shown: bool | Silent) -> Silent:
    """Bars on a terminal, lines elsewhere; ``False`` shows nothing; an object of this module's interface is taken as it is."""
    if isinstance(shown, Silent):
        return shown
    if not shown:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()
