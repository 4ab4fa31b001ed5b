"""What the tuner writes down: points of measurement, what compiling and timing gave, and how a candidate can fail."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import Config, Problem, Shape

#: Every way a candidate can fail. ``FATAL`` ones leave a process that cannot be used again.
KINDS = {
    "render": "the template did not render",
    "compile": "the compiler refused it",
    "shared_memory": "it needs more shared memory than the device has",
    "spills": "registers spill heavily",
    "launch": "the driver refused the launch (out of resources)",
    "memory": "inputs or workspace do not fit the device's memory",
    "wrong": "it disagrees with the reference",
    "illegal_access": "a device fault: the CUDA context is lost",
    "crash": "the process died",
    "hang": "the deadline passed",
    "error": "an exception of another kind",
}
FATAL = frozenset({"illegal_access", "crash", "hang"})


@dataclass(frozen=True)
class Failure:
    """A candidate that failed: ``kind`` is one of ``KINDS``."""

    kind: str
    message: str

    @property
    def fatal(self) -> bool:
        return self.kind in FATAL


@dataclass(frozen=True)
class Built:
    """A compiled config: source digest, and the largest use of each resource over the kernel's functions.

    ``shared`` and ``spills`` in bytes, ``registers`` a thread; the latter two are None where no tool reads the binary.
    """

    digest: str
    shared: int
    registers: int | None = None
    spills: int | None = None


@dataclass(frozen=True)
class Measured:
    """A config that was right, and its time.

    Args:
        ms: median of a call.
        spread: (p80 − p20) / median.
        max_rel_err: largest relative error (Frobenius) over the outputs against the float64 reference.
        stopped: timing ended early because the config was clearly behind.
    """

    ms: float
    spread: float
    max_rel_err: float
    stopped: bool = False


@dataclass(frozen=True, order=True)
class Point:
    """Sizes at which a kernel is measured: ``batch`` sequences of ``seqlen`` tokens, ``heads_kv`` KV heads.

    ``heads_query`` is given for a kernel whose key holds no group (combine); elsewhere it is 0 and follows from the key.
    """

    seqlen: int
    batch: int = 1
    heads_kv: int = 1
    heads_query: int = 0

    @property
    def shape(self) -> Shape:
        return Shape(self.seqlen, self.batch * self.heads_kv)

    def __str__(self) -> str:
        size = f"{self.seqlen // 1024}k" if self.seqlen % 1024 == 0 else str(self.seqlen)
        return f"{size}x{self.shape.batch_heads}"


@dataclass(frozen=True)
class Trial:
    """One candidate at one point: what was built (None if it was not) and what came of it."""

    problem: Problem
    point: Point
    config: Config
    digest: str
    built: Built | None
    outcome: Measured | Failure

    @property
    def ms(self) -> float | None:
        """Median milliseconds, None for a failure."""
        return self.outcome.ms if isinstance(self.outcome, Measured) else None

    def to_record(self) -> dict[str, Any]:
        failed = isinstance(self.outcome, Failure)
        return {
            "event": "trial",
            "kernel": self.problem.kernel,
            "key": self.problem.as_dict(),
            "point": asdict(self.point),
            "config": self.config.as_dict(),
            "digest": self.digest,
            "built": asdict(self.built) if self.built else None,
            "failure" if failed else "measured": asdict(self.outcome),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Trial:
        """The trial of a log record; raises KeyError, TypeError or ConfigError for one of another layout."""
        outcome = Failure(**record["failure"]) if "failure" in record else Measured(**record["measured"])
        return cls(
            Problem.of(record["kernel"], record["key"]),
            Point(**record["point"]),
            Config.of(record["kernel"], record["config"]),
            record["digest"],
            Built(**record["built"]) if record["built"] else None,
            outcome,
        )
