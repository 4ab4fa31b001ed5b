"""The frozen ``Spec`` of a Native Sparse Attention geometry, and the rules it is checked by when it is made.

Rules on one field sit with the field; rules between fields are in ``__post_init__``. Reading spec files is in ``spec``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

from .errors import SpecError, allowed

SCHEMA = 1
POOLINGS = ("mean", "weighted", "linear", "mlp")
MAPPINGS = ("overlap", "literal")
DTYPES = ("bfloat16", "float16", "float32")
KV = ("shared", "per_branch")


@dataclass(frozen=True)
class Rule:
    """What one field may hold: a whole number, a text, or one of ``choices``.

    ``tag`` names the field in the names of a sweep's members (``""``: the value alone does); None for fields that cannot be swept.
    """

    help: str
    kind: type = int
    low: int = 1
    high: int = 2**31 - 1
    multiple: int = 1
    power_of_two: bool = False
    choices: tuple[str, ...] = ()
    pattern: str = ""
    optional: bool = False
    tag: str | None = None

    def fault(self, value: Any) -> str | None:
        """Why ``value`` is not allowed, or None."""
        if value is None and self.optional:
            return None
        if type(value) is not self.kind:
            hint = "; a list makes a sweep: use spec.expand()" if isinstance(value, list) and self.tag is not None else ""
            return f"must be {_KINDS[self.kind]}, got {kind_of(value)} {show(value)}, allowed: {self.range}{hint}"
        if self.choices and value not in self.choices:
            return f"got {show(value)}, allowed: {self.range}{nearest(value[:100], self.choices)}"
        if self.pattern and not re.fullmatch(self.pattern, value):
            return f"got {show(value)}, allowed: {self.range}"
        if self.kind is int and not (self.low <= value <= self.high and value % self.multiple == 0):
            return f"got {show(value)}, allowed: {self.range}"
        if self.power_of_two and value & (value - 1):
            return f"got {value}, allowed: {self.range}"
        return None

    @property
    def range(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.kind is str:
            return "letters, digits and . _ -, beginning with a letter or digit, at most 200" if self.pattern else "any text"
        if self.power_of_two:
            return ", ".join(str(v) for v in self._powers())
        what = "whole numbers" if self.multiple == 1 else f"multiples of {self.multiple}"
        return f"{what} from {self.low} to {self.high}" if self.high < 2**31 - 1 else f"{what} from {self.low}"

    def _powers(self) -> list[int]:
        return [1 << e for e in range(31) if self.low <= 1 << e <= self.high]

    def schema(self) -> dict[str, Any]:
        """JSON Schema of one value."""
        if self.choices:
            return {"enum": list(self.choices)}
        if self.kind is str:
            return {"type": "string"} | ({"pattern": f"^{self.pattern}$"} if self.pattern else {})
        if self.power_of_two:
            return {"enum": self._powers()}
        bounds = {"type": "integer", "minimum": self.low, "maximum": self.high}
        return bounds | ({"multipleOf": self.multiple} if self.multiple > 1 else {})


_KINDS = {int: "a whole number", str: "a text"}


def kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    words = {bool: "the truth value", str: "the text", float: "the number", int: "the number", list: "the list", dict: "the mapping"}
    return words.get(type(value), f"the {type(value).__name__}")


def show(value: Any) -> str:
    """``repr``, cut to a length that fits in a message."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        return "a number of thousands of digits"


def nearest(word: Any, words: Any) -> str:
    near = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _whole(help: str, *, default: Any = MISSING, **rule: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(help, **rule)})


def _text(help: str, *, default: Any = MISSING, **rule: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(help, kind=str, **rule)})


