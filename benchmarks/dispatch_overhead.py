"""Host time of a warm call against bare launches of the bound compiled kernels; the line is 5 us of dispatch a kernel.

    python benchmarks/dispatch_overhead.py [--json FILE]

Every kernel is bound to a function that does nothing, so only the host is timed. A *bare launch* is what ``Launcher`` calls inside. The
*dispatch* of an operator is a warm call of its implementation, which is replayed (``nsa_gen/replay.py``), less its bare launches and less
what it asks of torch (allocating and clearing); these, the checks and torch.library are lines of their own, and so is the implementation
as it runs the first time (look-up of kernels, host functions, ``Launcher``). Launches and torch calls are recorded from one call of the
operator and timed by being made again, alone. Without a GPU only the look-up is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from torch.overrides import TorchFunctionMode

from nsa_gen import config, kernels, ops, replay, spec
from nsa_gen.branches import _inputs, forward, sliding
from nsa_gen.launch import Launcher

#: Batches are long beside what disturbs a host. Kernels that do nothing drain faster than they come, so no launch waits for a queue.
TOKENS, LAUNCHES, ROUNDS, LINE_US = 1024, 2400, 31, 5.0
Calls = list[Callable[[], Any]]
bind, launchers = Launcher._bind, []


@triton.jit
def noop_kernel():
    pass


def bind_noop(self: Launcher, *args: Any) -> tuple[Any, ...]:
    """As ``Launcher._bind`` does it, but the function launched is the no-op: the driver reads as many arguments as a function declares."""
    launchers.append(self)
    run, _, _, tail = bind(self, *args)
    _, function, metadata, _ = bind(Launcher(noop_kernel), (), {})
    return run, function, metadata, tail


class Recorder(TorchFunctionMode):
    """Records calls that allocate, or that launch a kernel of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("empty", "empty_like", "new_empty", "zeros", "new_zeros", "clone", "zero_", "fill_", "copy_"):
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def record(call: Callable[[], Any]) -> tuple[Calls, Calls]:
    """The bare launches and the torch calls of one warm call."""
    call()
    launches: Calls = []

    def spy(run: Any, *args: Any) -> None:
        launches.append(partial(run, *args))

    bound = [(launcher, dict(launcher._bound)) for launcher in launchers]
    for launcher, known in bound:
        launcher._bound.update({key: (partial(spy, run), *rest) for key, (run, *rest) in known.items()})
    with Recorder() as recorder:
        call()
    for launcher, known in bound:
        launcher._bound.update(known)
    return launches, recorder.calls


def host_us(*calls: Callable[[], Any], kernels: int = 1) -> list[list[float]]:
    """Host time of each call in us, by round. Calls take turns, as a shared host's speed drifts: compare within a round."""
    settle = torch.cuda.synchronize if torch.cuda.is_available() else int
    rounds = []
    for _ in range(ROUNDS):
        times = []
        for call in calls:
            settle()
            start = time.perf_counter()
            for _ in range(LAUNCHES // kernels):
                call()
            times.append((time.perf_counter() - start) / (LAUNCHES // kernels) * 1e6)
        rounds.append(times)
    settle()
    return rounds


def summary(us: Iterable[float]) -> dict[str, float]:
    """Median and spread (p80 - p20)."""
    found = list(us)
    cut = statistics.quantiles(found, n=5)
    return {"median_us": round(statistics.median(found), 2), "spread_us": round(cut[3] - cut[0], 2)}


def operator(
    public: Callable[[], Any], registered: Callable[[], Any], implementation: Callable[..., Any], args: tuple[Any, ...]
) -> dict[str, Any]:
    """Where the host time of an operator goes; the arguments are the same call made one layer further in each."""
    again, afresh = partial(replay.replayed(implementation), *args), partial(implementation, *args)
    launches, _ = record(afresh)
    for _ in range(3):
        again()
    _, torch_calls = record(again)
    n = len(launches)
    layers = (public, registered, again, afresh, lambda: [call() for call in launches], lambda: [call() for call in torch_calls])
    rounds = [
        {"whole": whole, "checks": whole - op, "torch.library": op - inner, "torch calls": made, "bare launches": bare,
         "dispatch": inner - bare - made, "dispatch a kernel": (inner - bare - made) / n, "not replayed": first}
        for whole, op, inner, first, bare, made in host_us(*layers, kernels=n)
    ]  # fmt: skip
    return {"kernels": n, "parts": {name: summary(found[name] for found in rounds) for name in rounds[0]}}


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """:func:`summary` of each call."""
    return dict(zip(calls, map(summary, zip(*host_us(*calls.values()), strict=True)), strict=True))


def measure() -> dict[str, Any]:
    """All timings of this machine by name."""
    chosen, device = spec.load("gqa16-d128"), kernels.default_device()
    problem, shape = config.problem("sliding_attention_fwd", chosen), config.Shape(TOKENS, chosen.heads.kv)
    single = {"kernels.get": lambda: kernels.get(problem, shape, device)}
    found: dict[str, Any] = {"device": device.slug, "torch": torch.__version__, "triton": triton.__version__, "tokens": TOKENS}
    if kernels.interpreting() or not torch.cuda.is_available():
        return found | {"calls": timed(single)}
    Launcher._bind = bind_noop  # type: ignore[method-assign]
    made = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(TOKENS, chosen.heads.query, 128, **made)
    k, v = (torch.randn(TOKENS, chosen.heads.kv, 128, **made) for _ in range(2))
    gates = [torch.rand(TOKENS, chosen.heads.query, **made) for _ in range(3)]
    tail = (None, _inputs.geometry_of(chosen).key, 1, TOKENS, 128**-0.5)
    whole = (q, [k], [v], *gates, [], [], None, None, *tail)

    launches, _ = record(lambda: sliding.sliding_attention_fwd(q, k, v, *tail))
    sliding_launcher, grid, args = launchers[-1], launches[0].args[:3], launches[0].args[9:]
    args = args[: len(args) - len(next(iter(sliding_launcher._bound.values()))[3])]
    look_up = ("sliding_attention_fwd", tail[1], q, None, shape)
    single["look-up"] = lambda: _inputs.kernel(*look_up)
    single |= {"bare launch": launches[0], "Launcher": lambda: sliding_launcher(grid, *args)}
    found["calls"] = timed(single)
    with torch.no_grad():
        found["operators"] = {
            "sliding_attention": operator(
                lambda: ops.sliding_attention(q, k, v, spec=chosen),
                lambda: ops._sliding_attention(q, k, v, *tail),
                sliding.sliding_attention_fwd,
                (q, k, v, *tail),
            ),
            "nsa_attention": operator(
                lambda: ops.nsa_attention(q, k, v, *gates, spec=chosen),
                lambda: ops._nsa_attention(*whole),
                forward.inference,
                whole,
            ),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    result = measure()
    lines = [("", result["calls"]), *((f"{n}, {x['kernels']} kernels", x["parts"]) for n, x in result.get("operators", {}).items())]
    for title, parts in lines:
        print(title)
        for name, timing in parts.items():
            print(f"  {name:18s} {timing['median_us']:8.2f} us  (spread {timing['spread_us']:.2f})")
        if title:
            median = parts["dispatch a kernel"]["median_us"]
            print(f"  {'within' if median <= LINE_US else 'ABOVE'} the line of {LINE_US:.0f} us of dispatch a kernel")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
