"""Compressed branch, backward: both ways to dq against the float64 reference, and compiled for every arch without a GPU."""

from __future__ import annotations

import ast
import json

import pytest
import torch
from gradient_cases import added, config, held, module, others_are_not_read, runs, strided

from nsa_gen import render, space
from nsa_gen.config import Problem
from nsa_gen.errors import ConfigError

RAGGED = (0, 37, 1, 70, 0, 7)
DQ = ("separate", "atomic")
MASKS = ("edges", "all")


def problem(dtype="float32", group=2, qk=16, v=16, block=8, stride=4, deterministic=False, varlen=True) -> Problem:
    key = {"dtype": dtype, "group": group, "head_dim_qk": qk, "head_dim_v": v, "block": block, "stride": stride}
    return Problem.of("compressed_attention_bwd", key | {"deterministic": deterministic, "varlen": varlen})


@runs
@pytest.mark.parametrize("dq", DQ)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 16])
def test_groups(group, dq):
    """Group members fill tiles in part and across tokens; sequences without a compressed token lie between."""
    p = problem(group=group)
    held(p, config(p, dq=dq), (0, 37, 1, 0, 26, 7) if group < 16 else (20, 7), heads=2 if group < 6 else 1)


@runs
@pytest.mark.parametrize("dq", DQ)
@pytest.mark.parametrize(("qk", "v"), [(80, 48), (48, 96), (192, 128)])
def test_head_dims(qk, v, dq):
    p = problem(qk=qk, v=v)
    held(p, config(p, dq=dq), (33, 9))


@runs
@pytest.mark.parametrize(("block", "stride"), [(16, 16), (32, 8), (12, 4), (4, 2)])
def test_blocks(block, stride):
    """Blocks that touch, overlap four times, are three strides long; lengths of a block, one less and one more."""
    p = problem(block=block, stride=stride)
    held(p, config(p), (70, 5, 0, block, block - 1, block + 1))


@runs
@pytest.mark.parametrize("dkv_mask", MASKS)
@pytest.mark.parametrize(("dq_mask", "loads"), [("edges", "pointer"), ("all", "pointer"), ("edges", "descriptor")])
def test_masks_and_loads(dq_mask, loads, dkv_mask):
    """Several tiles of keys and of rows, whole and cut, between neighbours that hold NaN."""
    p = problem(block=4, stride=2, group=3)
    c = config(p, dq_mask=dq_mask, dkv_mask=dkv_mask, loads=loads, dq_stages=2, DQ_N=16, KEYS=16, ROWS=32)
    held(p, c, (50, 3, 117), alter=strided)


@runs
@pytest.mark.parametrize("dkv_mask", MASKS)
def test_masks_where_dq_is_added_up_as_keys_are_walked(dkv_mask):
    p = problem(block=4, stride=2, group=3)
    held(p, config(p, dq="atomic", dkv_mask=dkv_mask, KEYS=16, ROWS=32), (50, 3, 117), alter=strided)


@runs
@pytest.mark.parametrize(
    "changes",
    [
        {"DQ_M": 32, "DQ_N": 64, "KEYS": 64, "ROWS": 32, "SPLITS": 1},
        {"DQ_M": 16, "DQ_N": 16, "KEYS": 16, "ROWS": 16, "SPLITS": 64},
        {"dq": "atomic", "KEYS": 16, "ROWS": 32, "SPLITS": 4},
    ],
)
def test_tiles_and_splits(changes):
    """Config changes nothing: more splits than some sequences have queries, and one."""
    p = problem(block=4, stride=2, group=2)
    held(p, config(p, **changes), (100, 0, 21))


@runs
@pytest.mark.parametrize("dq", DQ)
@pytest.mark.parametrize("seqlens", [(0,), (1,), (7,), (27, 27, 27)])
def test_batched(seqlens, dq):
    """Equal lengths without cu_seqlens: none, shorter than a block, no multiple of the stride (so rows have gaps)."""
    p = problem(varlen=False, group=3)
    case = held(p, config(p, dq=dq), seqlens)
    if max(seqlens) < 8:  # no compressed token
        assert torch.equal(case.outputs["dq"], case.tensors["dq_add"])
        assert not case.outputs["dk_cmp"].any() and not case.outputs["dv_cmp"].any()


@runs
@pytest.mark.parametrize("dq", DQ)
@pytest.mark.parametrize("seqlens", [(0, 0), (3, 0, 7, 1)])
def test_no_compressed_token(seqlens, dq):
    p = problem()
    case = held(p, config(p, dq=dq), seqlens, heads=2)
    assert torch.equal(case.outputs["dq"], case.tensors["dq_add"]) and not case.outputs["dk_cmp"].any()


@runs
@pytest.mark.parametrize("dq", DQ)
@pytest.mark.parametrize("kind", ["huge", "ties", "equal", "peaky"])
def test_kinds(kind, dq):
    p = problem(group=4, qk=32)
    held(p, config(p, dq=dq), (45, 0, 20), kind=kind)


@runs
@pytest.mark.parametrize("dq", DQ)
@pytest.mark.parametrize("kind", ["random", "huge"])
def test_half_and_strides(kind, dq):
    p = problem(dtype="float16", group=3, qk=48, v=32)
    held(p, config(p, dq=dq), RAGGED, heads=2, alter=strided, kind=kind)


