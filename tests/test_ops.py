from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nsa_gen
from nsa_gen import InputError, NSAError, lookup, reference
from nsa_gen.branches import _inputs, selection
from nsa_gen.config import Config
from nsa_gen.spec import load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPEC = load("tiny")
G, HKV, D = SPEC.group, 2, 16
HQ = G * HKV
LENGTHS = (73, 0, 7, 1, 4)  # 73 > 4 blocks of 16: queries leave blocks out
C, S = SPEC.compression, SPEC.selection


def packed(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    made = {"q": normal(total, HQ, D), "k": normal(total, HKV, D), "v": normal(total, HKV, D)}
    return made | {name: normal(total, HQ).sigmoid() for name in ("g_cmp", "g_slc", "g_swa")}


def cu_of(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


def expected(x: dict, lengths: tuple[int, ...] = LENGTHS, spec=SPEC, **more) -> Tensor:
    def double(value):
        return tuple(map(double, value)) if isinstance(value, tuple) else value.double()

    return reference.nsa_attention(**{name: double(value) for name, value in x.items()}, spec=spec, cu_seqlens=cu_of(lengths), **more)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=3e-5)


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], Tensor]:
    x = packed()
    return x, nsa_gen.nsa_attention(**x, spec=SPEC, cu_seqlens=cu_of(), max_seqlen=max(LENGTHS))


def test_whole_forward_is_the_reference(whole):
    x, o = whole
    assert o.shape == (sum(LENGTHS), HQ, D)
    close(o, expected(x))


@pytest.mark.parametrize(
    ("operands", "loads", "count", "initial", "local"),
    [
        ("rows", "pointer", 4, 1, 2),
        ("rows", "descriptor", 5, 1, 2),
        ("keys", "pointer", 5, 1, 2),
        ("rows", "pointer", 3, 0, 0),
        ("keys", "descriptor", 3, 0, 0),
        ("rows", "descriptor", 3, 1, 2),
    ],
)
def test_query_outer_selected_attention_gives_the_forward(operands, loads, count, initial, local):
    """One partial result a query at the fused end, where KV-outer has one a block, or none where all blocks are forced."""
    values = {"loop": "query_outer", "operands": operands, "loads": loads, "num_warps": 1, "num_stages": 2}
    spec, x = SPEC.replace(selection={"count": count, "initial": initial, "local": local}), packed()
    with lookup.override(Config.of("selected_attention_fwd", values)):
        o = nsa_gen.nsa_attention(**x, spec=spec, cu_seqlens=cu_of(), max_seqlen=max(LENGTHS))
    close(o, expected(x, spec=spec))


def test_parts_compose_to_the_whole_and_each_is_the_reference(whole):
    x, o = whole
    q, k, v = x["q"], x["k"], x["v"]
    at = {"spec": "tiny", "cu_seqlens": cu_of(), "max_seqlen": 73}
    k_cmp, v_cmp = nsa_gen.compress(k, **at), nsa_gen.compress(v, which="v", **at)
    close(k_cmp, reference.compress(k.double(), C.pooling, (), C.block, C.stride, cu_of()))
    o_cmp, lse = nsa_gen.compressed_attention(q, k_cmp, v_cmp, **at)
    want = reference.compressed_attention(q.double(), k_cmp.double(), v_cmp.double(), C.block, C.stride, cu_seqlens=cu_of())
    close(o_cmp, want[0])
    assert torch.equal(lse == -math.inf, want[1] == -math.inf) and bool((lse == -math.inf).any())
    block_indices = nsa_gen.select_blocks(q, k_cmp, lse, **at)
    scores = reference.importance(q.double(), k_cmp.double(), want[1], C.block, C.stride, S.block, cu_seqlens=cu_of())
    assert torch.equal(block_indices, reference.select_blocks(scores, S.block, S.count, S.initial, S.local, cu_of()))
    o_slc, _ = nsa_gen.selected_attention(q, k, v, block_indices, **at)
    close(o_slc, reference.selected_attention(q.double(), k.double(), v.double(), block_indices, S.block, cu_seqlens=cu_of())[0])
    o_swa, lse_swa = nsa_gen.sliding_attention(q, k, v, **at)
    want = reference.sliding_attention(q.double(), k.double(), v.double(), SPEC.window, cu_seqlens=cu_of())
    close(o_swa, want[0])
    close(lse_swa, want[1])
    again = nsa_gen.combine(o_cmp, o_slc, o_swa, x["g_cmp"], x["g_slc"], x["g_swa"])
    torch.testing.assert_close(again, o, atol=1e-6, rtol=1e-6)  # the whole forward may add up inside the selected branch


