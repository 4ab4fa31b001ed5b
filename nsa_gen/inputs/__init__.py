"""Seeded tensors for one call of one kernel: for tests, tuning, benchmarks, verification, and (``device="meta"``) compiling without a GPU.

A :class:`Case` owns the arguments of a kernel's host function (docs/design.md), its NaN-poisoned outputs, the reference's answer, and the
rule by which a kernel's answer is accepted. What the readers of a layout may not trust is poisoned too: gap rows of compressed tensors and
undefined columns of score tensors are NaN.
"""

from ..acceptance import Check, selection_agrees
from ..values import KINDS
from . import backward, decode, forward
from .case import CALLS, Case, case, positions, sample_queries

CALLS |= forward.CALLS | backward.CALLS | decode.CALLS

__all__ = ["KINDS", "Case", "Check", "case", "positions", "sample_queries", "selection_agrees"]
