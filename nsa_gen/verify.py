"""Kernels against the float64 reference: every kernel of a spec, and those that serve from a KV cache, on edge cases; the whole operator.

A case that fails, or raises, is one line of the report; the others still run. Acceptance rules are those of :mod:`nsa_gen.acceptance`:
at most twice the error of plain PyTorch in the same dtype, equal selections except where scores tie within rounding.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import acceptance, inputs, kernels, ops, reference
from .acceptance import Check
from .config import FP8, KERNELS, SERVING, Cached, Problem, Shape, cache_of, key_fields, problem, problems
from .errors import InputError
from .spec import Spec, load

#: Rows of long calls that are held to the reference; every element is checked for having been written.
QUERIES = 384
WHOLE = "nsa_attention"


@dataclass(frozen=True)
class Result:
    """One case: what ran, the measured errors by output and metric, and in words what is wrong."""

    kernel: str
    case: str
    seqlens: tuple[int, ...]
    dtype: str
    ok: bool
    errors: dict[str, dict[str, float]]
    message: str
    seconds: float


@dataclass
class Report:
    """All cases of one run. ``ok`` if each passed."""

    spec: str
    device: str
    results: list[Result] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.results) and all(result.ok for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"spec": self.spec, "device": self.device, "ok": self.ok, "results": [asdict(result) for result in self.results]}

    def print(self) -> None:
        """A table on stdout, and each failure's message below."""
        from rich.console import Console
        from rich.table import Table

        table = Table("kernel", "case", "lengths", "worst error", "PyTorch's", "", box=None, pad_edge=False, header_style="bold")
        for r in self.results:
            worst, eager = _worst(r.errors)
            mark = "[green]ok[/]" if r.ok else "[red]WRONG[/]"
            table.add_row(r.kernel, r.case, " ".join(map(str, r.seqlens[:5])), worst, eager, mark)
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(table)
        failed = [r for r in self.results if not r.ok]
        for r in failed:
            console.print(f"{r.kernel}, {r.case}: {r.message}", markup=False, style="red")
        console.print(f"{self.spec} on {self.device}: {len(self.results) - len(failed)} of {len(self.results)} cases right")


def _worst(errors: dict[str, dict[str, float]]) -> tuple[str, str]:
    """Largest relative error over the outputs, and PyTorch's beside it, as text."""
    found = [(e.get("rel_fro", e.get("max_rel")), e.get("eager_rel_fro")) for e in errors.values()]
    found = [pair for pair in found if pair[0] is not None]
    if not found:
        return "-", "-"
    worst, eager = max(found, key=lambda pair: pair[0])
    return f"{worst:.1e}", "-" if eager is None else f"{eager:.1e}"


