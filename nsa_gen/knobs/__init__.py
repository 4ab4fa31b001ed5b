"""The knobs of each kernel: what they may be, the default per arch, the safe config, and what is not built and why."""

from __future__ import annotations

from . import backward, decode, forward
from .space import Knob, Space

__all__ = ["SPACES", "Knob", "Space"]

SPACES: dict[str, Space] = {**forward.SPACES, **backward.SPACES, **decode.SPACES}
