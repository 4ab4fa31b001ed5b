"""Spawned processes that serve one request at a time, each under a deadline, and a pool of them.

A process is started once and reused: a fresh one for each candidate costs about eleven times as much. One that crashes, hangs or reports
a fatal failure is killed and replaced; its request is answered with a :class:`Failure`. Nothing here touches CUDA or imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import itertools
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from .records import Failure

_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 2000


@dataclass(frozen=True)
class Request:
    """A call of ``method(*args)`` on the object a process serves.

    Args:
        deadline_s: seconds until the process is killed.
        key: what the call needs prepared (inputs, references); a process whose last key differs, or a fresh one, gets ``grace_s`` more.
    """

    method: str
    args: tuple[Any, ...] = ()
    deadline_s: float = 60.0
    grace_s: float = 0.0
    key: Any = None


def _serve(pipe: connection.Connection, make: Callable[[], Any], output: str) -> None:
    """Body of a spawned process: answer requests until the other end closes."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator decides what ends
    with open(output, "ab", buffering=0) as file:  # compilers print at length when they fail: keep it off the progress bars
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    served: Any = None
    try:
        served = make()
    except Exception as error:
        served = Failure("error", f"worker did not start: {_one_line(error)}")
        traceback.print_exc()
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        if isinstance(served, Failure):
            answer = served
        else:
            try:
                answer = getattr(served, method)(*args)
            except Exception as error:
                traceback.print_exc()
                answer = Failure("error", _one_line(error))
        try:
            pipe.send(answer)
        except (BrokenPipeError, OSError):
            os._exit(0)
        if isinstance(answer, Failure) and answer.fatal:
            os._exit(1)  # the device context is lost: tearing it down may hang


def _die_with_parent() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Environment for a process being started (``None`` removes a variable)."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


class Worker:
    """One spawned process. ``busy`` is the ticket it works on, or None."""

    def __init__(self, make: Callable[[], Any], env: Mapping[str, str | None], output: Path):
        self._make, self._env, self._output = make, env, output
        self.busy: int | None = None
        self.starts = 0
        self._process: Any = None
        self._request: Request | None = None
        self._key: Any = None
        self.deadline = 0.0

    def submit(self, ticket: int, request: Request) -> None:
        fresh = self._process is None or not self._process.is_alive()
        if fresh:
            self._start()
        grace = request.grace_s if fresh or request.key != self._key else 0.0
        self.busy, self._request, self._key = ticket, request, request.key
        self.deadline = time.monotonic() + request.deadline_s + grace
        with contextlib.suppress(BrokenPipeError, OSError):  # a process that is gone is seen by its sentinel
            self._pipe.send((request.method, request.args))

    def _start(self) -> None:
        self.kill()
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make, str(self._output)), daemon=True)
        with _environment(self._env):
            self._process.start()
        theirs.close()
        self.starts += 1

    def handles(self) -> list[Any]:
        return [self._pipe, self._process.sentinel] if self.busy is not None else []

    def collect(self) -> Any | None:
        """The answer to the request if there is one: a result or a Failure. Ends the process if its deadline is past."""
        assert self._request is not None
        try:
            if self._pipe.poll():
                answer = self._pipe.recv()
                if isinstance(answer, Failure) and answer.fatal:
                    self.kill()
                self.busy = None
                return answer
        except (EOFError, OSError):
            return self._died()
        if not self._process.is_alive():
            return self._died()
        if time.monotonic() >= self.deadline:
            self.kill()
            self.busy = None
            return Failure("hang", f"{self._request.method} did not end within its deadline of {self._request.deadline_s:g} s")
        return None

    def _died(self) -> Failure:
        self._process.join(5)
        code = self._process.exitcode
        self.kill()
        self.busy = None
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
        return Failure("crash", f"process ended with {how}{self._last_words()}")

    def _last_words(self) -> str:
        try:
            lines = self._output.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f": {lines[-1][:300]}" if lines else ""

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
            self._pipe.close()
            self._process = None


@dataclass(order=True)
class _Waiting:
    priority: int
    ticket: int
    request: Request = field(compare=False)


class Pool:
    """Processes that share a queue.

    Args:
        makers: one picklable callable a process; called in it, gives the object that serves requests.
        env: environment changes for the processes, ``None`` removes a variable.
    """

    def __init__(self, makers: Sequence[Callable[[], Any]], *, env: Mapping[str, str | None] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="nsa-gen-tune-")
        self.workers = [Worker(make, env or {}, Path(self._folder.name) / f"{i}.txt") for i, make in enumerate(makers)]
        self._queue: list[_Waiting] = []
        self._tickets = itertools.count()

    def __len__(self) -> int:
        return len(self.workers)

    @property
    def load(self) -> int:
        """Requests queued or being served."""
        return len(self._queue) + sum(w.busy is not None for w in self.workers)

    def submit(self, request: Request, priority: int = 0) -> int:
        """Queue a request (the lowest priority number first); returns its ticket."""
        ticket = next(self._tickets)
        heapq.heappush(self._queue, _Waiting(priority, ticket, request))
        self.dispatch()
        return ticket

    def dispatch(self) -> None:
        for worker in self.workers:
            if worker.busy is None and self._queue:
                waiting = heapq.heappop(self._queue)
                worker.submit(waiting.ticket, waiting.request)

    def collect(self) -> list[tuple[int, Any]]:
        """Answers that are there now: (ticket, result or Failure)."""
        found = []
        for worker in self.workers:
            ticket = worker.busy
            if ticket is not None and (answer := worker.collect()) is not None:
                found.append((ticket, answer))
        self.dispatch()
        return found

    def clear(self) -> list[int]:
        """Drop requests no process has begun; returns their tickets."""
        dropped = [waiting.ticket for waiting in self._queue]
        self._queue.clear()
        return dropped

    def close(self) -> None:
        """Kill every process. May be called twice."""
        self._queue.clear()
        for worker in self.workers:
            worker.kill()
            worker.busy = None
        self._folder.cleanup()


class InlinePool:
    """The interface of :class:`Pool` over one object in this process: for replays. No deadlines."""

    def __init__(self, served: Any):
        self._served = served
        self._queue: list[_Waiting] = []
        self._tickets = itertools.count()

    def __len__(self) -> int:
        return 1

    @property
    def load(self) -> int:
        return len(self._queue)

    def submit(self, request: Request, priority: int = 0) -> int:
        ticket = next(self._tickets)
        heapq.heappush(self._queue, _Waiting(priority, ticket, request))
        return ticket

    def collect(self) -> list[tuple[int, Any]]:
        if not self._queue:
            return []
        waiting = heapq.heappop(self._queue)
        return [(waiting.ticket, getattr(self._served, waiting.request.method)(*waiting.request.args))]

    def clear(self) -> list[int]:
        dropped = [waiting.ticket for waiting in self._queue]
        self._queue.clear()
        return dropped

    def close(self) -> None:
        self._queue.clear()


def wait(pools: Sequence[Pool | InlinePool], timeout_s: float) -> None:
    """Sleep until a process of any pool answers, dies or passes its deadline, at most ``timeout_s``."""
    busy = [worker for pool in pools if isinstance(pool, Pool) for worker in pool.workers if worker.busy is not None]
    if any(isinstance(pool, InlinePool) and pool.load for pool in pools):
        return
    if not busy:
        return
    until = min(worker.deadline for worker in busy) - time.monotonic()
    connection.wait([handle for worker in busy for handle in worker.handles()], max(0.0, min(timeout_s, until)))
