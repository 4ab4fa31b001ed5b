"""Calls of the forward's kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..acceptance import Check, check_floats, check_indices, check_scores
from ..values import Values
from .case import Call, Case, positions


def sequences(case: Case) -> tuple[Any, int, int]:
    """``cu_seqlens``, batch, longest sequence: the end of most host functions' arguments."""
    return case.tensors["cu_seqlens"], len(case.seqlens), case.max_seqlen


def phi_weights(case: Case, values: Values, dim: int, hidden: int) -> tuple[Tensor, ...]:
    """Weights of φ for rows of ``dim`` elements."""
    p, heads = case.problem, case.heads_kv
    reach = p.block * dim
    return {
        "mean": lambda: (),
        "weighted": lambda: (values.normal(heads, p.block, std=p.block**-0.5),),
        "linear": lambda: (values.normal(heads, reach, dim, std=reach**-0.5),),
        "mlp": lambda: (
            values.normal(heads, reach, hidden, std=reach**-0.5),
            values.normal(heads, hidden, std=0.1),
            values.normal(heads, hidden, dim, std=hidden**-0.5),
            values.normal(heads, dim, std=0.1),
            values.normal(heads, p.block, dim, std=0.5),
        ),
    }[p.pooling]()


def phi_flops(case: Case, dim: int, hidden: int) -> int:
    """Floating-point operations of φ for one compressed token of one head."""
    pooling, reach = case.problem.pooling, case.problem.block * dim
    each = {"mean": reach, "weighted": 2 * reach, "linear": 2 * reach * dim}.get(pooling)
    return reach + 2 * reach * hidden + 2 * hidden * dim if each is None else each


def gap_rows(case: Case) -> Tensor:
    """Rows of compressed tensors that belong to no sequence, bool ``[rows]``."""
    p = case.problem
    gap = torch.ones(reference.compressed_rows(case.total, p.stride), dtype=torch.bool)
    for first, count in reference.compressed_offsets(case.cu_seqlens, case.total, p.block, p.stride):
        gap[first : first + count] = False
    return gap.to(case.device)


