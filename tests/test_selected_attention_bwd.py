"""Selected attention, backward: every way to dq against the float64 reference, and compiled for every arch without a GPU."""

from __future__ import annotations

import ast
import itertools
import json

import pytest
import torch
from gradient_cases import DEVICE, added, config, held, module, others_are_not_read, runs, strided

from nsa_gen import inputs, render, space
from nsa_gen.config import Config, Problem
from nsa_gen.errors import ConfigError
from nsa_gen.inputs.case import CALLS

RAGGED = (0, 55, 1, 11)
#: By what is stored, or lies on the tensor core's rows, and how K and V are loaded.
WALKS = tuple(itertools.product(("ds", "rows", "keys"), ("pointer", "descriptor")))
WAYS = ("slots", *map(" ".join, WALKS))
POINTER = ("slots", "ds pointer", "rows pointer", "keys pointer")
ORDERS = {"any order": False, "fixed order": True}


def problem(dtype="float32", group=2, qk=16, v=16, block=16, count=4, deterministic=False, varlen=True) -> Problem:
    key = {"dtype": dtype, "group": group, "head_dim_qk": qk, "head_dim_v": v, "selection_block": block, "count": count}
    return Problem.of("selected_attention_bwd", key | {"deterministic": deterministic, "varlen": varlen})


def built(p: Problem, way: str, **changes) -> Config:
    """A config that makes dq in one of WAYS."""
    if way == "slots":
        return config(p, **changes)
    how, loads = way.split()
    dq = {"dq": "ds"} if how == "ds" else {"dq": "query_outer", "operands": how}
    return config(p, **dq | {"loads": loads, "dq_stages": 2} | changes)


