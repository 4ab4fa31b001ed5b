"""What ``nsa-gen bench`` shows of a result: a table, a title, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bench import APART, FULL, WHOLE
from .bench_decode import WHOLE as DECODE_STEP
from .errors import InputError


def title(result: dict[str, Any]) -> str:
    """One line: spec, GPU, versions, ceilings."""
    there, top = result["environment"], result["ceilings"]
    return (
        f"{result['spec']['name']} on {there['device']}, torch {there['torch']}, triton {there['triton']}; "
        f"copy {top['copy_tb_s']:.2f} TB/s, bf16 matmul {top['matmul_bf16_tflop_s']:.0f} TFLOP/s"
    )


def rows(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows to print."""
    found: list[tuple[Any, ...]] = []
    digits = 4 if "cached" in result else 3
    for shape in result["shapes"]:
        at = _label(shape) if "cached" in result else shape["seqlen"]
        for entry in shape["entries"]:
            name = entry["name"] + (f" ({entry['note']})" if entry.get("note") else "")
            if "error" in entry:
                found.append((at, name, entry["error"], None, None, None, None))
                continue
            gain = shape["speedups"].get(entry["name"])
            tflop = f"{entry['tflop_s']:.0f}" if "tflop_s" in entry else None
            spread = f"{entry['p20_ms']:.{digits}f} - {entry['p80_ms']:.{digits}f}"
            ours = f"{gain['estimate']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]" if gain else None
            found.append((at, name, f"{entry['median_ms']:.{digits}f}", spread, tflop, f"{entry['peak_mib']:.0f}", ours))
        if "limit_ms" in shape:
            found.append((at, "bytes that must be read, at the copy bandwidth", f"{shape['limit_ms']:.{digits}f}", None, None, None, None))
    return ("seqlen", "what", "ms", "p20 - p80", "TFLOP/s", "peak MiB", "NSA is faster by"), found


def _label(shape: dict[str, Any]) -> str:
    """``32x64k``."""
    n = shape["seqlen"]
    return f"{shape['batch']}x{n // 1024}k" if n % 1024 == 0 else f"{shape['batch']}x{n}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Time against sequence length of the whole and of full attention, and the parts stacked; needs matplotlib."""
    from matplotlib.figure import Figure

    shapes = [shape for shape in result["shapes"] if any("median_ms" in entry for entry in shape["entries"])]
    if not shapes:
        raise InputError("nothing was measured, so there is nothing to draw")
    if "cached" in result:
        _plot_decoding(result, shapes, path)
        return
    times = {(s["seqlen"], e["name"]): e["median_ms"] for s in shapes for e in s["entries"] if "median_ms" in e}
    lengths = [shape["seqlen"] for shape in shapes]
    names = list(dict.fromkeys(entry["name"] for shape in shapes for entry in shape["entries"]))
    whole = result.get("whole", WHOLE)
    apart = APART if whole == WHOLE else ("forward", "backward")
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title(result), fontsize=8)
    left, right = figure.subplots(1, 2)
    for name in (whole, *FULL):
        known = [n for n in lengths if (n, name) in times]
        if known:
            left.plot(known, [times[n, name] for n in known], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="sequence length", ylabel=f"ms, {whole}")
    left.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths], minor=False)
    left.legend(fontsize=8)
    floor = [0.0] * len(lengths)
    for name in (name for name in names if name not in (whole, *FULL, *apart)):
        heights = [times.get((n, name), 0.0) for n in lengths]
        right.bar([str(n) for n in lengths], heights, bottom=floor, label=name)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    right.set(xlabel="sequence length", ylabel="ms, parts of the forward" if whole == WHOLE else "ms, parts of the backward")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plot_decoding(result: dict[str, Any], shapes: list[dict[str, Any]], path: Path) -> None:
    """A step over the tokens of a sequence, a panel for each number of sequences: NSA, full attention, and what reading takes."""
    from matplotlib.figure import Figure

    batches = sorted({shape["batch"] for shape in shapes})
    figure = Figure(figsize=(3.4 * len(batches) + 1, 3.6), layout="constrained")
    figure.suptitle(f"{title(result)}\n{result['cached']['storage']} cache, CUDA graphs", fontsize=8)
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        here = sorted((shape for shape in shapes if shape["batch"] == batch), key=lambda shape: shape["seqlen"])
        lengths = [shape["seqlen"] for shape in here]
        for name in (DECODE_STEP, *FULL):
            known = [(s["seqlen"], e["median_ms"]) for s in here for e in s["entries"] if e["name"] == name and "median_ms" in e]
            if known:
                panel.plot(*zip(*known, strict=True), marker="o", label=name)
        panel.plot(lengths, [shape["limit_ms"] for shape in here], marker=".", linestyle=":", label="bytes at copy bandwidth")
        panel.set(
            xscale="log", yscale="log", title=f"{batch} sequences" if batch > 1 else "1 sequence", xlabel="tokens", ylabel="ms a step"
        )
        panel.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths], minor=False)
        panel.minorticks_off()
    panels[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