def selected_pairs(case: Case, position: Tensor, count: int) -> int:
    """Pairs of query token and token it sees in ``count`` blocks, its own among them."""
    block = case.problem.selection_block
    seen = (position // block + 1).clamp(max=count) * block - (block - 1 - position % block)
    return int(seen.clamp(min=0).sum())


def legal_blocks(case: Case, values: Values) -> Tensor:
    """``block_indices [T,Hkv,n]``, legal by construction: the reference's choice on scores of the case's kind."""
    p = case.problem
    chosen = values.empty(case.total, case.heads_kv, p.count, dtype=torch.int32)
    if values.real:
        blocks, position = _score_columns(case), positions(case.seqlens, case.device)
        step = max(1, 2**28 // (case.heads_kv * blocks * 4))
        initial, local = p.as_dict().get("initial", 1), p.as_dict().get("local", min(2, p.count - 1))
        for i in range(0, case.total, step):
            part = position[i : i + step]
            scores = values.scores(len(part), case.heads_kv, blocks)
            chosen[i : i + step] = reference.select_at(scores, part, p.selection_block, p.count, initial, local)
    return chosen


def _attention_outputs(case: Case, values: Values) -> None:
    case.outputs["o"] = values.empty(case.total, case.heads_query, case.problem.head_dim_v)
    case.outputs["lse"] = values.empty(case.total, case.heads_query, dtype=torch.float32)
    case.tensors["scale"] = case.problem.head_dim_qk**-0.5


def _chunks(case: Case, blocks: int, workspace_bytes: int) -> tuple[tuple[int, int], ...]:
    """Token ranges whose scores fit the workspace, in multiples of 256."""
    step = max(256, workspace_bytes // max(case.heads_kv * blocks * 4, 1) // 256 * 256)
    return tuple((start, min(start + step, case.total)) for start in range(0, case.total, step)) or ((0, 0),)


def _score_columns(case: Case) -> int:
    """Columns of a score buffer: enough for the longest sequence, in multiples of 8."""
    return max(-(-case.max_seqlen // case.problem.selection_block), 1) + 7 & ~7


class _Compress(Call):
    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        case.tensors["x"] = values.normal(case.total, case.heads_kv, case.problem.head_dim)
        case.tensors["weights"] = phi_weights(case, values, case.problem.head_dim, case.problem.hidden)
        rows = reference.compressed_rows(case.total, case.problem.stride)
        case.outputs["out"] = values.empty(rows, case.heads_kv, case.problem.head_dim)

    def run(self, case: Case, host: Any) -> None:
        host(case.tensors["x"], case.tensors["weights"], case.outputs["out"], *sequences(case))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p, t = case.problem, case.tensors
        return {"out": reference.compress(t["x"], p.pooling, t["weights"], p.block, p.stride, case.cu_seqlens, dtype)}

    def check(self, case: Case, queries: Tensor | None) -> Check:
        return check_floats(case.expected(), case.expected(None, case.dtype), case.outputs, None)

    def flops(self, case: Case) -> int:
        p = case.problem
        count = sum(n for _, n in reference.compressed_offsets(case.cu_seqlens, case.total, p.block, p.stride))
        return count * case.heads_kv * phi_flops(case, p.head_dim, p.hidden)


class _CompressedAttention(Call):
    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p, rows = case.problem, reference.compressed_rows(case.total, case.problem.stride)
        q, k = values.q_k(case.total, case.heads_kv, p.group, rows, p.head_dim_qk)
        v = values.normal(rows, case.heads_kv, p.head_dim_v)
        if values.real:
            k[gap_rows(case)], v[gap_rows(case)] = torch.nan, torch.nan
        case.tensors |= {"q": q, "k_cmp": k, "v_cmp": v}
        _attention_outputs(case, values)

    def run(self, case: Case, host: Any) -> None:
        t, o = case.tensors, case.outputs
        host(t["q"], t["k_cmp"], t["v_cmp"], o["o"], o["lse"], t["scale"], 0, *sequences(case))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p, t = case.problem, case.tensors
        found = reference.compressed_attention(
            t["q"], t["k_cmp"], t["v_cmp"], p.block, p.stride, t["scale"], case.cu_seqlens, queries, dtype
        )
        return dict(zip(("o", "lse"), found, strict=True))

    def flops(self, case: Case) -> int:
        p = case.problem
        return 2 * case.heads_query * (p.head_dim_qk + p.head_dim_v) * case.compressed_pairs(positions(case.seqlens))


class _Importance(Call):
    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p, rows = case.problem, reference.compressed_rows(case.total, case.problem.stride)
        q, k = values.q_k(case.total, case.heads_kv, p.group, rows, p.head_dim_qk)
        if values.real:
            k[gap_rows(case)] = torch.nan
        scale = p.head_dim_qk**-0.5
        lse = values.empty(case.total, case.heads_query, dtype=torch.float32)
        if values.real:  # any LSE near the true one serves: the reference is given the same
            fast = case.dtype if case.device.type == "cuda" else torch.float32
            lse = reference.compressed_attention(q, k, k[..., :1], p.block, p.stride, scale, case.cu_seqlens, dtype=fast)[1]
        case.tensors |= {"q": q, "k_cmp": k, "lse": lse, "scale": scale}
        columns = _score_columns(case)
        case.chunks = _chunks(case, columns, workspace_bytes)
        case.outputs["scores"] = values.empty(max(b - a for a, b in case.chunks), case.heads_kv, columns, dtype=torch.float32)

    def run(self, case: Case, host: Any) -> None:
        t, scores = case.tensors, case.outputs["scores"]
        for start, stop in case.chunks:
            host(t["q"][start:stop], t["k_cmp"], t["lse"][start:stop], scores[: stop - start], t["scale"], start, *sequences(case))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p, t, tokens = case.problem, case.tensors, case.chunk_tokens(queries)
        geometry = (p.block, p.stride, p.selection_block, p.mapping)
        return {"scores": reference.importance(t["q"], t["k_cmp"], t["lse"], *geometry, t["scale"], case.cu_seqlens, tokens, dtype)}

    def check(self, case: Case, queries: Tensor | None) -> Check:
        start, stop = case.chunks[-1]
        scores, position = case.outputs["scores"][: stop - start], positions(case.seqlens, case.device)[start:stop]
        rows = case.chunk_tokens(queries) - start
        wanted = case.expected(queries)["scores"]
        return check_scores(scores, wanted, rows, position, case.problem.selection_block, case.tensors["lse"])

    def flops(self, case: Case) -> int:
        return 2 * case.heads_query * case.problem.head_dim_qk * case.compressed_pairs(positions(case.seqlens))


class _SelectTopk(Call):
    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        columns = _score_columns(case)
        case.chunks = _chunks(case, columns, workspace_bytes)
        scores = values.scores(max(b - a for a, b in case.chunks), case.heads_kv, columns)
        if values.real and len(case.chunks) == 1:
            current = positions(case.seqlens, case.device) // case.problem.selection_block
            for i in range(0, case.total, 4096):
                undefined = torch.arange(columns, device=case.device) > current[i : i + 4096, None]
                scores[i : i + 4096].masked_fill_(undefined[:, None], torch.nan)
        case.tensors["scores"] = scores
        case.outputs["block_indices"] = values.empty(case.total, case.heads_kv, case.problem.count, dtype=torch.int32)

    def run(self, case: Case, host: Any) -> None:
        for start, stop in case.chunks:
            host(case.tensors["scores"][: stop - start], case.outputs["block_indices"][start:stop], start, *sequences(case))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p = case.problem
        tokens = torch.arange(case.total, device=case.device) if queries is None else queries
        rows = tokens % case.chunks[0][1] if case.total else tokens  # all chunks but the last are of one length
        position = positions(case.seqlens, case.device)[tokens]
        chosen = reference.select_at(case.tensors["scores"][rows], position, p.selection_block, p.count, p.initial, p.local)
        return {"block_indices": chosen}

    def check(self, case: Case, queries: Tensor | None) -> Check:
        return check_indices(case.outputs["block_indices"], case.expected(queries)["block_indices"], queries)

    def flops(self, case: Case) -> int:
        return case.heads_kv * int((positions(case.seqlens) // case.problem.selection_block + 1).sum())


class _SelectedAttention(Call):
    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p = case.problem
        q, k = values.q_k(case.total, case.heads_kv, p.group, case.total, p.head_dim_qk)
        v = values.normal(case.total, case.heads_kv, p.head_dim_v)
        case.tensors |= {"q": q, "k": k, "v": v, "block_indices": legal_blocks(case, values), "workspace_bytes": workspace_bytes}
        _attention_outputs(case, values)

    def run(self, case: Case, host: Any) -> None:
        t, o = case.tensors, case.outputs
        host(t["q"], t["k"], t["v"], t["block_indices"], o["o"], o["lse"], t["scale"], t["workspace_bytes"], 0, *sequences(case))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p, t = case.problem, case.tensors
        found = reference.selected_attention(
            t["q"], t["k"], t["v"], t["block_indices"], p.selection_block, t["scale"], case.cu_seqlens, queries, dtype
        )
        return dict(zip(("o", "lse"), found, strict=True))

    def flops(self, case: Case) -> int:
        p = case.problem
        return 2 * case.heads_query * (p.head_dim_qk + p.head_dim_v) * selected_pairs(case, positions(case.seqlens), p.count)


class _SlidingAttention(Call):
    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p = case.problem
        q, k = values.q_k(case.total, case.heads_kv, p.group, case.total, p.head_dim_qk)
        case.tensors |= {"q": q, "k": k, "v": values.normal(case.total, case.heads_kv, p.head_dim_v)}
        _attention_outputs(case, values)

    def run(self, case: Case, host: Any) -> None:
        t, o = case.tensors, case.outputs
        host(t["q"], t["k"], t["v"], o["o"], o["lse"], t["scale"], 0, *sequences(case))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p, t = case.problem, case.tensors
        found = reference.sliding_attention(t["q"], t["k"], t["v"], p.window, t["scale"], case.cu_seqlens, queries, dtype)
        return dict(zip(("o", "lse"), found, strict=True))

    def flops(self, case: Case) -> int:
        p = case.problem
        pairs = int((positions(case.seqlens) + 1).clamp(max=p.window).sum())
        return 2 * case.heads_query * (p.head_dim_qk + p.head_dim_v) * pairs


class _SlidingMerge(Call):
    #: Arguments in the order of the host function's signature, up to the output.
    names = ("q", "k_slc", "v_slc", "k_swa", "v_swa", "part", "part_lse", "o_cmp", "g_cmp", "g_slc", "g_swa")

    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p, heads, total = case.problem, case.heads_kv, case.total
        q, k = values.q_k(total, heads, p.group, total, p.head_dim_qk)
        v = values.normal(total, heads, p.head_dim_v)
        # K and V of their own, as where the spec has them per branch, of the same kind: the others' tokens in another order.
        k_swa, v_swa = (x.roll(1, 0) if values.real else x for x in (k, v))
        case.tensors |= {"q": q, "k_slc": k, "v_slc": v, "k_swa": k_swa, "v_swa": v_swa}
        part = values.normal(heads * p.parts, total, p.group * p.head_dim_v).view(heads, p.parts, total, p.group, p.head_dim_v)
        # About what a block of keys gives: log2 of its size, more or less.
        spread = values.empty(heads, p.parts, total, p.group, dtype=torch.float32)
        if values.real:
            spread.copy_(values.normal(heads * p.parts, total, p.group).view_as(spread)).add_(math.log2(p.selection_block))
            current = positions(case.seqlens, case.device) // p.selection_block
            filled = (current + 1).clamp(max=p.count) - p.initial - p.local
            nothing = (torch.arange(p.parts, device=case.device)[:, None] >= filled)[None, :, :, None]
            spread.masked_fill_(nothing, torch.nan)  # what a query has no block for is unwritten memory
            part.masked_fill_(nothing[..., None], torch.nan)
        case.tensors |= {"part": part, "part_lse": spread, "o_cmp": values.normal(total, case.heads_query, p.head_dim_v)}
        for branch in ("cmp", "slc", "swa"):
            case.tensors[f"g_{branch}"] = values.normal(total, case.heads_query).sigmoid()
        case.tensors["scale"] = p.head_dim_qk**-0.5
        case.outputs["o"] = values.empty(total, case.heads_query, p.head_dim_v)

    def run(self, case: Case, host: Any) -> None:
        t = case.tensors
        host(*(t[name] for name in self.names), case.outputs["o"], t["scale"], 0, *sequences(case))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p, t = case.problem, case.tensors
        given, blocks = [t[name] for name in self.names], (p.selection_block, p.initial, p.local, p.count)
        return {"o": reference.sliding_merge(*given, p.window, *blocks, t["scale"], case.cu_seqlens, queries, dtype)}

    def flops(self, case: Case) -> int:
        p, position = case.problem, positions(case.seqlens)
        pairs = int((position + 1).clamp(max=p.window).sum()) + selected_pairs(case, position, p.initial + p.local)
        return 2 * case.heads_query * (p.head_dim_qk + p.head_dim_v) * pairs


class _Combine(Call):
    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        shape = (case.total, case.heads_query)
        for branch in ("cmp", "slc", "swa"):
            case.tensors[f"o_{branch}"] = values.normal(*shape, case.problem.head_dim_v)
        for branch in ("cmp", "slc", "swa"):
            case.tensors[f"g_{branch}"] = values.normal(*shape).sigmoid()
        case.outputs["o"] = values.empty(*shape, case.problem.head_dim_v)

    def run(self, case: Case, host: Any) -> None:
        host(*case.tensors.values(), case.outputs["o"])  # built in the order of the signature

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"o": reference.combine(*(x if queries is None else x[queries] for x in case.tensors.values()), dtype=dtype)}

    def flops(self, case: Case) -> int:
        return 5 * case.total * case.heads_query * case.problem.head_dim_v


CALLS: dict[str, Call] = {
    "compress_fwd": _Compress(),
    "compressed_attention_fwd": _CompressedAttention(),
    "importance_fwd": _Importance(),
    "select_topk": _SelectTopk(),
    "selected_attention_fwd": _SelectedAttention(),
    "sliding_attention_fwd": _SlidingAttention(),
    "sliding_merge_fwd": _SlidingMerge(),
    "combine_fwd": _Combine(),
}