def chosen(rows):
    """A change of a case's blocks: ``rows(t, h, n)`` gives the blocks of each query, of which there are ``n`` to choose from."""

    def alter(case) -> None:
        block_indices, p = case.tensors["block_indices"], case.problem
        block_indices.fill_(-1)
        for start, end in itertools.pairwise(case.cu_seqlens):
            for t, h in itertools.product(range(start, end), range(case.heads_kv)):
                some = sorted(set(rows(t, h, (t - start) // p.selection_block + 1)))[: p.count]
                block_indices[t, h, : len(some)] = torch.tensor(some, dtype=torch.int32)
        case.tensors["lse"].copy_(CALLS[p.kernel].lse(case, torch.float64))

    return alter


@runs
@pytest.mark.parametrize("way", POINTER)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 16])
def test_groups(group, way):
    p = problem(group=group, count=2)
    held(p, built(p, way), (0, 37, 1) if group < 6 else (20, 0, 1))


@runs
@pytest.mark.parametrize(("way", "order"), [*itertools.product(WAYS, ["any order"]), *itertools.product(WAYS[:2], ["fixed order"])])
def test_ragged_lengths(way, order):
    """Blocks that end past their sequence, with other sequences or nothing behind them; a group that tiles do not divide by."""
    p = problem(group=5, count=3, deterministic=ORDERS[order])
    held(p, built(p, way), RAGGED, heads=2 if way == "slots" else 1, alter=strided)


@runs
@pytest.mark.parametrize("way", POINTER)
@pytest.mark.parametrize(("qk", "v"), [(80, 48), (48, 96), (192, 128)])
def test_head_dims(qk, v, way):
    p = problem(qk=qk, v=v)
    held(p, built(p, way, ROWS=32), (20, 2))


@runs
@pytest.mark.parametrize(("qk", "v"), [(80, 48), (16, 192)])
def test_head_dims_in_a_fixed_order(qk, v):
    p = problem(qk=qk, v=v, deterministic=True)
    held(p, built(p, "slots", ROWS=32), (36, 2))


@runs
@pytest.mark.parametrize("how", ["ds", "rows", "keys"])
def test_head_dims_by_descriptor(how):
    p = problem(qk=32, v=64)
    held(p, built(p, f"{how} descriptor"), (36, 2))


@runs
@pytest.mark.parametrize("kind", ["random", "huge"])
@pytest.mark.parametrize("way", POINTER)
def test_half_precision(way, kind):
    """Into float32, where what other branches give is added."""
    p = problem(dtype="float16", block=32, group=3, count=2)
    held(p, built(p, way, **({"ROWS": 16} if way.startswith("ds") else {})), (70,) if way == "slots" else (40,), kind=kind)


@runs
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_keys_in_half_precision(order):
    """Into the activations' dtype, then float32, then as before: what is rounded is the sum in float32."""
    p, found = problem(dtype="float16", group=3, count=2, deterministic=ORDERS[order]), []
    for wide in (False, True, False):

        def alter(case, wide=wide):
            case.outputs |= {name: case.outputs[name].to(torch.float32 if wide else torch.float16) for name in ("dk", "dv")}

        found.append(held(p, built(p, "slots"), (70,), alter=alter).outputs)
    for half, wide, again in zip(*(one.values() for one in found), strict=True):
        assert torch.equal(half, wide.half()) and torch.equal(half, again)


@runs
@pytest.mark.parametrize("kind", ["ties", "equal", "huge", "peaky"])
@pytest.mark.parametrize("way", POINTER)
def test_kinds(way, kind):
    p = problem(count=2)
    held(p, built(p, way), (70,) if way == "slots" else (40,), kind=kind)


@runs
@pytest.mark.parametrize(("block", "count"), [(16, 1), (16, 3), (64, 2), (32, 16)])
def test_blocks(block, count):
    """One a query, no power of two of them, more than there are."""
    for way, deterministic in (("slots", True), ("ds pointer", True), ("rows pointer", False)):
        p = problem(block=block, count=count, deterministic=deterministic)
        held(p, built(p, way), (70, 0, 5) if way == "slots" else (36, 0, 5))


@runs
@pytest.mark.parametrize("order", ORDERS)
def test_batched_is_varlen_of_equal_lengths(order):
    for way in WAYS[:2] if order == "any order" else ("slots",):
        p = problem(varlen=False, deterministic=ORDERS[order])
        held(p, built(p, way), (19, 19))
    held(p, built(p, "slots"), (1,))


@runs
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("changes", [{"ENTRIES": 32, "ROWS": 16}, {"ENTRIES": 64, "ROWS": 128, "ADD_M": 2}])
def test_tiles_and_records_do_not_change_the_result(changes, order):
    """Lists of several records, the last not full."""
    p = problem(count=2, deterministic=ORDERS[order])
    whole, other = held(p, built(p, "slots"), (110, 9)), held(p, built(p, "slots", **changes), (110, 9))
    for name, out in whole.outputs.items():
        torch.testing.assert_close(other.outputs[name], out, rtol=1e-5, atol=2e-6)


@runs
@pytest.mark.parametrize(
    ("way", "order"), [("slots", "any order"), ("slots", "fixed order"), ("ds pointer", "any order"), ("rows pointer", "any order")]
)
def test_a_small_workspace(way, order):
    """Chunks of 64 queries, which begin and end inside sequences; some lists are empty in some chunks."""
    p = problem(count=2, deterministic=ORDERS[order])
    whole, chunked = (held(p, built(p, way), (50, 0, 16, 1), workspace_bytes=size) for size in (1 << 30, 1))
    assert torch.equal(whole.outputs["dq"], chunked.outputs["dq"])


@runs
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seqlens", [(0,), (0, 0)])
def test_no_tokens(seqlens, way):
    for deterministic in (False, True):
        p = problem(deterministic=deterministic)
        held(p, built(p, way), seqlens)


@runs
@pytest.mark.parametrize(("way", "order"), [*itertools.product(POINTER, ["any order"]), ("slots", "fixed order")])
def test_any_set_of_blocks_is_taken_as_given(way, order):
    """Blocks from elsewhere need not hold the query's own or the first; a query without any gives nothing and has no gradient."""
    generator = torch.Generator().manual_seed(5)
    some = chosen(lambda t, h, n: [i for i in range(n) if torch.rand((), generator=generator) < 0.4])
    p = problem(deterministic=ORDERS[order])
    case = held(p, built(p, way), (50, 3), heads=2, alter=some)
    none = (case.tensors["block_indices"] == -1).all(-1).repeat_interleave(p.group, 1)
    assert bool(none.any()) and torch.equal(case.outputs["dq"][none], case.tensors["dq_add"][none])


@runs
@pytest.mark.parametrize(("way", "order"), [*itertools.product(WAYS, ["any order"]), ("slots", "fixed order")])
@pytest.mark.parametrize(("count", "local"), [(3, 1), (3, 2), (2, 2)])
def test_local_blocks_may_be_left_out(count, local, way, order):
    """Sliding attention serves them where K and V are shared. Where all are local, or there are no others, nothing is left."""
    p = problem(count=count, deterministic=ORDERS[order])
    case = inputs.case(p, seqlens=(70, 3) if way == "slots" else (40, 3), heads_kv=1, device=DEVICE)
    if count == local:
        chosen(lambda t, h, n: range(max(n - local, 0), n))(case)
    case.tensors["local"] = local
    case.run(module(p, built(p, way)))
    blocks = case.tensors["block_indices"]
    own = (inputs.positions(case.seqlens, DEVICE) // p.selection_block)[:, None, None]
    case.tensors["block_indices"] = torch.where(blocks > own - local, -1, blocks)
    check = case.check()
    assert check.ok, check
    assert bool(case.outputs["dk"].any()) == (count > local)


@runs
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("which", ["first", "own", "nothing"])
def test_all_queries_on_the_same_blocks(which, order):
    """One list as long as the sequence, lists of a block's own queries, no list."""
    p = problem(count=2, deterministic=ORDERS[order])
    rows = {"first": lambda t, h, n: [0], "own": lambda t, h, n: [n - 1], "nothing": lambda t, h, n: []}[which]
    case = held(p, built(p, "slots", ENTRIES=32), (100, 20), alter=chosen(rows))
    if which == "first":
        assert not case.outputs["dk"][16:100].any() and case.outputs["dk"][:16].any()
    elif which == "nothing":
        assert torch.equal(case.outputs["dq"], case.tensors["dq_add"]) and not case.outputs["dk"].any()


@runs
@pytest.mark.parametrize("way", ["slots", "ds pointer", "keys pointer"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_addend(dtype, way):
    p = problem(dtype=dtype)
    added(p, built(p, way), (18, 5))


@runs
@pytest.mark.parametrize("way", WAYS)
def test_other_sequences_are_not_read(way):
    """A block that ends past its sequence holds NaN of the next."""
    for deterministic in (False, True) if way == "slots" else (False,):
        p = problem(deterministic=deterministic)
        others_are_not_read(p, built(p, way), (5, 21, 12), 1)


@runs
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 30])
def test_deterministic_is_the_same_bits_each_time(workspace_bytes):
    """Also as the same module serves another call in between, and chunk by chunk."""
    p = problem(deterministic=True, count=2)
    c = built(p, "slots", ENTRIES=32)
    first = held(p, c, (90, 30), workspace_bytes=workspace_bytes).outputs
    held(p, c, (20,), seed=7)
    again = held(p, c, (90, 30), workspace_bytes=workspace_bytes).outputs
    assert all(torch.equal(first[name], again[name]) for name in first)


@runs
def test_a_fixed_order_is_that_of_queries():
    """Lists are sorted, whatever order their entries were counted in."""
    p = problem(deterministic=True, count=1, group=1)
    c, handed = built(p, "slots", ENTRIES=32), []
    made, dkv = module(p, c), module(p, c)._dkv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "_dkv", lambda grid, *args, **more: [handed.append(args), dkv(grid, *args, **more)])
        held(p, c, (96,), alter=chosen(lambda t, h, n: [t % 2 if n > 1 else 0]))
    listed = handed[0][11][:96].tolist()
    assert listed == sorted(range(96), key=lambda t: (t % 2 if t >= 16 else 0, t))


@pytest.mark.parametrize(
    ("dims", "changes", "why"),
    [
        ({"block": 64}, {"operands": "keys", "dq_stages": 1}, "illegally"),
        ({}, {"operands": "keys", "dq_warps": 2}, "leave warps without rows"),
        ({}, {"loads": "descriptor", "dq_stages": 1}, "without a pipeline"),
        ({}, {"dq": "ds", "operands": None, "dq_stages": 1}, "without a pipeline"),
        ({"qk": 48}, {"loads": "descriptor"}, "head dims are 48 and 16"),
        ({}, {"dkv_warps": 8}, "8 warps on a block of 16 keys"),
        ({"dtype": "float16"}, {"ROWS": 16}, "are for float32"),
        ({"qk": 256, "v": 256, "block": 128}, {}, "registers a thread"),
    ],
)
def test_the_space_refuses_what_miscompiles_or_cannot_be_built(dims, changes, why):
    with pytest.raises(ConfigError, match=why):
        built(problem(**dims), "rows pointer", **changes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (128, 128), (192, 128), (256, 256)])
