"""Everything about correctness that only a GPU can show, in one run: a table last, JSON on request, exit 1 if anything is wrong.

    python benchmarks/gpu_check.py [--json FILE] [--specs a,b] [--only verify,memcheck,compile,graph,long] [--jobs N]

* ``verify``: every shipped spec's kernels on edge cases and its whole forward against the float64 reference (``nsa-gen verify``).
* ``memcheck``: one ragged case of each kernel under ``compute-sanitizer --tool memcheck``, with uncached allocations, so that a byte past a
  tensor counts.
* ``compile``, ``graph``: ``torch.compile(fullgraph=True)`` and CUDA-graph capture of the forward equal the eager result bit for bit.
* ``long``: 512k tokens run, with the memory taken beyond inputs and output.

Each check is a process of its own: one that dies is a failed line, the others still run. ``--jobs`` of them share the GPU; ``long``, which
takes much memory, runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LONG = 512 * 1024
#: How query-outer selected attention multiplies and loads, each checked beside what the tables choose.
ORDERS = (("rows", "pointer"), ("rows", "descriptor"), ("keys", "descriptor"))


def memcheck(spec_name: str) -> str:
    """One ragged call of each kernel; run under the sanitizer."""
    import torch

    from nsa_gen import inputs, kernels, space
    from nsa_gen.config import Config, Shape, problems
    from nsa_gen.spec import load

    spec, lengths = load(spec_name), (1153, 0, 31, 1, 700)
    done = []
    query_outer = {"loop": "query_outer", "num_warps": 1, "num_stages": 2}
    orders = [Config.of("selected_attention_fwd", query_outer | {"operands": o, "loads": x}) for o, x in ORDERS]
    for problem in problems(spec, varlen=True) + [p for p in problems(spec) if "varlen" not in dict(p.values)]:
        if problem.kernel in done and problem.kernel not in ("compress_fwd", "compress_bwd", "sliding_merge_fwd"):
            continue
        case = inputs.case(problem, seqlens=lengths, heads_kv=spec.heads.kv, device="cuda")
        legal = set(space.candidates(problem)) if problem.kernel == "selected_attention_fwd" else set()
        for configs in [(), *((config,) for config in orders if config in legal)]:
            with kernels.override(*configs):
                case.run(kernels.get(problem, Shape(max(lengths), len(lengths) * spec.heads.kv), kernels.default_device()))
            torch.cuda.synchronize()
        done.append(problem.kernel)
    return f"{len(done)} kernels"


def _forward(seqlen: int) -> tuple[Callable[..., object], dict[str, object]]:
    from nsa_gen import bench, ops
    from nsa_gen.spec import load

    spec = load("gqa16-d128")
    given = bench.tensors(spec, seqlen)

    def forward(q, k, v, g_cmp, g_slc, g_swa, phi_k, phi_v):
        return ops.nsa_attention(q, k, v, g_cmp, g_slc, g_swa, spec=spec, phi_k=phi_k, phi_v=phi_v)

    return forward, given


def compile(_: str) -> str:
    import torch

    forward, given = _forward(4096)
    eager, compiled = forward(**given), torch.compile(forward, fullgraph=True)(**given)
    assert torch.equal(eager, compiled), "torch.compile differs from eager"
    return "bit-equal at 4096 tokens"


def graph(_: str) -> str:
    import torch

    forward, given = _forward(4096)
    eager = forward(**given).clone()
    forward(**given)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = forward(**given)
    out.zero_()
    captured.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager, out), "the replayed graph differs from eager"
    return "bit-equal at 4096 tokens"


def long(_: str) -> str:
    import torch

    forward, given = _forward(LONG)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.time()
    out = forward(**given)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert bool(torch.isfinite(out).all()), "output not finite"
    return f"{LONG // 1024}k tokens in {time.time() - start:.2f} s with compiling, {extra / 2**30:.2f} GiB beyond inputs and output"


CHILDREN = {"memcheck": memcheck, "compile": compile, "graph": graph, "long": long}


def _run(name: str, command: list[str], limit: int, **env: str) -> dict[str, object]:
    start = time.time()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": _path(), **env}, capture_output=True, text=True, timeout=limit, check=False
        )
        ok, text = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        ok, text = False, f"stopped after {expired.timeout:.0f} s"
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["nothing printed"]
    result = next((line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")), lines[-1])
    if not ok:
        print("\n".join(lines[-30:]), file=sys.stderr)
    return {"check": name, "ok": ok, "result": result[:160], "seconds": round(time.time() - start, 1)}


def _path() -> str:
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--specs", default="")
    parser.add_argument("--only", default="verify,memcheck,compile,graph,long")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, spec_name = arguments.child
        print("RESULT", CHILDREN[name](spec_name))
        return 0

    from nsa_gen.spec import names

    specs, only = arguments.specs.split(",") if arguments.specs else names(), arguments.only.split(",")
    here = [sys.executable, str(Path(__file__).resolve()), "--child"]
    checks: list[tuple[str, list[str], dict[str, str]]] = []
    if "memcheck" in only:
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        child = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--log-file", os.devnull, *here, "memcheck"]
        checks += [(f"memcheck {name}", [*child, name], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}) for name in ("gqa16-d128", "nsa-paper")]
    checks += [(name, [*here, name, ""], {}) for name in ("compile", "graph") if name in only]
    if "verify" in only:
        checks += [(f"verify {name}", [sys.executable, "-m", "nsa_gen", "verify", name], {}) for name in specs]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda check: _run(check[0], check[1], 300, **check[2]), checks))
    if "long" in only:
        results.append(_run("long", [*here, "long", ""], 300))
    for row in results:
        print(f"{'ok ' if row['ok'] else 'BAD'} {row['check']:24} {row['seconds']:6.1f} s  {row['result']}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if results and all(row["ok"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
