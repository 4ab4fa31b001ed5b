"""``nsa-gen bench``: the forward of one spec (a training step, a step of decoding), whole and by part, against full attention, interleaved.

Everything is measured the same way (``nsa_gen.timing``: cold L2, launches unrolled in a CUDA graph), so launch overhead is left out
on all sides. Full attention is torch's ``scaled_dot_product_attention`` on its flash and cuDNN backends, causal, with the same heads. The
machine's ceilings (copy bandwidth, bf16 matmul) are measured in the same run, so that a figure can be judged by itself.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

from . import bench_decode, bench_training
from .config import Cached
from .device import current
from .errors import InputError, NSAError
from .geometry import TuneShape
from .spec import Spec

SEQLENS = (8192, 16384, 32768, 65536)
#: Of decoding: sequences and the tokens that each has.
DECODED = (TuneShape(1, 65536), TuneShape(64, 8192), TuneShape(64, 32768), TuneShape(32, 65536), TuneShape(32, 131072))
Progress = Callable[[str, int, int], None]


def run(
    spec: Spec,
    shapes: list[TuneShape] | None = None,
    *,
    rounds: int = 10,
    training: bool = False,
    cached: Cached | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure on the current GPU.

    Args:
        spec: geometry; its dtype must be one torch's fused attention takes for the comparison to run (bfloat16, float16).
        shapes: the length of the one sequence; of decoding, sequences and tokens that each has.
        rounds: interleaved rounds; medians and the bootstrap interval of the speed-ups are over these.
        training: forward and backward instead of the forward for inference.
        cached: a step of decoding from such a cache instead.
        progress: called with a description, steps done, steps in all.

    Returns:
        plain values: ``spec``, ``environment``, ``ceilings``, ``whole`` (the entry that is compared), of decoding ``cached``, and
        ``shapes``, each with ``batch``, ``seqlen``, ``entries`` (median, p20, p80 in ms, TFLOP/s where the arithmetic is known, peak MiB
        beyond the inputs; or ``error``), of decoding ``limit_ms`` (what must be read, at the copy bandwidth), and ``speedups`` of the whole
        over each full attention.

    Raises:
        TargetError: no GPU.
        InputError: several sequences of what is not decoding.
    """
    device = current()
    shapes = shapes or (list(DECODED) if cached else [TuneShape(1, n) for n in SEQLENS])
    if cached is None and any(shape.batch > 1 for shape in shapes):
        raise InputError("bench measures one sequence: BATCHxLENGTH goes with --decode")
    steps = len(shapes) + 1
    report = progress or (lambda description, done, total: None)
    report("ceilings", 0, steps)
    result: dict[str, Any] = {
        "spec": spec.to_dict(),
        "environment": {"slug": device.slug, **_environment()},
        "ceilings": _ceilings(),
        "whole": bench_decode.WHOLE if cached else bench_training.WHOLE if training else WHOLE,
        "shapes": [],
    }
    if cached:
        result["cached"] = cached._asdict()
    for done, shape in enumerate(shapes, 1):
        report(f"{spec.name}, {shape.batch} x {shape.seqlen} tokens", done, steps)
        copy_tb_s = result["ceilings"]["copy_tb_s"]
        found = _decoded(spec, cached, shape, rounds, copy_tb_s) if cached else _shape(spec, shape.seqlen, rounds, training)
        result["shapes"].append({"batch": shape.batch, **found})
    report("done", steps, steps)
    return result


