"""Which config serves a call, and why: overrides, the user's entries, shipped tables, borrowed rows, defaults.

The order, first match wins (only 1 and 2 are *exact*):

1. a config given by :func:`override` or :func:`set_override`;
2. this device, a row of the key whose ranges hold the shape: the user's entries before the shipped table;
3. this device, the nearest row of the key (octaves in seqlen, then in batch_heads), then of the keys that differ in ``varlen`` or
   ``deterministic`` alone, which lend theirs;
4. devices of the same arch, nearest SM count first; then the device's declared fallbacks, in their order: for each as in 2 and 3;
5. the default for the arch, then the safe config.

A row that needs more shared memory than the device has, or whose config is not in the space, is passed over. Distances are counted in
whole octaves, so that between two powers of two only row edges change the answer (see :func:`cuts`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from . import paths, space, table
from .config import Config, Problem, Shape
from .device import Device, same_arch
from .errors import ConfigError, NotTuned
from .row import Row
from .table import DigestOf, log

#: Config by what it is for: one Problem, or every problem of a kernel.
Overrides = tuple[tuple[Problem | str, Config], ...]

SOURCES = ("override", "user cache", "device table", "same arch", "arch fallback", "default", "safe")
_here: ContextVar[Overrides] = ContextVar("nsa_gen_override", default=())
_process: Overrides = ()
_logged: set[tuple[object, ...]] = set()


@dataclass(frozen=True)
class Resolution:
    """The config that serves a call, and why.

    Args:
        config: what to render.
        source: one of ``SOURCES``.
        reason: one line: what was taken, and why nothing better was.
        exact: an override, or a row of this device whose ranges hold the shape.
        stale: the row was measured on another rendering than today's (False where there is no row or no way to tell).
        row: the row taken, if one was.
        tried: what was looked at before and why it was not taken, in order.
    """

    config: Config
    source: str
    reason: str
    exact: bool
    stale: bool = False
    row: Row | None = None
    tried: tuple[str, ...] = ()


@contextmanager
def override(*configs: Config, problem: Problem | None = None) -> Iterator[None]:
    """Use these configs in the ``with`` block, whatever the tables say.

    It holds for this thread or task only. Autograd runs a backward pass on the GPU in a thread of its own: for that, use
    :func:`set_override`.

    Args:
        configs: each serves every problem of its kernel, or only ``problem`` if that is given. Inner blocks win over outer ones, and
            both over :func:`set_override`.

    Raises:
        ConfigError: on use, if the config is not in the space of the problem at hand.
    """
    token = _here.set(_added(_here.get(), configs, problem))
    try:
        yield
    finally:
        _here.reset(token)


def set_override(*configs: Config, problem: Problem | None = None) -> None:
    """As :func:`override`, for the whole process until :func:`clear_override`."""
    global _process
    _process = _added(_process, configs, problem)


def clear_override() -> None:
    """Forget what :func:`set_override` set."""
    global _process
    _process = ()


def active_overrides() -> Overrides:
    """The overrides in force here, as a value that can key a cache: ``()`` when there are none."""
    here = _here.get()
    return _process if not here else here if not _process else (*here, *_process)


def _added(old: Overrides, configs: tuple[Config, ...], problem: Problem | None) -> Overrides:
    strange = [c.kernel for c in configs if problem is not None and c.kernel != problem.kernel]
    if strange:
        raise ConfigError(f"override: a config of {strange[0]} for a problem of {problem.kernel if problem else ''}")
    new = [(problem or config.kernel, config) for config in reversed(configs)]
    names = [name for name, _ in new]
    return (*new, *(pair for pair in old if pair[0] not in names))


def resolve(problem: Problem, shape: Shape, device: Device, *, digest_of: DigestOf | None = None) -> Resolution:
    """The config for ``problem`` at ``shape`` on ``device``; the order is in this module's docstring.

    Every answer that is not exact says so in ``reason`` and is logged once (logger ``nsa_gen``): information if it is a row of this
    device or for the interpreter, which nobody tunes, else a warning.

    Args:
        digest_of: problem and config to the digest of what rendering gives today; without it nothing is called stale.

    Raises:
        NotTuned: ``NSA_GEN_STRICT=1`` and the answer would not be exact.
        ConfigError: an override is illegal for ``problem``, or the kernel is unknown.
    """
    found = _override(problem) or _from_rows(problem, shape, device, digest_of) or _untuned(problem, device)
    if found.exact:
        if found.stale:
            _log_once(logging.INFO, f"{problem.kernel} on {device.slug}: {found.reason}", problem, device.slug, found.row)
        return found
    if paths.strict():
        fields = problem.as_dict()
        key = " ".join(f"{name}={value}" for name, value in problem.values)
        served = {"--kv-dtype": "storage", "--page-size": "page_size", "--tokens": "tokens"} if "page_size" in fields else {}
        options = "".join([" --decode" if served else "", *(f" {option} {fields[name]}" for option, name in served.items())])
        raise NotTuned(
            f"{problem.kernel} [{key}] at seqlen {shape.seqlen}, batch_heads {shape.batch_heads} has no tuned row on {device.slug} "
            f"(would take: {found.reason}); tune it with: nsa-gen tune SPEC --kernels {problem.kernel}{options}, or unset NSA_GEN_STRICT"
        )
    expected = found.source in ("user cache", "device table") or device.backend == "cpu"
    level = logging.INFO if expected else logging.WARNING
    _log_once(level, f"{problem.kernel} on {device.slug}: {found.reason}", problem, device.slug, found.source, found.row)
    return found


def cuts(problem: Problem, device: Device) -> tuple[list[int], list[int]]:
    """Where :func:`resolve` may change its answer: sorted seqlens and batch_heads, powers of two and the edges of all rows in reach.

    Between two neighbouring cuts (the lower included) the answer is the same.
    """
    sides: list[list[int]] = []
    rows = [row for _, slug in _reach(device) for _, row in _rows(slug, (problem, *_lenders(problem)))]
    for name in ("seqlen", "batch_heads"):
        edges = {edge for row in rows for edge in (getattr(row, name)[0], getattr(row, name)[1] + 1)}
        sides.append(sorted(edges | {1 << power for power in range(64)}))
    return sides[0], sides[1]


def _override(problem: Problem) -> Resolution | None:
    active = active_overrides()
    for name, config in active:
        if name == problem or name == problem.kernel:
            space.check(problem, config)
            return Resolution(config, "override", f"override for {'this problem' if name == problem else problem.kernel}", exact=True)
    return None


def _reach(device: Device) -> Iterator[tuple[str, str]]:
    """``(source, slug)`` of every device whose tables may serve ``device``, best first, each once."""
    seen = {device.slug}
    yield "device table", device.slug
    for source, slugs in (("same arch", [other.slug for other in same_arch(device)]), ("arch fallback", device.fallbacks)):
        for slug in slugs:
            if slug not in seen:
                seen.add(slug)
                yield source, slug


def _rows(slug: str, keys: tuple[Problem, ...]) -> list[tuple[str, Row]]:
    """``(origin, row)`` of all rows of some keys of one kernel."""
    read = (("user cache", table.user_tables), ("device table", table.shipped_tables))
    tables = [(origin, found) for origin, tables_of in read for found in tables_of(slug, keys[0].kernel)]
    return [(origin, row) for origin, found in tables for key in keys for row in found.of(key)]


def _lenders(problem: Problem) -> tuple[Problem, ...]:
    """The keys whose rows serve a key that has none, nearest first: those of nearly the same code."""
    fields = problem.as_dict()
    found = [fields]
    for name in ("varlen", "deterministic"):
        if name in fields:
            found += [other | {name: not fields[name]} for other in found]
    return tuple(Problem.of(problem.kernel, other) for other in found[1:])


def _from_rows(problem: Problem, shape: Shape, device: Device, digest_of: DigestOf | None) -> Resolution | None:
    tried: list[str] = []
    keys = (problem, *_lenders(problem))
    for source, slug in _reach(device):
        near = _rows(slug, keys)
        if not near:
            tried.append(f"{slug}: no row of this key")
        near.sort(key=lambda pair: pair[1].rank, reverse=True)
        near.sort(key=lambda pair: _nearness(keys, shape, *pair))
        for origin, row in near:
            fault = _unusable(row, problem, device)
            if fault is None:
                return _taken(row, problem, shape, device, source if slug != device.slug else origin, slug, digest_of, tried)
            tried.append(f"{slug}, {row.where}: {fault}")
    return None


def _nearness(keys: tuple[Problem, ...], shape: Shape, origin: str, row: Row) -> tuple[int, bool, bool, int, int]:
    """Sorts the rows of one device: the key itself before its lenders; rows that hold the shape, the user's first; then the nearest."""
    outside, seqlen, batch_heads = row.distance(shape)
    return keys.index(row.problem), outside, not outside and origin != "user cache", seqlen, batch_heads