def run(
    spec: Spec | str,
    device: str | torch.device | None = None,
    *,
    seqlens: Sequence[int] = (),
    kernels: Sequence[str] | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Check the kernels of a spec, in the configs that calls of these sizes get.

    Args:
        spec: a name, path or ``Spec``. Its dtype is checked, float32 instead of bfloat16 in Triton's interpreter (whose bfloat16
            product is wrong).
        device: default: the current GPU, or the CPU under ``TRITON_INTERPRET=1``.
        seqlens: further lengths, each one sequence. Beyond a few hundred tokens only sampled rows are compared.
        kernels: only these, of ``config.KERNELS`` and ``config.SERVING``; ``nsa_attention`` is the whole operator. Default: all.
        on_result: called after each case.

    Raises:
        InputError: no GPU and no interpreter, or a length below 1.
        SpecError, ConfigError: no such spec or kernel.
    """
    spec = load(spec)
    target = _device(device)
    for name in kernels or ():
        if name != WHOLE:
            key_fields(name)
    if any(length < 1 for length in seqlens):
        raise InputError(f"seqlens must be positive, got {list(seqlens)}")
    if target.type == "cpu" and spec.dtype == "bfloat16":
        spec = spec.replace(dtype="float32")
    report = Report(spec.name, str(_kernels().device_of(torch.empty(0, device=target)).slug))
    wanted = tuple(kernels) if kernels else (*KERNELS, *SERVING, WHOLE)
    for kernel, label, lengths, check in _cases(spec, target, tuple(seqlens)):
        if kernel not in wanted:
            continue
        began = time.perf_counter()
        try:
            found = check()
        except Exception as error:  # one broken case must not hide the others
            found = Check(False, {}, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        seconds = time.perf_counter() - began
        result = Result(kernel, label, lengths, spec.dtype, found.ok, found.errors, found.message, round(seconds, 3))
        report.results.append(result)
        if on_result is not None:
            on_result(result)
    return report


def _kernels() -> Any:
    return kernels  # `run` has an argument of that name


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if kernels.interpreting():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("no GPU: set TRITON_INTERPRET=1 to verify in Triton's interpreter")
    return torch.device("cuda", torch.cuda.current_device())


_Case = tuple[str, str, tuple[int, ...], Callable[[], Check]]


def _cases(spec: Spec, device: torch.device, extra: tuple[int, ...]) -> Iterator[_Case]:
    """Each case as kernel, label, lengths and what runs it. Small on a CPU, several thousand tokens on a GPU."""
    block, sel = spec.compression.block, spec.selection.block
    small = device.type == "cpu"
    beyond = (spec.selection.count + 1) * sel + 5  # queries that leave blocks out
    short = min(beyond, max(192, 2 * sel + 5))  # what the interpreter does in seconds
    long = short if small else max(2 * beyond, 4096) + 37
    ragged = (long, 0, block - 1, 1, sel) if small else (long, 0, block - 1, 1, block, sel + 1, 777, 2 * sel, 0)
    middle = short if small else 1536
    for varlen in (False, True):
        for prob in problems(spec, varlen=varlen):
            fields = prob.as_dict()
            if varlen and "varlen" not in fields:
                continue
            if varlen:
                plan = [("ragged", ragged, "random", False), ("all empty", (0, 0), "random", False)]
                if not small:
                    plan.append(("ragged, huge logits", ragged, "huge", False))
            else:
                plan = [(kind, (middle,), kind, False) for kind in (inputs.KINDS if not small else ("random", "ties", "huge", "equal"))]
                plan.append(("batched, strided", (sel + 3,) * 2 if small else (1000, 1000), "random", True))
                plan.append(("shorter than a block", (block - 1,), "random", False))
                if small and beyond > short and prob.kernel == "select_topk":
                    plan.append(("more blocks than chosen", (beyond,), "ties", False))
                plan += [("given length", (length,), "random", False) for length in extra]
            for label, lengths, kind, strided in plan:
                yield prob.kernel, label, lengths, _bind(_check_kernel, prob, lengths, kind, device, strided)
    # The first sequence's newest token completes a compressed one; a sequence has its new tokens at least.
    first = short if small else 5 * long
    served = (first - (first - block) % spec.compression.stride, *((1, sel - 1) if small else ragged))
    for cached in _caches(spec, device):
        for prob in problems(spec, cached=cached):
            append, new = prob.kernel == "cache_append", f"{cached.tokens} new, {cached.storage}"
            if small and append and cached.storage == FP8:
                continue  # the interpreter rounds 0.99 to 0.5 when it stores fp8
            for kind in ("random",) if small or append else ("random", "huge", "ties"):
                label = f"ragged, {new}" + ("" if kind == "random" else f", {kind}")
                yield prob.kernel, label, served, _bind(_check_kernel, prob, served, kind, device, False)
            for length in extra:
                yield prob.kernel, f"given length, {new}", (length,), _bind(_check_kernel, prob, (length,), "random", device, False)
    yield WHOLE, "ragged", ragged, _bind(_check_whole, spec, ragged, device)
    yield WHOLE, "ragged, K/V per branch, odd strides", ragged, _bind(_check_whole, spec, ragged, device, odd=True)
    pair = (sel + 3,) * 2 if small else (1537, 1537)
    yield WHOLE, "batched", pair, _bind(_check_whole, spec, pair, device, batched=True)
    for length in extra:
        yield WHOLE, "given length", (length,), _bind(_check_whole, spec, (length,), device)


def _caches(spec: Spec, device: torch.device) -> list[Cached]:
    """In each storage that the device can, one new token and several; on a CPU not all pairs of them."""
    fp8 = kernels.device_of(torch.empty(0, device=device)).fp8
    if device.type == "cpu":
        return [cache_of(spec), cache_of(spec, FP8, tokens=4)]
    return [cache_of(spec, storage, tokens=tokens) for storage in (None, *((FP8,) if fp8 else ())) for tokens in (1, 4)]


def _bind(check: Callable[..., Check], *args: Any, **kwargs: Any) -> Callable[[], Check]:
    return lambda: check(*args, **kwargs)


def _check_kernel(prob: Problem, lengths: tuple[int, ...], kind: str, device: torch.device, strided: bool) -> Check:
    """One kernel on one case of :mod:`nsa_gen.inputs`; ``strided`` puts every tensor that may be strided into a wider one."""
    heads = 1 if device.type == "cpu" else 2
    made = inputs.case(prob, seqlens=lengths, heads_kv=heads, device=device, kind=kind)
    if strided:
        for name, x in made.tensors.items():
            branch = name.startswith("o_") and prob.kernel in ("sliding_merge_fwd", "combine_bwd")
            contiguous = branch or name in ("scores", "dout") or name.endswith("_add")
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3 and not contiguous:
                made.tensors[name] = _widened(x, 8)
    found = kernels.get(prob, Shape(made.max_seqlen, len(lengths) * heads), kernels.device_of(torch.empty(0, device=device)))
    made.run(found)
    queries = inputs.sample_queries(made.seqlens, QUERIES)
    if prob.kernel == "importance_fwd" and made.chunks:
        start, stop = made.chunks[-1]
        queries = queries[(queries >= start) & (queries < stop)]
    return made.check(queries)


def _widened(x: Tensor, by: int) -> Tensor:
    """Equal values, inside a tensor with one head and ``by`` elements a head more."""
    tokens, heads, dim = x.shape
    wide = x.new_full((tokens, heads + 1, dim + by), torch.nan)
    wide[:, :heads, :dim] = x
    return wide[:, :heads, :dim]


def _check_whole(spec: Spec, lengths: tuple[int, ...], device: torch.device, odd: bool = False, batched: bool = False) -> Check:
    """The operator against the reference: outputs, and the selection made on the way.

    ``odd``: three K and V, strides and addresses that kernels cannot read in place; ``batched``: ``[B,S,H,D]`` tensors.
    """
    dtype, total, heads = getattr(torch, spec.dtype), sum(lengths), 1 if device.type == "cpu" else 2
    generator = torch.Generator(device).manual_seed(len(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    q = normal(total, heads * spec.group, spec.head_dim.qk)
    three = 3 if odd else 1
    k = tuple(normal(total, heads, spec.head_dim.qk) for _ in range(three))
    v = tuple(normal(total, heads, spec.head_dim.v) for _ in range(three))
    gates = [normal(total, heads * spec.group).sigmoid() for _ in range(3)]
    phi_k, phi_v = (_phi(spec, which, heads, device) for which in "kv")
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    at = {} if batched else {"cu_seqlens": cu, "max_seqlen": max(lengths)}

    def given(x: Tensor) -> Tensor:
        if odd and x.dim() == 3:
            x = _widened(x, 3)
        return x.unflatten(0, (len(lengths), lengths[0])) if batched else x

    whole = {"k": tuple(map(given, k)), "v": tuple(map(given, v))} if odd else {"k": given(k[0]), "v": given(v[0])}
    with torch.no_grad():
        o = ops.nsa_attention(given(q), **whole, **dict(zip(("g_cmp", "g_slc", "g_swa"), map(given, gates), strict=True)),
                              spec=spec, phi_k=phi_k, phi_v=phi_v, **at)  # fmt: skip
        o = o.flatten(0, 1) if batched else o
        k_cmp = ops.compress(given(k[0]), phi_k, spec=spec, which="k", **at)
        v_cmp = ops.compress(given(v[0]), phi_v, spec=spec, which="v", **at)
        lse = ops.compressed_attention(given(q), k_cmp, v_cmp, spec=spec, **at)[1]
        block_indices = ops.select_blocks(given(q), k_cmp, lse, spec=spec, **at)
        block_indices = block_indices.flatten(0, 1) if batched else block_indices
    queries = inputs.sample_queries(lengths, QUERIES).to(device)
    fault = _selection_fault(spec, q, k_cmp, block_indices, cu, lengths, queries)
    if fault:
        return Check(False, {}, fault)
    exact, eager = (
        reference.nsa_attention(q, k if odd else k[0], v if odd else v[0], *gates, spec, phi_k, phi_v, cu_seqlens=cu, queries=queries,
                                block_indices=block_indices, dtype=d)
        for d in (torch.float64, dtype)
    )  # fmt: skip
    return acceptance.check_floats({"o": exact}, {"o": eager}, {"o": o}, queries)


def _phi(spec: Spec, which: str, heads: int, device: torch.device) -> tuple[Tensor, ...]:
    """Weights of φ for ``which`` of ``k`` and ``v``."""
    made = inputs.case(problem("compress_fwd", spec, which=which), seqlens=(spec.compression.block,), heads_kv=heads, device=device)
    return made.tensors["weights"]


def _selection_fault(
    spec: Spec, q: Tensor, k_cmp: Tensor, block_indices: Tensor, cu: Tensor, lengths: tuple[int, ...], queries: Tensor
) -> str:
    """What is wrong with the selection made from these compressed keys, or an empty text."""
    if not len(queries):
        return ""
    c, s = spec.compression, spec.selection
    exact = (c.block, c.stride)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp[..., :1], *exact, cu_seqlens=cu, queries=queries, dtype=torch.float64)
    spread = lse.new_zeros(q.shape[:2]).index_copy(0, queries, lse)
    scores = reference.importance(q, k_cmp, spread, *exact, s.block, s.mapping, cu_seqlens=cu, queries=queries, dtype=torch.float64)
    seen = lse[lse.isfinite()]
    rtol = 2e-4 + 3.2e-5 * (float(seen.abs().max()) if len(seen) else 0.0)  # twice what acceptance.check_scores grants a score
    position = inputs.positions(lengths, q.device)[queries]
    topk = problem("select_topk", spec, varlen=True)
    if acceptance.selection_agrees(block_indices[queries], scores, topk, rtol, position):
        return ""
    return f"block_indices differ from the float64 reference by more than ties within {rtol:.1e}"