def _environment() -> dict[str, str]:
    import torch
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def _ceilings() -> dict[str, float]:
    """Copy bandwidth (read + write, 8 GiB moved by a kernel) in TB/s and bf16 matmul (8192 cubed) in TFLOP/s."""
    import torch

    from . import timing

    source = torch.randn(2**31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    # Not copy_(): captured in a graph it becomes a memcpy node, which is slower than a kernel.
    copy_ms = timing.measure(lambda: torch.mul(source, 1, out=target)).median_ms
    moved = 2 * source.numel() * source.element_size()
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    matmul_ms = timing.measure(lambda: torch.matmul(a, b, out=out)).median_ms
    return {"copy_tb_s": moved / copy_ms / 1e9, "matmul_bf16_tflop_s": 2 * 8192**3 / matmul_ms / 1e9}


def tensors(spec: Spec, seqlen: int, device: str = "cuda") -> dict[str, Any]:
    """Seeded inputs of one forward over one sequence: ``q k v`` (per branch where the spec says so), gates, φ weights.

    ``q [T,Hq,Dqk]``, ``k [T,Hkv,Dqk]``, ``v [T,Hkv,Dv]`` normal in the spec's dtype; gates ``[T,Hq]`` in (0, 1).
    """
    import torch

    dtype = getattr(torch, spec.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Any:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    def branches(dim: int) -> Any:
        made = [normal(seqlen, spec.heads.kv, dim) for _ in range(3 if spec.kv == "per_branch" else 1)]
        return tuple(made) if len(made) == 3 else made[0]

    def phi(dim: int) -> tuple[Any, ...]:
        heads, reach = spec.heads.kv, spec.compression.block
        hidden = spec.compression.hidden or dim
        wide, narrow = (reach * dim) ** -0.5, hidden**-0.5
        return {
            "mean": tuple,
            "weighted": lambda: (normal(heads, reach, std=reach**-0.5),),
            "linear": lambda: (normal(heads, reach * dim, dim, std=wide),),
            "mlp": lambda: (
                normal(heads, reach * dim, hidden, std=wide), normal(heads, hidden, std=0.1),
                normal(heads, hidden, dim, std=narrow), normal(heads, dim, std=0.1), normal(heads, reach, dim, std=0.1),
            ),
        }[spec.compression.pooling]()  # fmt: skip

    q, k, v = normal(seqlen, spec.heads.query, spec.head_dim.qk), branches(spec.head_dim.qk), branches(spec.head_dim.v)
    gates = {f"g_{branch}": normal(seqlen, spec.heads.query).sigmoid() for branch in ("cmp", "slc", "swa")}
    return {"q": q, "k": k, "v": v, **gates, "phi_k": phi(spec.head_dim.qk), "phi_v": phi(spec.head_dim.v)}


def parts(spec: Spec, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The whole forward and each part of it as calls without arguments; a part's inputs are the outputs of those before it."""
    from . import ops, paths
    from .branches import forward
    from .config import Shape

    q, gates = given["q"], [given[f"g_{branch}"] for branch in ("cmp", "slc", "swa")]
    k_cmp_in, k_slc, k_swa = given["k"] if isinstance(given["k"], tuple) else (given["k"],) * 3
    v_cmp_in, v_slc, v_swa = given["v"] if isinstance(given["v"], tuple) else (given["v"],) * 3
    k_cmp = ops.compress(k_cmp_in, given["phi_k"], spec=spec, which="k")
    v_cmp = ops.compress(v_cmp_in, given["phi_v"], spec=spec, which="v")
    o_cmp, lse = ops.compressed_attention(q, k_cmp, v_cmp, spec=spec)
    blocks = ops.select_blocks(q, k_cmp, lse, spec=spec)
    o_slc, _ = ops.selected_attention(q, k_slc, v_slc, blocks, spec=spec)
    o_swa, _ = ops.sliding_attention(q, k_swa, v_swa, spec=spec)

    def compress() -> None:
        ops.compress(k_cmp_in, given["phi_k"], spec=spec, which="k")
        ops.compress(v_cmp_in, given["phi_v"], spec=spec, which="v")

    keys, scale = (k_slc, v_slc, k_swa, v_swa), spec.head_dim.qk**-0.5
    at = (spec.key, q, None, Shape(len(q), spec.heads.kv))
    fused = (o_cmp.clone(), gates, lse.clone(), scale, paths.workspace_bytes(), 0, (None, 1, len(q)))

    return {
        WHOLE: lambda: ops.nsa_attention(
            q, given["k"], given["v"], *gates, spec=spec, phi_k=given["phi_k"], phi_v=given["phi_v"]
        ),
        "compress K and V": compress,
        "compressed attention": lambda: ops.compressed_attention(q, k_cmp, v_cmp, spec=spec),
        "importance + top-k": lambda: ops.select_blocks(q, k_cmp, lse, spec=spec),
        "selected, sliding, gates": lambda: forward.finish(at, q, *keys, blocks, *fused),
        "selected attention": lambda: ops.selected_attention(q, k_slc, v_slc, blocks, spec=spec),
        "sliding attention": lambda: ops.sliding_attention(q, k_swa, v_swa, spec=spec),
        "combine": lambda: ops.combine(o_cmp, o_slc, o_swa, *gates),
    }  # fmt: skip


def full_attention(spec: Spec, given: dict[str, Any], backend: str, training: bool = False) -> tuple[Callable[[], Any], str]:
    """Causal full attention over the same heads on torch's ``FLASH_ATTENTION`` or ``CUDNN_ATTENTION``, and how it had to be called.

    Grouped heads are handed over as such where the backend takes them, else K and V are expanded before the timing; unequal head dims are
    padded before the timing where the backend wants them equal.

    Raises:
        InputError: the backend takes none of these forms.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def batched(x: Any) -> Any:
        return x.transpose(0, 1).unsqueeze(0)  # [1, H, T, D], strided

    q = batched(given["q"])
    k, v = (batched(x[0] if isinstance(x, tuple) else x) for x in (given["k"], given["v"]))
    scale = spec.head_dim.qk**-0.5
    padded = torch.nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1])) if q.shape[-1] > v.shape[-1] else v
    forms = {
        "": lambda: (k, v),
        "V padded": lambda: (k, padded),
        "K, V expanded": lambda: (k.repeat_interleave(spec.group, 1), v.repeat_interleave(spec.group, 1)),
        "K, V expanded, V padded": lambda: (k.repeat_interleave(spec.group, 1), padded.repeat_interleave(spec.group, 1)),
    }
    fault: Exception | None = None
    for note, form in forms.items():
        if "padded" in note and padded is v:
            continue
        keys, values = form()
        grouped = keys.shape[1] != q.shape[1]

        def attend(q: Any, keys: Any, values: Any, grouped: bool = grouped) -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)

        try:
            call = bench_training.with_gradients(attend, q, keys, values) if training else partial(attend, q, keys, values)
            call()
            torch.cuda.synchronize()
            return call, note
        except RuntimeError as error:
            fault = error
    raise InputError(f"torch's {backend} does not take this geometry: {str(fault).partition(chr(10))[0]}")


#: Parts that "selected, sliding, gates" does in one; the operators of each alone.
APART = ("selected attention", "sliding attention", "combine")
WHOLE = "whole forward"
FULL = {"full, flash": "FLASH_ATTENTION", "full, cuDNN": "CUDNN_ATTENTION"}


def _shape(spec: Spec, seqlen: int, rounds: int, training: bool) -> dict[str, Any]:
    import torch

    given = tensors(spec, seqlen)
    entries: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    whole = bench_training.WHOLE if training else WHOLE
    try:
        found = (bench_training.parts if training else parts)(spec, given)
    except (NSAError, torch.OutOfMemoryError) as error:
        entries.append(_failed(whole, error))
    notes: dict[str, str] = {}
    for name, backend in FULL.items():
        try:
            found[name], notes[name] = full_attention(spec, given, backend, training)
        except (InputError, torch.OutOfMemoryError) as error:
            entries.append(_failed(name, error))
    work = bench_training.flops(spec, seqlen) if training else _flops(spec, seqlen)
    return {"seqlen": seqlen, **_measured(whole, found, entries, notes, work, rounds)}


def _decoded(spec: Spec, cached: Cached, shape: TuneShape, rounds: int, copy_tb_s: float) -> dict[str, Any]:
    import torch

    from . import timing

    entries: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    try:
        found = bench_decode.parts(spec, cached, shape, tensors(spec, 1))
    except (NSAError, torch.OutOfMemoryError) as error:
        entries.append(_failed(bench_decode.WHOLE, error))
    step = found.get(bench_decode.WHOLE)
    for name, backend in FULL.items():
        try:
            found[name] = bench_decode.full_attention(spec, cached, shape, backend)
        except RuntimeError as error:
            entries.append(_failed(name, error))
    result = _measured(bench_decode.WHOLE, found, entries, {}, {}, rounds)
    ran = any(entry["name"] == bench_decode.WHOLE and "error" not in entry for entry in result["entries"])
    if step is not None and ran:  # without a graph: cannot be timed in turn with graphs
        timed = timing.streamed(step)
        result["entries"].append(
            {
                "name": bench_decode.EAGER,
                "note": "one of many in a row, launches included, L2 as they leave it",
                "peak_mib": 0.0,
                "p20_ms": timed.p20,
                "median_ms": timed.median_ms,
                "p80_ms": timed.p80,
            }
        )
    limit_ms = bench_decode.needed(spec, cached, shape) / copy_tb_s / 1e9
    return {"seqlen": shape.seqlen, "limit_ms": limit_ms, **result}


def _failed(name: str, error: Exception) -> dict[str, Any]:
    return {"name": name, "error": str(error).partition("\n")[0]}


def _measured(
    whole: str, found: dict[str, Any], entries: list[dict[str, Any]], notes: dict[str, str], work: dict[str, float], rounds: int
) -> dict[str, Any]:
    """The calls of ``found`` in turn: their entries, behind those given, and how much faster ``whole`` is than full attention."""
    import torch

    from . import timing

    calls: dict[str, Callable[[], Any]] = {}
    for name, call in found.items():
        try:
            peak = _peak_mib(call)
        except (NSAError, torch.OutOfMemoryError) as error:
            entries.append(_failed(name, error))
            continue
        calls[name] = call
        entries.append({"name": name, "peak_mib": peak, "note": notes.get(name, "")})
    samples = dict(zip(calls, timing.interleaved(list(calls.values()), rounds), strict=True))
    for entry in entries:
        if entry["name"] not in samples:
            continue
        ordered = sorted(samples[entry["name"]])
        pick = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)]
        entry |= dict(zip(("p20_ms", "median_ms", "p80_ms"), pick, strict=True))
        if entry["name"] in work:
            entry["tflop_s"] = work[entry["name"]] / entry["median_ms"] / 1e9
    speedups = {}
    for name in FULL:
        if name in samples and whole in samples:
            estimate, low, high = timing.speedup_interval(samples[name], samples[whole])
            speedups[name] = {"estimate": estimate, "low": low, "high": high}
    return {"entries": entries, "speedups": speedups}


def _peak_mib(call: Callable[[], Any]) -> float:
    """Memory a call allocates at its highest, outputs included, beyond what was there; the first call (which compiles) is not counted."""
    import torch

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _flops(spec: Spec, seqlen: int) -> dict[str, float]:
    """Useful arithmetic, visible keys only: a multiply and an add are two."""
    from . import inputs
    from .config import problem

    each = {
        name: inputs.case(problem(kernel, spec), seqlens=(seqlen,), heads_kv=spec.heads.kv, device="meta").flops()
        for name, kernel in (
            ("compressed attention", "compressed_attention_fwd"),
            ("importance + top-k", "importance_fwd"),
            ("selected attention", "selected_attention_fwd"),
            ("sliding attention", "sliding_attention_fwd"),
        )
    }
    full = spec.heads.query * (spec.head_dim.qk + spec.head_dim.v) * seqlen * (seqlen + 1)
    return {**each, WHOLE: sum(each.values()), **dict.fromkeys(FULL, full)}
