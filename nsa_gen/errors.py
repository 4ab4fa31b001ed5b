"""Every exception nsa-gen raises on purpose, worded for the user: what was given, what is allowed, what mends it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class NSAError(Exception):
    """Base of all errors raised by nsa-gen. ``str(error)`` is one line a user can act on."""


class SpecError(NSAError, ValueError):
    """A spec is malformed or impossible. Names file, line, field, the value given and what is allowed.

    Args:
        message: what is wrong, with what is allowed.
        file: path of the YAML file, if the spec came from one.
        line: 1-based line in ``file``.
        field: dotted field name, e.g. ``selection.block``.
    """

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None, field: str | None = None):
        where = "".join([file or "", f":{line}" if line is not None else ""])
        super().__init__(": ".join(part for part in (where, field, message) if part))
        self.file, self.line, self.field, self.message = file, line, field, message


class ConfigError(NSAError, ValueError):
    """A config names an unknown knob or a value outside the space."""


class RenderError(NSAError):
    """A template failed to render; the message shows the template lines around the fault."""


class CompileError(NSAError):
    """A rendered kernel did not compile for its target."""


class TargetError(NSAError, ValueError):
    """A target (device slug or arch) is unknown, or no GPU is present where one is needed."""


class TableError(NSAError, ValueError):
    """A table file or row breaks the schema (reading at run time warns and misses instead of raising)."""


class NotTuned(NSAError, LookupError):
    """``NSA_GEN_STRICT=1`` and no exact tuned row: the message says which key was looked for and how to tune it."""


class InputError(NSAError, ValueError):
    """An argument of an operator has a wrong rank, shape, dtype, device or value."""


class OutOfPages(NSAError, RuntimeError):
    """A KV cache has not enough free pages, or sequences; nothing of it has changed. Free some sequences and try again."""


class UnknownSequence(NSAError, KeyError):
    """A sequence is not in this KV cache: freed already, or of another cache."""

    __str__ = Exception.__str__  # a KeyError shows the repr


class CacheError(NSAError, OSError):
    """A cache or table folder cannot be written where writing was asked for."""


class TuneError(NSAError, RuntimeError):
    """A tuning study cannot go on (not: a failed candidate, which costs one trial)."""


class UnsupportedVersion(NSAError, RuntimeError):
    """The installed torch or triton is older than what the kernels need."""


def allowed(value: Any, choices: Iterable[Any]) -> str:
    """The tail of an error message: ``got 'x', allowed: a, b, c``."""
    return f"got {value!r}, allowed: {', '.join(str(c) for c in choices)}"
