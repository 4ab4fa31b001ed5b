"""Sliding attention, backward: the rendered kernels against the float64 reference, and compiled for every arch without a GPU."""

from __future__ import annotations

import ast
import json
from types import SimpleNamespace

import pytest
import torch
from gradient_cases import DEVICE, added, config, module, others_are_not_read, runs, strided

from nsa_gen import inputs, render, space
from nsa_gen.config import Config, Problem
from nsa_gen.errors import ConfigError
from nsa_gen.inputs.case import CALLS

RAGGED = (0, 37, 1, 66, 0, 15)
MASKS = ("edges", "all")
#: Without selected attention, and with its local blocks: tokens of one, and how many.
SELECTED = (None, (16, 2))


def problem(dtype="float32", group=2, qk=16, v=16, window=20, varlen=True) -> Problem:
    key = {"dtype": dtype, "group": group, "head_dim_qk": qk, "head_dim_v": v, "window": window, "varlen": varlen}
    return Problem.of("sliding_attention_bwd", key)


def held(p: Problem, c: Config, seqlens=RAGGED, selected=None, alter=None, **how) -> inputs.Case:
    """``gradient_cases.held``, with local blocks of selected attention or without: then the reference is given them with gates of 0."""
    made = module(p, c)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("block", "local"), selected or (16, 1), strict=True):
            patch.setattr(CALLS[p.kernel], name, value)
        case = inputs.case(p, seqlens=seqlens, device=DEVICE, **how)
        if alter is not None:
            alter(case)
        if selected is None:
            case.tensors["selected"][2].zero_()
            case.run(SimpleNamespace(sliding_attention_bwd=lambda *given: made.sliding_attention_bwd(*given[:-1])))
        else:
            case.run(made)
        check = case.check()
    assert check.ok, check
    return case


@runs
@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 16])
def test_groups(group, selected):
    p = problem(group=group)
    held(p, config(p), RAGGED if group < 6 else (33, 0, 5), selected, heads_kv=2 if group < 6 else 1)


@runs
@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize(("qk", "v"), [(80, 48), (48, 96), (192, 128)])
def test_head_dims(qk, v, selected):
    p = problem(qk=qk, v=v, group=3)
    held(p, config(p), (33, 2), selected)


@runs
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 33, 64, 500])
def test_windows(window, mask):
    """Of one key, of whole tiles, of no whole number of tiles, longer than any sequence."""
    p = problem(window=window)
    held(p, config(p, dq_mask=mask, dkv_mask=mask, DQ_N=16, KEYS=16, ROWS=32), (83, 16))


@runs
@pytest.mark.parametrize(("window", "mask"), [(20, "edges"), (20, "all"), (1, "edges"), (1, "all"), (500, "edges")])
@pytest.mark.parametrize("selected", [(16, 1), (16, 3), (32, 1), (64, 2)])
def test_local_blocks(window, selected, mask):
    """Within the window, past it, over all of a sequence; each key counts once for each branch."""
    p = problem(window=window)
    held(p, config(p, dq_mask=mask, dkv_mask=mask, DQ_N=16, KEYS=16, ROWS=32), (70, 16), selected)


@runs
@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize(
    "changes",
    [
        {"DQ_M": 64, "DQ_N": 16, "KEYS": 64, "ROWS": 16},
        {"DQ_M": 16, "DQ_N": 64, "KEYS": 16, "ROWS": 64},
        {"DQ_M": 128, "DQ_N": 32, "KEYS": 32, "ROWS": 128},
    ],
)
def test_tiles(changes, selected):
    """Config changes nothing: tiles of more tokens than keys and the reverse, several tiles a window."""
    p = problem(group=1, window=70)
    held(p, config(p, **changes), (150, 7), selected)


@runs
@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize("group", [1, 3])
def test_descriptors(group, selected):
    p = problem(window=40, group=group, qk=32)
    held(p, config(p, loads="descriptor", dq_stages=2, DQ_N=16), RAGGED, selected, strided, heads_kv=2)


@runs
@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize("seqlens", [(0,), (1,), (0, 0), (32, 32, 32)])
def test_batched(seqlens, selected):
    p = problem(varlen=False, group=3)
    held(p, config(p), seqlens, selected)


@runs
def test_no_token():
    p = problem()
    case = held(p, config(p), (0, 0))
    assert not any(out.numel() for out in case.outputs.values())


@runs
@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize("kind", ["huge", "ties", "equal", "peaky"])
def test_kinds(kind, selected):
    p = problem(group=4, qk=32)
    held(p, config(p), RAGGED, selected, kind=kind)


@runs
@pytest.mark.parametrize("kind", ["random", "huge"])
@pytest.mark.parametrize("wide", [False, True])
def test_half_and_strides(wide, kind):
    """dk and dv in the activations' dtype or, with what is added to them, in float32."""

    def alter(case):
        strided(case)
        if wide:
            case.outputs |= {name: case.outputs[name].float() for name in ("dk", "dv")}

    p = problem(dtype="float16", group=3, qk=48, v=32)
    case = held(p, config(p), RAGGED, SELECTED[wide], alter, heads_kv=2, kind=kind)
    assert case.outputs["dk"].dtype == (torch.float32 if wide else torch.float16)


@runs
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_addends(dtype):
    p = problem(dtype=dtype)
    added(p, config(p), (45, 20), ("dq", "dk", "dv"))


