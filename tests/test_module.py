"""The layer: against its own maths written out in float64, its positions, its gradients, and its state."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nsa_gen
from nsa_gen import InputError, SpecError, reference
from nsa_gen.branches._inputs import tokens_of
from nsa_gen.module import NSAttention
from nsa_gen.rope import positions_of, positions_of_blocks, rotary
from nsa_gen.spec import POOLINGS, load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPEC = load("tiny")
HIDDEN, HQ, HKV, D = 32, 4, 2, 16
LENGTHS = (73, 0, 7, 1, 14)
BLOCK, STRIDE = SPEC.compression.block, SPEC.compression.stride


def spec_with(pooling: str, **more) -> nsa_gen.Spec:
    hidden = {"hidden": 32} if pooling == "mlp" else {}
    return SPEC.replace(compression={"pooling": pooling, **hidden}, **more)


def layer(
    pooling: str = "mean", *, implementation: str = "reference", seed: int = 0, spec_changes: dict | None = None, **more
) -> NSAttention:
    """A layer with no parameter left at its start, so that each counts."""
    torch.manual_seed(seed)
    made = NSAttention(HIDDEN, spec_with(pooling, **spec_changes or {}), implementation=implementation, device=DEVICE, **more)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def hidden_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def cu_of(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as complex numbers: ``x [T,H,D]``, float64."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] * theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    found = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([found.real, found.imag], -1)


def written_out(module: NSAttention, x: Tensor, lengths: tuple[int, ...], position_ids: Tensor | None = None) -> Tensor:
    """The layer in float64, one line a step; rope is a number or None."""
    p = {name: value.detach().double() for name, value in module.named_parameters()}
    c = module.spec.compression

    def heads(projection: str, count: int) -> Tensor:
        y = x.double() @ p[f"{projection}.weight"].T + p.get(f"{projection}.bias", 0.0)
        return y.unflatten(-1, (count, -1))

    q, k, v = heads("q_proj", HQ), heads("k_proj", HKV), heads("v_proj", HKV)
    gates = heads("gate_proj", HQ).sigmoid()
    k, v = (y.unflatten(-1, (3, D)).unbind(2) if module.per_branch_kv else (y,) * 3 for y in (k, v))
    phi_k, phi_v = (tuple(p[f"{phi}.{name}"] for name in module.phi_k.names) for phi in ("phi_k", "phi_v"))
    place = torch.cat([torch.arange(length, device=x.device) for length in lengths])
    positions = place if position_ids is None else position_ids
    compressed = None
    if module.rope is not None:
        plain, q = k[0], turned(q, positions, module.rope)
        k = tuple(turned(y, positions, module.rope) for y in k)
        if module.phi_keys == "unrotated":
            k_cmp, v_cmp = (
                reference.compress(y, c.pooling, w, c.block, c.stride, cu_of(lengths)) for y, w in ((plain, phi_k), (v[0], phi_v))
            )
            start = 0
            for length in lengths:
                for j in range(max(0, (length - c.block) // c.stride + 1)):
                    row, token = start // c.stride + j, start + j * c.stride + c.block // 2
                    k_cmp[row : row + 1] = turned(k_cmp[row : row + 1], positions[token : token + 1], module.rope)
                start += length
            compressed = (k_cmp, v_cmp)
    o = reference.nsa_attention(q, k, v, *gates.unbind(-1), module.spec, phi_k, phi_v, cu_seqlens=cu_of(lengths), compressed=compressed)
    return o.flatten(1) @ p["o_proj.weight"].T + p.get("o_proj.bias", 0.0)


def close(got: Tensor, want: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=2e-4)


# --- forward -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi_keys", ["rotated", "unrotated"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_forward_is_its_maths(pooling, phi_keys):
    module = layer(pooling, rope=100.0, phi_keys=phi_keys, bias=pooling == "linear")
    x = hidden_of(sum(LENGTHS))
    close(module(x, cu_seqlens=cu_of(), max_seqlen=max(LENGTHS)), written_out(module, x, LENGTHS))


@pytest.mark.parametrize(
    "options",
    [
        {"rope": 100.0},
        {"pooling": "mlp", "rope": 100.0, "per_branch_kv": True, "bias": True},
    ],
    ids=str,
)
def test_kernels_give_the_forward(options):
    lengths = (70, 0, 9)
    module, x = layer(implementation="kernels", **options), hidden_of(sum(lengths))
    with torch.no_grad():
        close(module(x, cu_seqlens=cu_of(lengths), max_seqlen=70), written_out(module, x, lengths))


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
def test_batched_is_packed_with_equal_lengths(implementation):
    module = layer("linear", rope=100.0, implementation=implementation)  # rows of compressed tokens: 21 is no multiple of the stride
    x = hidden_of(2, 21)
    with torch.no_grad():
        y = module(x)
        assert y.shape == x.shape
        close(y.flatten(0, 1), written_out(module, x.flatten(0, 1), (21,) * 2))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
@pytest.mark.parametrize("phi_keys", ["rotated", "unrotated"])
def test_nothing_in_gives_nothing_out(lengths, phi_keys):
    for implementation in ("kernels", "reference"):
        module = layer(rope=100.0, phi_keys=phi_keys, implementation=implementation)
        with torch.no_grad():
            assert module(hidden_of(0), cu_seqlens=cu_of(lengths)).shape == (0, HIDDEN)
            assert module(hidden_of(2, 0)).shape == (2, 0, HIDDEN)
            assert module(hidden_of(0), position_ids=torch.zeros(0, dtype=torch.int32, device=DEVICE)).shape == (0, HIDDEN)


def test_kv_per_branch_follows_the_spec_and_is_laid_out_head_first():
    module = layer(rope=100.0, spec_changes={"kv": "per_branch"})
    assert module.per_branch_kv and module.k_proj.out_features == 3 * HKV * D
    x = hidden_of(70)
    close(module(x), written_out(module, x, (70,)))
    assert not layer(spec_changes={"kv": "per_branch"}, per_branch_kv=False).per_branch_kv


def test_head_dims_that_differ():
    spec = SPEC.replace(heads={"query": 3, "kv": 1}, head_dim={"qk": 32, "v": 16}, compression={"pooling": "mlp"})
    module = NSAttention(HIDDEN, spec, rope=100.0, implementation="reference")
    assert module.phi_k.w2.shape == (1, 32, 32) and module.phi_v.w2.shape == (1, 16, 16)  # hidden: the head dim
    assert module(hidden_of(40).cpu()).shape == (40, HIDDEN)


# --- the start ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["weighted", "linear"])
def test_weighted_and_linear_start_as_the_mean(pooling):
    x = hidden_of(60)
    found = []
    for one in ("mean", pooling):
        torch.manual_seed(3)
        found.append(NSAttention(HIDDEN, spec_with(one), rope=100.0, phi_keys="rotated", implementation="reference", device=DEVICE)(x))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_gates_start_at_a_third_and_mlp_at_the_scale_of_its_input():
    module = NSAttention(HIDDEN, spec_with("mlp", head_dim={"qk": 64, "v": 64}), implementation="reference")
    gates = module.gate_proj(hidden_of(5).cpu()).sigmoid()
    torch.testing.assert_close(gates, torch.full_like(gates, 1 / 3))
    out = reference.compress(torch.randn(400, HKV, 64), "mlp", module.phi_k(torch.float32), BLOCK, STRIDE)
    assert 0.3 < float(out[:99].detach().std()) < 1.5
    assert not module.phi_k.b1.any() and not module.phi_k.b2.any()


def test_built_on_meta_then_reset():
    torch.manual_seed(0)
    module = NSAttention(HIDDEN, spec_with("mlp"), device="meta", dtype=torch.bfloat16, implementation="reference")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    module = module.to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    module.reset_parameters()
    assert all(p.isfinite().all() for p in module.parameters())
    assert module(hidden_of(20).cpu()).isfinite().all()


# --- positions -----------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), max_size=6))
def test_positions_of_tokens_and_blocks(lengths):
    total = sum(lengths)
    x, cu = torch.zeros(total, 1), cu_of(tuple(lengths)).cpu()
    tokens = tokens_of("x", x, cu, None, rank=2)
    want = [t for length in lengths for t in range(length)]
    assert positions_of(tokens, x.device).tolist() == want
    ids = torch.arange(total) * 3 + 1
    found, given = positions_of_blocks(tokens, SPEC, x.device), positions_of_blocks(tokens, SPEC, x.device, ids)
    assert len(found) == len(given) == max(total // STRIDE, 1)
    for start, length in zip(cu.tolist(), lengths, strict=False):
        for j in range(max(0, (length - BLOCK) // STRIDE + 1)):
            assert found[start // STRIDE + j] == j * STRIDE + BLOCK // 2
            assert given[start // STRIDE + j] == ids[start + j * STRIDE + BLOCK // 2]


def test_positions_of_a_batch():
    tokens = tokens_of("x", torch.zeros(3, 22, 1), None, None, rank=2)
    assert positions_of(tokens, torch.device("cpu")).tolist() == [*range(22)] * 3
    blocks = positions_of_blocks(tokens, SPEC, torch.device("cpu"))
    for b in range(3):
        assert blocks[b * 22 // 4 : b * 22 // 4 + 4].tolist() == [4, 8, 12, 16]


def test_rotary_turns_pairs():
    x, positions = torch.randn(9, 2, 16), torch.tensor([0, 1, 2, 3, 50, 1000, 7, 7, 0])
    torch.testing.assert_close(rotary(x, positions, 500.0).double(), turned(x.double(), positions, 500.0), atol=2e-4, rtol=1e-4)
    assert torch.equal(rotary(x, positions * 0, 500.0), x)
    assert rotary(x.bfloat16(), positions, 500.0).dtype == torch.bfloat16


@pytest.mark.parametrize("pooling", POOLINGS)
def test_by_default_distances_alone_count(pooling):
    """And φ that mixes dimensions would see absolute positions, were it to read rotated keys."""
    module, x = layer(pooling, rope=100.0), hidden_of(2, 40)
    at = torch.arange(40, device=DEVICE).expand(2, -1)
    y = module(x)
    torch.testing.assert_close(module(x, position_ids=at), y)
    torch.testing.assert_close(module(x, position_ids=at + 77), y, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(module(x, position_ids=at * 2), y, atol=1e-3)
    if pooling in ("linear", "mlp"):
        module.phi_keys = "rotated"
        assert not torch.allclose(module(x, position_ids=at + 77), module(x), atol=1e-3)


def test_rope_of_ones_own():
    x = hidden_of(50)
    module = layer(rope=100.0)
    want = module(x)
    seen = []

    def rope(y: Tensor, positions: Tensor) -> Tensor:
        seen.append((tuple(y.shape), positions.dtype, positions.tolist()))
        return rotary(y, positions, 100.0).double()  # cast back

    module.rope = rope
    assert torch.equal(module(x), want)
    assert seen == [((50, heads, D), torch.int64, [*range(50)]) for heads in (HQ, HKV)]
    module.rope = lambda y, positions: y[:, :1]
    with pytest.raises(InputError, match=r"rope must return a tensor of its argument's shape \[50, 4, 16\], got \[50, 1, 16\]"):
        module(x)
    assert "rope=function" in repr(module) and "spec='tiny'" in repr(module)


# --- dtypes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "mlp"])
def test_autocast_of_float32_parameters(pooling):
    module, x = layer(pooling, rope=100.0), hidden_of(60)
    want = written_out(module, x, (60,))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
        assert module(x.bfloat16()).dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
    assert float((y.double() - want).norm() / want.norm()) < 0.02


def test_autocast_reaches_the_kernels():
    """float16: the interpreter's bfloat16 dot is wrong."""
    module, x = layer("linear", rope=100.0, implementation="kernels"), hidden_of(30)
    want = written_out(module, x, (30,))
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.float16):
        y = module(x)
    assert y.dtype == torch.float16
    assert float((y.double() - want).norm() / want.norm()) < 0.01


