"""Where templates, specs, tables and caches live; every environment variable nsa-gen reads.

A checkout keeps ``templates/``, ``specs/`` and ``tuned/`` at its top level; a wheel carries the same folders under ``nsa_gen/_data``.

| variable | meaning | default |
|---|---|---|
| ``NSA_GEN_CACHE`` | rendered modules (if read-only: a temporary one), user rows | ``$XDG_CACHE_HOME/nsa-gen`` or ``~/.cache/nsa-gen`` |
| ``NSA_GEN_TUNED`` | folder of shipped tables | the one shipped |
| ``NSA_GEN_STRICT`` | ``1``: raise ``NotTuned`` instead of falling back | ``0`` |
| ``NSA_GEN_DEBUG`` | ``1``: tracebacks on the command line; operators check values on the GPU too (a sync a call) | ``0`` |
| ``NSA_GEN_WORKSPACE`` | bound on an op's workspace in bytes (``512M``, ``2G`` …) | ``2G`` |
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from .errors import CacheError, InputError

_PACKAGE = Path(__file__).resolve().parent
_SUFFIX = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _data(name: str) -> Path:
    shipped = _PACKAGE / "_data" / name
    return shipped if shipped.is_dir() else _PACKAGE.parent / name


def templates() -> Path:
    """Folder of the Jinja templates."""
    return _data("templates")


def specs() -> Path:
    """Folder of the shipped YAML specs."""
    return _data("specs")


def tuned() -> Path:
    """Folder of the shipped tables (``<device slug>/<kernel>.json``)."""
    return Path(os.environ.get("NSA_GEN_TUNED") or _data("tuned"))


def cache() -> Path:
    """The user's cache folder; not created here."""
    explicit = os.environ.get("NSA_GEN_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsa-gen"


def strict() -> bool:
    """Whether a lookup without an exact tuned row raises ``NotTuned``."""
    return os.environ.get("NSA_GEN_STRICT", "0") not in ("", "0")


def debug() -> bool:
    """Whether checks that cost a device synchronisation are made, and errors show their traceback on the command line."""
    return os.environ.get("NSA_GEN_DEBUG", "0") not in ("", "0")


def workspace_bytes() -> int:
    """Upper bound in bytes on the scratch memory one op allocates beyond its inputs and outputs."""
    return _size(os.environ.get("NSA_GEN_WORKSPACE", "2G"))


@lru_cache(maxsize=16)
def _size(given: str) -> int:
    text = given.strip().upper().removesuffix("B")
    number, suffix = (text[:-1], text[-1]) if text[-1:] in _SUFFIX and text[-1:] else (text, "")
    try:
        value = int(float(number) * _SUFFIX[suffix])
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise InputError(f"NSA_GEN_WORKSPACE must be a positive size such as 512M or 2G, got {text!r}")
    return value


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that readers see the old file or the whole new one.

    Raises:
        CacheError: the folder cannot be created or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error}; set NSA_GEN_CACHE to a writable folder") from error


def writable_cache(sub: str) -> Path:
    """A writable folder below the cache, or below a temporary one, gone with this process, where the cache is read-only."""
    folder = cache() / sub
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = _temporary() / sub
    folder.mkdir(exist_ok=True)
    return folder


@lru_cache(maxsize=1)
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="nsa-gen-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
