"""One call of one kernel's host function: its arguments, poisoned outputs, the reference's answer, and when an answer is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import paths
from ..acceptance import Check, check_floats
from ..config import Problem
from ..errors import InputError, allowed
from ..values import KINDS, Values


class Call:
    """What is particular to one kernel. ``CALLS`` has an instance of the subclass of each.

    ``rows`` names the outputs that have a row a query, of which :meth:`Case.check` may sample; the others are compared whole.
    """

    def build(self, case: Case, values: Values, workspace_bytes: int) -> None:
        """Make the arguments and outputs."""
        raise TypeError(f"{type(self).__name__} builds no arguments")

    def poison(self, case: Case) -> None:
        """Fill the outputs with values no kernel writes."""
        for out in case.outputs.values():
            out.fill_(torch.nan if out.is_floating_point() else -7)

    def run(self, case: Case, host: Any) -> None:
        """Call the host function."""
        raise TypeError(f"{type(self).__name__} calls nothing")

    def expected(self, case: Case, queries: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """The reference's outputs."""
        raise TypeError(f"{type(self).__name__} has no reference")

    def check(self, case: Case, queries: Tensor | None) -> Check:
        """Hold the outputs to the reference."""
        wanted, eager = case.expected(queries), case.expected(queries, case.dtype)
        return check_floats(wanted, eager, case.outputs, queries)

    def flops(self, case: Case) -> int:
        """Useful floating-point operations: a multiply and an add are two, only visible keys count."""
        raise TypeError(f"{type(self).__name__} does not count operations")


#: By kernel.
CALLS: dict[str, Call] = {}


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
        """Fill the outputs with values no kernel writes, and set right what a kernel that failed may have left behind."""
        CALLS[self.problem.kernel].poison(self)

    def to(self, device: str | torch.device) -> Case:
        """The same case on another device."""

        def moved(x: Any) -> Any:
            if isinstance(x, tuple | list):
                return type(x)(moved(y) for y in x)
            return x.to(device) if isinstance(x, Tensor) else x

        tensors, outputs = ({name: moved(x) for name, x in given.items()} for given in (self.tensors, self.outputs))
        return replace(self, device=torch.device(device), tensors=tensors, outputs=outputs)

    def run(self, module: ModuleType) -> None:
        """Call the kernel's host function of a rendered module (any object with that attribute)."""
        CALLS[self.problem.kernel].run(self, getattr(module, self.problem.kernel))

    def expected(self, queries: Tensor | None = None, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The reference's outputs, computed in ``dtype``.

        Args:
            queries: LongTensor ``[S]`` of packed tokens; results have these rows only (``compress_fwd`` always gives all rows). For
                ``importance_fwd`` they must lie in the last chunk, which is what the score buffer holds after a run.
        """
        return CALLS[self.problem.kernel].expected(self, None if queries is None else queries.to(self.device), dtype)

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
        return CALLS[self.problem.kernel].check(self, queries)

    def chunk_tokens(self, queries: Tensor | None) -> Tensor:
        """The tokens of which the score buffer holds rows after :meth:`run`: those of the last chunk."""
        start, stop = self.chunks[-1]
        if queries is None:
            return torch.arange(start, stop, device=self.device)
        if len(queries) and not start <= int(queries.min()) <= int(queries.max()) < stop:
            raise InputError(f"queries of this importance case must be in its last chunk [{start}, {stop})")
        return queries

    def flops(self) -> int:
        """Useful floating-point operations of the call (a multiply and an add are two): only visible keys count."""
        return CALLS[self.problem.kernel].flops(self)

    def bytes(self) -> int:
        """Compulsory traffic of the call: each input read once, each output written once, undefined score columns left out. Of kernels that
        serve from a cache, which read a part of it, this is no measure.
        """
        size = 0
        for name, value in (self.tensors | self.outputs).items():
            for x in value if isinstance(value, tuple) else (value,):
                if name == "scores":
                    size += 4 * self.heads_kv * int((positions(self.seqlens) // self.problem.selection_block + 1).sum())
                elif isinstance(x, Tensor):
                    size += x.numel() * x.element_size()
        return size

    def compressed_pairs(self, position: Tensor) -> int:
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
    CALLS[problem.kernel].build(made, Values(kind, made.dtype, made.device, seed), limit)
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
