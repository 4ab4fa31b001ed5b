"""Sequences that can only be answered from memory: associative recall and needles in noise.

Both plant *facts* (a key token, then its value tokens) at random places of a context of noise, and end with questions: every key once
more, in random order, each followed by its values. A model is scored on the values it predicts there, and on nothing else.

* ``recall``: many facts of one value each, the more the longer the sequence (multi-query associative recall, arXiv 2312.04927).
* ``needle``: four facts of four values each, in a context that is otherwise noise.

Keys, values and noise are disjoint ranges of the vocabulary, laid out in this order. A key is planted once a sequence, its values are drawn
anew for each sequence, so nothing can be learnt by heart: an answer is in the context or it is a guess, right once in ``values`` times.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TASKS = ("recall", "needle")


class Batch(NamedTuple):
    """``tokens [B,S]``; positions ``at [B,A]`` whose next token is an answer; the answers ``[B,A]``."""

    tokens: Tensor
    at: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """How many tokens there are of each kind."""

    keys: int = 512
    values: int = 32
    noise: int = 32

    @property
    def size(self) -> int:
        return self.keys + self.values + self.noise

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def facts(task: str, seqlen: int) -> tuple[int, int]:
    """Facts in a sequence of ``seqlen`` tokens, and values of each. Recall: a fact for every 16 tokens, from 8 to 256."""
    return (min(max(seqlen // 16, 8), 256), 1) if task == "recall" else (4, 4)


def make(task: str, batch: int, seqlen: int, vocabulary: Vocabulary, generator: torch.Generator) -> Batch:
    """``batch`` sequences of ``task`` on the generator's device.

    Raises:
        ValueError: too short a sequence, or too few keys, for the task's facts.
    """
    made: dict[str, Any] = {"generator": generator, "device": generator.device}
    count, length = facts(task, seqlen)
    fact = 1 + length
    context = seqlen - count * fact
    slots = context // fact  # where a fact may begin: every ``fact`` tokens, from an offset of the sequence's own
    if slots < count or vocabulary.keys < count:
        raise ValueError(f"{task} needs {count} keys and {2 * count * fact} tokens, got {vocabulary.keys} and {seqlen}")
    keys = torch.rand(batch, vocabulary.keys, **made).argsort(1)[:, :count]
    values = torch.randint(vocabulary.keys, vocabulary.keys + vocabulary.values, (batch, count, length), **made)
    planted = torch.cat([keys[..., None], values], 2)  # [B, count, fact]
    offset = torch.randint(context - slots * fact + 1, (batch, 1), **made)
    start = torch.rand(batch, slots, **made).argsort(1)[:, :count] * fact + offset
    inside = torch.arange(fact, device=generator.device)

    tokens = torch.randint(vocabulary.keys + vocabulary.values, vocabulary.size, (batch, seqlen), **made)
    tokens.scatter_(1, (start[..., None] + inside).flatten(1), planted.flatten(1))
    order = torch.rand(batch, count, **made).argsort(1)
    asked = planted.gather(1, order[..., None].expand(-1, -1, fact))
    tokens[:, context:] = asked.flatten(1)
    at = (context + torch.arange(count, device=generator.device)[:, None] * fact + inside[:-1]).flatten()
    return Batch(tokens, at.expand(batch, -1), asked[..., 1:].flatten(1))
