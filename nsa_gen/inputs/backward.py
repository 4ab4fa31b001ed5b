"""Calls of the backward's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference, reference_backward
from ..acceptance import Check, check_floats
from ..values import Values
from .case import Call, Case, positions
from .forward import gap_rows, legal_blocks, phi_weights, selected_pairs, sequences


class _AttentionBackward(Call):
    """What the branches share: ``q k v do lse delta gate dq_add`` → ``dq dk dv``.

    ``lse`` is the true one, ``delta`` any number: a kernel takes both as they are.
    """

    keys: tuple[str, str] = ("k", "v")

    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p, total, (k_name, v_name) = case.problem, case.total, self.keys
        q, k = values.q_k(total, case.heads_kv, p.group, self.rows(case), p.head_dim_qk)
        v = values.normal(self.rows(case), case.heads_kv, p.head_dim_v)
        case.tensors |= {"q": q, k_name: k, v_name: v, "workspace_bytes": workspace_bytes, "scale": p.head_dim_qk**-0.5}
        self.choose(case, values)
        lse = values.empty(total, case.heads_query, dtype=torch.float32)
        if values.real:
            lse = self.lse(case, case.dtype if case.device.type == "cuda" else torch.float32).float()
        case.tensors["do"] = values.normal(total, case.heads_query, p.head_dim_v)
        case.tensors["lse"] = lse
        case.tensors["delta"] = values.normal(total, case.heads_query).float()
        case.tensors["gate"] = values.normal(total, case.heads_query).float().sigmoid()
        case.tensors["dq_add"] = values.normal(total, case.heads_query, p.head_dim_qk)
        case.outputs["dq"] = values.empty(total, case.heads_query, p.head_dim_qk)
        case.outputs[f"d{k_name}"], case.outputs[f"d{v_name}"] = (values.empty(*x.shape, dtype=self.gradient_dtype(case)) for x in (k, v))

    def rows(self, case: Case) -> int:
        """Rows of K and V."""
        return case.total

    def choose(self, case: Case, values: Values) -> None:
        """Arguments of one branch only."""

    def gradient_dtype(self, case: Case) -> torch.dtype:
        """Of dk and dv."""
        return case.dtype

    def lse(self, case: Case, dtype: torch.dtype) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no LSE")

    def visible(self, case: Case) -> reference_backward.Visible:
        raise TypeError(f"{type(self).__name__} sees nothing")

    def pairs(self, case: Case) -> int:
        """Pairs of query and key it sees."""
        raise TypeError(f"{type(self).__name__} sees nothing")

    def offsets(self, case: Case) -> list[tuple[int, int]]:
        return [(start, end - start) for start, end in reference.bounds(case.cu_seqlens, case.total)]

    def key_rows(self, case: Case, queries: Tensor) -> Tensor:
        """The rows of K and V to compare where ``queries`` are."""
        return queries

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        t, (k_name, v_name) = case.tensors, self.keys
        keys = None if queries is None else self.key_rows(case, queries)
        dq, dk, dv = reference_backward.attention_backward(
            t["q"], t[k_name], t[v_name], t["do"], t["lse"], t["delta"], t["gate"], self.visible(case), t["scale"], self.offsets(case),
            case.cu_seqlens, queries, keys, dtype,
        )  # fmt: skip
        found = {"dq": dq + _at(t["dq_add"], queries).to(dtype), f"d{k_name}": dk, f"d{v_name}": dv}
        for name in (f"{k_name}_add", f"{v_name}_add"):
            if f"d{name}" in t:
                found[f"d{name.removesuffix('_add')}"] += _at(t[f"d{name}"], keys).to(dtype)
        return found

    def check(self, case: Case, queries: Tensor | None) -> Check:
        wanted, eager = case.expected(queries), case.expected(queries, case.dtype)
        keys = None if queries is None else self.key_rows(case, queries)
        found = [check_floats({name: wanted[name]}, eager, case.outputs, queries if name == "dq" else keys) for name in wanted]
        errors = {name: error for check in found for name, error in check.errors.items()}
        return Check(all(check.ok for check in found), errors, "; ".join(check.message for check in found if check.message))

    def flops(self, case: Case) -> int:
        p = case.problem
        return 2 * case.heads_query * (3 * p.head_dim_qk + 2 * p.head_dim_v) * self.pairs(case)

    def given(self, case: Case) -> list[Any]:
        """The first arguments of the host function."""
        names = ("q", *self.keys, *(("block_indices",) if "block_indices" in case.tensors else ()), "do", "lse", "delta", "gate")
        return [case.tensors[name] for name in names]


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


class _CompressedAttentionBackward(_AttentionBackward):
    keys = ("k_cmp", "v_cmp")

    def rows(self, case: Case) -> int:
        return reference.compressed_rows(case.total, case.problem.stride)

    def choose(self, case: Case, values: Values) -> None:
        if values.real:
            for name in self.keys:
                case.tensors[name][gap_rows(case)] = torch.nan

    def lse(self, case: Case, dtype: torch.dtype) -> Tensor:
        p, t = case.problem, case.tensors
        return reference.compressed_attention(
            t["q"], t["k_cmp"], t["v_cmp"][..., :1], p.block, p.stride, t["scale"], case.cu_seqlens, dtype=dtype
        )[1]

    def visible(self, case: Case) -> reference_backward.Visible:
        return reference_backward.sees_compressed(case.problem.block, case.problem.stride)

    def offsets(self, case: Case) -> list[tuple[int, int]]:
        return reference.compressed_offsets(case.cu_seqlens, case.total, case.problem.block, case.problem.stride)

    def key_rows(self, case: Case, queries: Tensor) -> Tensor:
        return (queries // case.problem.stride).clamp(max=self.rows(case) - 1).unique()

    def pairs(self, case: Case) -> int:
        return case.compressed_pairs(positions(case.seqlens))

    def run(self, case: Case, host: Any) -> None:
        t, o = case.tensors, case.outputs
        host(*self.given(case), o["dq"], o["dk_cmp"], o["dv_cmp"], t["dq_add"], t["scale"], t["workspace_bytes"], *sequences(case))


class _SlidingAttentionBackward(_AttentionBackward):
    """With selected attention's local blocks, as in the backward of the whole: of a size that is no part of the key."""

    block, local = 64, 2

    def choose(self, case: Case, values: Values) -> None:
        for name in self.keys:
            case.tensors[f"d{name}_add"] = values.normal(*case.tensors[name].shape).float()
        shape = (case.total, case.heads_query)
        lse = values.empty(*shape, dtype=torch.float32)
        if values.real:
            lse = self._attended(case, self._blocks(case), case.dtype if case.device.type == "cuda" else torch.float32).float()
        numbers = lse, values.normal(*shape).float(), values.normal(*shape).float().sigmoid()
        case.tensors["selected"] = (*numbers, self.block, self.local)

    def _blocks(self, case: Case) -> Tensor:
        """The local blocks as block indices."""
        own = positions(case.seqlens, case.device)[:, None] // self.block
        blocks = (own - torch.arange(self.local, device=case.device)).clamp(min=-1)
        return blocks[:, None].expand(-1, case.heads_kv, -1)

    def _attended(self, case: Case, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        t = case.tensors
        given = t["q"], t["k"], t["v"][..., :1]
        return reference.selected_attention(*given, blocks, self.block, t["scale"], case.cu_seqlens, dtype=dtype)[1]

    def lse(self, case: Case, dtype: torch.dtype) -> Tensor:
        t = case.tensors
        narrow = t["v"][..., :1]  # the LSE does not depend on v
        return reference.sliding_attention(t["q"], t["k"], narrow, case.problem.window, t["scale"], case.cu_seqlens, dtype=dtype)[1]

    def visible(self, case: Case) -> reference_backward.Visible:
        return reference_backward.sees_window(case.problem.window)

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        t, found = case.tensors, super().expected(case, queries, dtype)
        lse, delta, gate, block, _ = t["selected"]
        local = reference_backward.attention_backward(
            t["q"], t["k"], t["v"], t["do"], lse, delta, gate, reference_backward.sees_selected(self._blocks(case), block), t["scale"],
            self.offsets(case), case.cu_seqlens, queries, queries, dtype,
        )  # fmt: skip
        return {name: found[name] + more for name, more in zip(("dq", "dk", "dv"), local, strict=True)}

    def pairs(self, case: Case) -> int:
        return int((positions(case.seqlens) + 1).clamp(max=case.problem.window).sum())

    def run(self, case: Case, host: Any) -> None:
        t, o = case.tensors, case.outputs
        added = t["dq_add"], t["dk_add"], t["dv_add"]
        host(*self.given(case), o["dq"], o["dk"], o["dv"], *added, t["scale"], *sequences(case), t["selected"])


class _SelectedAttentionBackward(_AttentionBackward):
    def choose(self, case: Case, values: Values) -> None:
        case.tensors["block_indices"] = legal_blocks(case, values)

    def gradient_dtype(self, case: Case) -> torch.dtype:
        return torch.float32

    def lse(self, case: Case, dtype: torch.dtype) -> Tensor:
        p, t = case.problem, case.tensors
        return reference.selected_attention(
            t["q"], t["k"], t["v"][..., :1], t["block_indices"], p.selection_block, t["scale"], case.cu_seqlens, dtype=dtype
        )[1]

    def visible(self, case: Case) -> reference_backward.Visible:
        return reference_backward.sees_selected(case.tensors["block_indices"], case.problem.selection_block)

    def pairs(self, case: Case) -> int:
        return selected_pairs(case, positions(case.seqlens), case.problem.count)

    def run(self, case: Case, host: Any) -> None:
        t, o = case.tensors, case.outputs
        last = (*sequences(case), t.get("local", 0))
        host(*self.given(case), o["dq"], o["dk"], o["dv"], t["dq_add"], t["scale"], t["workspace_bytes"], *last)


class _CombineBackward(Call):
    """``do``, the branches' outputs and gates → ``delta``, ``gate`` in fp32, the gradients of the gates and of the branches."""

    branches = ("cmp", "slc", "swa")

    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        shape, dim = (case.total, case.heads_query), case.problem.head_dim_v
        case.tensors["do"] = values.normal(*shape, dim)
        for branch in self.branches:
            case.tensors[f"o_{branch}"] = values.normal(*shape, dim)
        for branch in self.branches:
            case.tensors[f"g_{branch}"] = values.normal(*shape).sigmoid()
        for name in ("delta", "gate", "dg"):
            for branch in self.branches:
                case.outputs[f"{name}_{branch}"] = values.empty(*shape, dtype=case.dtype if name == "dg" else torch.float32)

    def run(self, case: Case, host: Any) -> None:
        outputs = list(case.outputs.values())
        host(*case.tensors.values(), outputs[:3], outputs[3:6], outputs[6:], (None, None, None))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        t = {name: x if queries is None else x[queries] for name, x in case.tensors.items()}
        do, found = t["do"].to(dtype), {}
        for branch in self.branches:
            found[f"delta_{branch}"] = found[f"dg_{branch}"] = (do * t[f"o_{branch}"].to(dtype)).sum(-1)
            found[f"gate_{branch}"] = t[f"g_{branch}"].to(dtype)
        return found

    def flops(self, case: Case) -> int:
        return 6 * case.total * case.heads_query * case.problem.head_dim_v


class _CompressBackward(Call):
    """``x``, φ's weights, ``dout``, ``dx_add`` → ``dx`` and, in the order of the weights, ``dw0`` …"""

    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        p, shape = case.problem, (case.heads_kv, case.problem.head_dim)
        dout = values.normal(reference.compressed_rows(case.total, p.stride), *shape)
        if values.real:
            dout[gap_rows(case)] = torch.nan
        case.tensors |= {"x": values.normal(case.total, *shape), "dout": dout}
        case.tensors["weights"] = phi_weights(case, values, p.head_dim, p.hidden)
        case.tensors["dx_add"] = values.normal(case.total, *shape)
        case.outputs["dx"] = values.empty(case.total, *shape)
        for i, weight in enumerate(case.tensors["weights"]):
            case.outputs[f"dw{i}"] = values.empty(*weight.shape)

    def run(self, case: Case, host: Any) -> None:
        t, (dx, *dweights) = case.tensors, case.outputs.values()
        host(t["x"], t["weights"], t["dout"], dx, tuple(dweights), t["dx_add"], *sequences(case))

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        p, t = case.problem, case.tensors
        with torch.enable_grad():
            x, *weights = (a.to(dtype).detach().requires_grad_() for a in (t["x"], *t["weights"]))
            out = reference.compress(x, p.pooling, tuple(weights), p.block, p.stride, case.cu_seqlens, dtype)
        dout = t["dout"].to(dtype).masked_fill(gap_rows(case)[:, None, None], 0.0)
        found: tuple[Tensor | None, ...] = (None,) * (1 + len(weights))
        if out.requires_grad:  # else there is no compressed token
            found = torch.autograd.grad(out, (x, *weights), dout, allow_unused=True)
        dx, *dweights = (torch.zeros_like(a) if grad is None else grad for a, grad in zip((x, *weights), found, strict=True))
        return {"dx": dx + t["dx_add"].to(dtype)} | {f"dw{i}": grad for i, grad in enumerate(dweights)}

    def check(self, case: Case, queries: Tensor | None) -> Check:
        return check_floats(case.expected(), case.expected(None, case.dtype), case.outputs, None)

    def flops(self, case: Case) -> int:
        p = case.problem
        count = sum(n for _, n in reference.compressed_offsets(case.cu_seqlens, case.total, p.block, p.stride))
        reach = p.block * p.head_dim
        each = {"mean": reach, "weighted": 4 * reach, "linear": 4 * reach * p.head_dim}.get(p.pooling)
        return count * case.heads_kv * (reach + 4 * reach * p.hidden + 4 * p.hidden * p.head_dim if each is None else each)


CALLS: dict[str, Call] = {
    "compressed_attention_bwd": _CompressedAttentionBackward(),
    "selected_attention_bwd": _SelectedAttentionBackward(),
    "sliding_attention_bwd": _SlidingAttentionBackward(),
    "combine_bwd": _CombineBackward(),
    "compress_bwd": _CompressBackward(),
}
