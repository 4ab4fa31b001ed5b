"""Figures from the JSON files of runs; a line is the mean over seeds, a band what lies between the lowest and the highest seed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Points = list[tuple[float, float]]
COLOURS = {"nsa": "tab:blue", "full": "tab:orange"}
NAMES = {"nsa": "NSA", "full": "full attention"}


def language(records: list[Record], path: Path) -> None:
    """Loss and accuracy against tokens, lengths marked, and the final accuracy at each length.

    Raises:
        SystemExit: no runs.
    """
    runs = _grouped(records, lambda record: record["config"]["attention"])
    figure = _figure(13, 4)
    loss, accuracy, final = figure.subplots(1, 3)
    for attention, group in runs.items():
        style = {"color": COLOURS[attention], "label": f"{NAMES[attention]}, {_seeds(group)}"}
        _band(loss, [_curve(record, "loss") for record in group], **style)
        for task, dash in zip(group[0]["evaluations"][0]["tasks"] if group[0]["evaluations"] else (), ("-", "--"), strict=False):
            curves = [[(_tokens(record, row["step"]), row["tasks"][task]["accuracy"]) for row in record["evaluations"]] for record in group]
            _band(accuracy, curves, linestyle=dash, **{**style, "label": f"{NAMES[attention]}, {task}"})
            done = [record["result"]["final"] for record in group if record["finished"]]
            curves = [[(int(length), found[task]["accuracy"]) for length, found in result.items()] for result in done]
            _band(final, curves, linestyle=dash, marker="o", markersize=4, **{**style, "label": f"{NAMES[attention]}, {task}"})
    for axes in (loss, accuracy):
        for tokens, length in _changes(next(iter(runs.values()))[0]):
            axes.axvline(tokens, color="0.85", linewidth=1, zorder=0)
            axes.annotate(str(length), (tokens, 1), xycoords=("data", "axes fraction"), fontsize=6, color="0.4", rotation=90, va="top")
    loss.set(xlabel="tokens", ylabel="loss on answers (nats)", title="training")
    accuracy.set(xlabel="tokens", ylabel="share of answers right", title="held out, at the length in training", ylim=(-0.02, 1.02))
    final.set(xlabel="sequence length", xscale="log", title="held out, at the end", ylim=(-0.02, 1.02))
    final.set_xscale("log", base=2)
    _write(figure, path)


def series(records: list[Record], path: Path) -> None:
    """Validation loss against tokens, and test accuracy with its interval, seed by seed.

    Raises:
        SystemExit: no runs.
    """
    runs = _grouped(records, lambda record: (record["config"]["kind"], record["config"]["attention"]))
    figure = _figure(11, 4)
    loss, accuracy = figure.subplots(1, 2)
    ticks: list[str] = []
    for (kind, attention), group in runs.items():
        style = {"color": COLOURS[attention], "linestyle": "-" if kind == "planted" else "--"}
        curves = [[(_tokens(record, row["step"]), row["log_loss"]) for row in record["evaluations"]] for record in group]
        _band(loss, curves, label=f"{kind}, {NAMES[attention]}, {_seeds(group)}", **style)
        for record in group:
            if record["finished"]:
                found = record["result"]["test"]["accuracy"]
                below, above = found["value"] - found["low"], found["high"] - found["value"]
                accuracy.errorbar(len(ticks), found["value"], [[below], [above]], fmt="o", capsize=4, color=COLOURS[attention])
                accuracy.plot(len(ticks), record["result"]["best"]["accuracy"], marker="_", markersize=20, color="0.5")
                ticks.append(f"{kind}\n{NAMES[attention]}\nseed {record['config']['seed']}")
    accuracy.axhline(0.5, color="0.5", linewidth=1)
    accuracy.set_xticks(range(len(ticks)), ticks, fontsize=6)
    accuracy.set(ylabel="share of steps right", title="test, once, with interval; grey: what can be known")
    loss.set(xlabel="tokens", ylabel="log loss (nats)", title="validation")
    _write(figure, path)


def serving(records: list[Record], path: Path) -> None:
    """How latencies are spread over requests, of all seeds; and against time, seed by seed, tokens made and requests that run and wait.

    Raises:
        SystemExit: no runs.
    """
    runs = _grouped(records, lambda record: record["config"]["attention"])
    figure = _figure(17, 4)
    first, each, rate, load = figure.subplots(1, 4)
    for attention, group in runs.items():
        style = {"color": COLOURS[attention], "linewidth": 1.3}
        for axes, name in ((first, "time_to_first_token"), (each, "time_per_output_token")):
            values = sorted(row[name] for record in group for row in record["requests"] if row[name] is not None)
            label = f"{NAMES[attention]}, {len(values)} requests of {_seeds(group)}"
            axes.plot(values, [(i + 1) / len(values) for i in range(len(values))], label=label, **style)
        for number, record in enumerate(group):
            rows = record["timeline"]
            times = [row["time"] for row in rows]
            label = NAMES[attention] if not number else None
            rate.plot(times, [row["output_tokens_per_second"] for row in rows], label=label, **style)
            for name, dash in (("running", "-"), ("waiting", ":")):
                load.plot(times, [row[name] for row in rows], dash, label=label and f"{label}, {name}", **style)
    for axes, title in ((first, "time to first token"), (each, "time per output token, a request's mean")):
        axes.set(xlabel="seconds", ylabel="share of requests", title=title, ylim=(0, 1.02))
        axes.set_xscale("log")
    rate.set(xlabel="seconds", ylabel="tokens a second", title="output")
    load.set(xlabel="seconds", ylabel="requests", title="requests")
    _write(figure, path)


# --- parts -------------------------------------------------------------------------------------------------------------------------


def _grouped(records: list[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    if not records:
        sys.exit("no runs there to draw: run first, or name their folder with --out")
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return dict(sorted(found.items(), reverse=True))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.2)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _seeds(group: list[Record]) -> str:
    return f"{len(group)} seed{'s' if len(group) > 1 else ''}"


def _tokens(record: Record, step: int) -> int:
    return step * record["config"]["batch_tokens"]


def _curve(record: Record, name: str) -> Points:
    return [(_tokens(record, row["step"]), row[name]) for row in record["curve"]]


def _changes(record: Record) -> list[tuple[int, int]]:
    """Tokens at which each length begins."""
    found, before = [], 0
    for row in record["curve"]:
        if not found or row["length"] != found[-1][1]:
            found.append((before, row["length"]))
        before = _tokens(record, row["step"])
    return found


def _band(axes: Any, curves: Iterable[Points], label: str, **style: Any) -> None:
    """The mean of the curves where all have a point, and the band between them."""
    kept = [dict(curve) for curve in curves if curve]
    if not kept:
        return
    common = sorted(set.intersection(*map(set, kept)))
    columns = [[curve[x] for curve in kept] for x in common]
    axes.plot(common, [sum(column) / len(column) for column in columns], label=label, linewidth=1.3, **style)
    axes.fill_between(common, list(map(min, columns)), list(map(max, columns)), color=style.get("color"), alpha=0.2, linewidth=0)
