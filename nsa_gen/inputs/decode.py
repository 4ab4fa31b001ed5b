"""Calls of the serving kernels: new tokens of some sequences on pages that lie anywhere, NaN in all that nobody holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..acceptance import Check, check_floats, selection_agrees
from ..config import COUNTERS, Problem
from ..values import Values
from .case import Call, Case, positions
from .forward import phi_flops, phi_weights

#: First and end row, in a stream, of some sequences (by number).
_Spans = dict[int, tuple[int, int]]


def _storage(case: Case) -> torch.dtype:
    return getattr(torch, case.problem.storage)


def _fp8(case: Case) -> bool:
    return _storage(case) is not case.dtype


def _bits(x: Tensor) -> Tensor:
    """fp8 as bytes: torch does not index fp8 tensors."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _factors(case: Case, *streams: int) -> Tensor:
    """What fp8 numbers of these streams are multiplied by, ``[streams,Hkv]``: another power of two for each and for neighbouring heads."""
    exponent = (torch.arange(case.heads_kv) + torch.tensor(streams)[:, None]) % 4 - 8
    return torch.exp2(exponent.float()).to(case.device)


def _stored(case: Case, x: Tensor, stream: int) -> Tensor:
    """As the cache stores it, ``[rows,Hkv,D]``."""
    if not _fp8(case):
        return x
    return x.to(torch.float32, copy=True).div_(_factors(case, stream)[0, :, None]).clamp_(-448, 448).to(_storage(case))


def _read(case: Case, x: Tensor, stream: int) -> Tensor:
    """As it counts."""
    return x.float() * _factors(case, stream)[0, :, None] if _fp8(case) else x


