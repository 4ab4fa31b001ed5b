"""Serving a model with random weights: NSA against full attention in one engine, at the same weights, requests and arrival times.

    python examples/serve.py [--attention nsa,full] [--seeds 0] [--out DIR] [--requests 128] [--rate 4] [--stream]
    python examples/serve.py --out DIR --plot FILE

Requests arrive at random (a Poisson process) with prompts and outputs of all lengths; some share the beginning of their prompts. The engine
(``examples/engine.py``) batches continuously, takes prompts in chunks, shares prefixes, and takes pages back where they run short
(``examples/scheduler.py``). A run writes ``serve-ATTENTION-seedN.json``: tokens a second, percentiles of latencies, a row for each request.
On a CPU everything is small and in plain PyTorch: it shows that the engine works, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from examples import options, plots
from examples.backends import backend_of
from examples.engine import Clock, Engine
from examples.model import Decoder, Size, parameters
from examples.run import environment, records, write_json
from examples.scheduler import Request
from nsa_gen import Spec
from nsa_gen.spec import load

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Workload:
    """Requests: ``count`` of them, ``rate`` a second on average.

    ``prompt`` and ``output`` are the least and the most tokens; lengths are spread evenly on a logarithmic scale. A ``share`` of the
    requests has, before its own prompt, one of ``prefixes`` beginnings of ``prefix`` tokens.
    """

    count: int = 128
    rate: float = 4.0
    prompt: tuple[int, int] = (1024, 32768)
    output: tuple[int, int] = (64, 512)
    share: float = 0.5
    prefixes: int = 4
    prefix: int = 2048

    @property
    def longest(self) -> int:
        return self.prefix + self.prompt[1] + self.output[1]

    def make(self, vocabulary: int, seed: int) -> list[Request]:
        """The requests, in the order they arrive; the same for the same seed."""
        chance, arrival, made = random.Random(seed), 0.0, []

        def drawn(count: int) -> list[int]:
            return chance.choices(range(vocabulary), k=count)

        def between(least: int, most: int) -> int:
            return min(round(least * (most / least) ** chance.random()), most)

        beginnings = [drawn(self.prefix) for _ in range(self.prefixes)]
        for number in range(self.count):
            arrival += chance.expovariate(self.rate)
            group = chance.randrange(self.prefixes) if self.prefixes and self.prefix and chance.random() < self.share else None
            shared = [] if group is None else beginnings[group]
            prompt = shared + drawn(between(*self.prompt))
            made.append(Request(number, arrival, prompt, between(*self.output), group, len(shared)))
        return made


@dataclass(frozen=True)
class Setup:
    """What is served, and in how much memory: ``pages`` of ``page_size`` tokens for all, compressed tokens of NSA included."""

    spec: Spec
    workload: Workload
    width: int = 4096
    layers: int = 8
    vocabulary: int = 32_000
    pages: int = 8192
    page_size: int = 64
    budget: int = 4096
    max_running: int = 32
    ahead: int = 64

    def size(self) -> Size:
        return Size(self.vocabulary, self.vocabulary, width=self.width, layers=self.layers, hidden=4 * self.width, shift=False)

    def to_dict(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if name not in ("spec", "workload", "width", "layers", "vocabulary")}
        return {"spec": self.spec.to_dict(), "workload": asdict(self.workload), "size": self.size().to_dict(), **found}


#: What a CPU serves in seconds, with pages that run short.
SMALL = Setup(
    load("tiny"), Workload(count=48, rate=100.0, prompt=(16, 96), output=(8, 64), prefixes=2, prefix=32), width=64, layers=2,
    vocabulary=256, pages=28, page_size=16, budget=64, max_running=6, ahead=0,
)  # fmt: skip


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The GPU's or the CPU's setup, with what the command line says."""
    chosen = SMALL if options.small(arguments) else Setup(load("gqa16-d128"), Workload())

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(arguments, name)) is not None}

    workload = replace(chosen.workload, **given("count", "rate", "prompt", "output", "share", "prefixes", "prefix"))
    spec = load(arguments.spec) if arguments.spec else chosen.spec
    return replace(chosen, spec=spec, workload=workload, **given("width", "layers", "pages", "budget", "max_running"))


