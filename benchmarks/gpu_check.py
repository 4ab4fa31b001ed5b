"""Everything about correctness that only a GPU can show, in one run: a line for each check as it ends, JSON on request, exit 1 on a fault.

    python benchmarks/gpu_check.py [--json FILE] [--specs a,b] [--only verify,memcheck,…] [--jobs N] [--limit SECONDS]

* ``verify``: every shipped spec's kernels on edge cases, those that serve from a KV cache among them, and its whole forward against the
  float64 reference (``nsa-gen verify``).
* ``memcheck``, ``racecheck``: one ragged case of each kernel, in each structure it is built in, under ``compute-sanitizer``, with uncached
  allocations, so that a byte past a tensor counts.
* ``gradients``: of every shipped spec, through autograd, against the float64 reference: at most twice the error of bf16 PyTorch.
* ``deterministic``: 20 backwards of one forward have the same bits with ``deterministic=True``.
* ``serving``: 10 000 random steps of paged caches, and of attention from them, beside a plain model: K and V shared and per branch, in bf16
  and fp8, a quarter each. No page is lost, nothing diverges, who finds no room changes nothing (``serving_walk.py``).
* ``compile``, ``graph``: ``torch.compile(fullgraph=True)`` and CUDA-graph capture of the forward, and of a training step, equal eager.
* ``long``: 512k tokens run, with the memory taken beyond inputs and output. ``training``: the same of a training step at 64k and 256k.

Each check is a process of its own: one that dies is a failed line, the others still run. ``--jobs`` of them share the GPU; ``long`` and
``training``, which take much memory, run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LONG = 512 * 1024
#: Structures of kernels that are checked beside what the tables choose: knobs to change in the default, None to leave out.
STRUCTURES: dict[str, list[dict[str, object]]] = {
    "selected_attention_fwd": [
        {"loop": "query_outer", "operands": operands, "loads": loads, "num_warps": 1, "num_stages": 2}
        for operands, loads in (("rows", "pointer"), ("rows", "descriptor"), ("keys", "descriptor"))
    ],
    "compressed_attention_bwd": [{"dq": "atomic"}, {"loads": "pointer", "dq_mask": "all"}, {"loads": "pointer", "dkv_mask": "edges"}],
    "sliding_attention_bwd": [{"loads": "pointer", "dq_mask": "all"}, {"loads": "pointer", "dkv_mask": "edges"}],
    "selected_attention_bwd": [
        *({"dq": "ds", "loads": loads, "dq_warps": 4, "dq_stages": 3} for loads in ("pointer", "descriptor")),
        *({"dq": "query_outer", "operands": operands, "loads": "pointer", "dq_warps": 4, "dq_stages": 2} for operands in ("rows", "keys")),
    ],
}
#: K and V and storage of the walks of ``serving``; which it is is the seed.
WALKS = ("shared bf16", "shared fp8", "per_branch bf16", "per_branch fp8")


def racecheck(spec_name: str) -> str:
    """The same on a short case: the tool is slow, and a race between warps shows in any tile."""
    return memcheck(spec_name, (150, 0, 31, 1, 80), 1)


def memcheck(spec_name: str, lengths: tuple[int, ...] = (1153, 0, 31, 1, 700), heads: int | None = None) -> str:
    """One ragged call of each kernel; run under the sanitizer."""
    import torch

    from nsa_gen import inputs, kernels
    from nsa_gen.config import FP8, SERVING, Shape, cache_of, problems
    from nsa_gen.spec import load

    spec = load(spec_name)
    heads = spec.heads.kv if heads is None else heads
    done, calls = [], 0
    variants = ("compress_fwd", "compress_bwd", "sliding_merge_fwd", "selected_attention_bwd", *SERVING)
    caches = [cache_of(spec), cache_of(spec, FP8 if kernels.default_device().fp8 else None, tokens=4)]
    served = [p for cached in caches for p in problems(spec, cached=cached)]
    for problem in problems(spec, varlen=True) + [p for p in problems(spec) if "varlen" not in dict(p.values)] + served:
        if problem.kernel in done and problem.kernel not in variants:
            continue
        # Made on the CPU: no kernel but ours runs under the tool. Racecheck does not follow the barriers of cuBLAS's.
        case = inputs.case(problem, seqlens=lengths, heads_kv=heads).to("cuda")
        for configs in [(), *((config,) for config in _structures(problem))]:
            with kernels.override(*configs):
                case.run(kernels.get(problem, Shape(case.max_seqlen, len(lengths) * heads), kernels.default_device()))
            torch.cuda.synchronize()
            calls += 1
        done.append(problem.kernel)
    return f"{len(set(done))} kernels, {calls} calls"


def _structures(problem: object) -> list[object]:
    """Legal configs of ``STRUCTURES``: the default with some knobs changed, and those left out that then do not exist."""
    from nsa_gen import kernels, space
    from nsa_gen.config import Config
    from nsa_gen.errors import ConfigError

    found = []
    default = space.default(problem, kernels.default_device().arch).as_dict()
    for changes in STRUCTURES.get(problem.kernel, ()):
        wanted = {**default, **changes}
        exist = [k for k in space.knobs(problem.kernel) if all(wanted.get(name) in values for name, values in k.when.items())]
        config = Config.of(problem.kernel, {k.name: wanted[k.name] for k in exist if k.name in wanted})
        try:
            space.check(problem, config)
        except ConfigError:
            continue
        found.append(config)
    return found


def _forward(seqlen: int) -> tuple[Callable[..., object], dict[str, object]]:
    from nsa_gen import bench, ops
    from nsa_gen.spec import load

    spec = load("gqa16-d128")
    given = bench.tensors(spec, seqlen)

    def forward(q, k, v, g_cmp, g_slc, g_swa, phi_k, phi_v):
        return ops.nsa_attention(q, k, v, g_cmp, g_slc, g_swa, spec=spec, phi_k=phi_k, phi_v=phi_v)

    return forward, given


def _step(seqlen: int, **options: object) -> tuple[Callable[..., tuple[object, ...]], list[object], object]:
    """A forward and backward: what makes the gradients, the tensors they are of, and the gradient of the result."""
    import torch

    from nsa_gen import bench, ops
    from nsa_gen.spec import load

    spec = load("gqa16-d128")
    given = bench.tensors(spec, seqlen)
    names = ("q", "k", "v", "g_cmp", "g_slc", "g_swa")
    leaves = [given[name].requires_grad_() for name in names]
    do = torch.randn(seqlen, spec.heads.query, spec.head_dim.v, dtype=given["q"].dtype, device="cuda")

    def step(*tensors: object) -> tuple[object, ...]:
        o = ops.nsa_attention(*tensors, spec=spec, **options)
        return o, *torch.autograd.grad(o, tensors, do)

    return step, leaves, do


def compile(_: str) -> str:
    import torch

    forward, given = _forward(4096)
    eager, compiled = forward(**given), torch.compile(forward, fullgraph=True)(**given)
    assert torch.equal(eager, compiled), "torch.compile differs from eager"
    step, leaves, do = _step(4096, deterministic=True)

    def loss(*tensors: object) -> object:
        from nsa_gen import ops

        return (ops.nsa_attention(*tensors, spec="gqa16-d128", deterministic=True) * do).sum()

    gradients = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for found, wanted in zip(gradients, step(*leaves)[1:], strict=True):
        assert torch.equal(found, wanted), "gradients of a compiled step differ from eager"
    return "forward and training step bit-equal at 4096 tokens"


def graph(_: str) -> str:
    import torch

    forward, given = _forward(4096)
    step, leaves, _ = _step(4096, deterministic=False)
    for name, call, arguments in (("forward", lambda: (forward(**given),), ()), ("training step", lambda: step(*leaves), leaves)):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # autograd's accumulation must have run on the capturing stream
            eager = [x.clone() for x in call()]
            call()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = call()
        for x in out:
            x.detach().zero_()
        captured.replay()
        torch.cuda.synchronize()
        for i, (x, y) in enumerate(zip(eager, out, strict=True)):
            exact = not arguments or i in (0, 1, 4, 5, 6)  # of K and V, atomic sums end in other bits
            close = torch.equal(x, y) if exact else (x - y).float().norm() <= 4e-3 * x.float().norm()
            assert bool(close), f"the replayed graph's {name} differs from eager in result {i}"
    return "forward and training step equal at 4096 tokens"


def gradients(spec_name: str) -> str:
    """Gradients through the whole operator, at most twice as wrong as those of plain PyTorch in the same dtype."""
    import torch

    from nsa_gen import bench, ops, reference
    from nsa_gen.spec import Heads, load

    spec = load(spec_name)
    spec = spec.replace(heads=Heads(2 * spec.group, 2))
    lengths = (1153, 0, 31, 1, 300)
    total = sum(lengths)
    cu = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device="cuda")
    given = bench.tensors(spec, total)

    def leaves(dtype: torch.dtype) -> tuple[dict[str, object], list[object]]:
        made = {
            name: tuple(y.detach().to(dtype).requires_grad_() for y in x) if isinstance(x, tuple) else x.detach().to(dtype).requires_grad_()
            for name, x in given.items()
        }
        return made, [y for x in made.values() for y in (x if isinstance(x, tuple) else (x,))]

    made, flat = leaves(given["q"].dtype)
    at = {"spec": spec, "cu_seqlens": cu, "max_seqlen": max(lengths)}
    o = ops.nsa_attention(**made, **at)
    do = torch.randn_like(o)
    found = torch.autograd.grad(o, flat, do)
    with torch.no_grad():  # the choice of blocks is held fixed: a tie within rounding is not an error of a gradient
        k, v = (x[0] if isinstance(x, tuple) else x for x in (made["k"], made["v"]))
        k_cmp, v_cmp = ops.compress(k, made["phi_k"], **at), ops.compress(v, made["phi_v"], which="v", **at)
        lse = ops.compressed_attention(made["q"], k_cmp, v_cmp, **at)[1]
        blocks = ops.select_blocks(made["q"], k_cmp, lse, **at)
    exact, eager = (_reference_gradients(reference, spec, *leaves(d), do, cu, blocks, d) for d in (torch.float64, o.dtype))
    worst, names = 0.0, [f"{name}[{i}]" for name, x in made.items() for i in range(len(x) if isinstance(x, tuple) else 1)]
    size = max(float(x.norm()) for x in exact)
    for name, x, y, z in zip(names, found, exact, eager, strict=True):
        assert bool(torch.isfinite(x).all()), f"gradient of {name} is not finite"
        error, allowed = (float((w.double() - y).norm()) for w in (x, z))
        scale = float(y.norm())
        if scale < 1e-9 * size:  # nothing but rounding, as the gradient of a bias that softmax does not see
            continue
        assert error <= 2 * allowed + 1e-3 * scale, f"gradient of {name}: {error / scale:.1e}, PyTorch's {allowed / scale:.1e}"
        worst = max(worst, error / max(allowed, 1e-30))
    return f"{len(names)} gradients, at most {worst:.2f} of the error of {str(o.dtype).removeprefix('torch.')} PyTorch"


def _reference_gradients(reference, spec, made, flat, do, cu, blocks, dtype):  # type: ignore[no-untyped-def]
    import torch

    phi = {"weights_k": made.pop("phi_k"), "weights_v": made.pop("phi_v")}
    o = reference.nsa_attention(**made, **phi, spec=spec, cu_seqlens=cu, block_indices=blocks, dtype=dtype)
    return torch.autograd.grad(o, flat, do.to(dtype))


def deterministic(_: str) -> str:
    import torch

    step, leaves, _do = _step(8192, deterministic=True)
    first = step(*leaves)
    for _run in range(19):
        for x, y in zip(first, step(*leaves), strict=True):
            assert torch.equal(x, y), "a backward differs from the first"
    return "20 backwards at 8192 tokens bit-equal"


def serving(which: str) -> str:
    """One of ``WALKS``."""
    from benchmarks.serving_walk import FP8, walk
    from nsa_gen import kernels

    kv, storage = which.split()
    if storage == "fp8" and not kernels.default_device().fp8:
        return "this GPU has no fp8"
    made = walk(kv, {"bf16": "bfloat16", "fp8": FP8}[storage], 2500, WALKS.index(which), "cuda")
    assert min(made["decodes"], made["prefills"], made["out_of_pages"]) >= 50, f"the walk has seen too little: {made}"
    assert made["undecided"] <= 0.1 * made["queries"], f"too many queries whose blocks tie: {made}"
    return (
        "{steps} steps, lengths to {longest}: {decodes} decodes, {prefills} prefills right to {worst:.1e} ({undecided} of {queries} "
        "queries tie), {out_of_pages} times out of pages, none lost"
    ).format(**made)


def training(_: str) -> str:
    import torch

    said = []
    for seqlen in (65536, 262144):
        step, leaves, do = _step(seqlen)
        step(*leaves)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = step(*leaves)
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30
        assert all(bool(torch.isfinite(x).all()) for x in made), "a gradient is not finite"
        assert seqlen > 65536 or extra < 10, f"{extra:.1f} GiB beyond inputs at 64k"
        said.append(f"{seqlen // 1024}k: {extra:.2f} GiB")
        del made, step, leaves, do
        torch.cuda.empty_cache()
    return "beyond inputs and output gradient, results and saved tensors included: " + ", ".join(said)


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


CHILDREN = {
    "memcheck": memcheck, "racecheck": racecheck, "compile": compile, "graph": graph, "gradients": gradients,
    "deterministic": deterministic, "serving": serving, "long": long, "training": training,
}  # fmt: skip
_ALL = "verify,memcheck,racecheck,gradients,deterministic,serving,compile,graph,long,training"


#: Process groups of the checks that run.
_running: set[int] = set()


def _stop(number: int, _: object) -> None:
    """Checks are sessions of their own: what stops this process stops them too."""
    for group in list(_running):
        os.killpg(group, signal.SIGKILL)
    os._exit(128 + number)


def _run(name: str, command: list[str], limit: int, **env: str) -> dict[str, object]:
    start = time.time()
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": _path(), **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        _running.add(process.pid)
        try:
            text, ok = process.communicate(timeout=limit)[0], process.returncode == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what a sanitizer watches, which it would leave behind
            text, ok = f"stopped after {limit} s", False
        _running.discard(process.pid)
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["nothing printed"]
    result = next((line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")), lines[-1])
    if not ok:  # the first lines tell what a sanitizer found, the last ones what Python raised
        print("\n".join([name, *lines[:40], *lines[40:][-30:]]), file=sys.stderr)
    row: dict[str, object] = {"check": name, "ok": ok, "result": result[:160], "seconds": round(time.time() - start, 1)}
    print(f"{'ok ' if ok else 'BAD'} {name:24} {row['seconds']:6.1f} s  {row['result']}", flush=True)
    return row


def _path() -> str:
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--specs", default="")
    parser.add_argument("--only", default=_ALL)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--limit", type=int, default=300, help="seconds of one check (default 300)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, spec_name = arguments.child
        print("RESULT", CHILDREN[name](spec_name))
        return 0

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    from nsa_gen.spec import names

    specs, only = arguments.specs.split(",") if arguments.specs else names(), arguments.only.split(",")
    here = [sys.executable, str(Path(__file__).resolve()), "--child"]
    checks: list[tuple[str, list[str], dict[str, str]]] = []
    for tool in ("memcheck", "racecheck"):
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        child = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", *here, tool]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        checks += [(f"{tool} {name}", [*child, name], uncached) for name in ("gqa16-d128", "nsa-paper") if tool in only]
    checks += [(name, [*here, name, ""], {}) for name in ("compile", "graph", "deterministic") if name in only]
    checks += [(f"serving {which}", [*here, "serving", which], {}) for which in WALKS if "serving" in only]
    if "verify" in only:
        checks += [(f"verify {name}", [sys.executable, "-m", "nsa_gen", "verify", name], {}) for name in specs]
    if "gradients" in only:
        checks += [(f"gradients {name}", [*here, "gradients", name], {}) for name in specs]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda check: _run(check[0], check[1], arguments.limit, **check[2]), checks))
    results += [_run(name, [*here, name, ""], arguments.limit) for name in ("long", "training") if name in only]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if results and all(row["ok"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
