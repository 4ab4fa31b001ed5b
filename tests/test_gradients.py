"""Gradients of the public operators, each against autograd through the float64 reference with the same blocks chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint as checkpointing

import nsa_gen
from nsa_gen import NSAError, lookup, reference
from nsa_gen.branches import selection
from nsa_gen.config import Config
from nsa_gen.spec import POOLINGS, Spec, load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: 2 blocks of 16 of at most 3: queries leave blocks out.
SPEC = load("tiny").replace(selection={"count": 2, "initial": 0, "local": 1})
LENGTHS = (41, 0, 7, 1)
GATES = ("g_cmp", "g_slc", "g_swa")


def made(spec: Spec = SPEC, lengths: tuple[int, ...] = LENGTHS, heads: int = 1, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``nsa_attention`` with K and V shared, φ's weights where there are any."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(DEVICE)

    total, dims = sum(lengths), {"k": spec.head_dim.qk, "v": spec.head_dim.v}
    x: dict[str, Any] = {"q": normal(total, heads * spec.group, spec.head_dim.qk)}
    x |= {name: normal(total, heads, dim) for name, dim in dims.items()}
    x |= {name: normal(total, heads * spec.group).sigmoid() for name in GATES}
    for name, dim in dims.items() if spec.compression.pooling != "mean" else ():
        block, size = spec.compression.block, spec.compression.hidden or dim
        shapes = {
            "weighted": [(block, block**-0.5)],
            "linear": [(block * dim, dim, (block * dim) ** -0.5)],
            "mlp": [(block * dim, size, (block * dim) ** -0.5), (size, 0.1), (size, dim, size**-0.5), (dim, 0.1), (block, dim, 0.5)],
        }[spec.compression.pooling]
        x[f"phi_{name}"] = tuple(normal(heads, *shape, std=std) for *shape, std in shapes)
    return x


def cu_of(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def at(lengths: tuple[int, ...] = LENGTHS, spec: Spec = SPEC) -> dict[str, Any]:
    return {"spec": spec, "cu_seqlens": cu_of(lengths), "max_seqlen": max(lengths)}


def flat(x: Any) -> list[Tensor]:
    """The tensors in dicts and tuples, in order."""
    if isinstance(x, dict):
        return flat(tuple(x.values()))
    return [z for y in x for z in flat(y)] if isinstance(x, tuple | list) else [x]


def tracked(x: Any, dtype: torch.dtype | None = None) -> Any:
    """The same as leaves that want gradients."""
    if isinstance(x, dict):
        return {name: tracked(y, dtype) for name, y in x.items()}
    if isinstance(x, tuple):
        return tuple(tracked(y, dtype) for y in x)
    return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()


def weight_of(o: Tensor, seed: int = 9) -> Tensor:
    return torch.randn(o.shape, generator=torch.Generator().manual_seed(seed)).to(o.device, o.dtype)


def gradients(run: Callable[..., Any], x: dict[str, Any], dtype: torch.dtype | None = None, weights: Any = None) -> list[Tensor]:
    """Of a weighted sum of all results (of an LSE, what is finite), for every tensor of ``x``."""
    leaves = tracked(x, dtype)
    found = flat(run(**leaves))
    weights = [weight_of(o) for o in found] if weights is None else weights
    weights = [w.to(o.dtype).masked_fill(o.detach().isinf(), 0.0) for o, w in zip(found, weights, strict=True)]
    grads = torch.autograd.grad(found, flat(leaves), weights, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(flat(leaves), grads, strict=True)]


def close(got: list[Tensor], want: list[Tensor], rtol: float = 2e-5) -> None:
    """Within a part of the largest element, and in norm of the whole; where all cancels out to 0, of what cancels, which is about 1."""
    assert len(got) == len(want)
    for i, (one, exact) in enumerate(zip(got, want, strict=True)):
        assert one.shape == exact.shape and not one.isnan().any(), i
        if exact.numel():
            error, size = one.double() - exact, max(exact.abs().max().item(), 0.1)
            assert error.abs().max() <= rtol * size, (i, error.abs().max(), size)
            assert error.norm() <= rtol * max(exact.norm(), 0.1 * exact.numel() ** 0.5), (i, error.norm(), exact.norm())


def chosen(x: dict[str, Any], where: dict[str, Any], **more: Any) -> Tensor:
    """The blocks that the operator chooses for ``x``."""
    k, v = (x[name][0] if isinstance(x[name], tuple) else x[name] for name in "kv")
    made = {name: nsa_gen.compress(y, x.get(f"phi_{name[0]}", ()), which=name[0], **where) for name, y in (("k_cmp", k), ("v_cmp", v))}
    made = {name: x.get(name, y) for name, y in made.items()}
    lse = nsa_gen.compressed_attention(x["q"], **made, **where, **more)[1]
    return nsa_gen.select_blocks(x["q"], made["k_cmp"], lse, **where, **more)


def exact(x: dict[str, Any], lengths: tuple[int, ...] = LENGTHS, spec: Spec = SPEC, dtype=torch.float64, **more: Any) -> list[Tensor]:
    """Autograd through the reference."""
    blocks = chosen(x, at(lengths, spec), **more)

    def run(phi_k: Any = (), phi_v: Any = (), k_cmp: Any = None, v_cmp: Any = None, **given: Any) -> Tensor:
        fixed = {"cu_seqlens": cu_of(lengths), "block_indices": blocks, "compressed": None if k_cmp is None else (k_cmp, v_cmp)}
        return reference.nsa_attention(**given, weights_k=phi_k, weights_v=phi_v, spec=spec, **fixed, **more)

    return gradients(run, x, dtype)


def whole(lengths: tuple[int, ...] = LENGTHS, spec: Spec = SPEC, **options: Any) -> Callable[..., Tensor]:
    return lambda **x: nsa_gen.nsa_attention(**x, **at(lengths, spec), **options)


@pytest.fixture(scope="module")
def shared() -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """A call with shared K and V, its gradients by the kernels and by the reference."""
    x = made()
    return x, gradients(whole(), x), exact(x)


# --- the whole ---------------------------------------------------------------------------------------------------------------------


def test_gradients_of_the_whole(shared):
    _, found, wanted = shared
    close(found, wanted)
    assert all(grad.dtype == torch.float32 for grad in found)


def test_several_kv_heads():
    lengths = (34, 0, 5)
    x = made(lengths=lengths, heads=2)
    close(gradients(whole(lengths), x), exact(x, lengths))


@pytest.mark.parametrize("group", [1, 3, 16])
def test_groups(group):
    spec, lengths = SPEC.replace(heads={"query": group, "kv": 1}), LENGTHS if group < 16 else (35, 0, 9)
    x = made(spec, lengths)
    close(gradients(whole(lengths, spec), x), exact(x, lengths, spec))


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": {"count": 3, "initial": 1, "local": 2}},
        {"selection": {"count": 2, "initial": 0, "local": 2}},
        {"selection": {"count": 2, "initial": 0, "local": 0}},
        {"window": 5, "compression": {"block": 16, "stride": 16}, "head_dim": {"qk": 32, "v": 16}},
        {"window": 200, "selection": {"block": 32, "count": 1, "initial": 0, "local": 1, "mapping": "literal"}},
    ],
    ids=str,
)
def test_geometries(changes):
    """Local blocks within the window and beyond, all blocks local, none."""
    spec = SPEC.replace(**changes)
    x = made(spec)
    close(gradients(whole(spec=spec), x), exact(x, spec=spec))


@pytest.mark.parametrize("pooling", [pooling for pooling in POOLINGS if pooling != "mean"])
def test_poolings(pooling):
    """Where K and V are shared, φ's gradients come on top of the other branches'."""
    lengths, hidden = (25, 0, 9), {"hidden": 16} if pooling == "mlp" else {}
    spec = SPEC.replace(compression={"pooling": pooling, **hidden}, head_dim={"qk": 32, "v": 16})
    x = made(spec, lengths)
    close(gradients(whole(lengths, spec), x), exact(x, lengths, spec), 4e-5)


@pytest.mark.parametrize(("names", "given"), [("kv", False), ("kv", True), ("k", False), ("v", True)])
def test_kv_per_branch(names, given):
    """Both or one of them; with compressed keys and values by the caller the first pair is not read."""
    x, others = made(), [made(seed=seed) for seed in (1, 2)]
    x |= {name: (x[name], *(other[name] for other in others)) for name in names}
    if given:
        x |= compressed(others[0])
    found = gradients(whole(), x)
    close(found, exact(x))
    assert bool(found[1].any()) == (not given or "k" not in names)


def compressed(x: dict[str, Any]) -> dict[str, Tensor]:
    """``k_cmp`` and ``v_cmp``; rows between sequences are NaN."""
    rows = torch.ones(reference.compressed_rows(sum(LENGTHS), SPEC.compression.stride), dtype=torch.bool)
    for first, count in reference.compressed_offsets(cu_of(), sum(LENGTHS), SPEC.compression.block, SPEC.compression.stride):
        rows[first : first + count] = False
    found = {f"{name}_cmp": nsa_gen.compress(x[name], which=name, **at()) for name in "kv"}
    return {name: y.masked_fill(rows[:, None, None].to(DEVICE), math.nan) for name, y in found.items()}


def test_compressed_keys_by_the_caller():
    x = made()
    x |= compressed(x)
    found, wanted = gradients(whole(), x), exact(x)
    close(found, wanted)
    gap = x["k_cmp"].isnan()
    assert bool(gap.any()) and not found[-2][gap].any()


@pytest.mark.parametrize("options", [{"recompute": True}, {"recompute": True, "deterministic": True}], ids=str)
def test_recompute_and_deterministic(shared, options):
    x, found, wanted = shared
    again = gradients(whole(**options), x)
    close(again, wanted)
    if "deterministic" in options:
        assert all(torch.equal(*pair) for pair in zip(again, gradients(whole(**options), x), strict=True))
    elif DEVICE.type == "cpu":  # the forward runs again with the same kernels
        assert all(torch.equal(*pair) for pair in zip(again, found, strict=True))


def test_deterministic_is_what_torch_says(monkeypatch):
    seen, kernel = [], selection.kernel

    def watched(name: str, *args: Any) -> Any:
        if name == "selected_attention_bwd":
            seen.append(args[4])
        return kernel(name, *args)

    monkeypatch.setattr(selection, "kernel", watched)
    lengths = (10,)
    x = made(lengths=lengths)
    for asked in (False, True):
        torch.use_deterministic_algorithms(asked)
        try:
            gradients(whole(lengths), x)
        finally:
            torch.use_deterministic_algorithms(False)
    gradients(whole(lengths, deterministic=True), x)
    blocks = chosen(x, at(lengths))
    for asked in (True, False, None):
        run = lambda asked=asked, **x: nsa_gen.selected_attention(**x, block_indices=blocks, spec=SPEC, deterministic=asked)  # noqa: E731
        gradients(run, {name: x[name] for name in "qkv"})
    assert seen == [False, True, True, True, False, False]


@pytest.mark.parametrize(
    "values",
    [
        {"dq": "query_outer", "operands": "rows", "loads": "descriptor", "dq_warps": 1, "dq_stages": 2},
        {"dq": "query_outer", "operands": "keys", "loads": "pointer", "dq_warps": 1, "dq_stages": 2},
    ],
    ids=lambda values: f"{values['operands']} {values['loads']}",
)
def test_other_configs_give_the_same(shared, values):
    x, _, wanted = shared
    rest = {"CHUNK": 2048, "ENTRIES": 32, "ROWS": 64, "dkv_warps": 4, "dkv_stages": 1, "dkv_registers": None}
    atomic = {"dq": "atomic", "dkv_mask": "edges", "KEYS": 32, "ROWS": 32, "dkv_warps": 4, "dkv_stages": 1, "SPLITS": 4}
    with lookup.override(Config.of("selected_attention_bwd", values | rest), Config.of("compressed_attention_bwd", atomic)):
        close(gradients(whole(), x), wanted)


def test_batched_and_a_scale():
    lengths = (21, 21)
    x = made(lengths=lengths, heads=2)
    given = {name: y.unflatten(0, (2, 21)) if isinstance(y, Tensor) else y for name, y in x.items()}
    weights = [weight_of(x["v"].repeat(1, SPEC.group, 1))]
    found = gradients(lambda **x: nsa_gen.nsa_attention(**x, spec=SPEC, scale=0.4).flatten(0, 1), given, weights=weights)
    close([grad.flatten(0, 1) for grad in found], exact(x, lengths, scale=0.4))


@pytest.mark.parametrize("lengths", [(1,), (7,), (1, 0, 3), (7, 8)])
def test_short_sequences(lengths):
    """Shorter than a compression block: no compressed token, and no gradient of its gate or of φ."""
    spec = SPEC.replace(compression={"pooling": "weighted"})
    x = made(spec, lengths)
    found = dict(zip([*x], gradients(whole(lengths, spec), x), strict=True))
    close([*found.values()], exact(x, lengths, spec))
    if max(lengths) < 8:
        assert not found["g_cmp"].any() and not found["phi_k"].any() and not found["phi_v"].any()


@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_nothing_in_gives_nothing_out(lengths):
    spec = SPEC.replace(compression={"pooling": "linear"})
    x = made(spec, lengths)
    leaves = tracked(x)
    for options in ({}, {"recompute": True, "deterministic": True}):
        o = whole(lengths, spec, **options)(**leaves)
        grads = torch.autograd.grad(o, flat(leaves), torch.empty_like(o))
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in flat(leaves)] and not any(grad.any() for grad in grads)


def test_huge_logits():
    """Up to about 80 in size."""
    x = made()
    x["q"] *= 18
    logits = torch.einsum("thd,shd->hts", x["q"][:41, ::2], x["k"][:41]) / 4
    assert 60 < logits.abs().max() < 110
    close(gradients(whole(), x), exact(x), 1e-4)


@pytest.mark.parametrize("what", ["keys", "queries"])
def test_equal_scores(what):
    """Equal keys (blocks of equal importance), or queries of 0."""
    x = made()
    if what == "keys":
        x["k"] = x["k"][:1].expand_as(x["k"]).contiguous()
    else:
        x["q"] = torch.zeros_like(x["q"])
    close(gradients(whole(), x), exact(x), 4e-5)


def test_half_precision_with_gates_in_float32():
    """Gradients have their tensor's dtype and are as near as the reference's in float16."""
    x = {name: y.half() if name in "qkv" else y for name, y in made().items()}
    found = gradients(whole(), x)
    assert [grad.dtype for grad in found] == [torch.float16] * 3 + [torch.float32] * 3
    exact_, eager = exact(x), exact(x, dtype=torch.float16)
    for got, want, other in zip(found, exact_, eager, strict=True):
        assert (got.double() - want).norm() <= 2 * (other.double() - want).norm() + 2**-11 * want.norm()


def odd_gradients(o: Tensor) -> dict[str, Tensor]:
    """Output gradients of layouts that kernels cannot read in place, or can, with their values."""
    total, heads, dim = o.shape
    wide = torch.full((total, heads + 1, 2 * dim), math.nan, device=DEVICE)
    wide[:, 1:, ::2] = weight_of(o)
    padded = torch.full((total, heads + 1, dim + 8), math.nan, device=DEVICE)
    padded[:, 1:, 8:] = weight_of(o)
    return {
        "a number": torch.ones((), device=DEVICE).expand_as(o),
        "of a token": weight_of(o[:, :1, :1]).expand_as(o),
        "of a head dim": weight_of(o[:1, :1]).expand_as(o),
        "head first": weight_of(o).transpose(0, 1).contiguous().transpose(0, 1),
        "last dim strided": wide[:, 1:, ::2],
        "last dim first": weight_of(o).permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "padded": padded[:, 1:, 8:],
        "reversed batch": weight_of(o).flip(0),
    }


def test_any_layout_of_output_gradients():
    lengths = (20, 3)
    x = tracked(made(lengths=lengths))
    o = whole(lengths)(**x)
    for name, do in [*odd_gradients(o).items()][::3]:
        found = torch.autograd.grad(o, flat(x), do, retain_graph=True)
        wanted = torch.autograd.grad(o, flat(x), do.contiguous(), retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)), name


def test_inputs_of_any_layout():
    """Gradients have their tensor's shape whatever its strides; elements in between get none."""
    lengths = (20, 3)
    x = made(lengths=lengths, heads=2)
    wanted = gradients(whole(lengths), x)
    wide = {name: torch.stack([y, torch.full_like(y, math.nan)], -1) for name, y in x.items() if isinstance(y, Tensor)}
    found = gradients(lambda **wide: whole(lengths)(**{name: y[..., 0] for name, y in wide.items()}), wide)
    for grad, want in zip(found, wanted, strict=True):
        assert torch.equal(grad[..., 0], want) and not grad[..., 1].any()
    one = x | {name: x[name][:, :1] for name in "kv"}  # one KV head seen as two: its gradients add up
    expanded = gradients(lambda k, v, **rest: whole(lengths)(k=k.expand(-1, 2, -1), v=v.expand(-1, 2, -1), **rest), one)
    copied = gradients(whole(lengths), x | {name: x[name][:, :1].repeat(1, 2, 1) for name in "kv"})
    for name, grad, both in zip(one, expanded, copied, strict=True):
        torch.testing.assert_close(grad, both.sum(1, keepdim=True) if name in "kv" else both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["q", "k", "v", "g_slc"])
