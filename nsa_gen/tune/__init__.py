"""Tuning: which config is fastest for a kernel, an exact key and a range of shapes on this GPU.

``run`` is the whole; ``nsa-gen tune`` and ``python -m nsa_gen.tune`` call it. In short: a study proposes (``study``), spawned
processes compile and measure (``worker``, ``backend``), every result goes to an append-only log (``log``), the coordinator keeps them all
busy (``tuner``), and interleaved finals decide what a table row says (``finals``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drive import run
    from .plan import Plan, plans
    from .summary import Result, Summary

__all__ = ["Plan", "Result", "Summary", "plans", "run"]
_HOMES = {"Plan": "plan", "Result": "summary", "Summary": "summary", "plans": "plan", "run": "drive"}


def __getattr__(name: str) -> Any:
    """Names are imported on use: spawned processes import this package, and need neither Optuna nor the coordinator."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
