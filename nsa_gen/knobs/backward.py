"""Spaces of the backward's kernels."""

from __future__ import annotations

from .space import Space

SPACES: dict[str, Space] = {}