def test_one_tensor_that_wants_a_gradient(shared, name):
    x, found, _ = shared
    x = dict(x)
    x[name] = x[name].clone().requires_grad_()
    o = whole()(**x)
    (grad,) = torch.autograd.grad(o, x[name], weight_of(o))
    assert torch.equal(grad, found[[*x].index(name)])


def test_one_tensor_for_all_branches_adds_up():
    """K given three times over is K shared, within rounding."""
    lengths = (40,)
    x = made(lengths=lengths)
    once, thrice = (gradients(run, x) for run in (whole(lengths), lambda k, v, **rest: whole(lengths)(k=(k, k, k), v=(v, v, v), **rest)))
    close(thrice, [grad.double() for grad in once])


def test_nan_gates_pass_through():
    """To the gradients of what the query sees; a gate's own gradient does not depend on it."""
    lengths = (40,)
    x = made(lengths=lengths, heads=2)
    clean = gradients(whole(lengths), x)
    x["g_swa"][39, 1] = math.nan
    found = dict(zip(x, gradients(whole(lengths), x), strict=True))
    assert bool(found["q"][39, 1].isnan().all()) and int(found["q"].isnan().sum()) == 16
    assert bool(found["k"][16:, 0].isnan().all()) and not found["k"][:16].isnan().any() and not found["k"][:, 1].isnan().any()
    assert all(torch.equal(found[name], want) for name, want in zip(x, clean, strict=True) if name in GATES)


