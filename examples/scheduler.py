"""Who runs next: continuous batching over a pool of pages. Host logic alone, without tensors or a clock.

A step has a budget of tokens. Sequences that generate take one each; what is left goes to prompts, the oldest first, in chunks. Requests
are served in the order they come: one is admitted when there are pages for its whole prompt beside all that running ones will soon take.
Where pages run short all the same, the youngest running request gives its pages back and is computed again later; its tokens stay. So the
oldest always goes on, and every request ends.

A prompt may begin with a prefix that others of its ``group`` share. Who has computed it leaves a fork of it behind, then and at its end,
unless there is one; the others begin from that. Under page pressure prefixes go before requests do.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nsa_gen.pages import Pages, Stream


class PagePool:
    """Pages that are counted and hold nothing, in the words of ``PagedKVCache``: n tokens of a sequence take ``ceil(n / page_size)``."""

    def __init__(self, pages: int, page_size: int, sequences: int, max_seqlen: int):
        self._pages = Pages(pages, page_size, [Stream(lambda tokens: tokens)], sequences, max_seqlen, rewind=0)

    @property
    def pages_free(self) -> int:
        return self._pages.free

    @property
    def pages_total(self) -> int:
        return self._pages.total

    def pages_needed(self, tokens: Mapping[int, int]) -> int:
        return self._pages.needed(tokens)

    def create(self) -> int:
        return self._pages.create()

    def fork(self, sequence: int, tokens: int) -> int:
        return self._pages.fork(sequence, tokens)[0]

    def free(self, *sequences: int) -> None:
        self._pages.drop(sequences)

    def length(self, sequence: int) -> int:
        return self._pages.find(sequence).tokens

    def slot(self, sequence: int) -> int:
        """Which of ``sequences`` places it has, until it is freed."""
        return self._pages.find(sequence).slot

    def extend(self, tokens: Mapping[int, int]) -> None:
        """Count so many more tokens of each sequence as there. Raises ``OutOfPages``."""
        self._pages.extend(tokens)


@dataclass(eq=False)
class Request:
    """A prompt to go on from, by ``max_tokens`` tokens.

    ``arrival`` is in seconds. The first ``prefix`` tokens of the prompt, fewer than all, are those of every request of ``group``. As it is
    served, ``output`` grows, and ``times``, when each token was there; ``preemptions`` counts how often it lost its pages, ``reused`` the
    tokens that it did not have to compute.
    """

    number: int
    arrival: float
    prompt: list[int]
    max_tokens: int
    group: Hashable = None
    prefix: int = 0
    output: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    sequence: Any = None
    preemptions: int = 0
    reused: int = 0

    @property
    def known(self) -> int:
        """Tokens of the prompt and the output so far."""
        return len(self.prompt) + len(self.output)

    @property
    def longest(self) -> int:
        """Tokens it has in the cache at its end: all but the last, which nobody reads."""
        return len(self.prompt) + self.max_tokens - 1

    def tokens(self, first: int, last: int) -> list[int]:
        """Tokens ``first`` to ``last`` of prompt and output."""
        n = len(self.prompt)
        return self.prompt[first:last] + self.output[max(first - n, 0) : max(last - n, 0)]


class Scheduler:
    """The queue, and what runs.

    Args:
        pool: a ``PagePool``, or what has the same ``pages_free``, ``pages_needed``, ``create``, ``fork``, ``free`` and ``length``, with
            sequences of any kind. Nobody else takes pages of it.
        budget: tokens a step.
        max_running: requests that have pages at a time; at most ``budget``.
        ahead: tokens of output that an admission leaves room for, of each running request.
        max_prefixes: shared prefixes kept at a time. The pool must have places for ``max_running + max_prefixes + 1`` sequences.

    Attributes:
        waiting, running: requests, each in the order of arrival; all that run came before all that wait.
        prefixes: sequences that hold a prefix, by group; the one used last is last.
    """

    def __init__(self, pool: Any, *, budget: int, max_running: int, ahead: int = 64, max_prefixes: int = 4):
        if not 1 <= max_running <= budget:
            raise ValueError(f"max_running must be 1 to budget, {budget}, as each that generates takes a token a step: got {max_running}")
        self.pool, self.budget, self.max_running, self.ahead, self.max_prefixes = pool, budget, max_running, ahead, max_prefixes
        self.pages = pool.pages_free
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prefixes: OrderedDict[Hashable, Any] = OrderedDict()
        self._refused = False  # the first in the queue, and nothing was given back since

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.running or self.waiting)

    def left(self, request: Request) -> int:
        """Known tokens that a running request has yet to compute: 1 where it generates."""
        return request.known - self.pool.length(request.sequence)

    def submit(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            ValueError: it is empty, its prefix is all of its prompt, or it would not fit even if it were alone.
            InputError: it would be longer than the pool allows.
        """
        if not 0 <= request.prefix < len(request.prompt) or request.max_tokens < 1 or (request.prefix and request.group is None):
            raise ValueError(
                f"request {request.number}: a prompt of {len(request.prompt)} tokens, {request.prefix} of them shared in group "
                f"{request.group!r}, and {request.max_tokens} more; one more at least, and one of the prompt that is not shared"
            )
        probe = self.pool.create()
        try:
            wanted = self.pool.pages_needed({probe: request.longest})
        finally:
            self.pool.free(probe)
        if wanted > self.pages:
            raise ValueError(f"request {request.number} takes {wanted} pages at its end, there are {self.pages}")
        self.waiting.append(request)

    def plan(self) -> dict[Request, int]:
        """Requests of the next step, and how many tokens of each; at most ``budget`` in all, and there are pages for them."""
        planned = {request: 1 for request in self.running if self.left(request) == 1}
        before = len(self.waiting)
        while not self._fits(planned):
            self._make_room(planned)
        for request in list(self.running):
            if request in planned or request.sequence is None:
                continue
            chunk = min(self.left(request), self.budget - sum(planned.values()))
            while chunk and not self._fits({**planned, request: chunk}):
                if not self._make_room(planned, request):
                    chunk = 0
            if chunk:
                planned[request] = chunk
        if len(self.waiting) == before:
            self._admit(planned)
        return planned

    def commit(self, planned: Mapping[Request, int], made: Mapping[Request, int]) -> list[Request]:
        """After a step: note new tokens, keep prefixes, give back what is done with.

        Args:
            planned: what :meth:`plan` gave; the pool holds these tokens now.
            made: the next token of requests; of those that have computed all they know it is the output.

        Returns:
            requests that have a new token, the last of ``output``.
        """
        grown = []
        for request, chunk in planned.items():
            length = self.pool.length(request.sequence)
            if length == request.known:
                request.output.append(made[request])
                grown.append(request)
            finished = len(request.output) == request.max_tokens
            if length - chunk < request.prefix <= length or (request.prefix and finished):
                self._keep(request)
            if finished:
                self.running.remove(request)
                self._release(request)
        return grown

    def drop_prefixes(self) -> None:
        """Forget all shared prefixes."""
        while self.prefixes:
            self._drop_prefix()

    # --- parts -------------------------------------------------------------------------------------------------------------------

    def _fits(self, planned: Mapping[Request, int]) -> bool:
        return self.pool.pages_needed({request.sequence: n for request, n in planned.items()}) <= self.pool.pages_free

    def _make_room(self, planned: dict[Request, int], request: Request | None = None) -> bool:
        """Take pages from a prefix, else from the youngest running request, which then waits; False if that is ``request``."""
        if self.prefixes:
            self._drop_prefix()
            return True
        youngest = self.running[-1]
        if youngest is request:
            return False
        self.running.pop()
        self._release(youngest)
        self.waiting.appendleft(youngest)
        youngest.preemptions += 1
        planned.pop(youngest, None)
        return True

    def _admit(self, planned: dict[Request, int]) -> None:
        """Move requests from the queue to those that run, while there are tokens and pages for the first in it."""
        while self.waiting and not self._refused and len(self.running) < self.max_running:
            room = self.budget - sum(planned.values())
            if not room:
                return
            request = self.waiting[0]
            shared = self.prefixes.get(request.group)
            request.sequence = self.pool.create() if shared is None else self.pool.fork(shared, request.prefix)
            while not self._fits({r: min(self.left(r) + self.ahead, self._coming(r)) for r in (*self.running, request)}):
                if self.running or not self.prefixes:
                    self._release(request)
                    self._refused = True
                    return
                self._drop_prefix()
            if shared is not None:
                request.reused += request.prefix
                if request.group in self.prefixes:
                    self.prefixes.move_to_end(request.group)
            self.running.append(self.waiting.popleft())
            planned[request] = min(self.left(request), room)

    def _coming(self, request: Request) -> int:
        """Tokens a running request will yet bring into the cache."""
        return request.longest - self.pool.length(request.sequence)

    def _keep(self, request: Request) -> None:
        if request.group in self.prefixes or not self.max_prefixes:
            return
        if len(self.prefixes) == self.max_prefixes:
            self._drop_prefix()
        self.prefixes[request.group] = self.pool.fork(request.sequence, request.prefix)
        self._refused = False

    def _drop_prefix(self) -> None:
        self.pool.free(self.prefixes.popitem(last=False)[1])
        self._refused = False

    def _release(self, request: Request) -> None:
        self.pool.free(request.sequence)
        request.sequence = None
        self._refused = False
