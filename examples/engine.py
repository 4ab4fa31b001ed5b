"""A small engine for continuous batching: the model's passes for what the scheduler plans, and tokens as they are made.

A step is a pass over the new token of every sequence that generates, and a pass over chunks of prompts. On a GPU the first is a CUDA
graph: room is made on the host, then the graph writes K and V and attends, wherever tables and lengths say. A sequence that idles fills a
batch up to a size that was captured. Where there are no kernels both are one pass in plain PyTorch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import nsa_gen
from examples.backends import NSA, Full
from examples.model import Decoder, TokenShift
from examples.scheduler import Request, Scheduler

#: ``(layer, q, k, v, gates) -> o``: attention of new tokens to all that came before them.
Attend = Callable[[int, Tensor, Tensor, Tensor, tuple[Tensor, ...]], Tensor]


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start

    def wait(self, until: float) -> None:
        time.sleep(max(until - self.now(), 0.0))


class Engine:
    """Serves requests with a model, greedily: the next token is always the most likely one.

    Args:
        model: a ``Decoder`` of tokens without ``TokenShift``, in the dtype it is to run in.
        backend: its attention, see :func:`examples.backends.backend_of`; with places for ``max_running`` and ``max_prefixes`` sequences and
            two more.
        budget, max_running, ahead, max_prefixes: the scheduler's.

    Attributes:
        steps: of each step: when it ended, tokens of prompts and generating sequences, requests that ran and waited, free pages.
    """

    def __init__(self, model: Decoder, backend: NSA | Full, *, budget: int, max_running: int, ahead: int = 64, max_prefixes: int = 4):
        if any(isinstance(block.shift, TokenShift) for block in model.blocks):
            raise ValueError("a model with TokenShift would need each sequence's last hidden state: build it with Size(shift=False)")
        self.model, self.backend, self.device = model, backend, model.head.weight.device
        self.decoding = None if backend.joint else Decoding(model, backend, max_running)
        self.scheduler = Scheduler(backend, budget=budget, max_running=max_running, ahead=ahead, max_prefixes=max_prefixes)
        self.steps: list[dict[str, Any]] = []

    def run(self, requests: Iterable[Request], clock: Clock | None = None) -> Iterator[tuple[Request, int]]:
        """Serve requests as they arrive by the clock; yields each token when it is there, with its request.

        Raises:
            ValueError, InputError: a request that could never be served, when it arrives.
        """
        coming, clock = deque(sorted(requests, key=lambda request: request.arrival)), clock or Clock()
        while coming or self.scheduler.busy:
            now = clock.now()
            while coming and coming[0].arrival <= now:
                self.scheduler.submit(coming.popleft())
            if self.scheduler.busy:
                yield from self.step(clock)
            else:
                clock.wait(coming[0].arrival)

    def step(self, clock: Clock) -> list[tuple[Request, int]]:
        """One step: requests that have a new token, with it."""
        scheduler, decoding = self.scheduler, self.decoding
        planned = scheduler.plan()
        batches = []
        if decoding and (single := [request for request, n in planned.items() if n == 1]):
            batches.append((single, decoding(single)))
        if chunks := {request: n for request, n in planned.items() if n > 1 or not decoding}:
            batches.append((list(chunks), self.prefill(chunks)))
        # Tokens are read when both passes are launched.
        made = {request: token for some, tokens in batches for request, token in zip(some, tokens.tolist(), strict=True)}
        now, generating = clock.now(), sum(bool(request.output) for request, n in planned.items() if n == 1)
        grown = scheduler.commit(planned, made)
        for request in grown:
            request.times.append(now)
        self.steps.append({
            "time": now, "prompt_tokens": sum(planned.values()) - generating, "output_tokens": len(grown),
            "running": len(scheduler.running), "waiting": len(scheduler.waiting), "pages_free": self.backend.pages_free,
        })  # fmt: skip
        return [(request, request.output[-1]) for request in grown]

    @torch.no_grad()
    def prefill(self, chunks: Mapping[Request, int]) -> Tensor:
        """Compute the next tokens that requests know, so many of each; the token after each chunk, int64 on the device."""
        sequences, counts = [request.sequence for request in chunks], list(chunks.values())
        spans = [(request, n := self.backend.length(request.sequence), n + chunk) for request, chunk in chunks.items()]
        tokens = [token for request, first, last in spans for token in request.tokens(first, last)]
        positions = [position for _, first, last in spans for position in range(first, last)]
        given = torch.tensor([tokens, positions], device=self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
            return self.backend.prefill(layer, q, k, v, gates, sequences, counts)

        x = forward(self.model, given[0], given[1], attend)
        return following(self.model, x[torch.tensor(counts, device=self.device).cumsum(0) - 1])

    def close(self) -> None:
        """Give back the pages of shared prefixes and of the idle sequence; requests that still run keep theirs."""
        self.scheduler.drop_prefixes()
        if self.decoding:
            self.decoding.close()


class Decoding:
    """The pass over one new token of each sequence, for batches up to ``most``; CUDA graphs where there is CUDA."""

    def __init__(self, model: Decoder, backend: NSA | Full, most: int):
        device = model.head.weight.device
        self.model, self.backend, self.idle = model, backend, backend.create()
        backend.reserve([self.idle])
        self.sizes = [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]
        self.given = torch.zeros(2, most, dtype=torch.int64, device=device)  # tokens and positions
        self.slots = backend.slots([self.idle] * most)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if device.type == "cuda":
            self._capture()

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> Tensor:
        """Compute one token of each request; the tokens that follow, int64 on the device, valid until the next call."""
        sequences, count = [request.sequence for request in requests], len(requests)
        positions = [self.backend.length(sequence) for sequence in sequences]
        tokens = [request.tokens(n, n + 1)[0] for request, n in zip(requests, positions, strict=True)]
        self.backend.reserve(sequences)
        size = next(size for size in self.sizes if size >= count)
        none = [0] * (size - count)
        self.given[:, :size] = torch.tensor([[*tokens, *none], [*positions, *none]], device=self.given.device)
        self.slots[:size] = self.backend.slots([*sequences, *[self.idle] * len(none)])
        if size not in self.graphs:
            return self._pass(size)[:count]
        graph, made = self.graphs[size]
        graph.replay()
        return made[:count]

    def close(self) -> None:
        self.graphs.clear()
        self.backend.free(self.idle)

    def _pass(self, size: int) -> Tensor:
        tokens, positions, slots = *self.given[:, :size], self.slots[:size]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
            return self.backend.decode(layer, q, k, v, gates, slots, positions)

        return following(self.model, forward(self.model, tokens, positions, attend))

    @torch.no_grad()
    def _capture(self) -> None:
        """A graph for each size, the largest first, whose memory serves all: only one runs at a time."""
        memory = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._pass(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                made = self._pass(size)
            self.graphs[size] = graph, made


# --- the model, step by step -----------------------------------------------------------------------------------------------------------


def forward(model: Decoder, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """What the head reads ``[T,width]`` of new ``tokens [T]`` at ``positions [T]`` of their sequences, whatever these are."""
    x = model.embedding(tokens)
    for layer, block in enumerate(model.blocks):
        x = block(x, partial(_attention, block.attention, positions, partial(attend, layer)))
    return model.norm(x)


def following(model: Decoder, x: Tensor) -> Tensor:
    """The most likely token after each row of ``x [T,width]``, int64 ``[T]``."""
    return model.head(x).float().argmax(-1)


def _attention(layer: Any, positions: Tensor, attend: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    """``layer``, an ``NSAttention`` or ``FullAttention``, on ``hidden [T,width]`` with the attention proper left to ``attend``."""
    heads, dim = layer.spec.heads, layer.spec.head_dim
    q, k, v = layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)
    q, k, v = q.view(-1, heads.query, dim.qk), k.view(-1, heads.kv, dim.qk), v.view(-1, heads.kv, dim.v)
    gates = nsa_gen.module.gates_of(layer.gate_proj(hidden)) if isinstance(layer, nsa_gen.NSAttention) else ()
    return layer.o_proj(attend(layer.rope(q, positions), layer.rope(k, positions), v, gates).flatten(-2))
