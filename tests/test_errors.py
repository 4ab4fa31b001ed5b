"""What a user meets when something around a call is wrong: each operator's arguments, tables, caches, devices."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_gen
from nsa_gen import errors, kernels, lookup, paths
from nsa_gen.errors import InputError, NotTuned, NSAError, SpecError
from nsa_gen.spec import load

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cpu" if kernels.default_device().backend == "cpu" else "cuda"
SPEC = load("tiny")
T, HQ, HKV, D, N = 40, 4, 2, 16, SPEC.selection.count
ROWS = T // SPEC.compression.stride


def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


#: Right arguments of each operator, by name.
GOOD = {
    "compress": {"x": made(T, HKV, D)},
    "compressed_attention": {"q": made(T, HQ, D), "k_cmp": made(ROWS, HKV, D), "v_cmp": made(ROWS, HKV, D)},
    "select_blocks": {"q": made(T, HQ, D), "k_cmp": made(ROWS, HKV, D), "lse": made(T, HQ)},
    "selected_attention": {
        "q": made(T, HQ, D), "k": made(T, HKV, D), "v": made(T, HKV, D), "block_indices": made(T, HKV, N, dtype=torch.int32) - 1,
    },
    "sliding_attention": {"q": made(T, HQ, D), "k": made(T, HKV, D), "v": made(T, HKV, D)},
    "combine": {name: made(T, HQ, D) for name in ("o_cmp", "o_slc", "o_swa")} | {name: made(T, HQ) for name in ("g_cmp", "g_slc", "g_swa")},
}  # fmt: skip
#: What is done to an argument; the message must name it.
FAULTS = {
    "no tensor": lambda x: [0.0],
    "rank": lambda x: x[0, 0],
    "dtype": lambda x: x.to(torch.complex64),
    "device": lambda x: x.to("meta"),
    "tokens": lambda x: x[:3],
    "heads": lambda x: torch.cat([x, x[:, :1]], 1),
    "last dim": lambda x: x[..., :-1],
}
#: The first argument of a call sets its device and tokens, and its heads where there are no others.
FREE = {(op, next(iter(arguments)), fault) for op, arguments in GOOD.items() for fault in ("device", "tokens")}
FREE |= {("compress", "x", "heads"), ("combine", "o_cmp", "heads")}
CASES = [case for op, arguments in GOOD.items() for name in arguments for fault in FAULTS if (case := (op, name, fault)) not in FREE]


def call(op: str, **arguments: object) -> object:
    return getattr(nsa_gen, op)(**GOOD[op] | ({} if op == "combine" else {"spec": SPEC}) | arguments)


@pytest.mark.parametrize("op", GOOD)
def test_right_arguments_are_taken(op):
    call(op)


@pytest.mark.parametrize(("op", "name", "fault"), CASES)
def test_a_wrong_argument_is_named(op, name, fault):
    with pytest.raises(InputError) as caught:
        call(op, **{name: FAULTS[fault](GOOD[op][name])})
    message = str(caught.value)
    assert name in message and "\n" not in message
    if fault == "dtype":
        assert "complex64" in message and "allowed" in message


@pytest.mark.parametrize("op", [op for op in GOOD if op != "combine"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": [0, T]}, "cu_seqlens must be an int32 tensor"),
        ({"cu_seqlens": torch.tensor([0, T])}, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "must have B \\+ 1 entries"),
        ({"cu_seqlens": torch.tensor([0, 9, 8, T], dtype=torch.int32)}, "not decrease"),
        ({"cu_seqlens": torch.tensor([0, T - 1], dtype=torch.int32)}, f"end at {T}"),
        ({"cu_seqlens": torch.tensor([0, T], dtype=torch.int32), "max_seqlen": -1}, "max_seqlen must be a whole number"),
        ({"max_seqlen": T - 1}, "leave it out"),
    ],
)
def test_sequences_are_checked_by_every_operator(op, arguments, message, monkeypatch):
    monkeypatch.setenv("NSA_GEN_DEBUG", "1")
    arguments = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(InputError, match=message):
        call(op, **arguments)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_scale_that_is_none(scale):
    with pytest.raises(InputError, match="scale must be a positive finite number"):
        call("sliding_attention", scale=scale)


def test_other_wrong_choices():
    with pytest.raises(InputError, match="which must be 'k' or 'v', got 'q'"):
        call("compress", which="q")
    with pytest.raises(InputError, match="multiple of 16 from 16 to 256, got 24"):
        nsa_gen.combine(*[made(T, HQ, 24)] * 3, *[made(T, HQ)] * 3)
    with pytest.raises(SpecError, match=r"no such spec: got 'tinny'.*tiny"):
        call("sliding_attention", spec="tinny")


def test_a_broken_spec_file_names_file_line_and_field(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((paths.specs() / "tiny.yaml").read_text().replace("window: 24", "window: wide"))
    with pytest.raises(SpecError, match=r"mine\.yaml:\d+: window: .*'wide'"):
        call("sliding_attention", spec=path)
    path.write_text("schema: 1\nname: [unclosed\n")
    with pytest.raises(SpecError, match=r"mine\.yaml:\d+: bad YAML"):
        call("sliding_attention", spec=str(path))


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder of tables of the test's own, and lookups that know nothing yet."""
    monkeypatch.setenv("NSA_GEN_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setattr(lookup, "_logged", set())
    kernels.clear()
    yield tmp_path / "tuned"
    kernels.clear()


def test_a_torn_table_costs_a_warning_and_no_result(tables, caplog):
    q, k = torch.randn(T, HQ, D, device=DEVICE), torch.randn(T, HKV, D, device=DEVICE)
    want = call("sliding_attention", q=q, k=k, v=k)
    kernels.clear()
    path = tables / kernels.default_device().slug / "sliding_attention_fwd.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, "rows": [{"conf')
    with caplog.at_level(logging.WARNING, "nsa_gen"):
        found = [call("sliding_attention", q=q, k=k, v=k) for _ in range(2)]
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, want, strict=True))
    assert sum(str(path) in record.getMessage() for record in caplog.records) == 1
    assert path.read_text().endswith("conf"), "nothing rewrites what it cannot read"


