"""The adapter for transformers, on a small Llama with random weights: its maths, where sequences lie, its state, what it refuses."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import nsa_gen
from nsa_gen import InputError, huggingface
from nsa_gen.module import rotary
from nsa_gen.spec import load

transformers = pytest.importorskip("transformers", "4.57")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPEC = load("tiny")
WEIGHTED = SPEC.replace(compression={"pooling": "weighted"})
VOCABULARY = 50


def llama(seed: int = 0, **changes):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.2, **changes,
        }
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(DEVICE)


def prepared(spec=WEIGHTED, implementation: str = "reference", layers: int = 2, **options):
    """A prepared model with no new parameter left at its start."""
    model = huggingface.prepare(llama(num_hidden_layers=layers), spec, implementation=implementation, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nsa." in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture(scope="module")
def model():
    return prepared()


# --- its maths ---------------------------------------------------------------------------------------------------------------------


def by_hand(attention, hidden: Tensor, spec) -> Tensor:
    """One attention module's forward with nsa_gen.nsa_attention."""

    def heads(projection, count: int) -> Tensor:
        return projection(hidden).unflatten(-1, (count, 16))

    q, k, v = heads(attention.q_proj, 4), heads(attention.k_proj, 2), heads(attention.v_proj, 2)
    at = torch.arange(hidden.shape[1], device=hidden.device).repeat(hidden.shape[0])
    q, k = (rotary(x.flatten(0, 1), at, 10000.0).view_as(x) for x in (q, k))
    gates = torch.sigmoid(attention.nsa.gate_proj(hidden)).unflatten(-1, (4, 3)).unbind(-1)
    phi = {f"phi_{x}": [getattr(attention.nsa, f"phi_{x}").weight] for x in "kv"} if spec.compression.pooling == "weighted" else {}
    return attention.o_proj(nsa_gen.nsa_attention(q, k, v, *gates, spec=spec, **phi).flatten(-2))


@pytest.mark.parametrize("spec", [SPEC, WEIGHTED], ids=["mean", "weighted"])
def test_attention_is_nsa_attention(spec):
    model = prepared(spec, "kernels", layers=1)
    attention, seen = model.model.layers[0].self_attn, {}

    def keep(module, args, kwargs, output):
        seen.update(hidden=kwargs["hidden_states"], output=output[0])

    handle = attention.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(ids_of(2, 19))
        handle.remove()
        torch.testing.assert_close(seen["output"], by_hand(attention, seen["hidden"], spec), atol=2e-6, rtol=1e-4)


def test_kernels_are_the_reference():
    ids = ids_of(1, 70)  # past 64 tokens queries leave blocks out
    with torch.no_grad():
        found = [prepared(implementation=one, layers=1)(ids).logits for one in ("kernels", "reference")]
    torch.testing.assert_close(*found, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["reference", "kernels"])
def test_gradients_reach_gates_and_phi(implementation):
    model = prepared(implementation=implementation, layers=1)
    ids = ids_of(2, 20)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert sum(".nsa." in name for name, _ in model.named_parameters()) == 4


@pytest.mark.parametrize("pooling", ["linear", "mlp"])
def test_every_pooling_runs(pooling):
    model, ids = prepared(SPEC.replace(compression={"pooling": pooling})), ids_of(1, 30)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".nsa." in name)


def test_gradient_checkpointing_gives_the_same():
    model, ids = prepared().train(), ids_of(2, 24)
    grads = []
    for on in (False, True):
        if on:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # renamed in 5
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*grads)


def test_autocast_and_bfloat16():
    ids = ids_of(2, 30)
    model = prepared()
    want = model(ids).logits.detach()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = model(ids, labels=ids)
    found.loss.backward()
    assert float((found.logits.detach() - want).norm() / want.norm()) < 0.05
    half = huggingface.prepare(llama().bfloat16(), "tiny", implementation="reference")
    assert half.model.layers[0].self_attn.nsa.gate_proj.weight.dtype == torch.bfloat16
    assert half(ids).logits.dtype == torch.bfloat16


def test_compiled_is_eager():
    torch._dynamo.reset()
    model, ids = prepared(SPEC, "kernels", layers=1, detect_packing=False), ids_of(2, 12)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


# --- where sequences lie -----------------------------------------------------------------------------------------------------------

LENGTHS = (30, 41, 5)


