"""The frozen ``Spec``: heads, head dims, block sizes, windows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int


@dataclass(frozen=True)
class HeadDim:
    qk: int
    v: int


@dataclass(frozen=True)
class Compression:
    block: int
    stride: int
    pooling: str
    hidden: int | None = None


@dataclass(frozen=True)
class Selection:
    block: int
    count: int
    initial: int
    local: int
    mapping: str = "overlap"


@dataclass(frozen=True)
class TuneShape:
    batch: int
    seqlen: int


@dataclass(frozen=True)
class Spec:
    name: str
    description: str
    heads: Heads
    head_dim: HeadDim
    compression: Compression
    selection: Selection
    window: int
    dtype: str
    kv: str
    tune: tuple[TuneShape, ...]

    @property
    def group(self) -> int:
        return self.heads.query // self.heads.kv