# --- torch.compile and gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rope": 100.0}, {"pooling": "mlp", "rope": 100.0, "per_branch_kv": True}], ids=str)
def test_compiled_is_eager(options):
    torch._dynamo.reset()
    module = layer(implementation="kernels", **options)
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, cu = hidden_of(20), cu_of((11, 9))
    with torch.no_grad():
        torch.testing.assert_close(step(x, cu_seqlens=cu, max_seqlen=11), module(x, cu_seqlens=cu, max_seqlen=11), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(step(x.unflatten(0, (2, 10))), module(x.unflatten(0, (2, 10))), atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


def gradients(module: NSAttention, x: Tensor, **at) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x, **at)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return {"hidden": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_reach_every_parameter(pooling):
    module = layer(pooling, rope=100.0, per_branch_kv=True, bias=True)
    for name, grad in gradients(module, hidden_of(sum(LENGTHS)), cu_seqlens=cu_of()).items():
        assert grad is not None and grad.isfinite().all() and grad.any(), name


@pytest.mark.parametrize(
    "options", [{"rope": 100.0}, {"pooling": "mlp", "rope": 100.0, "per_branch_kv": True}, {"pooling": "weighted", "rope": 100.0}], ids=str
)
def test_gradients_of_the_kernels_are_the_reference_s(options):
    lengths = (41, 0, 9)
    x, at = hidden_of(sum(lengths)), {"cu_seqlens": cu_of(lengths), "max_seqlen": 41}
    module = layer(**options)
    want = gradients(module, x, **at)
    module.implementation = "kernels"
    for name, grad in gradients(module, x, **at).items():
        assert float((grad - want[name]).norm()) < 1e-4 * float(want[name].norm()) + 1e-5, name


def test_a_compiled_step_trains():
    torch._dynamo.reset()
    module, x = layer("weighted", rope=100.0, implementation="kernels"), hidden_of(2, 20)
    want = gradients(module, x)
    found = gradients(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    for name, grad in want.items():
        torch.testing.assert_close(found[name if name in found else f"_orig_mod.{name}"], grad, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


# --- state -------------------------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, attention: NSAttention):
        super().__init__()
        self.attention, self.norm = attention, torch.nn.LayerNorm(HIDDEN)


def test_state_survives_files_and_casts():
    module, other = Block(layer("mlp", rope=100.0)), Block(layer("mlp", rope=100.0, seed=5))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["attention._extra_state"].dtype == torch.uint8
    other.load_state_dict(state)
    x = hidden_of(30)
    assert torch.equal(other.attention(x), module.attention(x))
    other.load_state_dict({name: value.bfloat16() for name, value in state.items()})
    other.load_state_dict(dict(state))  # without metadata, as safetensors give it
    assert torch.equal(other.attention(x), module.attention(x))
    copy.deepcopy(module).load_state_dict(other.state_dict())


def test_state_passes_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    module, other = layer("weighted"), layer("weighted", seed=5)
    safetensors.save_file(module.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other.phi_k.weight, module.phi_k.weight)


def test_state_without_its_geometry_loads():
    module, other = Block(layer("weighted")), Block(layer("weighted", seed=5))
    state = module.state_dict()
    del state["attention._extra_state"]
    found = other.load_state_dict(state)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(other.attention.phi_v.weight, module.attention.phi_v.weight)
    del state["attention.q_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*attention\.q_proj\.weight"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec_changes": {"window": 25}}, r"trained with geometry '4 2 16 16 8 4 0 16 4 1 2 24 mean overlap', this layer has '.* 25 mean"),
        ({"spec_changes": {"selection": {"mapping": "literal"}}}, "mean literal"),
        ({"per_branch_kv": True}, "trained with kv 'shared', this layer has 'per_branch'"),
        ({"phi_keys": "unrotated"}, "trained with phi_keys 'rotated', this layer has 'unrotated'"),
    ],
    ids=str,
)
def test_state_of_another_geometry_is_refused(change, message):
    state = Block(layer()).state_dict()
    other = Block(layer(seed=5, **change))
    before = copy.deepcopy(other.attention.q_proj.weight)
    with pytest.raises(InputError, match=message) as error:
        other.load_state_dict(state)
    assert "delete 'attention._extra_state'" in str(error.value)
    assert torch.equal(other.attention.q_proj.weight, before)
    if "per_branch_kv" not in change:
        del state["attention._extra_state"]
        other.load_state_dict(state)


def test_a_spec_s_name_and_rope_do_not_bind_its_state():
    module, other = layer(rope=1e4), layer(rope=1e6, spec_changes={"name": "other", "dtype": "bfloat16"}, implementation="kernels")
    other.load_state_dict(module.state_dict())


def test_state_of_a_later_version_and_of_no_version():
    module = layer()
    state = module.state_dict()
    state._metadata[""]["version"] = 9
    del state["_extra_state"]
    with pytest.raises(InputError, match="state of version 9, this nsa-gen reads versions up to 1"):
        module.load_state_dict(state)
    for wrong in (torch.zeros(3), "text", torch.tensor([*b'{"version": "2"}'], dtype=torch.uint8)):
        with pytest.raises(InputError, match="_extra_state is not what nsa-gen wrote there"):
            module.load_state_dict({**module.state_dict(), "_extra_state": wrong})


# --- bad input ---------------------------------------------------------------------------------------------------------------------

_BAD_LAYER = {
    "hidden": ({"hidden_size": 0}, "hidden_size must be a whole number from 1, got 0"),
    "hidden type": ({"hidden_size": 32.0}, "hidden_size must be a whole number"),
    "spec": ({"spec": 7}, "spec must be a name, a path or a Spec, got int"),
    "rope": ({"rope": -1.0}, r"rope must be a number above 0 \(the base θ\), a function .* or None, got -1.0"),
    "rope text": ({"rope": "llama"}, "got 'llama'"),
    "phi_keys": ({"phi_keys": "plain"}, "phi_keys: got 'plain', allowed: rotated, unrotated, None"),
    "kv": ({"per_branch_kv": 3}, "per_branch_kv: got 3, allowed: True, False, None"),
    "implementation": ({"implementation": "cuda"}, "implementation: got 'cuda', allowed: kernels, reference"),
}


@pytest.mark.parametrize("name", _BAD_LAYER)
def test_bad_options_are_named(name):
    changes, message = _BAD_LAYER[name]
    with pytest.raises(InputError, match=message):
        NSAttention(**{"hidden_size": HIDDEN, "spec": "tiny", **changes})


def test_a_spec_that_is_not_there():
    with pytest.raises(SpecError, match="tinny"):
        NSAttention(HIDDEN, "tinny")


_BAD_CALL = {
    "list": ({"hidden": [1.0]}, "hidden must be a tensor, got list"),
    "rank": ({"hidden": torch.zeros(HIDDEN)}, r"hidden must be \[T, 32\] or \[B, S, 32\], got \[32\]"),
    "width": ({"hidden": torch.zeros(4, 31)}, r"got \[4, 31\]"),
    "dtype": ({"hidden": torch.zeros(4, HIDDEN, dtype=torch.float64)}, "torch.float64, allowed: torch.bfloat16"),
    "mixed": ({"hidden": torch.zeros(4, HIDDEN).bfloat16()}, "torch.bfloat16, allowed: torch.float32 .*or any under torch.autocast"),
    "cu": ({"cu_seqlens": torch.tensor([0, 20])}, "cu_seqlens must be int32"),
    "cu batched": ({"hidden": torch.zeros(2, 4, HIDDEN), "cu_seqlens": torch.tensor([0, 8])}, "batched"),
    "cu end": ({"cu_seqlens": torch.tensor([0, 19], dtype=torch.int32)}, "end at 20"),
    "max_seqlen": ({"max_seqlen": 3}, "leave it out"),
    "positions type": ({"position_ids": [0]}, "position_ids must be a tensor of integers, got list"),
    "positions dtype": ({"position_ids": torch.zeros(20)}, "tensor of integers, got torch.float32"),
    "positions shape": ({"position_ids": torch.zeros(1, 20).int()}, r"position_ids must be \[20\] on .*, got \[1, 20\]"),
}


@pytest.mark.parametrize("name", _BAD_CALL)
def test_bad_calls_are_named(name, monkeypatch):
    monkeypatch.setenv("NSA_GEN_DEBUG", "1")
    changes, message = _BAD_CALL[name]
    module = layer(rope=100.0)
    call = {"hidden": torch.zeros(20, HIDDEN), **changes}
    with pytest.raises(InputError, match=message):
        module(**{key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in call.items()})