# --- the parts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_compress(pooling):
    spec = SPEC.replace(compression={"pooling": pooling, **({"hidden": 48} if pooling == "mlp" else {})}, head_dim={"qk": 16, "v": 32})
    lengths = (37, 0, 5, 20)
    c, all_ = spec.compression, made(spec, lengths, heads=2)
    for which in "kv":
        x = {"x": all_[which], "weights": all_.get(f"phi_{which}", ())}
        found = gradients(lambda which=which, **x: nsa_gen.compress(**x, which=which, **at(lengths, spec)), x)
        wanted = gradients(lambda x, weights: reference.compress(x, pooling, weights, c.block, c.stride, cu_of(lengths)), x, torch.float64)
        close(found, wanted)


PARTS = ("compressed", "selected", "sliding")


def parts(name: str, spec: Spec, lengths: tuple[int, ...]) -> tuple[dict[str, Tensor], Callable[..., Any], Callable[..., Any]]:
    """Tensors of a branch's operator, the operator, and the reference."""
    x, where, cu = made(spec, lengths), at(lengths, spec), cu_of(lengths)
    c, s = spec.compression, spec.selection
    x = {key: x[key] for key in "qkv"}
    if name == "compressed":
        x |= {f"{key}_cmp": nsa_gen.compress(x.pop(key), which=key, **where) for key in "kv"}
        return (
            x,
            lambda **x: nsa_gen.compressed_attention(**x, **where),
            lambda **x: reference.compressed_attention(**x, block=c.block, stride=c.stride, cu_seqlens=cu),
        )
    if name == "sliding":
        return (
            x,
            lambda **x: nsa_gen.sliding_attention(**x, **where),
            lambda **x: reference.sliding_attention(**x, window=spec.window, cu_seqlens=cu),
        )
    blocks = chosen(x, where)
    return (
        x,
        lambda **x: nsa_gen.selected_attention(**x, block_indices=blocks, **where),
        lambda **x: reference.selected_attention(**x, block_indices=blocks, selection_block=s.block, cu_seqlens=cu),
    )


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("name", PARTS)
def test_parts(name, group):
    """With a gradient into the LSE too."""
    spec = SPEC.replace(heads={"query": group, "kv": 1}, head_dim={"qk": 32, "v": 16})
    x, run, exact_run = parts(name, spec, LENGTHS)
    close(gradients(run, x), gradients(exact_run, x, torch.float64))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", PARTS)