def _spread(spans: _Spans, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of all rows in ``spans``, one sequence after the other: the sequence's number, and the row's in it."""
    number, first, end = torch.tensor([(n, *span) for n, span in spans.items()], dtype=torch.long).view(-1, 3).T
    count = (end - first).clamp(min=0)
    each = torch.arange(len(count)).repeat_interleave(count)
    return number[each].to(device), (positions(count.tolist()) + first[each]).to(device)


def _paged(case: Case, values: Values, streams: Sequence[_Spans]) -> tuple[list[Tensor], list[Tensor]]:
    """Pages of K and V with room for these rows, NaN all over, and each stream's table: where no row is it names a page of nobody's."""
    p, size = case.problem, case.problem.page_size
    held = [{n: (first // size, -(-end // size)) if end > first else (0, 0) for n, (first, end) in rows.items()} for rows in streams]
    total = sum(end - first for rows in held for first, end in rows.values()) + 1
    width = max((end for rows in held for _, end in rows.values()), default=0) + 1
    pages = [values.empty(total, case.heads_kv, size, dim, dtype=_storage(case)) for dim in (p.head_dim_qk, p.head_dim_v)]
    tables = [values.empty(len(case.seqlens) + 1, width, dtype=torch.int32) for _ in streams]
    if values.real:
        for x in pages:
            _bits(x).fill_(0x7F if x.element_size() == 1 else torch.nan)  # e4m3's NaN
        order = torch.randperm(total, generator=values.generator, device=case.device).to(torch.int32)
        for table, rows in zip(tables, held, strict=True):
            table.fill_(order[-1])
            number, column = _spread(rows, case.device)
            table[case.tensors["slots"].long()[number], column] = order[: len(column)]
            order = order[len(column) :]
    return pages, tables


def _places(case: Case, table: Tensor, rows: _Spans) -> tuple[Tensor, Tensor]:
    """The page of each row, and where in it."""
    number, row = _spread(rows, case.device)
    size = case.problem.page_size
    return table[case.tensors["slots"].long()[number], row // size].long(), row % size


def _write(case: Case, pages: Sequence[Tensor], table: Tensor, rows: _Spans, kv: Sequence[Tensor], stream: int) -> None:
    """Store rows of K and V, ``[rows,Hkv,D]``."""
    page, row = _places(case, table, rows)
    for x, given in zip(pages, kv, strict=True):
        _bits(x)[page, :, row] = _bits(_stored(case, given, stream))


def _rows(case: Case, pages: Sequence[Tensor], table: Tensor, rows: _Spans) -> list[Tensor]:
    """Rows of K and V as they are stored."""
    page, row = _places(case, table, rows)
    return [_bits(x)[page, :, row].view(x.dtype) for x in pages]


def _begin(case: Case, values: Values) -> None:
    """Slots and lengths; a sequence has its new tokens at least."""
    count = len(case.seqlens)
    case.seqlens = tuple(max(n, case.problem.tokens) for n in case.seqlens)
    slots = torch.randperm(count + 1, generator=values.generator, device=case.device)[:count] if values.real else values.empty(count)
    lengths = values.empty(count + 1, dtype=torch.int32)
    case.tensors |= {"slots": slots.to(torch.int32), "lengths": lengths}
    if values.real:
        lengths.fill_(-1)
        lengths[slots] = torch.tensor(case.seqlens, dtype=torch.int32, device=case.device)


def _scales(case: Case, *streams: int) -> Tensor | None:
    return _factors(case, *streams) if _fp8(case) else None


class _Decode(Call):
    """New tokens, each of which is the last one of a sequence of its own to the reference.

    Compressed tokens have pages of their own, and so have the selected branch's and the window where K and V are per branch.
    """

    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p, count = case.problem, len(case.seqlens)
        _begin(case, values)
        streams = self.streams(p, dict(enumerate(case.seqlens)))[: 2 if p.branches == 1 else 3]
        counts = [sum(end - first for first, end in rows.values()) for rows in streams]
        q, k = values.q_k(count * p.tokens, case.heads_kv, p.group, sum(counts), p.head_dim_qk)
        pages, tables = _paged(case, values, streams)
        if values.real:
            v = values.normal(sum(counts), case.heads_kv, p.head_dim_v)
            for i, kv in enumerate(zip(k.split(counts), v.split(counts), strict=True)):
                _write(case, pages, tables[i], streams[i], kv, i)
        if p.branches == 1:
            tables = [*tables, tables[1]]
        sliding = self.stream_of(p, 2)
        case.tensors |= {
            "q": q.view(count, p.tokens, *q.shape[1:]), "k_pages": pages[0], "v_pages": pages[1], "tables": tuple(tables),
            "scales": (_scales(case, 0, 1, sliding),) * 2,
            "gates": tuple(values.uniform(count, p.tokens, case.heads_query).to(case.dtype) for _ in range(3)),
            "arrived": values.empty(COUNTERS * count * case.heads_kv * p.tokens, dtype=torch.int32), "scale": p.head_dim_qk**-0.5,
        }  # fmt: skip
        case.outputs["block_indices"] = values.empty(count, p.tokens, case.heads_kv, p.count, dtype=torch.int32)
        case.outputs["o"] = values.empty(count, p.tokens, case.heads_query, p.head_dim_v)

    def streams(self, p: Problem, lengths: dict[int, int]) -> tuple[_Spans, _Spans, _Spans]:
        """Rows of compressed tokens, of the selected branch and of the sliding one: the same, or from the first token in a page that the
        window of a new token reaches into, which is what a cache keeps at least."""
        tokens = {number: (0, n) for number, n in lengths.items()}
        held = {number: (max(0, n - p.tokens - p.window + 1) // p.page_size * p.page_size, n) for number, n in lengths.items()}
        compressed = {number: (0, reference.compressed_count(n, p.block, p.stride)) for number, n in lengths.items()}
        return compressed, tokens, tokens if p.branches == 1 else held

    def stream_of(self, p: Problem, branch: int) -> int:
        """The number of a branch's stream: 0 compressed, 1 selected, 2 sliding."""
        return min(branch, 1) if p.branches == 1 else branch

    def poison(self, case: Case) -> None:
        super().poison(case)
        case.tensors["arrived"].zero_()

    def run(self, case: Case, host: Any) -> None:
        t = case.tensors
        host(
            t["q"], t["k_pages"], t["v_pages"], *t["scales"], *t["tables"], t["slots"], t["lengths"], t["arrived"], *t["gates"],
            case.outputs["block_indices"], case.outputs["o"], case.max_seqlen, t["scale"],
        )  # fmt: skip

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """``o`` of the blocks that were chosen, the ``scores`` that choose, and the compressed ``lse``; one row for each new token."""
        p, t, found = case.problem, case.tensors, []
        blocks = -(-case.max_seqlen // p.selection_block)
        for number, length in enumerate(case.seqlens):
            held = []
            for i, (table, rows) in enumerate(zip(t["tables"], self.streams(p, {number: length}), strict=True)):
                k, v = (_read(case, x, self.stream_of(p, i)) for x in _rows(case, (t["k_pages"], t["v_pages"]), table, rows))
                held.append((k, v, rows[number][0]))
            (k_cmp, v_cmp, _), (k_slc, v_slc, _), (k_swa, v_swa, first) = held
            for token in range(p.tokens):
                position = length - p.tokens + token
                q = t["q"][number, token].expand(position + 1, -1, -1)  # in no memory, for all tokens up to it
                how: dict[str, Any] = {"scale": t["scale"], "queries": torch.tensor([position], device=case.device), "dtype": dtype}
                o_cmp, lse = reference.compressed_attention(q, k_cmp, v_cmp, p.block, p.stride, **how)
                everywhere = lse.expand(len(q), -1)
                scores = reference.importance(q, k_cmp, everywhere, p.block, p.stride, p.selection_block, p.mapping, **how)
                # What was not written is said by `check`.
                chosen = case.outputs["block_indices"][number, token].clamp(-1, position // p.selection_block).expand(len(q), -1, -1)
                o_slc, _ = reference.selected_attention(q, k_slc, v_slc, chosen, p.selection_block, **how)
                o_swa, _ = reference.sliding_attention(q[first:], k_swa, v_swa, p.window, **how | {"queries": how["queries"] - first})
                gates = (gate[number, token][None] for gate in t["gates"])
                o = reference.combine(o_cmp, o_slc, o_swa, *gates, dtype)
                found.append((o, torch.nn.functional.pad(scores, (0, blocks - scores.shape[2])), lse))
        o, scores, lse = map(torch.cat, zip(*found, strict=True))
        return {"o": o.view_as(case.outputs["o"]), "scores": scores, "lse": lse}

    def check(self, case: Case, queries: Tensor | None) -> Check:
        p, block_indices = case.problem, case.outputs["block_indices"]
        unwritten = int((block_indices == -7).sum())
        if unwritten:
            return Check(False, {}, f"block_indices: {unwritten} elements were not written")
        wanted, eager = case.expected(), case.expected(None, case.dtype)
        found = check_floats({"o": wanted["o"]}, {"o": eager["o"]}, {"o": case.outputs["o"]}, None)
        if bool(case.tensors["arrived"].any()):
            return Check(False, found.errors, "arrived is not 0 again")
        seen = wanted["lse"][wanted["lse"].isfinite()]
        rtol = 2e-4 + 3.2e-5 * (float(seen.abs().max()) if len(seen) else 0.0)
        last = torch.tensor(case.seqlens, device=case.device) - 1
        positions = (last[:, None] - torch.arange(p.tokens - 1, -1, -1, device=case.device)).flatten()
        fields = {name: p[name] for name in ("selection_block", "count", "initial", "local")}
        topk = Problem.of("select_topk", fields | {"varlen": True})
        if not selection_agrees(block_indices.flatten(0, 1), wanted["scores"], topk, rtol, positions):
            return Check(False, found.errors, f"block_indices differ by more than ties within {rtol:.1e}")
        return found

    def flops(self, case: Case) -> int:
        p = case.problem
        chosen = p.count * p.selection_block
        pairs = sum(reference.compressed_count(n, p.block, p.stride) + min(n, chosen) + min(n, p.window) for n in case.seqlens) * p.tokens
        return 2 * case.heads_query * (p.head_dim_qk + p.head_dim_v) * pairs


class _CacheAppend(Call):
    """Pages hold the older tokens that φ may read; new tokens of each stream, and compressed ones, are NaN until they are written.

    Outputs are the pages: ``before`` keeps them as they are to be found.
    """

    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p, streams = case.problem, case.problem.branches + 1
        _begin(case, values)
        olds = {number: (max(0, first - p.block + 1), first) for number, (first, _) in self.new(case).items()}
        room = [self.new(case) for _ in range(p.branches)] + [self.completed(case)]
        room[0] = {number: (olds[number][0], end) for number, (_, end) in room[0].items()}
        pages, tables = _paged(case, values, room)
        dims = ((p.head_dim_qk, p.hidden), (p.head_dim_v, p.hidden_v))
        total, old = len(case.seqlens) * p.tokens, sum(end - first for first, end in olds.values())
        if values.real:
            _write(case, pages, tables[0], olds, [values.normal(old, case.heads_kv, dim) for dim, _ in dims], 0)
        case.tensors |= {"before": tuple(pages), "tables": torch.stack(tables)}
        for name, (dim, hidden) in zip("kv", dims, strict=True):
            case.tensors[name] = [values.normal(total, case.heads_kv, dim) for _ in range(p.branches)]
            case.tensors[f"{name}_scale"] = _scales(case, *range(streams))
            case.tensors[f"phi_{name}"] = list(phi_weights(case, values, dim, hidden))
        case.outputs |= {"k_pages": torch.empty_like(pages[0]), "v_pages": torch.empty_like(pages[1])}

    def new(self, case: Case) -> _Spans:
        """The new tokens."""
        return {number: (n - case.problem.tokens, n) for number, n in enumerate(case.seqlens)}

    def completed(self, case: Case) -> _Spans:
        """The compressed tokens that they complete."""

        def complete(tokens: int) -> int:
            return reference.compressed_count(tokens, case.problem.block, case.problem.stride)

        return {number: (complete(first), complete(end)) for number, (first, end) in self.new(case).items()}

    def poison(self, case: Case) -> None:
        for x, before in zip(case.outputs.values(), case.tensors["before"], strict=True):
            x.copy_(before)

    def run(self, case: Case, host: Any) -> None:
        t, o = case.tensors, case.outputs
        host(
            t["k"], t["v"], o["k_pages"], o["v_pages"], t["tables"], t["k_scale"], t["v_scale"], t["slots"], t["lengths"], t["phi_k"],
            t["phi_v"],
        )  # fmt: skip

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """``k0 v0 …``, each branch's new rows, and ``k v``, the compressed ones; unless in float64, as they count once they are stored."""
        p, t = case.problem, case.tensors
        filled = [x.clone() for x in t["before"]]
        _write(case, filled, t["tables"][0], self.new(case), (t["k"][0], t["v"][0]), 0)
        made: list[list[Tensor]] = [[], []]
        for number, (first, end) in self.completed(case).items():
            reach = {number: (first * p.stride, (end - 1) * p.stride + p.block if end > first else 0)}
            for found, x, name in zip(made, _rows(case, filled, t["tables"][0], reach), "kv", strict=True):
                x, weights = _read(case, x, 0).to(case.dtype), tuple(t[f"phi_{name}"])
                found.append(reference.compress(x, p.pooling, weights, p.block, p.stride, None, dtype)[: end - first])
        wanted = {f"{name}{i}": x for i in range(p.branches) for name, x in (("k", t["k"][i]), ("v", t["v"][i]))}
        wanted |= {"k": torch.cat(made[0]), "v": torch.cat(made[1])}
        if dtype is torch.float64:
            return {name: x.double() for name, x in wanted.items()}
        stream = {name: p.branches if name in "kv" else int(name[1:]) for name in wanted}
        return {name: _read(case, _stored(case, x, stream[name]), stream[name]) for name, x in wanted.items()}

    def check(self, case: Case, queries: Tensor | None) -> Check:
        t, pages, outputs = case.tensors, list(case.outputs.values()), {}
        rows = [self.new(case)] * case.problem.branches + [self.completed(case)]
        others = [x.clone() for x in pages]
        for i, (table, written) in enumerate(zip(t["tables"], rows, strict=True)):
            names = (f"k{i}", f"v{i}") if i < case.problem.branches else ("k", "v")
            outputs |= {name: _read(case, x, i) for name, x in zip(names, _rows(case, pages, table, written), strict=True)}
            page, row = _places(case, table, written)
            for x, before in zip(others, t["before"], strict=True):
                _bits(x)[page, :, row] = _bits(before)[page, :, row]
        wanted = case.expected()
        found = check_floats(wanted, case.expected(None, case.dtype), outputs, None)
        if not _fp8(case) and any(not torch.equal(x.double(), wanted[name]) for name, x in outputs.items() if name not in "kv"):
            return Check(False, found.errors, found.message or "new rows are not stored as they are")
        if any(not torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(others, t["before"], strict=True)):
            return Check(False, found.errors, found.message or "rows that are not new have changed")
        return found

    def flops(self, case: Case) -> int:
        p, count = case.problem, sum(end - first for first, end in self.completed(case).values())
        return count * case.heads_kv * (phi_flops(case, p.head_dim_qk, p.hidden) + phi_flops(case, p.head_dim_v, p.hidden_v))


CALLS: dict[str, Call] = {
    "decode_fwd": _Decode(),
    "cache_append": _CacheAppend(),
}
