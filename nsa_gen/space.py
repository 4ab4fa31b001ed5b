"""The legal configs of each kernel: listed, checked, the default for an arch, the safe one, neighbours of one."""

from __future__ import annotations

from collections.abc import Iterator

from .config import Config, Problem, Value
from .errors import ConfigError, allowed
from .knobs import SPACES, Knob, Space

__all__ = ["SPACES", "Knob", "Space", "candidates", "check", "default", "knobs", "neighbours", "safe", "size"]


def candidates(problem: Problem) -> Iterator[Config]:
    """Every legal config, each once, in a fixed order."""
    space = _space(problem.kernel)
    for config in _walk(problem.kernel, space.knobs, {}):
        if space.illegal(problem, config) is None:
            yield config


def _walk(kernel: str, knobs: tuple[Knob, ...], chosen: dict[str, Value]) -> Iterator[Config]:
    if not knobs:
        yield Config.of(kernel, chosen)
        return
    knob, rest = knobs[0], knobs[1:]
    if not _exists(knob, chosen):
        yield from _walk(kernel, rest, chosen)
        return
    for value in knob.values:
        yield from _walk(kernel, rest, {**chosen, knob.name: value})


def _exists(knob: Knob, chosen: dict[str, Value]) -> bool:
    return all(chosen.get(name) in values for name, values in knob.when.items())


def default(problem: Problem, arch: str) -> Config:
    """The spec's default for ``arch``: not measured for this problem."""
    defaults = _space(problem.kernel).defaults
    config = Config.of(problem.kernel, defaults.get(arch, defaults[""])(problem))
    check(problem, config)
    return config


def safe(problem: Problem) -> Config:
    """A config that fits every supported device."""
    config = Config.of(problem.kernel, _space(problem.kernel).safe(problem))
    check(problem, config)
    return config


def check(problem: Problem, config: Config) -> None:
    """Raise ConfigError unless ``config`` is in the space of ``problem``."""
    chosen = config.as_dict()
    known = {knob.name: knob for knob in _space(problem.kernel).knobs if _exists(knob, chosen)}
    for name in sorted(set(chosen) ^ set(known)):
        word = "unknown" if name in chosen else "missing"
        raise ConfigError(f"{problem.kernel}: {word} knob {name!r}, this config needs: {', '.join(sorted(known))}")
    for name, knob in known.items():
        if chosen[name] not in knob.values:
            raise ConfigError(f"{problem.kernel}: knob {name}: {allowed(chosen[name], knob.values)}")
    reason = _space(problem.kernel).illegal(problem, config)
    if reason:
        raise ConfigError(f"{problem.kernel}: illegal config: {reason}")


def knobs(kernel: str) -> tuple[Knob, ...]:
    """The knobs of ``kernel`` in order; a knob's ``when`` only names earlier ones."""
    return _space(kernel).knobs


def _space(kernel: str) -> Space:
    try:
        return SPACES[kernel]
    except KeyError:
        raise ConfigError(f"unknown kernel: {allowed(kernel, SPACES)}") from None


def size(problem: Problem) -> int:
    """Number of legal configs."""
    return sum(1 for _ in candidates(problem))


def neighbours(problem: Problem, config: Config) -> Iterator[Config]:
    """Legal configs that differ from ``config`` in one knob."""
    chosen = config.as_dict()
    seen = {config}
    for knob in knobs(problem.kernel):
        for value in knob.values if knob.name in chosen else ():
            try:
                other = config.replace(**{knob.name: value})
                check(problem, other)
            except ConfigError:
                continue
            if other not in seen:
                seen.add(other)
                yield other