def test_batched_is_packed_with_equal_lengths():
    x = packed((19, 19), seed=1)
    batched = {name: value.unflatten(0, (2, 19)) for name, value in x.items()}
    o = nsa_gen.nsa_attention(**batched, spec=SPEC)
    assert o.shape == (2, 19, HQ, D)
    close(o.flatten(0, 1), expected(x, (19, 19)))
    out, lse = nsa_gen.sliding_attention(batched["q"], batched["k"], batched["v"], spec=SPEC)
    assert out.shape == (2, 19, HQ, D) and lse.shape == (2, 19, HQ)
    # [B,H,S,D] seen as [B,S,H,D]: tokens of a batch cannot be flattened in place
    turned = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in batched.items()}
    assert torch.equal(nsa_gen.nsa_attention(**turned, spec=SPEC), o)


def test_any_strides_and_addresses(whole):
    x, o = whole

    def odd(value: Tensor) -> Tensor:
        if value.dim() == 2:  # gates as one projection gives them
            return torch.stack([value, value, value], -1).unbind(-1)[1]
        wide = value.new_full((len(value), value.shape[1] + 1, D + 3), math.nan)
        wide[:, 1:, 3:] = value
        return wide[:, 1:, 3:]

    found = nsa_gen.nsa_attention(**{name: odd(value) for name, value in x.items()}, spec=SPEC, cu_seqlens=cu_of(), max_seqlen=73)
    assert torch.equal(found, o)


def test_ready_copies_only_what_kernels_cannot_read():
    x = torch.randn(6, 4, 32)
    for fine in (x, x[:, 1:3], x[::2], x[:, :, :16], x[:, :1].expand(-1, 4, -1), x[:1].transpose(0, 1).transpose(0, 1)):
        assert _inputs.ready(fine) is fine
    for copied in (x[:, :, ::2], x[:, :, 1:17], x.transpose(1, 2).contiguous().transpose(1, 2), torch.randn(6, 4, 17)[:, :, :16]):
        found = _inputs.ready(copied)
        assert found is not copied and torch.equal(found, copied) and found.is_contiguous() and found.data_ptr() % 16 == 0


def test_kv_per_branch_and_compressed_by_the_caller():
    lengths = (67, 5)
    x, other, third = (packed(lengths, seed) for seed in (2, 3, 4))
    gates = {name: x[name] for name in ("g_cmp", "g_slc", "g_swa")}
    k, v = ((x[n], other[n], third[n]) for n in "kv")
    at = {"cu_seqlens": cu_of(lengths), "max_seqlen": 67}
    o = nsa_gen.nsa_attention(x["q"], k, v, **gates, spec=SPEC, **at)
    close(o, expected({"q": x["q"], "k": k, "v": v} | gates, lengths))
    k_cmp, v_cmp = nsa_gen.compress(x["k"], spec=SPEC, **at), nsa_gen.compress(x["v"], spec=SPEC, which="v", **at)
    assert torch.equal(nsa_gen.nsa_attention(x["q"], k, v, **gates, spec=SPEC, k_cmp=k_cmp, v_cmp=v_cmp, **at), o)


