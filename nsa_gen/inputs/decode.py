"""Calls of the serving kernels: new tokens of some sequences on pages that lie anywhere, NaN in all that nobody holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..acceptance import Check, check_floats, selection_agrees
from ..config import Problem
from ..values import Values
from .case import Call, Case

#: What fp8 numbers of these cases are multiplied by.
_SCALE = 1 / 64


def _storage(case: Case) -> torch.dtype:
    return getattr(torch, case.problem.storage)


def _paged(case: Case, values: Values, rows: list[int], streams: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Put rows of K and V into pages; the table of each stream. ``rows``: of each sequence; ``streams``: these rows packed."""
    p, heads, size = case.problem, case.heads_kv, case.problem.page_size
    each = [-(-n // size) for n in rows]
    slots, width = len(rows) + 1, max(*each, 1) + 1
    total = len(streams) * sum(each) + 1
    dims = p.head_dim_qk, p.head_dim_v
    pages = [values.empty(total, heads, size, dim, dtype=_storage(case)) for dim in dims]
    tables = [values.empty(slots, width, dtype=torch.int32) for _ in streams]
    case.tensors |= {"k_pages": pages[0], "v_pages": pages[1]}
    if not values.real:
        return tables
    for x in pages:
        x.fill_(torch.nan) if x.element_size() > 1 else x.view(torch.uint8).fill_(0x7F)  # e4m3's NaN
    order = torch.randperm(total, generator=values.generator, device=case.device).tolist()
    slot_of = case.tensors["slots"].tolist()
    for table, kv in zip(tables, streams, strict=True):
        table.fill_(order[-1])  # a page that nobody holds
        start = 0
        for slot, n, count in zip(slot_of, rows, each, strict=True):
            for i in range(count):
                page = order.pop(0)
                table[slot, i] = page
                here = slice(start + i * size, start + min((i + 1) * size, n))
                for x, y in zip(pages, kv, strict=True):
                    x[page, :, : here.stop - here.start] = y[here].transpose(0, 1)
            start += n
    return tables


def _begin(case: Case, values: Values) -> None:
    """Slots and lengths; a sequence has its new tokens at least."""
    count = len(case.seqlens)
    case.seqlens = tuple(max(n, case.problem.tokens) for n in case.seqlens)
    slots = torch.randperm(count + 1, generator=values.generator, device=case.device)[:count] if values.real else values.empty(count)
    lengths = values.empty(count + 1, dtype=torch.int32)
    case.tensors |= {"slots": slots.to(torch.int32), "lengths": lengths, "scale": case.problem.head_dim_qk**-0.5}
    case.tensors["arrived"] = values.empty(count * case.heads_kv * case.problem.tokens, dtype=torch.int32)
    if values.real:
        case.tensors["arrived"].zero_()
        lengths.fill_(-1)
        lengths[slots] = torch.tensor(case.seqlens, dtype=torch.int32, device=case.device)


def _stored(case: Case, x: Tensor) -> Tensor:
    """As the cache stores it."""
    return (x.float() / _SCALE).clamp(-448, 448).to(_storage(case)) if _storage(case) is not case.dtype else x


def _read(case: Case, x: Tensor) -> Tensor:
    """As it counts."""
    return x.float() * _SCALE if _storage(case) is not case.dtype else x


def _queries(case: Case, values: Values, k_rows: int) -> tuple[Tensor, Tensor]:
    """``q [S,tokens,Hq,Dqk]`` and keys ``[k_rows,Hkv,Dqk]`` of the case's kind."""
    p = case.problem
    q, k = values.q_k(len(case.seqlens) * p.tokens, case.heads_kv, p.group, k_rows, p.head_dim_qk)
    return q.view(len(case.seqlens), p.tokens, case.heads_query, p.head_dim_qk), k


def _scales(case: Case, *shape: int) -> Tensor | None:
    if _storage(case) is case.dtype:
        return None
    return torch.full(shape, _SCALE, dtype=torch.float32, device=case.device)


class _Sequence:
    """One sequence of a case as the reference wants it: queries for all its tokens, of which the last are the new ones."""

    def __init__(self, case: Case, number: int):
        p, self.length = case.problem, case.seqlens[number]
        self.new = torch.arange(self.length - p.tokens, self.length, device=case.device)
        q = case.tensors["q"][number]
        self.q = q.new_zeros(self.length, *q.shape[1:]).index_copy(0, self.new, q)


class _DecodeCompressed(Call):
    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p = case.problem
        _begin(case, values)
        rows = [reference.compressed_count(n, p.block, p.stride) for n in case.seqlens]
        q, k = _queries(case, values, sum(rows))
        k, v = _stored(case, k), _stored(case, values.normal(sum(rows), case.heads_kv, p.head_dim_v))
        case.tensors |= {"q": q, "k_scale": _scales(case, case.heads_kv), "rows": (k, v)}
        (case.tensors["table"],) = _paged(case, values, rows, [(k, v)])
        case.outputs["block_indices"] = values.empty(len(case.seqlens), p.tokens, case.heads_kv, p.count, dtype=torch.int32)

    def run(self, case: Case, host: Any) -> None:
        t = case.tensors
        t["made"] = host(
            t["q"], t["k_pages"], t["v_pages"], t["k_scale"], t["table"], t["slots"], t["lengths"], t["arrived"],
            case.outputs["block_indices"], case.max_seqlen, t["scale"],
        )  # fmt: skip

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """``o [S*tokens,Hq,Dv]`` of the compressed branch, but for the factor on values; and the ``scores`` that choose."""
        p, t, found, first = case.problem, case.tensors, [], 0
        for number, length in enumerate(case.seqlens):
            at, count = _Sequence(case, number), reference.compressed_count(length, p.block, p.stride)
            k, v = (x[first : first + count] for x in t["rows"])
            k, v = _read(case, k), v.float() if _storage(case) is not case.dtype else v
            first += count
            if not count:  # as reference.compress lays nothing out
                k, v = k.new_zeros(1, *k.shape[1:]), v.new_zeros(1, *v.shape[1:])
            where = {"scale": t["scale"], "queries": at.new, "dtype": dtype}
            o, lse = reference.compressed_attention(at.q, k, v, p.block, p.stride, **where)
            spread = lse.new_zeros(length, lse.shape[1]).index_copy(0, at.new, lse)
            scores = reference.importance(at.q, k, spread, p.block, p.stride, p.selection_block, p.mapping, **where)
            found.append((o, scores, lse))
        return {"o": torch.cat([o for o, _, _ in found]), "scores": [s for _, s, _ in found], "lse": torch.cat([x for _, _, x in found])}  # type: ignore[dict-item]

    def check(self, case: Case, queries: Tensor | None) -> Check:
        wanted, eager = case.expected(), case.expected(None, case.dtype)
        part, stat = case.tensors["made"]
        outputs = {"o": _together(case, part, stat).to(case.dtype)}
        found = check_floats({"o": wanted["o"]}, {"o": eager["o"]}, outputs, None)
        if bool(case.tensors["arrived"].any()):
            return Check(False, found.errors, "arrived is not 0 again")
        seen = wanted["lse"][wanted["lse"].isfinite()]
        rtol = 2e-4 + 3.2e-5 * (float(seen.abs().max()) if len(seen) else 0.0)
        topk = _topk(case.problem)
        for number, scores in enumerate(wanted["scores"]):
            position = _Sequence(case, number).new
            if not selection_agrees(case.outputs["block_indices"][number], scores, topk, rtol, position):
                return Check(False, found.errors, f"block_indices of sequence {number} differ by more than ties within {rtol:.1e}")
        return found

    def flops(self, case: Case) -> int:
        p = case.problem
        pairs = sum(reference.compressed_count(n, p.block, p.stride) for n in case.seqlens) * p.tokens
        return 2 * case.heads_query * (p.head_dim_qk + p.head_dim_v) * pairs


def _topk(p: Problem) -> Problem:
    fields = {name: p[name] for name in ("selection_block", "count", "initial", "local")}
    return Problem.of("select_topk", fields | {"varlen": True})


def _together(case: Case, part: Tensor, stat: Tensor) -> Tensor:
    """``o [S*tokens,Hq,Dv]`` of the partial results ``part [S,Hkv,splits,M,Dv]``, ``stat [S,Hkv,splits,2,M]``."""
    p = case.problem
    rows = p.group * p.tokens
    top, total = stat[:, :, :, 0, :rows], stat[:, :, :, 1, :rows]
    weight = torch.exp2(top - top.amax(2, keepdim=True).nan_to_num(neginf=0.0))
    used = (total > 0)[..., None]
    o = (torch.where(used, part[:, :, :, :rows], 0.0) * weight[..., None]).sum(2) / (total * weight).sum(2).clamp(min=1e-30)[..., None]
    o = o.unflatten(2, (p.tokens, p.group)).transpose(1, 2)  # [S, tokens, Hkv, G, Dv]
    return o.reshape(-1, case.heads_query, o.shape[-1])


class _DecodeMerge(Call):
    """``branches``: whether selected and sliding attention have K and V of their own: one code serves both."""

    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p, count, splits = case.problem, len(case.seqlens), 3
        _begin(case, values)
        q, k = _queries(case, values, case.total)
        both = [(_stored(case, x), _stored(case, values.normal(case.total, case.heads_kv, p.head_dim_v))) for x in (k, k.flip(-1))]
        case.tensors |= {"q": q, "k_scale": _scales(case, 2, case.heads_kv), "v_scale": _scales(case, 2, case.heads_kv)}
        case.tensors |= {"cmp_scale": _scales(case, case.heads_kv), "rows": (*both[0], *both[1])}
        case.tensors["tables"] = tuple(_paged(case, values, list(case.seqlens), both))
        rows = max(16, 1 << (p.group * p.tokens - 1).bit_length())
        part = values.uniform(count, case.heads_kv, splits, rows, p.head_dim_v)
        stat = values.uniform(count, case.heads_kv, splits, 2, rows)
        indices = values.empty(count, p.tokens, case.heads_kv, p.count, dtype=torch.int32)
        if values.real:
            stat[..., 0, :].mul_(8)
            stat[:, :, -1, 0], stat[:, :, -1, 1] = -torch.inf, 0.0  # a split without tokens
            part[:, :, -1] = 0.0
            for number, length in enumerate(case.seqlens):
                position = torch.arange(length - p.tokens, length, device=case.device)
                scores = values.scores(p.tokens, case.heads_kv, -(-length // p.selection_block))
                indices[number] = reference.select_at(scores, position, p.selection_block, p.count, 1, min(1, p.count - 1))
        gates = [values.uniform(count, p.tokens, case.heads_query).to(case.dtype) for _ in range(3)]
        case.tensors |= {"part": part, "stat": stat, "block_indices": indices, "gates": tuple(gates)}
        case.outputs["o"] = values.empty(count, p.tokens, case.heads_query, p.head_dim_v)

    def run(self, case: Case, host: Any) -> None:
        t = case.tensors
        host(
            t["q"], t["k_pages"], t["v_pages"], t["k_scale"], t["v_scale"], t["cmp_scale"], *t["tables"], t["slots"], t["lengths"],
            t["block_indices"], t["part"], t["stat"], *t["gates"], t["arrived"], case.outputs["o"], t["scale"],
        )  # fmt: skip

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p, t, found, first = case.problem, case.tensors, [], 0
        o_cmp = _together(case, t["part"].to(torch.float64), t["stat"].to(torch.float64)).unflatten(0, (-1, p.tokens))
        for number, length in enumerate(case.seqlens):
            at, here = _Sequence(case, number), slice(first, first + length)
            first += length
            k, v, k_swa, v_swa = (_read(case, x[here]) for x in t["rows"])
            where = {"scale": t["scale"], "queries": at.new, "dtype": dtype}
            blocks = (
                t["block_indices"].new_full((length, *t["block_indices"].shape[2:]), -1).index_copy(0, at.new, t["block_indices"][number])
            )
            o_slc, _ = reference.selected_attention(at.q, k, v, blocks, p.selection_block, **where)
            o_swa, _ = reference.sliding_attention(at.q, k_swa, v_swa, p.window, **where)
            scaled = o_cmp[number] * (1.0 if t["cmp_scale"] is None else _SCALE)
            found.append(reference.combine(scaled.to(dtype), o_slc, o_swa, *(g[number] for g in t["gates"]), dtype))
        return {"o": torch.stack(found)}

    def check(self, case: Case, queries: Tensor | None) -> Check:
        found = check_floats(case.expected(), case.expected(None, case.dtype), case.outputs, None)
        return Check(False, found.errors, "arrived is not 0 again") if bool(case.tensors["arrived"].any()) else found

    def flops(self, case: Case) -> int:
        p = case.problem
        seen = sum(min(n, p.count * p.selection_block) + min(n, p.window) for n in case.seqlens) * p.tokens
        return 2 * case.heads_query * (p.head_dim_qk + p.head_dim_v) * seen


CALLS: dict[str, Call] = {"decode_compressed_fwd": _DecodeCompressed(), "decode_merge_fwd": _DecodeMerge()}