def alone(model, ids: Tensor) -> list[Tensor]:
    """Logits of each sequence, run by itself; ``ids [sum(LENGTHS)]``."""
    with torch.no_grad():
        return [model(part[None]).logits[0] for part in ids.split(LENGTHS)]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(model, side):
    ids = ids_of(sum(LENGTHS))
    batch, mask = ids.new_zeros(3, max(LENGTHS)), torch.zeros(3, max(LENGTHS), dtype=torch.long, device=DEVICE)
    places = [slice(0, n) if side == "right" else slice(max(LENGTHS) - n, None) for n in LENGTHS]
    for row, (place, part) in enumerate(zip(places, ids.split(LENGTHS), strict=True)):
        batch[row, place], mask[row, place] = part, 1
    with torch.no_grad():
        found = model(batch, attention_mask=mask).logits
    assert found.isfinite().all()
    for row, (place, want) in enumerate(zip(places, alone(model, ids), strict=True)):
        close(found[row, place], want)


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens", "both"])
def test_packed_sequences_do_not_see_each_other(model, by):
    ids = ids_of(sum(LENGTHS))
    at = torch.cat([torch.arange(n, device=DEVICE) for n in LENGTHS])[None]
    cu = torch.tensor([0, 30, 71, 76], dtype=torch.int32, device=DEVICE)
    how = {} if by == "position_ids" else {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 41, "max_length_k": 41}
    how |= {} if by == "cu_seq_lens" else {"position_ids": at}
    with torch.no_grad():
        found = model(ids[None], **how).logits[0]
    for got, want in zip(found.split(LENGTHS), alone(model, ids), strict=True):
        close(got, want)


def test_rows_of_packed_sequences(model):
    ids = ids_of(2, 38)
    at = torch.cat([torch.arange(n, device=DEVICE) for n in (30, 8)])[None]
    with torch.no_grad():
        found = model(ids, position_ids=at.expand(2, -1)).logits
        for row in range(2):
            close(found[row, :30], model(ids[row : row + 1, :30]).logits[0])
            close(found[row, 30:], model(ids[row : row + 1, 30:]).logits[0])


def test_without_detection_positions_are_for_rope_alone():
    model = prepared(detect_packing=False)
    ids, at = ids_of(1, 38), torch.cat([torch.arange(30), torch.arange(8)])[None].to(DEVICE)
    with torch.no_grad():
        assert not torch.allclose(model(ids, position_ids=at).logits[0, 30:], model(ids[:, 30:]).logits[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["position_ids", "attention_mask"])
def test_one_look_a_forward(model, kind, monkeypatch):
    """Each look waits for the GPU."""
    looks, name = [], "_restarts" if kind == "position_ids" else "_unpadded"
    find = getattr(huggingface, name)
    monkeypatch.setattr(huggingface, name, lambda *args: looks.append(1) or find(*args))
    given = torch.arange(20, device=DEVICE)[None] if kind == "position_ids" else (torch.arange(20, device=DEVICE) < 15)[None].long()
    with torch.no_grad():
        model(ids_of(1, 20), **{kind: given})
        assert len(looks) == 1
        given[0, 10:] = torch.arange(10) if kind == "position_ids" else 0  # in place: another packing, or another padding
        model(ids_of(1, 20), **{kind: given})
        assert len(looks) == 2
    with torch.inference_mode():
        assert model(ids_of(1, 20), **{kind: given.clone()}).logits.isfinite().all()


def test_generate_without_a_cache(model):
    ids = ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert found.shape == (2, 15)
    assert torch.equal(found[1:], model.generate(ids[1:], attention_mask=mask[1:], use_cache=False, **options))
    with pytest.raises(InputError, match=r"1 queries for 13 keys: .* generate with use_cache=False"):
        model.generate(ids, attention_mask=mask, **options)


# --- state -------------------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    model, ids = prepared(), ids_of(1, 30)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert nsa_gen.Spec.from_dict(config.nsa_spec) == WEIGHTED
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    assert huggingface.prepare(other, checkpoint=tmp_path, implementation="reference") is other
    assert torch.equal(other(ids).logits, model(ids).logits)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"phi_k.weight must be \[2, 16\], .* has \[2, 8\]: not of this spec"):
        huggingface.prepare(plain, WEIGHTED.replace(compression={"block": 16}), checkpoint=tmp_path)
    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"layers.0.self_attn.nsa.gate_proj.weight must be \[12, 32\], .* has nothing"):
        huggingface.prepare(plain, WEIGHTED, checkpoint=tmp_path / "dense")
    with pytest.raises(InputError, match=r"no .*safetensors files"):
        huggingface.prepare(plain, WEIGHTED, checkpoint=tmp_path / "nowhere")
    huggingface.prepare(plain, WEIGHTED)  # what failed left nothing behind


def test_the_implementation_can_be_changed_back():
    model, ids = prepared(), ids_of(1, 30)
    want = llama()(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, want)
    model.set_attn_implementation("nsa")
    assert not torch.allclose(model(ids).logits, want, atol=1e-2)


# --- what is refused ---------------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_prepared():
    huggingface.register()
    huggingface.register()  # twice is fine
    model = transformers.LlamaForCausalLM._from_config(llama().config, attn_implementation="nsa").to(DEVICE)
    with pytest.raises(InputError, match=r"LlamaAttention has no gates for NSA: call nsa_gen.huggingface.prepare\(model, spec\)"):
        model(ids_of(1, 8))
    huggingface.prepare(model, "tiny", implementation="reference")
    model(ids_of(1, 8))


