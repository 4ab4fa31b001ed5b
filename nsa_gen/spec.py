"""Spec files: load a ``Spec`` by name or path, expand sweeps, list what is shipped, emit the JSON Schema for editors.

A spec file (``specs/*.yaml``) states one geometry, or with lists in geometry fields a sweep: the cartesian product, each member a spec
with a name of its own (``base-window512``). Whatever is wrong with a file is a ``SpecError`` that names file, line, field, the value and
what is allowed. PyYAML is imported where a file is read, and nowhere else.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import SpecError
from .geometry import (
    DTYPES,
    KV,
    MAPPINGS,
    POOLINGS,
    SCHEMA,
    SECTIONS,
    SWEEPABLE,
    Compression,
    HeadDim,
    Heads,
    Selection,
    Spec,
    TuneShape,
    kind_of,
    rules,
    show,
)

__all__ = [
    "DTYPES", "KV", "MAPPINGS", "POOLINGS", "SCHEMA", "Compression", "HeadDim", "Heads", "Selection", "Spec", "TuneShape",
    "expand", "expand_dict", "json_schema", "load", "names",
]  # fmt: skip

#: Most specs one sweep may make.
MAX_SWEEP = 512
_SUFFIXES = (".yaml", ".yml")
#: What :func:`load` found for a text: file, its stamp, spec. A name is looked up at every call of an operator.
_recent: dict[str, tuple[str, tuple[int, int], Spec]] = {}


def load(source: str | PathLike[str] | Spec) -> Spec:
    """One spec: itself, by its name in ``specs/``, or by the path of its file.

    A member of a sweep goes by its own name: ``load("base-window512")``, ``load("my/specs/base-window512")``.

    Raises:
        SpecError: no such spec, a file that makes several, or whatever is wrong in it.
    """
    if isinstance(source, Spec):
        return source
    known = _recent.get(source) if type(source) is str else None
    if known is not None and known[1] == _stamp(known[0]):
        return known[2]
    path, name = _find(source)
    specs, sweep = _read(path, *_stamp(path))
    if name is not None:
        return next(spec for spec in specs if spec.name == name)
    if sweep:
        shown = ", ".join(spec.name for spec in specs[:8]) + (", ..." if len(specs) > 8 else "")
        raise SpecError(f"is a sweep of {len(specs)} specs: name one of {shown}, or use expand()", file=str(path))
    if type(source) is str and path.is_absolute():
        _recent[source] = (str(path), _stamp(path), specs[0])
    return specs[0]


def expand(source: str | PathLike[str]) -> list[Spec]:
    """All specs of a file, given by name or path: one, or the members of its sweep in the order of the lists.

    Raises:
        SpecError: as :func:`load`, or a sweep with an empty list, a repeated value, an impossible member or more than ``MAX_SWEEP``.
    """
    path, name = _find(source)
    return [spec for spec in _specs(path) if name in (None, spec.name)]


def names() -> list[str]:
    """Names of the shipped specs, sorted; members of sweeps by their own names. A file that is broken goes by its stem."""
    from . import paths

    return sorted(name for path in _files(paths.specs()) for name in _names_in(path))


def expand_dict(data: Any) -> list[Spec]:
    """The specs of a mapping shaped like a spec file, lists in geometry fields included; without lists that is one.

    Raises:
        SpecError: as :func:`expand`, without file and line.
    """
    swept = {name: values for name in SWEEPABLE if isinstance(values := _get(data, name), (list, tuple))}
    if not swept:
        return [Spec.from_dict(data)]
    size = 1
    for name, values in swept.items():
        _check_list(name, values)
        size *= len(values)
    if size > MAX_SWEEP:
        factors = " x ".join(f"{len(values)} ({name})" for name, values in swept.items())
        raise SpecError(f"sweep of {factors} = {size} specs, allowed: at most {MAX_SWEEP}", field=next(iter(swept)))
    base, rule = data.get("name"), rules(Spec)["name"]
    fault = rule.fault(base) if "name" in data else f"missing; allowed: {rule.range}"
    if fault:
        raise SpecError(fault, field="name")
    found = []
    for chosen in itertools.product(*swept.values()):
        one = copy.deepcopy({name: value for name, value in data.items() if name not in swept})
        for name, value in zip(swept, chosen, strict=True):
            head, _, tail = name.partition(".")
            if tail:
                one[head][tail] = value
            else:
                one[head] = value
        one["name"] = "-".join([base, *(f"{SWEEPABLE[name].tag}{value}" for name, value in zip(swept, chosen, strict=True))])
        try:
            found.append(Spec.from_dict(one))
        except SpecError as error:
            raise SpecError(f"{error.message} (in {one['name']}, one of {size} of this sweep)", field=error.field) from None
    return found


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a spec file, for editors. Rules between fields are checked on loading only."""

    def properties(cls: type, prefix: str) -> dict[str, Any]:
        return {name: _schema(f"{prefix}{name}", rule) for name, rule in rules(cls).items()}

    def mapping(cls: type, inner: dict[str, Any], help: str) -> dict[str, Any]:
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.name in inner and f.name != "description"]
        return {"type": "object", "description": help, "properties": inner, "required": needed, "additionalProperties": False}

    inner = {"schema": {"const": SCHEMA, "description": "version of this format"}, **properties(Spec, "")}
    for name, cls in SECTIONS.items():
        inner[name] = mapping(cls, properties(cls, f"{name}."), (cls.__doc__ or "").partition("\n")[0])
    shape = mapping(TuneShape, properties(TuneShape, "tune.shapes."), "batch sequences of seqlen tokens")
    shapes = {"type": "array", "description": "shapes to tune for; they do not bound what the kernels take", "items": shape}
    inner["tune"] = {"type": "object", "properties": {"shapes": shapes}, "additionalProperties": False}
    whole = mapping(Spec, inner, "One geometry of Native Sparse Attention, or a sweep: lists in geometry fields make their product.")
    whole["required"].insert(0, "schema")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "nsa-gen spec", **whole}