def test_parts_by_one_of_their_results(name, which):
    """The output alone or the LSE alone (then v has no gradient), with gradients of odd layouts."""
    x, run, exact_run = parts(name, SPEC, (30, 0, 5))
    found = gradients(lambda **x: run(**x)[which], x)
    close(found, gradients(lambda **x: exact_run(**x)[which], x, torch.float64))
    assert bool(found[2].any()) == (which == 0)


@pytest.mark.parametrize("name", PARTS)
def test_parts_with_gradients_of_any_layout(name):
    x, run, _ = parts(name, SPEC, (20, 3))
    x = tracked(x)
    o, lse = run(**x)
    seen = lse.detach().isfinite()
    dlses = {"turned": weight_of(lse).t().contiguous().t(), "of a head": weight_of(lse[:1]).expand_as(lse)}
    for (name, do), dlse in zip(odd_gradients(o).items(), [*dlses.values()] * 4, strict=True):
        dlse = dlse.where(seen, 0.0) if name == "padded" else dlse
        found, wanted = (
            torch.autograd.grad((o, lse), flat(x), (a, b), retain_graph=True) for a, b in ((do, dlse), (do.contiguous(), dlse.contiguous()))
        )
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)), name


def test_batched_parts():
    x = made(lengths=(19, 19))
    turned = {name: x[name].unflatten(0, (2, 19)) for name in "qkv"}
    found = gradients(lambda **x: nsa_gen.sliding_attention(**x, spec=SPEC), turned)
    weights = [weight_of(o).flatten(0, 1) for o in nsa_gen.sliding_attention(**turned, spec=SPEC)]
    wanted = gradients(lambda **x: nsa_gen.sliding_attention(**x, **at((19, 19))), {name: x[name] for name in "qkv"}, weights=weights)
    close([grad.flatten(0, 1) for grad in found], [grad.double() for grad in wanted], 1e-6)