def test_strict_mode_reaches_the_operators(tables, monkeypatch):
    monkeypatch.setenv("NSA_GEN_STRICT", "1")
    with pytest.raises(NotTuned, match="nsa-gen tune SPEC --kernels sliding_attention_fwd"):
        call("sliding_attention")
    kernels.clear()
    monkeypatch.delenv("NSA_GEN_STRICT")
    call("sliding_attention")


def test_a_call_without_a_writable_cache_gives_the_same_bits(tmp_path):
    code = """
import torch, nsa_gen, sys
torch.manual_seed(0)
q, k = torch.randn(40, 4, 16), torch.randn(40, 2, 16)
torch.save(nsa_gen.sliding_attention(q, k, k, spec="tiny"), sys.argv[1])
"""
    (tmp_path / "blocked").write_text("a file where the folder would be")
    found = []
    for name in ("blocked", "cache"):
        env = os.environ | {"TRITON_INTERPRET": "1", "NSA_GEN_CACHE": str(tmp_path / name), "CUDA_VISIBLE_DEVICES": ""}
        out = tmp_path / f"{name}.pt"
        done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert (tmp_path / "blocked").read_text() and list((tmp_path / "cache" / "src").glob("sliding_attention_fwd_*.py"))


def test_every_error_is_one_family_and_says_what_it_is():
    mine = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, Exception)]
    assert len(mine) > 10 and all(issubclass(x, NSAError) and x.__doc__ for x in mine)
    used = "\n".join(path.read_text() for path in (ROOT / "nsa_gen").rglob("*.py") if path.name not in ("errors.py", "__init__.py"))
    assert not [x.__name__ for x in mine if x is not NSAError and f"{x.__name__}(" not in used], "an error that nothing raises"
