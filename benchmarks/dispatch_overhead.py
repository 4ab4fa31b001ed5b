"""Host time of a warm call: the look-up of a kernel, an operator, and the bare launch of the same kernel.

    python benchmarks/dispatch_overhead.py [--json FILE]

On a GPU the calls are enqueued without waiting, so what is measured is the host's time and not the device's (the inputs are small enough
that the queue never fills). Without a GPU only the look-up is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nsa_gen import config, kernels, ops, spec

TOKENS, CALLS, REPEATS = 256, 200, 15


def host_us(call: Callable[[], Any], settle: Callable[[], None]) -> dict[str, float]:
    """Median and spread (p80 - p20) in µs a call over ``REPEATS`` batches of ``CALLS``."""
    for _ in range(CALLS):
        call()
    samples = []
    for _ in range(REPEATS):
        settle()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    settle()
    cut = statistics.quantiles(samples, n=5)
    return {"median_us": round(statistics.median(samples), 2), "spread_us": round(cut[3] - cut[0], 2)}


def measure() -> dict[str, Any]:
    """All timings of this machine by name."""
    chosen = spec.load("gqa16-d128")
    gpu = torch.cuda.is_available()
    device = kernels.default_device()
    problem = config.problem("sliding_attention_fwd", chosen)
    shape = config.Shape(TOKENS, chosen.heads.kv)
    found = {"kernels.get": host_us(lambda: kernels.get(problem, shape, device), lambda: None)}
    if gpu:
        made = {"device": "cuda", "dtype": torch.bfloat16}
        q = torch.randn(TOKENS, chosen.heads.query, 128, **made)
        k, v = (torch.randn(TOKENS, chosen.heads.kv, 128, **made) for _ in range(2))
        gates = [torch.rand(TOKENS, chosen.heads.query, **made) for _ in range(3)]
        o, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
        settle = torch.cuda.synchronize
        bare = getattr(kernels.get(problem, shape, device).module, problem.kernel)
        found["bare host function"] = host_us(lambda: bare(q, k, v, o, lse, 128**-0.5, None, 1, TOKENS), settle)
        found["sliding_attention"] = host_us(lambda: ops.sliding_attention(q, k, v, spec=chosen), settle)
        found["nsa_attention"] = host_us(lambda: ops.nsa_attention(q, k, v, *gates, spec=chosen), settle)
    return {"device": device.slug, "torch": str(torch.__version__), "tokens": TOKENS, "calls": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    result = measure()
    for name, timing in result["calls"].items():
        print(f"{name:24s} {timing['median_us']:8.2f} us  (spread {timing['spread_us']:.2f})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