def test_blocks_of_ones_own():
    """Without the forced ones; queries without any block have no gradient."""
    x = {name: made(lengths=(60,))[name] for name in "qkv"}
    blocks = torch.full((60, 1, 2), -1, dtype=torch.int32, device=DEVICE)
    blocks[40:, 0, 0] = 1
    blocks[50:, 0] = torch.tensor([0, 3], dtype=torch.int32)
    for deterministic in (False, True):
        found = gradients(lambda **x: nsa_gen.selected_attention(**x, block_indices=blocks, spec=SPEC, deterministic=deterministic), x)  # noqa: B023
        close(found, gradients(lambda **x: reference.selected_attention(**x, block_indices=blocks, selection_block=16), x, torch.float64))
        assert not found[0][:40].any() and not found[1][32:48].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_combine(dtype):
    x = made(lengths=(30,), heads=2)
    shape = {f"o_{branch}": weight_of(x["v"].repeat(1, SPEC.group, 1), seed).to(dtype) for seed, branch in enumerate(("cmp", "slc", "swa"))}
    given = shape | {name: x[name].to(torch.float32 if name == "g_slc" else dtype) for name in GATES}
    found = gradients(lambda **x: nsa_gen.combine(**x), given)
    assert [grad.dtype for grad in found] == [y.dtype for y in given.values()]
    close(found, gradients(lambda **x: reference.combine(**x), given, torch.float64), 1e-5 if dtype == torch.float32 else 2e-3)