def _schema(name: str, rule: Any) -> dict[str, Any]:
    one = rule.schema()
    if name in SWEEPABLE:
        one = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}]}
    return {"description": rule.help, **one}


def _get(data: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _check_list(name: str, values: Any) -> None:
    if not values:
        raise SpecError(f"empty list, allowed: {SWEEPABLE[name].range}, or a list of these", field=name)
    for i, value in enumerate(values):
        fault = f"missing, allowed: {SWEEPABLE[name].range}" if value is None else SWEEPABLE[name].fault(value)
        if fault:
            raise SpecError(fault, field=f"{name}[{i}]")
        if value in values[:i]:
            raise SpecError(f"got {value} twice, allowed: each value once", field=f"{name}[{i}]")


# --- finding files -------------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    except OSError:
        return []


def _find(source: Any) -> tuple[Path, str | None]:
    """The file of ``source``, and the name of a sweep's member if that is what ``source`` named."""
    if not isinstance(source, (str, PathLike)) or isinstance(source, bytes):
        raise SpecError(f"a spec is given by name, path or as a Spec, got {kind_of(source)} {show(source)}")
    text = str(source)
    is_path = isinstance(source, PathLike) or Path(text).suffix in _SUFFIXES or Path(text).name != text
    if is_path:
        path = Path(text)
        folder, name = path.parent, path.stem if path.suffix in _SUFFIXES else path.name
        if _is_file(path):
            return path, None
    else:
        from . import paths

        folder, name = paths.specs(), text
        for suffix in _SUFFIXES:
            if _is_file(folder / f"{text}{suffix}"):
                return folder / f"{text}{suffix}", None
    known = {member: path for path in _files(folder) for member in _names_in(path)}
    if name in known:
        return known[name], name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    where = "no such file" if is_path else "no such spec"
    listed = ", ".join(sorted(known)) or "none"
    raise SpecError(f"{where}: got {text!r}, allowed: the specs in {folder} ({listed}) or a path to a .yaml file{hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _names_in(path: Path) -> list[str]:
    try:
        return [spec.name for spec in _specs(path)]
    except SpecError:
        return [path.stem]


# --- reading files -------------------------------------------------------------------------------------------------------------


def _specs(path: Path) -> tuple[Spec, ...]:
    return _read(path, *_stamp(path))[0]


def _stamp(path: Path | str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=str(path)) from error
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=256)
def _read(path: Path, mtime: int, size: int) -> tuple[tuple[Spec, ...], bool]:
    """The specs of a file and whether it is a sweep; parsed again when time or size of the file changed."""
    file = str(path)
    try:
        import yaml
    except ImportError as error:
        raise SpecError("reading spec files needs PyYAML: pip install pyyaml, or build the spec with Spec.from_dict", file=file) from error
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        root = loader.get_single_node()
        if root is None:
            raise SpecError("the file is empty; allowed: a mapping that begins with schema: 1", file=file)
        with _located(file, root):
            data = _plain(loader, root, "", {}, ())
            specs = tuple(expand_dict(data))
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror or error}", file=file) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        problem += "; a text that holds ': ' needs quotes" if "mapping values" in problem else ""
        context = f"{error.context}, " if getattr(error, "context", None) else ""
        raise SpecError(f"bad YAML: {context}{problem}", file=file, line=mark.line + 1 if mark else None) from error
    except RecursionError:
        raise SpecError("bad YAML: nested too deep", file=file) from None
    return specs, any(isinstance(_get(data, name), list) for name in SWEEPABLE)


