"""Operators as torch.library has them: schemas, fake kernels, and gradients under AOTAutograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gradients import DEVICE, GATES, SPEC, made
from torch import Tensor

import nsa_gen
from nsa_gen import operators, ops, serving

NAMES = {name.removeprefix("nsa_gen::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("nsa_gen::")}


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, and of every operator's backward."""
    x = made(lengths=(9,))
    q, k, v, gates = x["q"], x["k"], x["v"], [x[name] for name in GATES]
    weights = [torch.full((1, 8), 0.125, device=DEVICE)]
    spec = SPEC.replace(compression={"pooling": "weighted"})
    sequences, lse = (None, spec.key, 1, 9), torch.zeros(9, 2, device=DEVICE)
    tail, k_cmp = (*sequences, 0.25), operators.compress(k, weights, *sequences[:2], "k", 1, 9)
    blocks = nsa_gen.select_blocks(q, k_cmp, lse, spec=spec)
    given = (q, [k], [v], *gates, weights, weights, None, None)
    saved = list(operators.nsa_attention_saving(*given, *tail, False)[1:])
    cache = nsa_gen.PagedKVCache(SPEC, 8, page_size=16, max_sequences=1, max_seqlen=64, heads_kv=k.shape[1], device=DEVICE)
    s = cache.create()
    cache.append([s], k, v)
    return {
        "compress": (k, weights, *sequences[:2], "k", 1, 9),
        "compressed_attention": (q, k_cmp, k_cmp, *tail, False),
        "select_blocks": (q, k_cmp, lse, *tail),
        "selected_attention": (q, k, v, blocks, *tail, False),
        "sliding_attention": (q, k, v, *tail),
        "combine": (q, q, q, *gates),
        "nsa_attention_fwd": (*given, *tail, True),
        "nsa_attention_save": (*given, *tail, False),
        "compress_bwd": (k_cmp, k, weights, *sequences[:2], "k", 1, 9),
        "compressed_attention_bwd": (q, q, k_cmp, k_cmp, q, lse, None, *tail, False),
        "selected_attention_bwd": (q, q, k, v, blocks, q, lse, lse, *tail, True),
        "sliding_attention_bwd": (q, q, k, v, q, lse, lse, *tail),
        "combine_bwd": (q, q, q, q, *gates),
        "nsa_attention_bwd": (q, *given, saved, *tail, False),
        "nsa_decode": (
            q[-1:, None], *cache.layer(0), cache.tables, cache.slots([s]), cache.lengths, cache.arrived, [],
            *(g[-1:, None] for g in gates), SPEC.key, 64, 0.25,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(NAMES))
def test_operators_keep_the_rules_of_torch_library(calls, name):
    """Schemas (nothing returned is an argument or changes one), fake kernels, and gradients under AOTAutograd."""
    args = calls[name]
    tests = ["test_schema", "test_faketensor"]
    if not name.endswith("_bwd") and name not in ("select_blocks", "nsa_decode"):
        tests += ["test_autograd_registration", "test_aot_dispatch_static"]
        args = tuple(_wanting(y) for y in args)
    found = torch.library.opcheck(getattr(torch.ops.nsa_gen, name).default, args, test_utils=tests)
    assert set(found.values()) == {"SUCCESS"}, found


def _wanting(x: Any) -> Any:
    if isinstance(x, list):
        return [_wanting(y) for y in x]
    return x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def test_what_users_call_is_an_operator():
    assert {*ops.__all__, *serving.__all__} == {"nsa_attention", "nsa_prefill"} | {
        name for name in NAMES if not name.endswith(("_bwd", "_fwd", "_save"))
    }
