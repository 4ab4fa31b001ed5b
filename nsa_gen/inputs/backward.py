"""Calls of the backward's kernels."""

from __future__ import annotations

from .case import Call

CALLS: dict[str, Call] = {}
