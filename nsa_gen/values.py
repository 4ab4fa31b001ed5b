"""Random tensors whose logits or scores are of a kind: what cases of :mod:`nsa_gen.inputs` are filled with."""

from __future__ import annotations

import torch
from torch import Tensor

#: What values the inputs take. ``ties``: few distinct keys or scores; ``equal``: all logits or scores the same; ``huge``: logits up to
#: about 80 in size; ``peaky``: a few keys or blocks hold nearly all the weight.
KINDS = ("random", "ties", "equal", "huge", "peaky")


class Values:
    """Random tensors of one kind from one seed; on ``meta``, shapes only.

    Args:
        kind: one of ``KINDS``.
        dtype: of activations.
    """

    def __init__(self, kind: str, dtype: torch.dtype, device: torch.device, seed: int):
        self.kind, self.dtype, self.device = kind, dtype, device
        self.real = device.type != "meta"
        self.generator = torch.Generator(device).manual_seed(seed) if self.real else None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        out = self.empty(*shape)
        return out.normal_(0, std, generator=self.generator) if self.real else out

    def uniform(self, *shape: int) -> Tensor:
        out = self.empty(*shape, dtype=torch.float32)
        return out.uniform_(generator=self.generator) if self.real else out

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def q_k(self, total: int, heads: int, group: int, rows: int, dim: int) -> tuple[Tensor, Tensor]:
        """``q [total,heads*group,dim]`` and keys ``[rows,heads,dim]`` whose logits at scale ``dim**-0.5`` are of the case's kind."""
        q, k = self.normal(total, heads * group, dim), self.normal(rows, heads, dim)
        if not self.real:
            return q, k
        if self.kind == "huge":
            q.mul_(16)  # logits of standard deviation 16: beyond 64 among a few thousand keys
        elif self.kind in ("ties", "equal"):
            pool = k.new_empty(4 if self.kind == "ties" else 1, heads, dim).normal_(generator=self.generator)
            pick = self.integers(len(pool), rows, heads)
            k = pool[pick, torch.arange(heads, device=self.device)]
        elif self.kind == "peaky":
            sign = self.integers(2, heads, 1, dim).to(self.dtype) * 2 - 1
            q.unflatten(1, (heads, group)).add_(sign * (12 * dim**-0.5))
            special = self.uniform(rows, heads) < 1 / 64
            k = torch.where(special[..., None], sign.squeeze(1), k)
        return q, k

    def scores(self, rows: int, heads: int, blocks: int) -> Tensor:
        """Float32 ``[rows,heads,blocks]`` of the case's kind."""
        out = self.uniform(rows, heads, blocks)
        if not self.real:
            return out
        column = torch.arange(blocks, device=self.device)
        if self.kind == "ties":
            return out.mul_(8).floor_().div_(8)
        if self.kind == "equal":
            return out.fill_(0.25)
        if self.kind == "huge":
            return out.mul_(60).sub_(40).exp_()  # 1e-17 … 5e8
        return out.add_((column % 7 == 3) * 4.0) if self.kind == "peaky" else out