def engine_of(setup: Setup, attention: str, seed: int, device: str) -> Engine:
    """An engine with random weights, which are the same for both attentions."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        model = Decoder(setup.size(), setup.spec, attention, tokens=True, seed=seed).to(dtype).eval()
    longest = -(-setup.workload.longest // setup.page_size) * setup.page_size
    prefixes = setup.workload.prefixes
    places = setup.max_running + prefixes + 2
    backend = backend_of(model, pages=setup.pages, page_size=setup.page_size, sequences=places, max_seqlen=longest)
    return Engine(model, backend, budget=setup.budget, max_running=setup.max_running, ahead=setup.ahead, max_prefixes=prefixes)


def warm_up(engine: Engine, requests: Sequence[Request]) -> None:
    """Serve copies of the shortest and the longest request and of a few more, so that no kernel is compiled while the clock runs."""
    by_length = sorted(requests, key=lambda request: len(request.prompt))
    some = [by_length[0], by_length[-1], *requests[:4]]
    for _ in engine.run(Request(request.number, 0.0, request.prompt, min(request.max_tokens, 3)) for request in some):
        pass
    engine.steps.clear()


def run(setup: Setup, attention: str, seed: int, device: str, stream: bool) -> dict[str, Any]:
    """Serve the workload once; the record."""
    engine = engine_of(setup, attention, seed, device)
    requests = setup.workload.make(setup.vocabulary, seed)
    warm_up(engine, requests)
    clock = Clock()
    for request, token in engine.run(requests, clock):
        if stream:
            print(f"{request.times[-1]:9.3f} s  request {request.number}, token {len(request.output)}: {token}", flush=True)
    engine.close()
    config = {"attention": attention, "seed": seed, "backend": type(engine.backend).__name__, **setup.to_dict()}
    return {
        "name": f"serve-{attention}-seed{seed}", "config": config, "environment": environment(torch.device(device)),
        "parameters": parameters(engine.model), "result": measured(requests, engine.steps), "timeline": timeline(engine.steps),
        "requests": [row_of(request) for request in requests],
    }  # fmt: skip


# --- what was measured -----------------------------------------------------------------------------------------------------------------


def row_of(request: Request) -> dict[str, Any]:
    """A finished request. Seconds from its arrival to its first token, and from there per token; None if there was one token only."""
    first, last, more = request.times[0], request.times[-1], len(request.times) - 1
    return {
        "arrival": request.arrival, "prompt": len(request.prompt), "output": len(request.output), "reused": request.reused,
        "preemptions": request.preemptions, "time_to_first_token": first - request.arrival,
        "time_per_output_token": (last - first) / more if more else None, "longest_pause": _longest_pause(request.times),
    }  # fmt: skip


def measured(requests: Sequence[Request], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates and percentiles over finished requests; times in seconds, from the first arrival on."""
    rows = [row_of(request) for request in requests]
    seconds = max(request.times[-1] for request in requests) - min(request.arrival for request in requests)
    made = sum(row["output"] for row in rows)
    prompts, computed = sum(row["prompt"] for row in rows), sum(step["prompt_tokens"] for step in steps)
    names = ("time_to_first_token", "time_per_output_token", "longest_pause")
    return {
        "seconds": seconds, "output_tokens": made, "output_tokens_per_second": made / seconds, "prompt_tokens": prompts,
        "prompt_tokens_computed": computed, "total_tokens_per_second": (made + prompts) / seconds, "steps": len(steps),
        "reused_tokens": sum(row["reused"] for row in rows), "preemptions": sum(row["preemptions"] for row in rows),
        **{name: percentiles([row[name] for row in rows if row[name] is not None]) for name in names},
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """``p50``, ``p95``, ``p99``, linear between samples; None of no values."""
    if not values:
        return None
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(PERCENTILES, dtype=torch.float64) / 100)
    return {f"p{p}": value for p, value in zip(PERCENTILES, found.tolist(), strict=True)}