def test_head_dims_that_differ_groups_and_phi():
    spec = SPEC.replace(heads={"query": 3, "kv": 1}, head_dim={"qk": 32, "v": 16}, compression={"pooling": "mlp", "hidden": 16})
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(DEVICE)

    q, k, v, gates = normal(70, 3, 32), normal(70, 1, 32), normal(70, 1, 16), [normal(70, 3) for _ in range(3)]
    phi_k, phi_v = (
        (normal(1, 8 * d, 16, std=0.1), normal(1, 16), normal(1, 16, d, std=0.2), normal(1, d), normal(1, 8, d)) for d in (32, 16)
    )
    o = nsa_gen.nsa_attention(q, k, v, *gates, spec=spec, phi_k=phi_k, phi_v=phi_v, scale=0.3)
    want = reference.nsa_attention(q, k, v, *gates, spec, phi_k, phi_v, scale=0.3, dtype=torch.float64)
    close(o, want)


def test_chunks_of_queries_do_not_change_the_selection(whole, monkeypatch):
    x, _ = whole
    at = {"spec": SPEC, "cu_seqlens": cu_of(), "max_seqlen": 73}
    k_cmp = nsa_gen.compress(x["k"], **at)
    lse = nsa_gen.compressed_attention(x["q"], k_cmp, k_cmp, **at)[1]
    once = nsa_gen.select_blocks(x["q"], k_cmp, lse, **at)
    monkeypatch.setenv("NSA_GEN_WORKSPACE", "1K")
    monkeypatch.setattr(selection, "CHUNK", 32)
    assert selection.query_chunk(105, 64, 1024) == 32
    assert torch.equal(nsa_gen.select_blocks(x["q"], k_cmp, lse, **at), once)