@contextmanager
def _located(file: str, root: Any) -> Iterator[None]:
    """Give file and line to the errors of the block."""
    try:
        yield
    except SpecError as error:
        line = error.line if error.line is not None else _line(root, error.field)
        raise SpecError(error.message, file=file, line=line, field=error.field) from None


def _line(node: Any, dotted: str | None) -> int:
    """1-based line of a field like ``tune.shapes[2].seqlen``; of the innermost part that is there, if the field is not."""
    line = node.start_mark.line + 1
    for part in re.findall(r"[^.\[\]]+", dotted or ""):
        if isinstance(node.value, str):
            break
        if node.id == "sequence":
            if not part.isdigit() or int(part) >= len(node.value):
                break
            node = node.value[int(part)]
            line = node.start_mark.line + 1
            continue
        pairs = [pair for pair in node.value if pair[0].value == part]
        if not pairs:
            break
        line, node = pairs[-1][0].start_mark.line + 1, pairs[-1][1]
    return line


def _plain(loader: Any, node: Any, where: str, done: dict[int, Any], above: tuple[int, ...]) -> Any:
    """Python value of a YAML node. Unlike ``yaml.safe_load`` it refuses repeated keys; an alias is converted once, so it cannot explode."""
    if id(node) in done:
        return done[id(node)]
    line = node.start_mark.line + 1
    if id(node) in above:
        raise SpecError("bad YAML: an alias that holds itself", line=line, field=where or None)
    above = (*above, id(node))
    if node.id == "scalar":
        try:
            value: Any = loader.construct_object(node)
        except (ValueError, OverflowError, AttributeError, KeyError, IndexError) as error:
            raise SpecError(f"bad YAML: {show(node.value)}: {error}", line=line, field=where or None) from error
    elif node.id == "sequence":
        value = [_plain(loader, item, f"{where}[{i}]", done, above) for i, item in enumerate(node.value)]
    else:
        value = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.id != "scalar":
                raise SpecError("bad YAML: a key must be a text", line=line, field=where or None)
            key = key_node.value
            inner = f"{where}.{key}" if where else key
            if key in value:
                raise SpecError("the key is there twice, allowed: once", line=line, field=inner)
            value[key] = _plain(loader, value_node, inner, done, above)
    done[id(node)] = value
    return value