def timeline(steps: Sequence[dict[str, Any]], parts: int = 60) -> list[dict[str, float]]:
    """The run in equal parts of time, those without a step left out: tokens a second, and the means of what ran, waited and was free."""
    width = steps[-1]["time"] / parts
    grouped: dict[int, list[dict[str, Any]]] = {}
    for step in steps:
        grouped.setdefault(min(int(step["time"] / width), parts - 1), []).append(step)
    return [
        {
            "time": (part + 0.5) * width,
            **{f"{name}_per_second": sum(step[name] for step in some) / width for name in ("output_tokens", "prompt_tokens")},
            **{name: sum(step[name] for step in some) / len(some) for name in ("running", "waiting", "pages_free")},
        }
        for part, some in sorted(grouped.items())
    ]


def summary(record: dict[str, Any]) -> str:
    """A run in a few lines."""
    found, lines = record["result"], []
    for name in ("time_to_first_token", "time_per_output_token", "longest_pause"):
        if found[name]:
            values = "  ".join(f"{p} {value * 1e3:,.1f}" for p, value in found[name].items())
            lines.append(f"  {name.replace('_', ' ')} (ms): {values}")
    rates = f"{found['output_tokens_per_second']:,.1f} output tokens/s, {found['total_tokens_per_second']:,.1f} with prompts"
    counts = f"{found['steps']} steps, {found['preemptions']} preemptions, {found['reused_tokens']} tokens reused"
    return "\n".join([f"{record['name']}: {rates}; {found['seconds']:.1f} s, {counts}", *lines])


def _longest_pause(times: Sequence[float]) -> float | None:
    return max((after - before for before, after in pairwise(times)), default=None)


# --- command line ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = options.base(__doc__, out="out/serve")
    parser.add_argument("--requests", type=int, dest="count", help="how many (default 128; 48 on a CPU)")
    parser.add_argument("--rate", type=float, help="requests a second (default 4; 100 on a CPU)")
    parser.add_argument("--prompt", type=_range, help="tokens of a prompt, least and most (default 1024,32768; 16,96 on a CPU)")
    parser.add_argument("--output", type=_range, help="tokens of an output, least and most (default 64,512; 8,64 on a CPU)")
    parser.add_argument("--share", type=float, help="of requests that begin with a shared prefix (default 0.5)")
    parser.add_argument("--prefixes", type=int, help="how many there are (default 4; 2 on a CPU)")
    parser.add_argument("--prefix", type=int, help="tokens of one (default 2048; 32 on a CPU)")
    parser.add_argument("--pages", type=int, help="in all (default 8192; 28 on a CPU)")
    parser.add_argument("--budget", type=int, help="tokens a step (default 4096; 64 on a CPU)")
    parser.add_argument("--max-running", type=int, help="requests that run at a time (default 32; 6 on a CPU)")
    parser.add_argument("--stream", action="store_true", help="print each token when it is made")
    arguments = parser.parse_args(argv)
    if arguments.plot:
        plots.serving(records(arguments.out), arguments.plot)
        print(f"{arguments.plot} drawn")
        return 0
    setup = setup_of(arguments)
    for seed in arguments.seeds:
        for attention in arguments.attention:
            try:
                with one_thread(unless=arguments.device.startswith("cuda")):
                    record = run(setup, attention, seed, arguments.device, arguments.stream)
            except ValueError as error:
                parser.error(str(error))
            write_json(arguments.out / f"{record['name']}.json", record)
            print(summary(record))
            gc.collect()  # captured graphs and caches of one model, before those of the next
            if arguments.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return 0


@contextmanager
def one_thread(unless: bool) -> Iterator[None]:
    """One thread for PyTorch: for operators as small as a CPU's here, several mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if unless else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _range(text: str) -> tuple[int, int]:
    try:
        least, most = map(int, text.split(","))
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: two numbers from 1 with a comma, the smaller first")
    return least, most


if __name__ == "__main__":
    sys.exit(main())