@runs
def test_calls_of_one_module_in_turn():
    """Sums in float32, then the activations' dtype, with other blocks and none: each call is right."""
    p = problem(dtype="float16")
    for wide, selected in ((True, (16, 2)), (False, (16, 1)), (True, None), (False, (32, 2))):

        def alter(case, wide=wide):
            if wide:
                case.outputs |= {name: case.outputs[name].float() for name in ("dk", "dv")}
            else:
                case.tensors |= {f"{name}_add": case.tensors[f"{name}_add"].half() for name in ("dk", "dv")}

        held(p, config(p), (45,), selected, alter)


@runs
@pytest.mark.parametrize("changes", [{}, {"dq_mask": "all", "dkv_mask": "all"}, {"loads": "descriptor", "dq_stages": 2}])
def test_other_sequences_are_not_read(changes):
    p = problem()
    others_are_not_read(p, config(p, **changes), (13, 40, 9), 1)


@runs
def test_the_same_bits_each_time():
    p = problem(window=40)
    first, again = (held(p, config(p, KEYS=16, ROWS=32), RAGGED, (16, 2)).outputs for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@runs
@pytest.mark.parametrize("which", ["sliding", "selected"])
def test_a_gate_that_is_nan_stays_with_what_its_query_sees(which):
    """NaN passes through: to dq of its query and to the keys of that branch, no further."""
    p = problem(window=8, group=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CALLS[p.kernel], "block", 16)
        case = inputs.case(p, seqlens=(60,), heads_kv=2, device=DEVICE)
    gate = case.tensors["gate"] if which == "sliding" else case.tensors["selected"][2]
    gate[40, 1] = torch.nan
    case.run(module(p, config(p)))
    for name, out in case.outputs.items():
        wanted = torch.zeros(60, out.shape[1], dtype=torch.bool, device=DEVICE)
        if name == "dq":
            wanted[40, 1] = True
        else:
            wanted[33 if which == "sliding" else 16 : 41, 0] = True
        assert torch.equal(out.isnan().any(-1), wanted), name


def test_space():
    p = problem(dtype="bfloat16", group=16, qk=128, v=128, window=512)
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        space.check(p, space.default(p, arch))
    for changes, why in (
        ({"dq_mask": "all", "loads": "descriptor", "dq_stages": 2}, "not loaded by descriptor"),
        ({"loads": "descriptor"}, "without a pipeline"),
        ({"dq_warps": 8}, "leave warps without rows"),
        ({"KEYS": 128, "ROWS": 128}, "registers a thread"),
        ({"DQ_M": 16}, "are for float32"),
    ):
        with pytest.raises(ConfigError, match=why):
            config(p, **changes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (128, 128), (192, 128), (256, 256)])
def test_defaults_are_legal(dims, dtype):
    for window in (1, 16, 100, 512):
        p = problem(dtype, 7, *dims, window)
        assert space.safe(p) and all(space.default(p, arch) for arch in ("sm_80", "sm_90", "sm_100", "gfx942"))


@pytest.mark.parametrize("mask", MASKS)
def test_rendered_is_python(mask):
    for dims in ({}, {"qk": 80, "v": 192}):
        for debug in (False, True):
            p = problem(**dims)
            ast.parse(render.render(p, config(p, dq_mask=mask, dkv_mask=mask), debug=debug).text)


SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
COMPILE = """
import itertools
import json
from triton.backends.compiler import GPUTarget
from gradient_cases import bound, config, module
from test_sliding_bwd import problem

from nsa_gen import inputs, launch, loader, space

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
p = problem("bfloat16", 16, 128, 128, 512)
case = inputs.case(p, seqlens=(1000, 24), heads_kv=4, device="meta")
found = {}
for arch, target in TARGETS.items():
    for one in loader.compile_all(lambda: case.run(module(p, space.default(p, arch))), target):
        found[f"{arch} {one.name}"] = [one.shared, one.spills]
with launch.recording() as jobs:
    case.run(module(p, space.default(p, "sm_90")))
for job in jobs:
    found[f"wgmma {job.name}"] = launch.compile_job(job, TARGETS["sm_90"]).asm["ptx"].count("wgmma.mma_async")

names, c = ("dq", "dk", "dv"), config(p)

def calls():
    for kind, wide, selected in itertools.product((case.dtype, None, "float"), (False, True), (case.tensors["selected"], None)):
        for name in names:
            out = case.outputs[name].float() if wide and name != "dq" else case.outputs[name].to(case.dtype)
            case.outputs[name] = out
            case.tensors[f"{name}_add"] = None if kind is None else out.float() if kind == "float" else out.to(kind)
        case.tensors["selected"] = selected
        case.run(module(p, c))

assert bound(calls) == 2 * (3 + 6)
print(json.dumps(found))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """The default config fits every arch, spills next to nothing, and uses the warpgroup tensor cores where there are some; what is added,
    and in what dtype, are binaries apart."""
    found = json.loads(compiled_python(COMPILE))
    assert len(found) == 4 * 2 + 2
    for name, measured in found.items():
        if name.startswith("wgmma"):
            assert measured > 0, name
            continue
        shared, spills = measured
        assert shared <= SHARED[name.split()[0]], name
        assert (spills or 0) <= 128, (name, spills)  # bytes a thread