def test_defaults_are_legal(dims, dtype):
    for group, block in itertools.product((1, 7, 16), (16, 64)):
        p = problem(dtype, group, *dims, block)
        assert space.safe(p) and all(space.default(p, arch) for arch in ("sm_80", "sm_90", "sm_100", "gfx942"))


@pytest.mark.parametrize("way", POINTER)
def test_rendered_is_python(way):
    for dims, debug, deterministic in itertools.product(({}, {"qk": 80, "v": 192}), (False, True), (False, True)):
        p = problem(deterministic=deterministic, **dims)
        ast.parse(render.render(p, built(p, way, ROWS=32), debug=debug).text)


COMPILE = """
import json
from gradient_cases import bound, module
from test_selected_attention_bwd import built, problem

from nsa_gen import device, inputs, loader, space

every = {}
for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
    there, found = device.from_name(arch), []
    for deterministic in (False, True) if arch == "sm_90" else (False,):
        p = problem("bfloat16", 16, 128, 128, 64, 16, deterministic)
        configs = [space.default(p, arch)]
        if arch == "sm_90" and not deterministic:
            configs += [built(p, "keys descriptor"), built(p, "ds descriptor")]
        for c in configs:
            case = inputs.case(p, seqlens=(8192, 1000), heads_kv=4, device="meta")
            default = c == configs[0]
            resources = loader.compile_all(lambda: case.run(module(p, c)), there.triton_target())
            found += [[r.name, r.shared, (r.spills or 0) * default] for r in resources]
            kept = dict(case.outputs)

            def calls():
                for add in (case.tensors["dq_add"], None, case.tensors["dq_add"].float(), kept["dq"]):
                    for wide in (True, False):
                        case.tensors["dq_add"] = add
                        case.outputs = {name: x.float() if wide and name != "dq" else x.to(case.dtype) for name, x in kept.items()}
                        case.run(module(p, c))

            assert bound(calls) > 5
    every[arch] = [there.shared_bytes, found]
print(json.dumps(every))
"""


@pytest.mark.compile
def test_compiles(compiled_python):
    """The default config fits; an addend or none, and gradients of one dtype or another, are binaries apart."""
    every = json.loads(compiled_python(COMPILE).splitlines()[-1])
    assert len(every) == 4
    for arch, (limit, found) in every.items():
        lists = {"key_kernel", "add_records_kernel"} if arch == "sm_90" else set()
        lists |= {"count_kernel", "plan_kernel", "scatter_kernel"}
        assert {name for name, _, _ in found} >= lists | {"selected_attention_bwd_dq_kernel", "selected_attention_bwd_dkv_kernel"}, arch
        assert all(shared <= limit for _, shared, _ in found), (arch, found)
        assert all(spills <= 256 for _, _, spills in found), (arch, found)  # bytes a thread, of the default
