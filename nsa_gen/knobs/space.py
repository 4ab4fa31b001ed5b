"""What a space of configs is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..config import Config, Problem, Value


@dataclass(frozen=True)
class Knob:
    """One choice the tuner makes.

    Args:
        name: as the template reads it (``c.<name>``); lower case for structure, upper case for tile sizes, else Triton's launch options.
        values: what it may be.
        when: other knobs' values under which it exists, e.g. ``{"loop": ("kv_outer",)}``; elsewhere it is absent from a config.
    """

    name: str
    values: tuple[Value, ...]
    when: dict[str, tuple[Value, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Space:
    """The knobs of one kernel.

    ``defaults`` maps an arch (``sm_90``; ``""`` for every other) to a function Problem → values measured or reasoned good there;
    ``safe`` gives small tiles that fit every supported device; ``illegal`` names why a combination is not built, or None.
    """

    knobs: tuple[Knob, ...]
    defaults: dict[str, Callable[[Problem], dict[str, Value]]]
    safe: Callable[[Problem], dict[str, Value]]
    illegal: Callable[[Problem, Config], str | None] = lambda problem, config: None