class _Checked:
    """A frozen dataclass that checks each field by its rule when it is made."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, rule in rules(type(self)).items():
            fault = rule.fault(getattr(self, name))
            if fault:
                raise SpecError(fault, field=f"{self.prefix}{name}")


@cache
def rules(cls: type) -> dict[str, Rule]:
    return {f.name: f.metadata["rule"] for f in fields(cls) if "rule" in f.metadata}


@dataclass(frozen=True)
class Heads(_Checked):
    """Numbers of heads; ``query`` is a multiple of ``kv`` (checked by Spec)."""

    prefix: ClassVar[str] = "heads."
    query: int = _whole("query heads", high=4096, tag="query")
    kv: int = _whole("key/value heads; divides the query heads: 1 is MQA, as many as query heads is MHA", high=4096, tag="kv")


@dataclass(frozen=True)
class HeadDim(_Checked):
    """Elements of a head: 16 is the least depth of a tensor-core tile, 256 what on-chip memory holds."""

    prefix: ClassVar[str] = "head_dim."
    qk: int = _whole("elements of a query or key head", low=16, high=256, multiple=16, tag="qk")
    v: int = _whole("elements of a value head", low=16, high=256, multiple=16, tag="v")


@dataclass(frozen=True)
class Compression(_Checked):
    """How keys and values are pooled (eq. 7): token j of the compressed branch is φ of tokens ``[j*stride, j*stride + block)``.

    ``block`` is at least 8: the branch attends to 1/stride of the tokens and with shorter blocks saves little over full attention.
    """

    prefix: ClassVar[str] = "compression."
    block: int = _whole("tokens pooled into one (l); a multiple of stride, at most selection.block", low=8, high=128, tag="cmp_block")
    stride: int = _whole("tokens between two pooled blocks (d); divides block", high=128, power_of_two=True, tag="cmp_stride")
    pooling: str = _text("φ, how a block becomes one token", choices=POOLINGS, tag="")
    hidden: int | None = _whole(
        "width of the mlp's hidden layer; without it the head dim",
        default=None,
        low=16,
        high=1024,
        multiple=16,
        optional=True,
        tag="hidden",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.stride:
            divisors = [1 << e for e in range(8) if self.block % (1 << e) == 0]
            raise SpecError(
                f"compression.block ({self.block}) must be a multiple of it, so that blocks overlap by whole strides: "
                + allowed(self.stride, divisors),
                field="compression.stride",
            )
        if self.hidden is not None and self.pooling != "mlp":
            raise SpecError(f"only pooling mlp has a hidden layer, pooling is {self.pooling}: remove it", field="compression.hidden")


@dataclass(frozen=True)
class Selection(_Checked):
    """Which blocks the selected branch reads (eqs. 9-12): ``count`` blocks of ``block`` tokens, ``initial`` and ``local`` ones always."""

    prefix: ClassVar[str] = "selection."
    block: int = _whole("tokens of a selection block (l')", low=16, high=128, power_of_two=True, tag="slc_block")
    count: int = _whole("blocks a query reads (n), the initial and local ones counted in", high=64, tag="slc_count")
    initial: int = _whole("first blocks of a sequence that are always read", low=0, high=64, tag="initial")
    local: int = _whole("blocks up to the query's own that are always read", low=0, high=64, tag="local")
    mapping: str = _text(
        "how compressed probabilities count for selection blocks (eq. 9): overlap, or literal for the paper's indices read 0-based",
        default="overlap",
        choices=MAPPINGS,
        tag="",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < self.initial + self.local:
            raise SpecError(
                f"got {self.count}, allowed: whole numbers from {self.initial + self.local} to 64, "
                f"because {self.initial} initial and {self.local} local blocks count in it",
                field="selection.count",
            )


@dataclass(frozen=True)
class TuneShape(_Checked):
    """A shape to tune for: ``batch`` sequences of ``seqlen`` tokens."""

    prefix: ClassVar[str] = "tune.shapes."
    batch: int = _whole("sequences")
    seqlen: int = _whole("tokens a sequence")


SECTIONS: dict[str, type] = {"heads": Heads, "head_dim": HeadDim, "compression": Compression, "selection": Selection}


@dataclass(frozen=True)
class Spec(_Checked):
    """One geometry of Native Sparse Attention, with a name and the shapes worth tuning for.

    Args:
        name: in tables, generated packages and on the command line.
        description: one line for people.
        heads, head_dim, compression, selection: see their classes.
        window: keys a query of the sliding branch sees, itself included (w).
        dtype: ``bfloat16``, ``float16`` or ``float32``: of q, k, v and the outputs.
        kv: ``shared``: one K and V for all branches; ``per_branch``: three (the paper's 3.3.3).
        tune: shapes to tune for; they do not bound what the kernels take.

    ``key`` (str) holds the numbers and choices that decide results, as operators pass them on.

    Raises:
        SpecError: a value is not allowed or the shape is impossible; ``field`` says which.
    """

    name: str = _text("name of the spec", pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
    description: str = _text("one line for people")
    heads: Heads
    head_dim: HeadDim
    compression: Compression
    selection: Selection
    window: int = _whole("keys a query of the sliding branch sees, itself included (w)", tag="window")
    dtype: str = _text("element type of q, k, v and the outputs", choices=DTYPES, tag="")
    kv: str = _text(
        "shared: one K and V for the three branches; per_branch: one each (the paper's 3.3.3)", default="shared", choices=KV, tag=""
    )
    tune: tuple[TuneShape, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, cls in SECTIONS.items():
            if not isinstance(getattr(self, name), cls):
                raise SpecError(f"must be a {cls.__name__}, got {kind_of(getattr(self, name))}; from_dict() takes mappings", field=name)
        if not isinstance(self.tune, (tuple, list)) or not all(isinstance(shape, TuneShape) for shape in self.tune):
            raise SpecError(f"must be a tuple of TuneShape, got {show(self.tune)}", field="tune")
        object.__setattr__(self, "tune", tuple(self.tune))
        heads, compression, selection = self.heads, self.compression, self.selection
        if heads.query % heads.kv:
            raise SpecError(
                f"every KV head must serve equally many query heads: got {heads.query} for {heads.kv} KV heads, "
                f"allowed: multiples of {heads.kv}, e.g. {max(heads.query // heads.kv, 1) * heads.kv}",
                field="heads.query",
            )
        if selection.block % compression.stride:
            raise SpecError(
                f"must divide selection.block ({selection.block}), so that a selection block holds whole strides: "
                + allowed(compression.stride, [1 << e for e in range(8) if 1 << e <= selection.block]),
                field="compression.stride",
            )
        if compression.block > selection.block:
            raise SpecError(
                f"a compressed block must not be longer than a selection block, else its weight spreads over more than two: "
                f"got {compression.block}, allowed: multiples of {compression.stride} up to {selection.block}",
                field="compression.block",
            )
        dim, c, s = self.head_dim, compression, selection
        numbers = (heads.query, heads.kv, dim.qk, dim.v, c.block, c.stride, c.hidden or 0, s.block, s.count, s.initial, s.local)
        object.__setattr__(self, "key", " ".join(map(str, (*numbers, self.window, c.pooling, s.mapping))))  # read on every call

    @property
    def group(self) -> int:
        """Query heads a KV head serves (G)."""
        return self.heads.query // self.heads.kv

    @property
    def geometry_digest(self) -> str:
        """12 hex digits over everything but name, description and tune: specs of equal geometry share tuned rows."""
        data = self.to_dict()
        for name in ("schema", "name", "description", "tune"):
            data.pop(name, None)
        if self.compression.pooling == "mlp" and self.head_dim.qk == self.head_dim.v:
            data["compression"].setdefault("hidden", self.head_dim.qk)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """The spec of a mapping shaped like a spec file, without lists in geometry fields (``spec.expand`` takes those).

        Raises:
            SpecError: unknown, missing or wrong fields, or an impossible shape.
        """
        data = _known(data, ("schema", *(f.name for f in fields(cls))), "")
        if type(data.get("schema")) is not int or data["schema"] != SCHEMA:
            given = f"got {show(data['schema'])}" if "schema" in data else "missing"
            raise SpecError(f"{given}, allowed: {SCHEMA} (the version of the format of spec files)", field="schema")
        values = {name: value for name, value in data.items() if name != "schema"}
        values.setdefault("description", "")
        _complete(cls, values, "")
        for name, section in SECTIONS.items():
            values[name] = _section(section, values[name], name)
        tune = _known(values.get("tune", {}), ("shapes",), "tune")
        shapes = tune.get("shapes", [])
        if not isinstance(shapes, (list, tuple)):
            raise SpecError(f"must be a list of {{batch, seqlen}}, got {kind_of(shapes)} {show(shapes)}", field="tune.shapes")
        values["tune"] = tuple(_section(TuneShape, shape, f"tune.shapes[{i}]") for i, shape in enumerate(shapes))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, lists, texts and numbers, shaped like a spec file; ``from_dict`` takes it back."""
        data: dict[str, Any] = {"schema": SCHEMA} | dataclasses.asdict(self)
        data["tune"] = {"shapes": [dataclasses.asdict(shape) for shape in self.tune]}
        if self.compression.hidden is None:
            del data["compression"]["hidden"]
        return data

    def replace(self, **changes: Any) -> Spec:
        """A copy with changes, checked again: fields, sections (whole or the part of a mapping) or dotted fields.

        ``spec.replace(window=256, selection={"count": 8})``, ``spec.replace(**{"selection.count": 8, "selection.local": 1})``.

        Raises:
            SpecError: unknown or wrong fields, or an impossible shape.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in changes.items():
            head, _, tail = name.partition(".")
            if head not in values or (tail and head not in SECTIONS):
                raise SpecError(f"unknown field, allowed: {', '.join(values)}{nearest(name, [*values, *SWEEPABLE])}", field=name)
            part = {tail: value} if tail else value
            if head in SECTIONS and isinstance(part, Mapping):
                old = values[head] if isinstance(values[head], Mapping) else dataclasses.asdict(values[head])
                part = {**old, **part}
            values[head] = part
        for name, cls in SECTIONS.items():
            if isinstance(values[name], Mapping):
                values[name] = _section(cls, values[name], name)
        return Spec(**values)


def _sweepable() -> Iterator[tuple[str, Rule]]:
    for f in fields(Spec):
        cls = SECTIONS.get(f.name)
        found = {f"{f.name}.{name}": rule for name, rule in rules(cls).items()} if cls else {f.name: f.metadata.get("rule")}
        yield from ((name, rule) for name, rule in found.items() if rule is not None and rule.tag is not None)


#: Fields that a sweep may list, with their rules, in the order of a spec file.
SWEEPABLE: dict[str, Rule] = dict(_sweepable())


def _known(data: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """``data`` if it is a mapping of known keys."""
    if not isinstance(data, Mapping):
        raise SpecError(f"must be a mapping with {', '.join(names)}; got {kind_of(data)} {show(data)}", field=where or None)
    for key in data:
        if key not in names:
            dotted = f"{where}.{key}" if where else str(key)
            raise SpecError(f"unknown key, allowed: {', '.join(names)}{nearest(key, names)}", field=dotted)
    return dict(data)


def _complete(cls: type, values: dict[str, Any], where: str) -> None:
    for f in fields(cls):
        if f.name not in values and f.default is MISSING:
            rule = f.metadata.get("rule")
            wanted = f"; allowed: {rule.range}" if rule else f"; it holds {', '.join(x.name for x in fields(SECTIONS[f.name]))}"
            raise SpecError(f"missing{wanted}", field=f"{where}.{f.name}" if where else f.name)


def _section(cls: type, data: Any, where: str) -> Any:
    values = _known(data, tuple(f.name for f in fields(cls)), where)
    _complete(cls, values, where)
    try:
        return cls(**values)
    except SpecError as error:  # tune.shapes.seqlen -> tune.shapes[2].seqlen
        name = (error.field or "").rpartition(".")[2]
        raise SpecError(error.message, field=f"{where}.{name}") from None