@pytest.mark.parametrize(
    ("total", "row", "bound"), [(1, 64, 1 << 30), (65536, 16384, 1 << 28), (10**6, 1 << 20, 1 << 20), (70000, 4096, 10**8)]
)
def test_query_chunks_are_whole_even_and_bounded(total, row, bound):
    chunk = selection.query_chunk(total, row, bound)
    assert chunk % selection.CHUNK == 0 and chunk > 0
    assert chunk * row <= bound or chunk == selection.CHUNK
    assert chunk * (-(-total // chunk) - 1) < total


def test_short_sequences_choose_all_candidates_without_importance():
    x = packed((40,), seed=6)
    k_cmp = nsa_gen.compress(x["k"], spec=SPEC)
    nothing = torch.full((40, HQ), math.nan, device=DEVICE)
    found = nsa_gen.select_blocks(x["q"], k_cmp, nothing, spec=SPEC)
    assert found[39, 0].tolist() == [0, 1, 2, -1] and found[15, 1].tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_nothing_in_gives_nothing_out(lengths):
    x = packed(lengths)
    o = nsa_gen.nsa_attention(**x, spec=SPEC, cu_seqlens=cu_of(lengths))
    assert o.shape == (0, HQ, D)
    k_cmp = nsa_gen.compress(x["k"], spec=SPEC, cu_seqlens=cu_of(lengths))
    assert k_cmp.shape == (1, HKV, D) and not k_cmp.any()
    assert nsa_gen.nsa_attention(**{n: t.unflatten(0, (3, 0)) for n, t in packed(()).items()}, spec=SPEC).shape == (3, 0, HQ, D)


def test_nan_gates_pass_through_and_float32_gates_are_taken():
    x = {name: value.half() for name, value in packed((9,)).items()}
    x["g_slc"] = x["g_slc"].float()
    x["g_slc"][4, 1] = math.nan
    o = nsa_gen.nsa_attention(**x, spec=SPEC)
    assert o.dtype == torch.float16
    assert bool(o[4, 1].isnan().all()) and int(o.isnan().sum()) == D


# --- bad input -------------------------------------------------------------------------------------------------------------------

_BAD = {
    "rank": ({"q": lambda x: x[0]}, "q must be packed"),
    "not a tensor": ({"k": lambda x: [1, 2]}, "three for the compressed"),
    "text": ({"v": lambda x: "v"}, "v must be a tensor, got str"),
    "dtype": ({"q": lambda x: x.double()}, "torch.float64, allowed: torch.bfloat16"),
    "mixed dtypes": ({"k": lambda x: x.half()}, "k.dtype: got torch.float16, allowed: torch.float32"),
    "device": ({"v": lambda x: x.to("meta")}, "v is on meta"),
    "group": ({"q": lambda x: x[:, :3]}, "3 heads, the spec has groups of 2"),
    "no whole group": ({"k": lambda x: x[:, :1].expand(-1, 3, -1)}, "3 heads for 4 query heads, which is no whole group"),
    "kv heads": ({"v": lambda x: x[:, :1]}, "v has 1 heads for 4 query heads"),
    "head dim": ({"q": lambda x: x[..., :8]}, r"\[20, 4, 16\], got \[20, 4, 8\]"),
    "tokens": ({"k": lambda x: x[:7]}, r"k must be \[..., Hkv, Dqk\] = \[20, 2, 16\], got \[7, 2, 16\]"),
    "gate": ({"g_swa": lambda x: x[..., None]}, "g_swa must have 2 dimensions"),
    "gate dtype": ({"g_cmp": lambda x: x.double()}, "g_cmp.dtype"),
    "pair": ({"k": lambda x: (x, x)}, "got 2"),
    "cu dtype": ({"cu_seqlens": lambda x: torch.tensor([0, 20])}, "cu_seqlens must be int32"),
    "cu rank": ({"cu_seqlens": lambda x: torch.zeros(1, 2, dtype=torch.int32)}, "cu_seqlens must be int32"),
    "cu device": ({"cu_seqlens": lambda x: torch.zeros(2, dtype=torch.int32, device="meta")}, "on meta"),
    "cu list": ({"cu_seqlens": lambda x: [0, 20]}, "cu_seqlens must be an int32 tensor"),
    "cu start": ({"cu_seqlens": lambda x: [1, 20], "max_seqlen": lambda x: 20}, "must start at 0"),
    "cu falls": ({"cu_seqlens": lambda x: [0, 12, 9, 20]}, "not decrease"),
    "cu end": ({"cu_seqlens": lambda x: [0, 19]}, r"end at 20 \(the number of tokens\), got \[0, 19\]"),
    "max_seqlen": ({"cu_seqlens": lambda x: [0, 3, 20], "max_seqlen": lambda x: 12}, "a sequence of 17 tokens"),
    "max_seqlen impossible": ({"cu_seqlens": lambda x: [0, 3, 20], "max_seqlen": lambda x: 9}, "need at least 10"),
    "max_seqlen alone": ({"max_seqlen": lambda x: 12}, "leave it out"),
    "scale": ({"scale": lambda x: 0.0}, "scale must be a positive finite number, got 0.0"),
    "one of two": ({"k_cmp": lambda x: torch.zeros(5, 2, 16)}, "k_cmp and v_cmp go together"),
    "phi": ({"phi_k": lambda x: (torch.zeros(2, 8),)}, "pooling mean of the spec takes 0 tensors"),
    "spec": ({"spec": lambda x: 7}, "spec must be a name"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_input_is_named(name, monkeypatch):
    monkeypatch.setenv("NSA_GEN_DEBUG", "1")
    changes, message = _BAD[name]
    x = {**packed((20,)), "spec": SPEC}
    for argument, change in changes.items():
        value = change(x.get(argument))
        if argument == "cu_seqlens" and isinstance(value, list) and name != "cu list":
            value = torch.tensor(value, dtype=torch.int32)
        x[argument] = value.to(DEVICE) if isinstance(value, Tensor) and value.device.type == "cpu" else value
    with pytest.raises(InputError, match=message):
        nsa_gen.nsa_attention(**x)


def test_bad_block_indices_and_compressed_rows(monkeypatch):
    monkeypatch.setenv("NSA_GEN_DEBUG", "1")
    x = packed((40,))
    chosen = torch.full((40, HKV, 4), -1, dtype=torch.int32, device=DEVICE)
    for wrong in ([1, 0, -1, -1], [0, 0, -1, -1], [-1, 0, -1, -1], [0, 3, -1, -1], [-2, -1, -1, -1]):
        chosen[:, :] = -1
        chosen[20, 1] = torch.tensor(wrong)
        with pytest.raises(InputError, match=r"token 20, KV head 1 \(own block 1\)"):
            nsa_gen.selected_attention(x["q"], x["k"], x["v"], chosen, spec=SPEC)
    with pytest.raises(InputError, match=r"k_cmp must be .* = \[10, 2, 16\], got \[40, 2, 16\]"):
        nsa_gen.compressed_attention(x["q"], x["k"], x["v"], spec=SPEC)


def test_a_selection_of_ones_own_need_not_hold_the_forced_blocks():
    x = packed((60,), seed=7)
    chosen = torch.full((60, HKV, 4), -1, dtype=torch.int32, device=DEVICE)
    chosen[40:, 0, 0] = 1
    chosen[50:, 1, :2] = torch.tensor([2, 3], device=DEVICE)
    o, lse = nsa_gen.selected_attention(x["q"], x["k"], x["v"], chosen, spec=SPEC)
    want = reference.selected_attention(x["q"].double(), x["k"].double(), x["v"].double(), chosen, S.block)
    close(o, want[0])
    assert torch.equal(lse == -math.inf, want[1] == -math.inf)


def test_cpu_without_the_interpreter_is_refused(monkeypatch):
    if DEVICE.type == "cuda":
        pytest.skip("with a GPU the interpreter is off anyway")
    from nsa_gen import kernels

    kernels.clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x = packed((9,))
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        nsa_gen.sliding_attention(x["q"], x["k"], x["v"], spec=SPEC)
    kernels.clear()


# --- torch.library ---------------------------------------------------------------------------------------------------------------


def test_what_training_keeps_gives_the_same_result():
    x = packed((9,))
    x["k"].requires_grad_()
    o = nsa_gen.nsa_attention(**x, spec=SPEC)
    assert o.requires_grad
    with torch.no_grad():  # the same kernels, which then keep nothing
        torch.testing.assert_close(nsa_gen.nsa_attention(**x, spec=SPEC), o.detach(), rtol=2e-6, atol=2e-6)
    (grad,) = torch.autograd.grad(o.sum(), x["k"], create_graph=True)
    with pytest.raises(NSAError, match="nsa_attention_bwd has no backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(dynamic):
    torch._dynamo.reset()
    x = packed((9,))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def step(x, spec):
        x = {name: value * 1.0 for name, value in x.items()}
        return nsa_gen.nsa_attention(**x, spec=spec), nsa_gen.sliding_attention(x["q"], x["k"], x["v"], spec=spec)[1]

    for spec in ("tiny", SPEC):
        o, lse = step(x, spec)
        assert torch.equal(o, nsa_gen.nsa_attention(**x, spec=SPEC))
        assert torch.equal(lse, nsa_gen.sliding_attention(x["q"], x["k"], x["v"], spec=SPEC)[1])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["tiny", "nsa-paper", "gqa5-d128"])
def test_a_geometry_survives_as_text(name):
    spec = load(name)
    found = _inputs._spec(_inputs._parse(spec.key), torch.float16)
    assert (found.key, found.dtype, found.group) == (spec.key, "float16", spec.group)
    for part in ("heads", "head_dim", "compression", "selection", "window"):
        assert getattr(found, part) == getattr(spec, part)


def test_one_compiled_function_serves_several_specs():
    """Numbers of a spec stay constants where ``torch.compile`` would make changing integers symbolic."""
    torch._dynamo.reset()
    x = packed((9,))
    step = torch.compile(lambda spec: nsa_gen.sliding_attention(x["q"], x["k"], x["v"], spec=spec)[0], fullgraph=True, backend="eager")
    for window in (24, 3, 5):
        spec = SPEC.replace(window=window)
        close(step(spec), reference.sliding_attention(x["q"].double(), x["k"].double(), x["v"].double(), window)[0])
    torch._dynamo.reset()


@pytest.mark.gpu
def test_whole_forward_in_a_cuda_graph():
    spec = load("gqa16-d128").replace(compression={"pooling": "mean"})
    q = torch.randn(4096, 16, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(4096, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gates = [torch.rand(4096, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    eager = nsa_gen.nsa_attention(q, k, v, *gates, spec=spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = nsa_gen.nsa_attention(q, k, v, *gates, spec=spec)
    o.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, eager)
