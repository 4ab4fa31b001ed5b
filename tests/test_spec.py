"""Specs: rules of one field and between fields, spec files, sweeps, digests, the JSON Schema."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nsa_gen import config, paths, spec
from nsa_gen.errors import SpecError
from nsa_gen.geometry import SWEEPABLE
from nsa_gen.spec import Compression, HeadDim, Heads, Selection, Spec, TuneShape

BASE = {
    "schema": 1,
    "name": "base",
    "heads": {"query": 8, "kv": 2},
    "head_dim": {"qk": 64, "v": 64},
    "compression": {"block": 32, "stride": 16, "pooling": "mean"},
    "selection": {"block": 64, "count": 16, "initial": 1, "local": 2},
    "window": 512,
    "dtype": "bfloat16",
}
SHIPPED = ("gqa-d256", "gqa16-d128", "gqa4-d128", "gqa5-d128", "gqa8-d64", "mha-d128", "nsa-paper", "tiny")


def changed(**dotted) -> dict:
    """BASE with ``compression__block=…`` changes; DROP removes."""
    data = copy.deepcopy(BASE)
    for name, value in dotted.items():
        *sections, last = name.split("__")
        part = data
        for section in sections:
            part = part.setdefault(section, {})
        if value is DROP:
            del part[last]
        else:
            part[last] = value
    return data


DROP = object()


def write(folder: Path, text: str, name: str = "base.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def dump(folder: Path, data: dict, name: str = "base.yaml") -> Path:
    return write(folder, yaml.safe_dump(data, sort_keys=False), name)


# --- one field, fields together ------------------------------------------------------------------------------------------------


def test_from_dict_and_defaults():
    made = Spec.from_dict(BASE)
    assert made == Spec(
        name="base",
        description="",
        heads=Heads(8, 2),
        head_dim=HeadDim(64, 64),
        compression=Compression(32, 16, "mean"),
        selection=Selection(64, 16, 1, 2, "overlap"),
        window=512,
        dtype="bfloat16",
        kv="shared",
        tune=(),
    )
    assert made.group == 4
    assert hash(made) == hash(Spec.from_dict(BASE))


@pytest.mark.parametrize(
    ("change", "field", "parts"),
    [
        (dict(heads__query=0), "heads.query", ["got 0", "whole numbers from 1"]),
        (dict(heads__query=10, heads__kv=4), "heads.query", ["got 10 for 4 KV heads", "multiples of 4"]),
        (dict(heads__kv="two"), "heads.kv", ["whole number", "'two'"]),
        (dict(heads__kv=True), "heads.kv", ["truth value True"]),
        (dict(heads=3), "heads", ["mapping", "query, kv", "3"]),
        (dict(head_dim__qk=72), "head_dim.qk", ["got 72", "multiples of 16 from 16 to 256"]),
        (dict(head_dim__v=272), "head_dim.v", ["got 272", "16 to 256"]),
        (dict(compression__stride=12), "compression.stride", ["got 12", "1, 2, 4, 8, 16"]),
        (dict(compression__block=40), "compression.stride", ["compression.block (40)", "got 16", "1, 2, 4, 8"]),
        (dict(compression__block=4, compression__stride=4), "compression.block", ["got 4", "8 to 128"]),
        (dict(compression__block=128), "compression.block", ["got 128", "up to 64", "selection block"]),
        (dict(compression__stride=32, selection__block=16), "compression.stride", ["selection.block (16)", "got 32"]),
        (dict(compression__pooling="mlpp"), "compression.pooling", ["'mlpp'", "mean, weighted, linear, mlp", "did you mean 'mlp'?"]),
        (dict(compression__hidden=64), "compression.hidden", ["mlp", "mean", "remove"]),
        (dict(compression__pooling="mlp", compression__hidden=20), "compression.hidden", ["got 20", "multiples of 16 from 16 to 1024"]),
        (dict(selection__block=48), "selection.block", ["got 48", "16, 32, 64, 128"]),
        (dict(selection__block=256), "selection.block", ["got 256", "16, 32, 64, 128"]),
        (dict(selection__count=65), "selection.count", ["got 65", "1 to 64"]),
        (dict(selection__count=2), "selection.count", ["got 2", "from 3 to 64", "1 initial and 2 local"]),
        (dict(selection__initial=-1), "selection.initial", ["got -1", "0 to 64"]),
        (dict(selection__mapping="paper"), "selection.mapping", ["'paper'", "overlap, literal"]),
        (dict(window=0), "window", ["got 0", "from 1"]),
        (dict(window=2**31), "window", ["got 2147483648"]),
        (dict(window=10**5000), "window", ["thousands of digits", "from 1"]),
        (dict(heads=10**5000), "heads", ["mapping"]),
        (dict(schema=10**5000), "schema", ["allowed: 1"]),
        (dict(window=512.0), "window", ["whole number", "512.0"]),
        (dict(window=None), "window", ["got nothing"]),
        (dict(window=[256, 512]), "window", ["spec.expand()"]),
        (dict(dtype="bf16"), "dtype", ["'bf16'", "bfloat16, float16, float32"]),
        (dict(kv="per-branch"), "kv", ["shared, per_branch", "did you mean 'per_branch'?"]),
        (dict(name="a b"), "name", ["'a b'", "letters, digits"]),
        (dict(name=7), "name", ["a text", "7"]),
        (dict(description=7), "description", ["a text", "7"]),
        (dict(schema=2), "schema", ["got 2", "allowed: 1"]),
        (dict(schema=True), "schema", ["got True"]),
        (dict(schema=DROP), "schema", ["missing", "allowed: 1"]),
        (dict(window=DROP), "window", ["missing", "whole numbers from 1"]),
        (dict(heads=DROP), "heads", ["missing", "query, kv"]),
        (dict(heads__kv=DROP), "heads.kv", ["missing"]),
        (dict(windw=3), "windw", ["unknown key", "did you mean 'window'?"]),
        (dict(selection__blocks=3), "selection.blocks", ["unknown key", "did you mean 'block'?"]),
        (dict(tune=[1]), "tune", ["mapping", "shapes"]),
        (dict(tune__shapes={}), "tune.shapes", ["list of {batch, seqlen}"]),
        (dict(tune__shapes=[{"batch": 1, "seqlen": 8}, {"batch": 1}]), "tune.shapes[1].seqlen", ["missing"]),
        (dict(tune__shapes=[{"batch": 0, "seqlen": 8}]), "tune.shapes[0].batch", ["got 0"]),
        (dict(tune__shapes=[3]), "tune.shapes[0]", ["mapping", "batch, seqlen"]),
    ],
)  # fmt: skip
def test_errors_name_field_value_and_what_is_allowed(change, field, parts):
    with pytest.raises(SpecError) as caught:
        Spec.from_dict(changed(**change))
    assert caught.value.field == field
    assert "\n" not in str(caught.value) and str(caught.value).startswith(field)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("data", [None, 3, "text", [BASE], {1: 2}, {}])
def test_what_is_no_spec_at_all(data):
    with pytest.raises(SpecError):
        Spec.from_dict(data)


@pytest.mark.parametrize(
    "change",
    [
        dict(heads__query=40, heads__kv=8),
        dict(heads__query=1, heads__kv=1),
        dict(head_dim__qk=112, head_dim__v=16),
        dict(compression__block=48),
        dict(compression__block=16),
        dict(compression__block=64, selection__block=64),
        dict(compression__stride=1),
        dict(selection__count=1, selection__initial=0, selection__local=1),
        dict(selection__count=1, selection__initial=0, selection__local=0),
        dict(selection__count=64),
        dict(window=1),
        dict(compression__pooling="mlp", compression__hidden=512),
    ],
)
def test_edges_that_are_legal(change):
    made = Spec.from_dict(changed(**change))
    assert config.problems(made)


def test_construction_checks_too():
    made = Spec.from_dict(BASE)
    with pytest.raises(SpecError, match="must be a Heads"):
        made.replace(heads=(8, 2))
    with pytest.raises(SpecError, match="TuneShape"):
        made.replace(tune=({"batch": 1, "seqlen": 8},))
    with pytest.raises(SpecError, match=r"selection\.block.*got 20"):
        Selection(20, 4, 0, 0)
    with pytest.raises(AttributeError):
        made.window = 3
    assert made.replace(tune=[TuneShape(1, 8)]).tune == (TuneShape(1, 8),)


def test_replace():
    made = Spec.from_dict(BASE)
    assert made.replace(window=3, name="other").window == 3
    assert made.replace(heads=Heads(4, 4)).group == 1
    assert made.replace(selection={"count": 8}).selection == Selection(64, 8, 1, 2)
    both = made.replace(**{"compression.stride": 64, "compression.block": 64})  # neither alone is legal
    assert both.compression == Compression(64, 64, "mean")
    assert made.replace() == made
    with pytest.raises(SpecError, match=r"selection\.cnt.*did you mean 'count'"):
        made.replace(**{"selection.cnt": 3})
    with pytest.raises(SpecError, match=r"unknown field.*did you mean 'window'"):
        made.replace(windows=3)
    with pytest.raises(SpecError, match="unknown field"):
        made.replace(**{"tune.shapes": []})
    with pytest.raises(SpecError, match=r"heads\.query"):
        made.replace(heads={"kv": 3})


# --- digest --------------------------------------------------------------------------------------------------------------------


def test_digest_is_of_the_geometry_alone():
    made = Spec.from_dict(BASE)
    same = made.replace(name="other", description="text", tune=(TuneShape(1, 4096),))
    assert made.geometry_digest == same.geometry_digest
    assert len(made.geometry_digest) == 12 and int(made.geometry_digest, 16) >= 0
    others = [
        made.replace(**{name: value})
        for name, value in {
            "heads.query": 16, "heads.kv": 4, "head_dim.qk": 80, "head_dim.v": 80, "compression.block": 16, "compression.stride": 8,
            "compression.pooling": "mlp", "selection.block": 32, "selection.count": 8, "selection.initial": 0, "selection.local": 1,
            "selection.mapping": "literal", "window": 256, "dtype": "float16", "kv": "per_branch",
        }.items()
    ]  # fmt: skip
    assert len({s.geometry_digest for s in [made, *others]}) == 16
    assert len(SWEEPABLE) == 16  # these and compression.hidden


def test_digest_knows_the_hidden_width_that_is_meant():
    mlp = Spec.from_dict(changed(compression__pooling="mlp"))
    assert mlp.geometry_digest == mlp.replace(**{"compression.hidden": 64}).geometry_digest
    assert mlp.geometry_digest != mlp.replace(**{"compression.hidden": 128}).geometry_digest


# --- files ---------------------------------------------------------------------------------------------------------------------


def test_shipped_specs():
    assert set(SHIPPED) <= set(spec.names()) and spec.names() == sorted(spec.names())
    for name in spec.names():
        made = spec.load(name)
        assert made.name == name and made.description and made.tune
        assert Spec.from_dict(made.to_dict()) == made
        assert (paths.specs() / f"{name}.yaml").read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=spec.schema.json\n")
    assert len({spec.load(name).geometry_digest for name in spec.names()}) == len(spec.names())


def test_the_paper():
    made = spec.load("nsa-paper")
    assert (made.heads, made.head_dim, made.group) == (Heads(64, 4), HeadDim(192, 128), 16)
    assert made.compression == Compression(32, 16, "mlp") and made.selection == Selection(64, 16, 1, 2) and made.window == 512
    assert (made.kv, made.dtype) == ("per_branch", "bfloat16")
    assert [(s.batch, s.seqlen) for s in made.tune] == [(1, 4096 * 2**i) for i in range(6)]


def test_load_takes_name_path_and_spec(tmp_path):
    made = Spec.from_dict(BASE)
    assert spec.load(made) is made
    path = dump(tmp_path, BASE)
    assert spec.load(path) == spec.load(str(path)) == spec.load(tmp_path / "base") == made
    assert spec.load("tiny") is spec.load("tiny")
    assert spec.expand("tiny") == [spec.load("tiny")]


def test_a_changed_file_is_read_again(tmp_path):
    path = str(dump(tmp_path, BASE))
    assert spec.load(path).window == 512
    dump(tmp_path, changed(window=1024))
    assert spec.load(path).window == 1024


@pytest.mark.parametrize("source", ["nsa-papr", "", "no/such.yaml", "/", ".", "a\0b", "nsa-paper.yaml"])
def test_unknown_specs(source):
    with pytest.raises(SpecError) as caught:
        spec.load(source)
    assert repr(source) in str(caught.value)
    if "/" not in source and source not in (".", "nsa-paper.yaml"):
        assert "nsa-paper" in str(caught.value)


def test_unknown_names_suggest_the_nearest(tmp_path):
    with pytest.raises(SpecError, match="did you mean 'nsa-paper'"):
        spec.load("nsa_paper")
    dump(tmp_path, BASE)
    with pytest.raises(SpecError, match=r"no such file.*did you mean 'base'"):
        spec.load(tmp_path / "bas.yaml")


@pytest.mark.parametrize("source", [None, 3, b"tiny", ["tiny"]])
def test_sources_of_a_wrong_kind(source):
    with pytest.raises(SpecError, match="name, path or"):
        spec.load(source)


TEXT = yaml.safe_dump(BASE, sort_keys=False)


@pytest.mark.parametrize(
    ("text", "line", "part"),  # line 9 is compression, 18 the window
    [
        ("", None, "empty"),
        ("# only a comment\n", None, "empty"),
        ("- 1\n- 2\n", 1, "mapping"),
        ("text\n", 1, "mapping"),
        (TEXT.replace("window: 512", "window: [512"), 19, "bad YAML"),
        (TEXT.replace("name: base", "name: a: b"), 2, "needs quotes"),
        (TEXT.replace("name: base", "\tname: base"), 2, "bad YAML"),
        (TEXT + "---\n" + TEXT, 20, "single document"),
        (TEXT + "window: 256\n", 20, "twice"),
        (TEXT.replace("  stride: 16\n", "  stride: 16\n  stride: 16\n"), 12, "compression.stride: the key is there twice"),
        (TEXT.replace("name: base", "name: base\nwindw: 5"), 3, "did you mean 'window'?"),
        (TEXT.replace("  stride: 16", "  strid: 16"), 11, "did you mean 'stride'?"),
        (TEXT.replace("  stride: 16", "  stride: 12"), 11, "compression.stride: got 12"),
        (TEXT.replace("  stride: 16\n", ""), 9, "compression.stride: missing"),
        (TEXT.replace("window: 512", "window: 2024-13-45"), 18, "bad YAML"),
        (TEXT.replace("window: 512", "window: 2024-01-02"), 18, "whole number"),
        (TEXT.replace("window: 512", "window: 0x200000000"), 18, "got 8589934592"),
        (TEXT.replace("window: 512", "window: " + "9" * 5000), 18, "window"),
        (TEXT.replace("window: 512", "window: !!python/object:os.system 3"), 18, "bad YAML"),
        (TEXT.replace("window: 512", "? [1, 2]\n: 3"), 18, "a key must be a text"),
        (TEXT.replace("window: 512", "window: &a [*a]"), 18, "holds itself"),
        (TEXT.replace("window: 512", "window: *nowhere"), 18, "bad YAML"),
        (TEXT.replace("window: 512", "window: !!binary x"), 18, "bad YAML"),
        (TEXT.replace("window: 512", "window:\n  - 256\n  - 0\n"), 20, "window[1]: got 0"),
        (TEXT + "tune:\n  shapes:\n    - {batch: 1, seqlen: 8}\n    - batch: 1\n      seqlen: x\n", 24, "tune.shapes[1].seqlen"),
        (TEXT.replace("name: base", "name: no"), 2, "a text"),
        ("a: " + "[" * 1500, None, "bad YAML"),
        ("a: \x01", None, "bad YAML"),
    ],
    ids=itertools.count(),
)
def test_files_that_are_wrong(tmp_path, text, line, part):
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        spec.load(path)
    message = str(caught.value)
    assert caught.value.file == str(path) and caught.value.line == line, message
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ") and part in message and "\n" not in message
    assert len(message) < 600


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_bytes(b"name: \xff\xfe\xff")
    with pytest.raises(SpecError, match="bad YAML"):
        spec.load(path)
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(SpecError):
        spec.load(folder)


def test_aliases_do_not_explode(tmp_path):
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(SpecError, match="unknown key"):
        spec.load(write(tmp_path, "\n".join(rows)))


def test_aliases_work(tmp_path):
    path = write(tmp_path, TEXT.replace("qk: 64", "qk: &dim 64").replace("v: 64", "v: *dim"))
    assert spec.load(path).head_dim == HeadDim(64, 64)


# --- sweeps --------------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_product(tmp_path):
    data = changed(window=[256, 512], selection__count=[8, 16], compression__pooling=["mean", "mlp"], kv=["shared"])
    path = dump(tmp_path, data)
    found = spec.expand(path)
    assert [s.name for s in found] == [
        f"base-{p}-slc_count{n}-window{w}-shared" for p, n, w in itertools.product(["mean", "mlp"], [8, 16], [256, 512])
    ]
    assert {(s.compression.pooling, s.selection.count, s.window) for s in found} == {
        *itertools.product(["mean", "mlp"], [8, 16], [256, 512])
    }
    assert len({s.geometry_digest for s in found}) == 8
    one = found[3]
    assert spec.load(tmp_path / one.name) == spec.load(str(tmp_path / f"{one.name}.yaml")) == one
    assert spec.expand(tmp_path / one.name) == [one]
    with pytest.raises(SpecError, match="sweep of 8 specs: name one of base-mean-slc_count8-window256-shared"):
        spec.load(path)


def test_a_sweep_in_the_shipped_folder_goes_by_its_members_names(tmp_path, monkeypatch):
    dump(tmp_path, changed(name="swept", window=[256, 512]), "swept.yaml")
    write(tmp_path, "broken: [", "broken.yaml")
    monkeypatch.setattr(paths, "specs", lambda: tmp_path)
    assert spec.names() == ["broken", "swept-window256", "swept-window512"]
    assert spec.load("swept-window512").window == 512
    with pytest.raises(SpecError, match="did you mean 'swept-window256'"):
        spec.load("swept-window255")
    with pytest.raises(SpecError, match="bad YAML"):
        spec.load("broken")
    with pytest.raises(SpecError, match="sweep of 2 specs"):
        spec.load("swept")


@pytest.mark.parametrize(
    ("change", "field", "part"),
    [
        (dict(window=[]), "window", "empty list"),
        (dict(window=[256, 256]), "window[1]", "twice"),
        (dict(window=[256, "x"]), "window[1]", "whole number"),
        (dict(window=[256, True]), "window[1]", "truth value"),
        (dict(window=[256, None]), "window[1]", "missing"),
        (dict(window=[[256]]), "window[0]", "list"),
        (dict(compression__block=[32, 128]), "compression.block", "in base-cmp_block128, one of 2"),
        (dict(compression__block=[32], name=3), "name", "a text"),
        (dict(window=list(range(1, 514))), "window", "513 specs, allowed: at most 512"),
        (dict(window=[1, 2], name="n" * 195), "name", "at most 200"),
        (dict(window=[1, 2], name=DROP), "name", "missing"),
    ],
)
def test_sweeps_that_are_wrong(change, field, part):
    with pytest.raises(SpecError) as caught:
        spec.expand_dict(changed(**change))
    assert caught.value.field == field and part in str(caught.value)


VALUES = {
    "heads.query": [8, 16, 40], "heads.kv": [1, 2, 4, 8], "head_dim.qk": [16, 80, 192], "compression.stride": [4, 8, 16],
    "compression.pooling": list(spec.POOLINGS), "selection.block": [32, 64, 128], "selection.count": [3, 8, 64],
    "window": [1, 64, 512], "dtype": list(spec.DTYPES), "kv": list(spec.KV), "selection.mapping": list(spec.MAPPINGS),
}  # fmt: skip


@given(st.fixed_dictionaries({}, optional={k: st.lists(st.sampled_from(v), min_size=1, unique=True) for k, v in VALUES.items()}))
def test_any_sweep_has_the_products_members(lists):
    data = changed(**{name.replace(".", "__"): values for name, values in lists.items()})
    before, size = copy.deepcopy(data), math.prod(map(len, lists.values()))
    if size > spec.MAX_SWEEP:
        with pytest.raises(SpecError, match="at most"):
            spec.expand_dict(data)
        return
    found = spec.expand_dict(data)
    assert data == before
    assert len(found) == len({s.name for s in found}) == len({s.geometry_digest for s in found}) == size
    for made in found:
        for name, values in lists.items():
            value = made
            for part in name.split("."):
                value = getattr(value, part)
            assert value in values


# --- properties ----------------------------------------------------------------------------------------------------------------


@st.composite
def specs(draw) -> Spec:
    pick, up_to = (lambda *values: draw(st.sampled_from(values))), (lambda low, high: draw(st.integers(low, high)))
    block, kv, pooling = pick(16, 32, 64, 128), up_to(1, 8), pick(*spec.POOLINGS)
    stride = pick(*[1 << e for e in range(8) if 1 << e <= block])
    initial, local = up_to(0, 4), up_to(0, 4)
    return Spec(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        description=draw(st.text(max_size=20)),
        heads=Heads(kv * up_to(1, 20), kv),
        head_dim=HeadDim(16 * up_to(1, 16), 16 * up_to(1, 16)),
        compression=Compression(
            stride * up_to(-(-8 // stride), block // stride),
            stride,
            pooling,
            16 * up_to(1, 64) if pooling == "mlp" and up_to(0, 1) else None,
        ),
        selection=Selection(block, up_to(max(initial + local, 1), 64), initial, local, pick(*spec.MAPPINGS)),
        window=up_to(1, 2**31 - 1),
        dtype=pick(*spec.DTYPES),
        kv=pick(*spec.KV),
        tune=tuple(TuneShape(up_to(1, 64), up_to(1, 2**20)) for _ in range(up_to(0, 3))),
    )


@given(specs())
def test_round_trip(made):
    data = made.to_dict()
    assert Spec.from_dict(data) == made == spec.expand_dict(data)[0]
    assert Spec.from_dict(json.loads(json.dumps(data))) == made
    assert Spec.from_dict(data).geometry_digest == made.geometry_digest
    assert len({p.digest for p in config.problems(made)}) == len(config.problems(made))


@given(specs())
def test_round_trip_through_a_file(tmp_path_factory, made):
    path = dump(tmp_path_factory.mktemp("specs"), made.to_dict())
    assert spec.load(path) == made


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers() | st.none(), inner, max_size=3),
    max_leaves=8,
)


@given(anything)
def test_anything_is_a_spec_error(data):
    with pytest.raises(SpecError):
        spec.expand_dict(data)


@given(st.dictionaries(st.sampled_from([*SWEEPABLE, "schema", "name", "description", "tune", "heads", "selection"]), anything, min_size=1))
def test_anything_in_a_spec_is_a_spec_error_or_a_spec(changes):
    data = copy.deepcopy(BASE)
    for name, value in changes.items():
        head, _, tail = name.partition(".")
        if tail and isinstance(data[head], dict):
            data[head][tail] = value
        else:
            data[head] = value
    try:
        assert all(isinstance(made, Spec) for made in spec.expand_dict(data))
    except SpecError as error:
        assert error.field is not None and "\n" not in str(error)


@given(text=st.text(max_size=40), at=st.integers(0, len(TEXT)), drop=st.integers(0, 10))
def test_any_edit_of_a_file_is_a_spec_error_or_a_spec(tmp_path_factory, text, at, drop):
    path = tmp_path_factory.mktemp("specs") / "base.yaml"
    path.write_bytes((TEXT[:at] + text + TEXT[at + drop :]).encode("utf-8", "surrogatepass"))
    try:
        assert spec.expand(path)
    except SpecError as error:
        assert error.file == str(path)


# --- JSON Schema ---------------------------------------------------------------------------------------------------------------


def test_json_schema_file_is_current(update_goldens):
    path = paths.specs() / "spec.schema.json"
    text = json.dumps(spec.json_schema(), indent=2) + "\n"
    if update_goldens:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "run pytest tests/test_spec.py --update-goldens"


def test_json_schema_agrees_with_the_rules():
    jsonschema = pytest.importorskip("jsonschema")
    schema = spec.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in spec.names():
        validator.validate(yaml.safe_load((paths.specs() / f"{name}.yaml").read_text(encoding="utf-8")))
    for change in (dict(window=[256, 512]), dict(compression__pooling="mlp", compression__hidden=64), dict(tune__shapes=[])):
        validator.validate(changed(**change))
    wrong = [
        dict(window=0), dict(window=[]), dict(window=[1, 1]), dict(window="x"), dict(windw=1), dict(heads__kv=DROP), dict(schema=2),
        dict(name="a b"), dict(dtype="bf16"), dict(selection__block=48), dict(head_dim__qk=72), dict(compression__hidden=20),
        dict(tune__shapes=[{"batch": 1}]), dict(compression__stride=3), dict(heads=3), dict(tune=3), dict(selection__x=1),
    ]  # fmt: skip
    for change in wrong:
        assert not validator.is_valid(changed(**change)), change
        with pytest.raises(SpecError):
            spec.expand_dict(changed(**change))
