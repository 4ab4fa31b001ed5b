"""Prefill agrees with training: in chunks, in ragged batches, behind prefixes, in every storage; and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gradient_cases import DEVICE, runs
from test_serving import FEW, Stream

import nsa_gen
from nsa_gen.errors import InputError, UnknownSequence

WHOLE = 110  # longer than the window of 40 and than six blocks of 16


@pytest.fixture(autouse=True)
def few_programs():
    with nsa_gen.override(*(FEW if DEVICE == "cpu" else ())):
        yield


def prefill(stream: Stream, cache: nsa_gen.PagedKVCache, sequence: int, first: int, last: int) -> torch.Tensor:
    """Append tokens ``first`` to ``last`` and attend from them."""
    cache.append([sequence], *stream.part(first, last))
    given = stream.q[first:last], *(g[first:last] for g in stream.gates)
    return nsa_gen.nsa_prefill(*given, cache=cache, sequences=[sequence])


@runs
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
def test_chunks_are_all_at_once_and_tokens_follow(kv):
    stream = Stream(WHOLE + 2, kv)
    o, _ = stream.trained()
    cache = stream.cache(rewind=0)
    s, limits = cache.create(), (0, 1, 9, 47, WHOLE)
    for first, last in pairwise(limits):
        torch.testing.assert_close(prefill(stream, cache, s, first, last), o[first:last], rtol=1e-4, atol=1e-5)
    for first in range(WHOLE, WHOLE + 2):
        cache.append([s], *stream.part(first, first + 1))
        given = stream.q[first : first + 1], *(g[first : first + 1] for g in stream.gates)
        found = nsa_gen.nsa_decode(*given, cache=cache, sequences=[s])
        torch.testing.assert_close(found, o[first : first + 1], rtol=1e-4, atol=1e-5)
    cache.free(s)
    assert cache.pages_free == cache.pages_total


@runs
def test_a_ragged_batch_of_prompts_and_of_what_follows_a_prefix():
    stream = Stream(WHOLE)
    o, _ = stream.trained()
    cache = stream.cache()
    prefix, empty, new, short = (cache.create() for _ in range(4))
    cache.append([prefix], *stream.part(0, 37))
    child = cache.fork(prefix)
    spans = {new: (0, 33), child: (37, 52), empty: (0, 0), short: (0, 7), prefix: (37, 38)}
    at = torch.cat([torch.arange(*span, device=DEVICE) for span in spans.values()])
    counts = [last - first for first, last in spans.values()]
    cache.append(list(spans), stream.k[0][at], stream.v[0][at], counts)
    given = {"cache": cache, "sequences": list(spans), "tokens": counts}
    found = nsa_gen.nsa_prefill(stream.q[at], *(g[at] for g in stream.gates), **given)
    torch.testing.assert_close(found, o[at], rtol=1e-4, atol=1e-5)
    wide = torch.full((len(at), 7, 24), torch.nan, device=DEVICE)
    wide[:, :6, :16] = stream.q[at]
    again = nsa_gen.nsa_prefill(wide[:, :6, :16], *(g[at].float() for g in stream.gates), **given)
    assert torch.equal(again, found)
    nothing = nsa_gen.nsa_prefill(stream.q[:0], *(g[:0] for g in stream.gates), cache=cache, sequences=[])
    assert nothing.shape == (0, 6, 32)


@runs
@pytest.mark.parametrize("first", [0, 30])
def test_fp8_is_attention_to_what_is_stored(first):
    stream = Stream(52)
    cache = stream.cache(storage=torch.float8_e4m3fn, k_scale=0.02, v_scale=0.03)
    s = cache.create()
    if first:
        cache.append([s], *stream.part(0, first))
    found = prefill(stream, cache, s, first, 52)
    given = stream.q[51:], *(g[51:] for g in stream.gates)
    torch.testing.assert_close(found[-1:], nsa_gen.nsa_decode(*given, cache=cache, sequences=[s]), rtol=1e-4, atol=1e-5)
    assert torch.equal(prefill(stream, cache, (t := cache.create()), 0, 52)[first:], found) and cache.length(t) == 52


def test_what_is_not_prefilled():
    stream = Stream(20)
    cache = stream.cache()
    s = cache.create()
    cache.append([s], *stream.part(0, 5))
    q, gates = stream.q[:6], [g[:6] for g in stream.gates]
    for given, how, why in (
        ((q[0], *gates), {}, r"q must be \[T, Hq, Dqk\], got \[6, 16\]"),
        ((q.half(), *gates), {}, "q must be torch.float32 on .* like the cache, got torch.float16"),
        ((q[:, :5], *gates), {}, "q has 5 heads, the spec has groups of 3"),
        ((q, gates[0][:5], *gates[1:]), {}, r"g_cmp must be \[T, Hq\] = \[6, 6\], got \[5, 6\]"),
        ((q, *gates), {}, f"6 new tokens of sequence {s}, which has 5"),
        ((q, *gates), {"tokens": [5]}, "tokens must be 1 numbers from 0 that add up to 6"),
        ((q, *gates), {"sequences": [s, s]}, "sequences: each once"),
        ((q, *gates), {"scale": float("inf")}, "scale must be a positive finite number"),
    ):
        with pytest.raises(InputError, match=why):
            nsa_gen.nsa_prefill(*given, cache=cache, **({"sequences": [s]} | how))
    with pytest.raises(UnknownSequence):
        nsa_gen.nsa_prefill(q, *gates, cache=cache, sequences=[-5])