_BAD_PREPARE = {
    "heads": ({"num_attention_heads": 8, "head_dim": 16}, {}, "8 query and 2 KV heads of 16 elements; spec 'tiny' has 4 and 2"),
    "kv heads": ({"num_key_value_heads": 4}, {}, r"take one with heads {query: 4, kv: 4}, head_dim {qk: 16, v: 16}"),
    "head dim": ({"head_dim": 8}, {}, "heads of 8 elements; spec 'tiny' has 4 and 2 of 16"),
    "v dim": ({}, {"spec": SPEC.replace(head_dim={"v": 32})}, r"16 \(K\) and 32 \(V\)"),
    "per branch": ({}, {"spec": SPEC.replace(kv="per_branch")}, "spec.kv: got 'per_branch', LlamaAttention has one K and V"),
    "spec": ({}, {"spec": None}, "spec: got None, and model.config has no nsa_spec"),
    "spec type": ({}, {"spec": 4}, "spec must be a name, a path or a Spec"),
    "name": ({}, {"name": "sdpa"}, "name: 'sdpa' is an attention implementation of transformers, allowed: any but eager"),
    "name type": ({}, {"name": ""}, "name must be a text, got ''"),
    "implementation": ({}, {"implementation": "eager"}, "implementation: got 'eager', allowed: kernels, reference"),
}  # fmt: skip


@pytest.mark.parametrize("case", _BAD_PREPARE)
def test_bad_models_and_options_are_named(case):
    config, options, message = _BAD_PREPARE[case]
    with pytest.raises(InputError, match=message):
        huggingface.prepare(llama(**config), **{"spec": "tiny", **options})


def test_models_that_cannot_be_prepared(model):
    with pytest.raises(InputError, match="self_attn is prepared already"):
        huggingface.prepare(model, "tiny")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=VOCABULARY
    )  # fmt: skip
    with pytest.raises(InputError, match="BertModel has no attention modules"):
        huggingface.prepare(transformers.BertModel(config), "tiny")


def call(model, **changes):
    attention = model.model.layers[0].self_attn
    q, k = torch.zeros(2, 4, 9, 16, device=DEVICE), torch.zeros(2, 2, 9, 16, device=DEVICE)
    given = {"attention_mask": None, "scaling": 0.25, "dropout": 0.0, "nsa_gates": [torch.zeros(2, 9, 4, device=DEVICE)] * 3, **changes}
    return huggingface.attention(attention, q, given.pop("key", k), given.pop("value", k), **given)


_BAD_CALL = {
    "gates": ({"nsa_gates": None}, "has no gates for NSA"),
    "dropout": ({"dropout": 0.1}, "attention dropout: got 0.1, allowed: 0"),
    "cache": ({"key": torch.zeros(2, 2, 12, 16)}, "9 queries for 12 keys"),
    "window": ({"sliding_window": 4096}, "sliding_window: got 4096, NSA has none of it, allowed: None"),
    "softcap": ({"softcap": 30.0}, "softcap: got 30.0"),
    "causal": ({"is_causal": False}, "NSA is causal"),
    "mask": ({"attention_mask": torch.zeros(2, 1, 9, 9)}, r"attention_mask must be \[B, S\] = \[2, 9\] \(padding\), got \[2, 1, 9, 9\]"),
    "packed rows": ({"cu_seq_lens_q": torch.zeros(2, dtype=torch.int32)}, "packed in one row, got a batch of 2"),
    "positions": ({"position_ids": torch.zeros(3, 2, 9).int()}, r"position_ids must be \[B, S\], got \[3, 2, 9\]"),
}


@pytest.mark.parametrize("case", _BAD_CALL)
def test_bad_calls_are_named(model, case):
    changes, message = _BAD_CALL[case]
    assert call(model)[0].shape == (2, 9, 4, 16)
    with pytest.raises(InputError, match=message):
        call(model, **changes)


def test_training_with_dropout_is_refused():
    model = huggingface.prepare(llama(attention_dropout=0.1), "tiny", implementation="reference")
    model.eval()(ids_of(1, 8))
    with pytest.raises(InputError, match=r"set config\.attention_dropout to 0"):
        model.train()(ids_of(1, 8))


def test_masks():
    ones = torch.ones(2, 7, dtype=torch.bool)
    assert huggingface.padding_of(kv_length=7) is None
    assert huggingface.padding_of(kv_length=7, attention_mask=ones, q_length=7) is None
    ones[1, 6] = False
    assert huggingface.padding_of(kv_length=7, attention_mask=ones) is not None
    with pytest.raises(InputError, match="adds its own rule to the causal mask"):
        huggingface.padding_of(kv_length=7, use_vmap=True)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers >= 4.57: pip install 'nsa-gen\[huggingface\]'"):
        huggingface.register()