def test_the_choice_of_blocks_has_no_gradient():
    x = tracked({name: made(lengths=(40,))[name] for name in "qkv"})
    where = at((40,))
    k_cmp = nsa_gen.compress(x["k"], **where)
    _, lse = nsa_gen.compressed_attention(x["q"], k_cmp, k_cmp, **where)
    assert k_cmp.requires_grad and lse.requires_grad
    assert not nsa_gen.select_blocks(x["q"], k_cmp, lse, **where).requires_grad


# --- autograd, checkpoints, compilation --------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused():
    for run in (whole((9,)), whole((9,), recompute=True), lambda q, k, v, **_: nsa_gen.sliding_attention(q, k, v, spec=SPEC)[0]):
        x = tracked(made(lengths=(9,)))
        (dq,) = torch.autograd.grad(run(**x).square().sum(), x["q"], create_graph=True)
        assert dq.requires_grad
        with pytest.raises(NSAError, match=r"nsa_gen::\w+_bwd has no backward"):
            dq.sum().backward()


def test_a_graph_may_be_used_twice_if_kept():
    x = tracked(made(lengths=(9,)))
    o = whole((9,))(**x)
    first, second = (torch.autograd.grad(o, x["q"], weight_of(o), retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(o, x["q"], weight_of(o))


def test_an_argument_changed_in_place_is_noticed():
    x = tracked(made(lengths=(9,)))
    k = x["k"] * 1.0
    o = whole((9,))(**x | {"k": k})
    k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def kept(run: Callable[..., Tensor], x: dict[str, Any]) -> list[Tensor]:
    """What a call keeps for its backward besides its arguments."""
    saved: list[Tensor] = []
    known = {y.untyped_storage().data_ptr() for y in flat(x)}
    with torch.autograd.graph.saved_tensors_hooks(lambda y: [saved.append(y), y][1], lambda y: y):
        run(**x)
    return [y for y in saved if y.numel() and y.untyped_storage().data_ptr() not in known]


def test_what_is_kept():
    """Three outputs, three LSEs, block indices and compressed K and V; with recompute nothing; without gradients nothing."""
    lengths = (49, 7)
    x = made(lengths=lengths)
    cu = at(lengths)
    run = lambda **x: nsa_gen.nsa_attention(**x, **cu)  # noqa: E731
    again = lambda **x: nsa_gen.nsa_attention(**x, **cu, recompute=True)  # noqa: E731
    known = tracked(x)
    known["cu_seqlens"] = cu.pop("cu_seqlens")
    found = kept(run, known)
    assert sorted(tuple(y.shape) for y in found) == sorted([(56, 2, 16)] * 3 + [(56, 2)] * 3 + [(56, 1, 2)] + [(14, 1, 16)] * 2)
    assert not kept(again, known)
    rows = {name: torch.zeros(14, 1, 16, device=DEVICE) for name in ("k_cmp", "v_cmp")}
    assert len(kept(run, known | rows)) == 7 and not kept(again, known | rows)
    with torch.no_grad():
        assert not kept(run, known)
    assert not kept(run, {name: y if name == "cu_seqlens" else x[name] for name, y in known.items()})


def test_checkpoint(shared):
    x, found, _ = shared
    leaves = tracked(x)
    o = checkpointing.checkpoint(lambda: whole()(**leaves), use_reentrant=False)
    again = torch.autograd.grad(o, flat(leaves), weight_of(o))
    close(list(again), [grad.double() for grad in found], 1e-5)


@pytest.mark.parametrize(("dynamic", "recompute"), [(False, False), (True, False), (False, True)])
def test_a_compiled_training_step_is_eager(dynamic, recompute):
    torch._dynamo.reset()
    spec, lengths = SPEC.replace(compression={"pooling": "weighted"}), (9, 4)
    x, where = made(spec, lengths), at(lengths, spec)

    def step(x: dict[str, Any]) -> Tensor:
        x = {name: tuple(z * 1.0 for z in y) if isinstance(y, tuple) else y * 1.0 for name, y in x.items()}
        return nsa_gen.nsa_attention(**x, **where, recompute=recompute).square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found, wanted = (gradients(lambda run=run, **x: run(x), x) for run in (compiled, step))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    torch._dynamo.reset()


def test_compiled_parts_are_eager():
    torch._dynamo.reset()
    x = made(lengths=(20,), heads=2)
    x = {name: x[name] for name in "qkv"} | {name: x[name] for name in GATES}

    def step(q: Tensor, k: Tensor, v: Tensor, **gates: Tensor) -> tuple[Tensor, ...]:
        k_cmp, v_cmp = (nsa_gen.compress(y, which=which, spec=SPEC) for which, y in (("k", k), ("v", v)))
        o_cmp, lse = nsa_gen.compressed_attention(q, k_cmp, v_cmp, spec=SPEC)
        blocks = nsa_gen.select_blocks(q, k_cmp, lse, spec=SPEC)
        o_slc, lse_slc = nsa_gen.selected_attention(q, k, v, blocks, spec=SPEC, deterministic=True)
        o_swa, _ = nsa_gen.sliding_attention(q, k, v, spec=SPEC)
        return nsa_gen.combine(o_cmp, o_slc, o_swa, **gates), lse_slc

    found, wanted = (gradients(run, x) for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    close(found, gradients(lambda **x: (nsa_gen.nsa_attention(**x, spec=SPEC), step(**x)[1]), x))
    torch._dynamo.reset()


def test_autocast():
    """A projection in float16 under autocast: gradients reach its weights in float32, and are those of the same casts written out."""
    torch.manual_seed(0)
    x, tokens = made(lengths=(20,)), torch.randn(20, 24, device=DEVICE)
    layer = torch.nn.Linear(24, 16 * 2 + 16 + 16, device=DEVICE)

    def attended(y: Tensor) -> Tensor:
        q, k, v = y.split((32, 16, 16), -1)
        gates = {name: x[name] for name in GATES}
        return nsa_gen.nsa_attention(q.unflatten(-1, (2, 16)), k.unflatten(-1, (1, 16)), v.unflatten(-1, (1, 16)), **gates, spec=SPEC)

    with torch.autocast(DEVICE.type, torch.float16):
        o = attended(layer(tokens))
        assert o.dtype == torch.float16
        loss = o.float().square().sum()
    loss.backward()
    found = layer.weight.grad
    weight, bias = (y.detach().half().requires_grad_() for y in (layer.weight, layer.bias))
    attended(torch.nn.functional.linear(tokens.half(), weight, bias)).float().square().sum().backward()
    assert found.dtype == torch.float32 and bool(found.any())
    torch.testing.assert_close(found, weight.grad.float(), rtol=1e-3, atol=1e-3)