@runs
@pytest.mark.parametrize("dq", DQ)
@pytest.mark.parametrize("workspace_bytes", [1, 40_000])
def test_a_small_workspace(workspace_bytes, dq):
    """Fewer splits, and queries in chunks that begin and end inside sequences, where dq is added up in float32."""
    p = problem()
    held(p, config(p, dq=dq, ROWS=16, SPLITS=8), (80, 0, 70, 1), workspace_bytes=workspace_bytes)


@runs
def test_chunks_share_out_the_queries(monkeypatch):
    p = problem()
    c = config(p, dq="atomic", SPLITS=1)
    ranges, dkv = [], module(p, c)._dkv
    monkeypatch.setattr(module(p, c), "_dkv", lambda grid, *args: [ranges.append(args[15:17]), dkv(grid, *args)])
    held(p, c, (80, 0, 70, 1), workspace_bytes=1)
    assert ranges == [(0, 51), (51, 102), (102, 151)]


@runs
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dq", DQ)
def test_addend(dq, dtype):
    p = problem(dtype=dtype)
    added(p, config(p, dq=dq), (45, 20))


@runs
@pytest.mark.parametrize("changes", [{}, {"dq_mask": "all", "dkv_mask": "all"}, {"loads": "descriptor", "dq_stages": 2}, {"dq": "atomic"}])
def test_other_sequences_are_not_read(changes):
    p = problem()
    others_are_not_read(p, config(p, **changes), (13, 40, 18), 1)


@runs
@pytest.mark.parametrize("dq", DQ)
def test_queries_that_see_nothing(dq):
    """They have no gradient, whatever their delta and gate, and give none."""
    p = problem()
    plain, blind = held(p, config(p, dq=dq), RAGGED, heads=2).outputs, []

    def alter(case):
        blind.append(case.tensors["lse"] == -torch.inf)
        case.tensors["delta"][blind[0]] = 1e30
        case.tensors["gate"][blind[0]] = -1e30

    found = held(p, config(p, dq=dq), RAGGED, heads=2, alter=alter).outputs
    assert bool(blind[0].any()) and all(torch.equal(found[name], plain[name]) for name in plain)


@runs
def test_deterministic_is_the_same_bits_each_time():
    p = problem(deterministic=True, block=4, stride=2)
    first, again = (held(p, config(p, KEYS=16, ROWS=32), (80, 3, 41)).outputs for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_space():
    p = problem(dtype="bfloat16", group=16, qk=128, v=128, block=32, stride=16)
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        space.check(p, space.default(p, arch))
    with pytest.raises(ConfigError, match="another order each time"):
        config(problem(deterministic=True), dq="atomic")
    for changes, why in (
        ({"dq_mask": "all", "loads": "descriptor", "dq_stages": 2}, "not loaded by descriptor"),
        ({"loads": "descriptor"}, "without a pipeline"),
        ({"dkv_warps": 8}, "leave warps without rows"),
        ({"KEYS": 128, "ROWS": 128}, "registers a thread"),
    ):
        with pytest.raises(ConfigError, match=why):
            config(p, **changes)
    with pytest.raises(ConfigError, match="head dims are 80 and 16"):
        config(problem(qk=80), loads="descriptor", dq_stages=2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (128, 128), (192, 128), (256, 256)])
def test_defaults_are_legal(dims, dtype):
    for group in (1, 7, 16):
        p = problem(dtype, group, *dims)
        assert space.safe(p) and all(space.default(p, arch) for arch in ("sm_80", "sm_90", "sm_100", "gfx942"))


@pytest.mark.parametrize("changes", [{}, {"dq_mask": "all"}, {"dkv_mask": "all"}, {"dq": "atomic"}])
def test_rendered_is_python(changes):
    for dims in ({}, {"qk": 80, "v": 192}):
        for debug in (False, True):
            p = problem(**dims)
            ast.parse(render.render(p, config(p, **changes), debug=debug).text)


SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from gradient_cases import bound, config, module
from test_compressed_attention_bwd import problem

from nsa_gen import inputs, loader, space

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
p = problem("bfloat16", 16, 128, 128, 32, 16)
case = inputs.case(p, seqlens=(8192, 1000), heads_kv=4, device="meta")
found = {}
for arch, target in TARGETS.items():
    for one in loader.compile_all(lambda: case.run(module(p, space.default(p, arch))), target):
        found[f"{arch} {one.name}"] = [one.shared, one.spills]
for c in (config(p, dq="atomic"), config(p, dq_mask="all", dkv_mask="all")):
    for one in loader.compile_all(lambda: case.run(module(p, c)), TARGETS["sm_90"]):
        found[f"sm_90 {c.dq} {one.name}"] = [one.shared, one.spills]
for c in (config(p), config(p, dq="atomic")):
    def calls():
        for add in (case.tensors["dq_add"], None, case.tensors["dq_add"].float(), case.outputs["dq"]):
            case.tensors["dq_add"] = add
            case.run(module(p, c))
    assert bound(calls) > 3
print(json.dumps(found))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """The default config fits every arch and spills next to nothing; an addend or none, of one dtype or another, are binaries apart."""
    found = json.loads(compiled_python(COMPILE))
    assert len(found) == 4 * 3 + 2 + 3
    for name, (shared, spills) in found.items():
        assert shared <= SHARED[name.split()[0]], name
        assert (spills or 0) <= 128, (name, spills)  # bytes a thread
