"""Seeded tensors for one call of one kernel: for tests, tuning, benchmarks, verification, and (``device="meta"``) compiling without a GPU.

A :class:`Case` owns the arguments of a kernel's host function (docs/design.md), its NaN-poisoned outputs, the reference's answer, and the
rule by which a kernel's answer is accepted. What the readers of a layout may not trust is poisoned too: gap rows of compressed tensors and
undefined columns of score tensors are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import paths, reference
from .acceptance import Check, check_floats, check_indices, check_scores, selection_agrees
from .config import Problem
from .errors import InputError, allowed
from .values import KINDS, Values

__all__ = ["KINDS", "Case", "Check", "case", "positions", "sample_queries", "selection_agrees"]


@dataclass
class Case:
    """One call of one kernel's host function.

    Args:
        problem: kernel and exact key.
        seqlens: tokens of each sequence.
        heads_kv: KV heads; ``heads_query`` follows from the group.
        device, seed, kind: where and which values; see ``KINDS``.
        tensors: arguments by name, outputs excluded.
        outputs: written by the kernel; poisoned with NaN (floats) or -7 (integers).
        chunks: token ranges that ``importance_fwd`` and ``select_topk`` are called with in turn, sharing one score buffer.
    """

    problem: Problem
    seqlens: tuple[int, ...]
    heads_kv: int
    heads_query: int
    device: torch.device
    seed: int
    kind: str
    tensors: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def total(self) -> int:
        return sum(self.seqlens)

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlens, default=0)

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Host copy of the sequences' limits, ``[B+1]``."""
        return (0, *accumulate(self.seqlens))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations (float32 for ``select_topk``)."""
        return getattr(torch, self.problem.as_dict().get("dtype", "float32"))

    def poison(self) -> None:
        """Fill the outputs with values no kernel writes."""
        for out in self.outputs.values():
            out.fill_(torch.nan if out.is_floating_point() else -7)

    def run(self, module: ModuleType) -> None:
        """Call the kernel's host function of a rendered module (any object with that attribute)."""
        host, t, o = getattr(module, self.problem.kernel), self.tensors, self.outputs
        if self.problem.kernel == "combine_fwd":
            host(*t.values(), o["o"])  # built in the order of the signature
            return
        tail = (t["cu_seqlens"], len(self.seqlens), self.max_seqlen)
        match self.problem.kernel:
            case "compress_fwd":
                host(t["x"], t["weights"], o["out"], *tail)
            case "compressed_attention_fwd":
                host(t["q"], t["k_cmp"], t["v_cmp"], o["o"], o["lse"], t["scale"], 0, *tail)
            case "importance_fwd":
                for start, stop in self.chunks:
                    host(t["q"][start:stop], t["k_cmp"], t["lse"][start:stop], o["scores"][: stop - start], t["scale"], start, *tail)
            case "select_topk":
                for start, stop in self.chunks:
                    host(t["scores"][: stop - start], o["block_indices"][start:stop], start, *tail)
            case "selected_attention_fwd":
                host(t["q"], t["k"], t["v"], t["block_indices"], o["o"], o["lse"], t["scale"], t["workspace_bytes"], 0, *tail)
            case "sliding_attention_fwd":
                host(t["q"], t["k"], t["v"], o["o"], o["lse"], t["scale"], 0, *tail)
            case "sliding_merge_fwd":
                host(*(t[name] for name in _MERGED), o["o"], t["scale"], 0, *tail)

    def expected(self, queries: Tensor | None = None, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The reference's outputs, computed in ``dtype``.

        Args:
            queries: LongTensor ``[S]`` of packed tokens; results have these rows only (``compress_fwd`` always gives all rows). For
                ``importance_fwd`` they must lie in the last chunk, which is what the score buffer holds after a run.
        """
        p, t, cu = self.problem, self.tensors, self.cu_seqlens
        queries = None if queries is None else queries.to(self.device)
        match p.kernel:
            case "compress_fwd":
                return {"out": reference.compress(t["x"], p.pooling, t["weights"], p.block, p.stride, cu, dtype)}
            case "compressed_attention_fwd":
                found = reference.compressed_attention(t["q"], t["k_cmp"], t["v_cmp"], p.block, p.stride, t["scale"], cu, queries, dtype)
                return dict(zip(("o", "lse"), found, strict=True))
            case "importance_fwd":
                tokens = self._chunk_tokens(queries)
                geometry = (p.block, p.stride, p.selection_block, p.mapping)
                return {"scores": reference.importance(t["q"], t["k_cmp"], t["lse"], *geometry, t["scale"], cu, tokens, dtype)}
            case "select_topk":
                tokens = torch.arange(self.total, device=self.device) if queries is None else queries
                rows = tokens % self.chunks[0][1] if self.total else tokens  # all chunks but the last are of one length
                position = positions(self.seqlens, self.device)[tokens]
                chosen = reference.select_at(t["scores"][rows], position, p.selection_block, p.count, p.initial, p.local)
                return {"block_indices": chosen}
            case "selected_attention_fwd":
                found = reference.selected_attention(
                    t["q"], t["k"], t["v"], t["block_indices"], p.selection_block, t["scale"], cu, queries, dtype
                )
                return dict(zip(("o", "lse"), found, strict=True))
            case "sliding_attention_fwd":
                found = reference.sliding_attention(t["q"], t["k"], t["v"], p.window, t["scale"], cu, queries, dtype)
                return dict(zip(("o", "lse"), found, strict=True))
            case "sliding_merge_fwd":
                given = [t[name] for name in _MERGED]
                blocks = (p.selection_block, p.initial, p.local, p.count)
                return {"o": reference.sliding_merge(*given, p.window, *blocks, t["scale"], cu, queries, dtype)}
            case _:
                return {"o": reference.combine(*(x if queries is None else x[queries] for x in t.values()), dtype=dtype)}

    def check(self, queries: Tensor | None = None) -> Check:
        """Hold the outputs to the float64 reference; rules in :mod:`nsa_gen.acceptance`.

        Every output element must be written, also where ``queries`` samples. Floats: at most twice the error that plain PyTorch makes in
        the problem's dtype, plus about one rounding. LSEs: float32 accuracy. Scores: relative closeness in the defined columns. Block
        indices: equality.
        """
        if queries is not None:
            start, stop = self.chunks[-1] if self.problem.kernel == "importance_fwd" else (0, self.total)
            queries = queries.to(self.device)
            queries = queries[(queries >= start) & (queries < stop)]
        wanted = self.expected(queries)
        match self.problem.kernel:
            case "select_topk":
                return check_indices(self.outputs["block_indices"], wanted["block_indices"], queries)
            case "importance_fwd":
                start, stop = self.chunks[-1]
                scores, position = self.outputs["scores"][: stop - start], positions(self.seqlens, self.device)[start:stop]
                rows = self._chunk_tokens(queries) - start
                return check_scores(scores, wanted["scores"], rows, position, self.problem.selection_block, self.tensors["lse"])
            case kernel:
                eager = self.expected(queries, self.dtype)
                return check_floats(wanted, eager, self.outputs, None if kernel == "compress_fwd" else queries)

    def _chunk_tokens(self, queries: Tensor | None) -> Tensor:
        """The tokens of which the score buffer holds rows after :meth:`run`: those of the last chunk."""
        start, stop = self.chunks[-1]
        if queries is None:
            return torch.arange(start, stop, device=self.device)
        if len(queries) and not start <= int(queries.min()) <= int(queries.max()) < stop:
            raise InputError(f"queries of this importance case must be in its last chunk [{start}, {stop})")
        return queries

    def flops(self) -> int:
        """Useful floating-point operations of the call (a multiply and an add are two): only visible keys count."""
        p, position = self.problem, positions(self.seqlens)
        match p.kernel:
            case "compress_fwd":
                count = sum(n for _, n in reference.compressed_offsets(self.cu_seqlens, self.total, p.block, p.stride))
                reach = p.block * p.head_dim
                each = {"mean": reach, "weighted": 2 * reach, "linear": 2 * reach * p.head_dim}.get(p.pooling)
                return count * self.heads_kv * (reach + 2 * reach * p.hidden + 2 * p.hidden * p.head_dim if each is None else each)
            case "compressed_attention_fwd":
                return 2 * self.heads_query * (p.head_dim_qk + p.head_dim_v) * self._compressed_pairs(position)
            case "importance_fwd":
                return 2 * self.heads_query * p.head_dim_qk * self._compressed_pairs(position)
            case "select_topk":
                return self.heads_kv * int((position // p.selection_block + 1).sum())
            case "selected_attention_fwd":
                current = position // p.selection_block
                seen = (current + 1).clamp(max=p.count) * p.selection_block - (p.selection_block - 1 - position % p.selection_block)
                return 2 * self.heads_query * (p.head_dim_qk + p.head_dim_v) * int(seen.sum())
            case "sliding_attention_fwd":
                return 2 * self.heads_query * (p.head_dim_qk + p.head_dim_v) * int((position + 1).clamp(max=p.window).sum())
            case "sliding_merge_fwd":
                block, forced = p.selection_block, p.initial + p.local
                seen = (position // block + 1).clamp(max=forced) * block - (block - 1 - position % block)
                pairs = int((position + 1).clamp(max=p.window).sum()) + int(seen.clamp(min=0).sum())
                return 2 * self.heads_query * (p.head_dim_qk + p.head_dim_v) * pairs
            case _:
                return 5 * self.total * self.heads_query * p.head_dim_v

    def bytes(self) -> int:
        """Compulsory traffic of the call: each input read once, each output written once, undefined score columns left out."""
        size = 0
        for name, value in (self.tensors | self.outputs).items():
            for x in value if isinstance(value, tuple) else (value,):
                if name == "scores":
                    size += 4 * self.heads_kv * int((positions(self.seqlens) // self.problem.selection_block + 1).sum())
                elif isinstance(x, Tensor):
                    size += x.numel() * x.element_size()
        return size

    def _compressed_pairs(self, position: Tensor) -> int:
        """Pairs of query token and compressed token it sees."""
        return int(((position + 1 - self.problem.block) // self.problem.stride + 1).clamp(min=0).sum())


def case(problem: Problem, *, seqlens: Sequence[int], heads_kv: int = 1, heads_query: int | None = None,
         device: str | torch.device = "cpu", seed: int = 0, kind: str = "random", workspace_bytes: int | None = None) -> Case:  # fmt: skip
    """Make a :class:`Case`. The same arguments give the same values on the same kind of device.

    Args:
        seqlens: tokens of each sequence; 0 allowed. Must be equal unless the problem is varlen.
        heads_query: only for ``combine_fwd``, whose key has no group (default: ``heads_kv``).
        workspace_bytes: bound on a kernel's scratch memory, and on score buffers (default: that of the environment).

    Raises:
        InputError: unknown kind, or unequal lengths of a problem that is not varlen.
    """
    fields = problem.as_dict()
    if kind not in KINDS:
        raise InputError(f"kind: {allowed(kind, KINDS)}")
    if "varlen" in fields and not fields["varlen"] and len(set(seqlens)) > 1:
        raise InputError(f"{problem.kernel} is not varlen: sequences must have one length, got {sorted(set(seqlens))}")
    group = int(fields.get("group") or 1)
    queries = heads_kv * group if "group" in fields else heads_query or heads_kv
    made = Case(problem, tuple(seqlens), heads_kv, queries, torch.device(device), seed, kind)
    if "varlen" in fields:
        made.tensors["cu_seqlens"] = torch.tensor(made.cu_seqlens, dtype=torch.int32).to(made.device) if fields["varlen"] else None
    limit = paths.workspace_bytes() if workspace_bytes is None else workspace_bytes
    _BUILD[problem.kernel](made, Values(kind, made.dtype, made.device, seed), limit)
    made.poison()
    return made


def positions(seqlens: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """Position of each packed token in its sequence, int64 ``[T]``."""
    lengths = torch.tensor(list(seqlens), dtype=torch.long)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return (torch.arange(int(lengths.sum())) - starts).to(device)


def sample_queries(seqlens: Sequence[int], count: int, seed: int = 0) -> Tensor:
    """About ``count`` packed token indices worth checking, sorted and distinct: first and last token of the batch, starts, ends and
    block boundaries of its sequences (at most half the count), the rest random. All tokens if there are no more than ``count``."""
    cu = (0, *accumulate(seqlens))
    total = cu[-1]
    if total <= count:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed)
    edges = [0, *(2**e + d for e in range(4, 12) for d in (-1, 0, 1))]
    near = {start + e for start, end in pairwise(cu) for e in edges if start + e < end}
    near |= {end - 1 - e for start, end in pairwise(cu) for e in (0, 1, 15, 16, 31, 32, 63, 64) if start <= end - 1 - e}
    boundary = torch.tensor(sorted(near))
    boundary = boundary[torch.randperm(len(boundary), generator=generator)[: count // 2]]
    chosen = torch.cat([torch.tensor([0, total - 1]), boundary])
    rest = torch.randint(total, (max(count - len(chosen), 0),), generator=generator)
    return torch.cat([chosen, rest]).unique()


# --- arguments of each kernel ------------------------------------------------------------------------------------------------


def _compressed(made: Case, *tensors: Tensor) -> None:
    """NaN in the gap rows."""
    p = made.problem
    if made.device.type == "meta":
        return
    held = torch.zeros(len(tensors[0]), dtype=torch.bool)
    for first, count in reference.compressed_offsets(made.cu_seqlens, made.total, p.block, p.stride):
        held[first : first + count] = True
    for x in tensors:
        x[~held.to(made.device)] = torch.nan


def _attention_outputs(made: Case, values: Values) -> None:
    made.outputs["o"] = values.empty(made.total, made.heads_query, made.problem.head_dim_v)
    made.outputs["lse"] = values.empty(made.total, made.heads_query, dtype=torch.float32)
    made.tensors["scale"] = made.problem.head_dim_qk**-0.5


def _compress(made: Case, values: Values, workspace_bytes: int) -> None:
    p, heads = made.problem, made.heads_kv
    reach = p.block * p.head_dim
    made.tensors["x"] = values.normal(made.total, heads, p.head_dim)
    made.tensors["weights"] = {
        "mean": lambda: (),
        "weighted": lambda: (values.normal(heads, p.block, std=p.block**-0.5),),
        "linear": lambda: (values.normal(heads, reach, p.head_dim, std=reach**-0.5),),
        "mlp": lambda: (
            values.normal(heads, reach, p.hidden, std=reach**-0.5),
            values.normal(heads, p.hidden, std=0.1),
            values.normal(heads, p.hidden, p.head_dim, std=p.hidden**-0.5),
            values.normal(heads, p.head_dim, std=0.1),
            values.normal(heads, p.block, p.head_dim, std=0.5),
        ),
    }[p.pooling]()
    made.outputs["out"] = values.empty(reference.compressed_rows(made.total, p.stride), heads, p.head_dim)


def _compressed_attention(made: Case, values: Values, workspace_bytes: int) -> None:
    p, rows = made.problem, reference.compressed_rows(made.total, made.problem.stride)
    q, k = values.q_k(made.total, made.heads_kv, p.group, rows, p.head_dim_qk)
    v = values.normal(rows, made.heads_kv, p.head_dim_v)
    _compressed(made, k, v)
    made.tensors |= {"q": q, "k_cmp": k, "v_cmp": v}
    _attention_outputs(made, values)


def _chunks(made: Case, blocks: int, workspace_bytes: int) -> tuple[tuple[int, int], ...]:
    """Token ranges whose scores fit the workspace, in multiples of 256."""
    step = max(256, workspace_bytes // max(made.heads_kv * blocks * 4, 1) // 256 * 256)
    return tuple((start, min(start + step, made.total)) for start in range(0, made.total, step)) or ((0, 0),)


def _score_columns(made: Case) -> int:
    """Columns of a score buffer: enough for the longest sequence, in multiples of 8."""
    return max(-(-made.max_seqlen // made.problem.selection_block), 1) + 7 & ~7


def _importance(made: Case, values: Values, workspace_bytes: int) -> None:
    p, rows = made.problem, reference.compressed_rows(made.total, made.problem.stride)
    q, k = values.q_k(made.total, made.heads_kv, p.group, rows, p.head_dim_qk)
    _compressed(made, k)
    scale = p.head_dim_qk**-0.5
    lse = values.empty(made.total, made.heads_query, dtype=torch.float32)
    if values.real:  # any LSE near the true one serves: the reference is given the same
        fast = made.dtype if made.device.type == "cuda" else torch.float32
        lse = reference.compressed_attention(q, k, k[..., :1], p.block, p.stride, scale, made.cu_seqlens, dtype=fast)[1]
    made.tensors |= {"q": q, "k_cmp": k, "lse": lse, "scale": scale}
    columns = _score_columns(made)
    made.chunks = _chunks(made, columns, workspace_bytes)
    made.outputs["scores"] = values.empty(max(b - a for a, b in made.chunks), made.heads_kv, columns, dtype=torch.float32)


def _select(made: Case, values: Values, workspace_bytes: int) -> None:
    columns = _score_columns(made)
    made.chunks = _chunks(made, columns, workspace_bytes)
    scores = values.scores(max(b - a for a, b in made.chunks), made.heads_kv, columns)
    if values.real and len(made.chunks) == 1:
        current = positions(made.seqlens, made.device) // made.problem.selection_block
        for i in range(0, made.total, 4096):
            undefined = torch.arange(columns, device=made.device) > current[i : i + 4096, None]
            scores[i : i + 4096].masked_fill_(undefined[:, None], torch.nan)
    made.tensors["scores"] = scores
    made.outputs["block_indices"] = values.empty(made.total, made.heads_kv, made.problem.count, dtype=torch.int32)


def _selected_attention(made: Case, values: Values, workspace_bytes: int) -> None:
    p = made.problem
    q, k = values.q_k(made.total, made.heads_kv, p.group, made.total, p.head_dim_qk)
    v = values.normal(made.total, made.heads_kv, p.head_dim_v)
    chosen = values.empty(made.total, made.heads_kv, p.count, dtype=torch.int32)
    if values.real:  # legal by construction: the reference's choice on scores of the case's kind
        blocks, position = _score_columns(made), positions(made.seqlens, made.device)
        step = max(1, 2**28 // (made.heads_kv * blocks * 4))
        for i in range(0, made.total, step):
            part = position[i : i + step]
            scores = values.scores(len(part), made.heads_kv, blocks)
            chosen[i : i + step] = reference.select_at(scores, part, p.selection_block, p.count, p.initial, p.local)
    made.tensors |= {"q": q, "k": k, "v": v, "block_indices": chosen, "workspace_bytes": workspace_bytes}
    _attention_outputs(made, values)


def _sliding_attention(made: Case, values: Values, workspace_bytes: int) -> None:
    p = made.problem
    q, k = values.q_k(made.total, made.heads_kv, p.group, made.total, p.head_dim_qk)
    made.tensors |= {"q": q, "k": k, "v": values.normal(made.total, made.heads_kv, p.head_dim_v)}
    _attention_outputs(made, values)


#: Arguments of ``sliding_merge_fwd`` in the order of its signature, up to the output.
_MERGED = ("q", "k_slc", "v_slc", "k_swa", "v_swa", "part", "part_lse", "o_cmp", "g_cmp", "g_slc", "g_swa")


def _sliding_merge(made: Case, values: Values, workspace_bytes: int) -> None:
    p, heads, total = made.problem, made.heads_kv, made.total
    q, k = values.q_k(total, heads, p.group, total, p.head_dim_qk)
    v = values.normal(total, heads, p.head_dim_v)
    # K and V of their own, as where the spec has them per branch, of the same kind: the others' tokens in another order.
    k_swa, v_swa = (x.roll(1, 0) if values.real else x for x in (k, v))
    made.tensors |= {"q": q, "k_slc": k, "v_slc": v, "k_swa": k_swa, "v_swa": v_swa}
    made.tensors["part"] = values.normal(heads * p.parts, total, p.group * p.head_dim_v).view(heads, p.parts, total, p.group, p.head_dim_v)
    # About what a block of keys gives: log2 of its size, more or less.
    spread = values.empty(heads, p.parts, total, p.group, dtype=torch.float32)
    if values.real:
        spread.copy_(values.normal(heads * p.parts, total, p.group).view_as(spread)).add_(math.log2(p.selection_block))
        current = positions(made.seqlens, made.device) // p.selection_block
        filled = (current + 1).clamp(max=p.count) - p.initial - p.local
        nothing = (torch.arange(p.parts, device=made.device)[:, None] >= filled)[None, :, :, None]
        spread.masked_fill_(nothing, torch.nan)  # what a query has no block for is unwritten memory
        made.tensors["part"].masked_fill_(nothing[..., None], torch.nan)
    made.tensors["part_lse"] = spread
    made.tensors["o_cmp"] = values.normal(total, made.heads_query, p.head_dim_v)
    for branch in ("cmp", "slc", "swa"):
        made.tensors[f"g_{branch}"] = values.normal(total, made.heads_query).sigmoid()
    made.tensors["scale"] = p.head_dim_qk**-0.5
    made.outputs["o"] = values.empty(total, made.heads_query, p.head_dim_v)


def _combine(made: Case, values: Values, workspace_bytes: int) -> None:
    shape = (made.total, made.heads_query)
    for branch in ("cmp", "slc", "swa"):
        made.tensors[f"o_{branch}"] = values.normal(*shape, made.problem.head_dim_v)
    for branch in ("cmp", "slc", "swa"):
        made.tensors[f"g_{branch}"] = values.normal(*shape).sigmoid()
    made.outputs["o"] = values.empty(*shape, made.problem.head_dim_v)


_BUILD: dict[str, Callable[[Case, Values, int], None]] = {
    "compress_fwd": _compress,
    "compressed_attention_fwd": _compressed_attention,
    "importance_fwd": _importance,
    "select_topk": _select,
    "selected_attention_fwd": _selected_attention,
    "sliding_attention_fwd": _sliding_attention,
    "sliding_merge_fwd": _sliding_merge,
    "combine_fwd": _combine,
}