def _unusable(row: Row, problem: Problem, device: Device) -> str | None:
    if row.resources["shared"] > device.shared_bytes:
        return f"needs {row.resources['shared']} bytes of shared memory, {device.slug} has {device.shared_bytes}"
    if row.config.as_dict().get("chain") and not device.chains:
        return f"chains its launches, {device.slug} does not"
    try:
        space.check(problem, row.config)
    except ConfigError as error:
        if row.problem == problem:
            _log_once(logging.WARNING, f"tuned row skipped: {error}")
        return str(error)
    return None


def _taken(
    row: Row, problem: Problem, shape: Shape, device: Device, source: str, slug: str, digest_of: DigestOf | None, tried: list[str]
) -> Resolution:
    holds = row.holds(shape)
    other = [f"{name}={value}" for name, value in row.problem.values if value != problem.as_dict()[name]]
    borrowed = f"measured with {', '.join(other)}, borrowed" if other else ""
    exact = holds and not borrowed and slug == device.slug
    stale = digest_of is not None and digest_of(row.problem, row.config) != row.source_digest
    what = "row" if holds else f"nearest row to seqlen {shape.seqlen}, batch_heads {shape.batch_heads}:"
    reason = f"{what} {row.where} of {slug} ({source})"
    reason += "".join(f"; {note}" for note in (borrowed, "stale: measured on another rendering" if stale else "") if note)
    if not exact and tried:
        reason += f"; not taken: {' | '.join(tried)}"
    return Resolution(row.config, source, reason, exact, stale, row, tuple(tried))


def _untuned(problem: Problem, device: Device) -> Resolution:
    why = f"no usable row on {', '.join(slug for _, slug in _reach(device))}"
    try:
        return Resolution(space.default(problem, device.arch), "default", f"default for {device.arch}: {why}", False, tried=(why,))
    except ConfigError as error:
        _log_once(logging.WARNING, f"default for {device.arch} skipped: {error}")
        return Resolution(
            space.safe(problem), "safe", f"safe config: default for {device.arch}: {error}; {why}", False, tried=(why, str(error))
        )


def _log_once(level: int, message: str, *about: object) -> None:
    """Log unless it was said before; ``about`` stands for the message where its words differ from shape to shape."""
    topic = about or (message,)
    if topic not in _logged:
        _logged.add(topic)
        log.log(level, message)
