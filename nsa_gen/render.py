"""Problem + Config → ``Source(text, digest)``: Jinja2 templates rendered into readable Triton modules."""

from __future__ import annotations

import hashlib
import math
import re
import textwrap
from dataclasses import dataclass
from functools import lru_cache

import jinja2

from . import paths
from .config import Config, Problem, overlap_weights
from .errors import RenderError


@dataclass(frozen=True)
class Source:
    """A rendered module: its text, and a digest (16 hex digits over the text) that names it in caches and table rows."""

    kernel: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def environment() -> jinja2.Environment:
    """Line statements (``#% if``), line comments (``#%#``), strict names. Templates are valid Python as they stand."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.templates()),
        undefined=jinja2.StrictUndefined,
        line_statement_prefix="#%",
        line_comment_prefix="#%#",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


_environment = lru_cache(maxsize=1)(environment)
#: A function with its comments and decorators. Line statements swallow the blank lines after them, so their number is settled at the end.
_BEFORE_DEF = re.compile(r"\n+((?:#.*\n)*(?:@.*\n)*def )")
_AFTER_DEF = re.compile(r"(\n +\S.*)\n+(?=(?:#.*\n)*\w+ = )")


def main_dim(dim: int) -> int:
    """The largest power of two ≤ ``dim``: the first part of a head dim."""
    return 1 << (dim.bit_length() - 1)


def tail_dim(dim: int) -> int:
    """The rest of ``dim`` after :func:`main_dim`, padded to a power of two ≥ 16; 0 if there is none."""
    rest = dim - main_dim(dim)
    return max(16, 1 << (rest - 1).bit_length()) if rest else 0


def next_power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two ≥ ``value`` and ≥ ``least``."""
    return max(least, 1 << (value - 1).bit_length())


def render(problem: Problem, config: Config, *, standalone: bool = False, debug: bool = False) -> Source:
    """Render the module of ``problem`` built as ``config`` says. Same arguments, same bytes.

    Args:
        standalone: import ``Launcher`` from the generated package's own ``..launch`` instead of ``nsa_gen.launch``.
        debug: add device-side checks (``tl.device_assert``).

    Raises:
        RenderError: the template is broken; the message shows its lines around the fault.
    """
    name = f"{problem.kernel}.py.jinja"
    key = " ".join(f"{k}={v}" for k, v in problem.values)
    knobs = " ".join(f"{k}={v}" for k, v in config.values)
    header = "\n".join(
        [
            f'"""{problem.kernel}, rendered by nsa-gen from templates/{name}. Do not edit: change the template.',
            "",
            textwrap.fill(f"problem {problem.digest}: {key}", 140, subsequent_indent="    "),
            textwrap.fill(f"config  {config.digest}: {knobs}", 140, subsequent_indent="    "),
            "command: python -m nsa_gen generate SPEC --target TARGET -o DIR",
            '"""',
        ]
    )
    variables = {
        "p": problem,
        "c": config,
        "header": header,
        "standalone": standalone,
        "debug": debug,
        "main_dim": main_dim,
        "tail_dim": tail_dim,
        "next_power_of_two": next_power_of_two,
        "gcd": math.gcd,
        "overlap_weights": overlap_weights,
    }
    try:
        text = _environment().get_template(name).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(f"{error.name}:{error.lineno}: {error.message}\n{_around(error.name, error.lineno)}") from error
    except jinja2.UndefinedError as error:
        line = _template_line(error, name)
        raise RenderError(f"{name}:{line}: {error.message}\n{_around(name, line)}") from error
    except jinja2.TemplateNotFound as error:
        raise RenderError(f"no template {error.name} in {paths.templates()}") from error
    return Source(problem.kernel, _AFTER_DEF.sub(r"\1\n\n\n", _BEFORE_DEF.sub(r"\n\n\n\1", text)))


def _template_line(error: BaseException, name: str) -> int:
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(".jinja"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _around(name: str | None, line: int, context: int = 2) -> str:
    try:
        lines = (paths.templates() / (name or "")).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    first = max(1, line - context)
    shown = enumerate(lines[first - 1 : line + context], first)
    return "\n".join(f"{'>' if number == line else ' '} {number:4d} | {text}" for number, text in shown)
