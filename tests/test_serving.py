"""Decoding agrees with training: token by token, several at once, from forks, in every storage; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from gradient_cases import DEVICE, runs
from interpreter import few_programs
from test_cache import spec

import nsa_gen
from nsa_gen import kernels, reference, serving
from nsa_gen.branches import decode
from nsa_gen.errors import InputError, UnknownSequence

GEOMETRY = {"selection": {"block": 16, "count": 6, "initial": 1, "local": 2}, "window": 40, "heads": {"query": 6, "kv": 2}}
FEW = (few_programs(2),)


class Stream:
    """One sequence of ``n`` tokens, and what training's forward makes of it."""

    def __init__(self, n: int, kv: str = "shared", dtype: torch.dtype = torch.float32, **changes):
        self.spec = spec(kv=kv, dtype=str(dtype).removeprefix("torch."), **{**GEOMETRY, **changes})
        generator = torch.Generator().manual_seed(n)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        branches = 3 if kv == "per_branch" else 1
        self.q, self.gates = normal(n, 6, 16), [normal(n, 6).sigmoid() for _ in range(3)]
        self.k, self.v = ([normal(n, 2, dim) for _ in range(branches)] for dim in (16, 32))
        self.kv, self.n = kv, n

    def cache(self, **options) -> nsa_gen.PagedKVCache:
        chosen = {"page_size": 32, "max_sequences": 16, "max_seqlen": 640, "device": DEVICE} | options
        return nsa_gen.PagedKVCache(self.spec, 400, **chosen)

    def at(self, tokens):
        """K and V of some tokens, by an index of them, as the cache takes them."""
        k, v = (tuple(x[tokens] for x in several) for several in (self.k, self.v))
        return (k, v) if self.kv == "per_branch" else (k[0], v[0])

    def part(self, first: int, last: int):
        return self.at(slice(first, last))

    def trained(self):
        """``o [n,Hq,Dv]`` and ``block_indices [n,Hkv,count]``: on a GPU by the kernels that train; the interpreter is too slow."""
        k, v = (tuple(x) if self.kv == "per_branch" else x[0] for x in (self.k, self.v))
        c, chosen = self.spec.compression, self.spec.selection
        if DEVICE == "cpu":
            k_cmp, v_cmp = (reference.compress(x[0], c.pooling, (), c.block, c.stride) for x in (self.k, self.v))
            _, lse = reference.compressed_attention(self.q, k_cmp, v_cmp, c.block, c.stride)
            scores = reference.importance(self.q, k_cmp, lse, c.block, c.stride, chosen.block, chosen.mapping)
            blocks = reference.select_blocks(scores, chosen.block, chosen.count, chosen.initial, chosen.local)
            return reference.nsa_attention(self.q, k, v, *self.gates, self.spec, block_indices=blocks), blocks
        k_cmp, v_cmp = (nsa_gen.compress(x[0], spec=self.spec, which=which) for x, which in ((self.k, "k"), (self.v, "v")))
        lse = nsa_gen.compressed_attention(self.q, k_cmp, v_cmp, spec=self.spec)[1]
        return nsa_gen.nsa_attention(self.q, k, v, *self.gates, spec=self.spec), nsa_gen.select_blocks(self.q, k_cmp, lse, spec=self.spec)


@pytest.fixture(autouse=True)
def with_few_programs():
    with nsa_gen.override(*(FEW if DEVICE == "cpu" else ())):
        yield


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The block indices of each call of ``nsa_decode`` from here on."""
    found, kernel = [], decode.kernel

    def watched(name, *args):
        host = kernel(name, *args)
        if name != "decode_fwd":
            return host

        def run(*given):
            made = host(*given)
            found.append(given[-4].clone())
            return made

        return run

    monkeypatch.setattr(decode, "kernel", watched)
    return found


@runs
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
def test_token_by_token_is_all_at_once(kv, chosen):
    """Every length from 1 to 600: twelve prefixes of one sequence, forks of one another, grow by 50 tokens each. In the interpreter by 4,
    which meets every place in a block (prefixes are 2 tokens of 16 apart), a stride, a page and the window."""
    stream = Stream(600, kv)
    o, blocks = stream.trained()
    cache = stream.cache(rewind=600)
    prefixes = [cache.create()]
    for i in range(1, 12):
        longest = prefixes[-1] if i > 1 else cache.create()
        prefixes.append(cache.fork(longest) if i > 1 else longest)
        cache.append([prefixes[-1]], *stream.part(50 * (i - 1), 50 * i))
    assert [cache.length(s) for s in prefixes] == [50 * i for i in range(12)]
    for step in range(50 if DEVICE == "cuda" else 4 if kv == "shared" else 1):
        at = torch.tensor([50 * i + step for i in range(12)], device=DEVICE)
        k, v = (tuple(x[at] for x in several) for several in (stream.k, stream.v))
        cache.append(prefixes, *((k, v) if kv == "per_branch" else (k[0], v[0])))
        found = nsa_gen.nsa_decode(stream.q[at], *(g[at] for g in stream.gates), cache=cache, sequences=prefixes)
        torch.testing.assert_close(found, o[at], rtol=1e-4, atol=1e-5)
        assert torch.equal(chosen[-1].squeeze(1), blocks[at]), f"blocks at step {step}"
    assert not cache.arrived.any()


@runs
@pytest.mark.parametrize(("tokens", "kv"), [(2, "shared"), (5, "per_branch"), (8, "shared")])
def test_several_tokens_are_one_after_the_other(tokens, kv, chosen):
    """Speculation, some of which is taken back."""
    stream = Stream(150, kv)
    o, blocks = stream.trained()
    cache, first = stream.cache(), 0
    s, ahead = cache.create(), cache.create()
    cache.append([ahead], *stream.part(0, 70))
    while first + tokens <= (120 if DEVICE == "cuda" else 40):
        new = torch.arange(first, first + tokens, device=DEVICE)
        cache.append([s], *stream.part(first, first + tokens))
        cache.append([ahead], *stream.part(int(cache.length(ahead)), int(cache.length(ahead)) + 1))
        found = nsa_gen.nsa_decode(stream.q[new][None], *(g[new][None] for g in stream.gates), cache=cache, sequences=[s])
        torch.testing.assert_close(found[0], o[new], rtol=1e-4, atol=1e-5)
        assert torch.equal(chosen[-1][0], blocks[new])
        kept = tokens - (first // tokens) % 3 if tokens > 3 else tokens
        first += kept
        cache.truncate(s, first)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gates_may_be_float32(dtype):
    stream = Stream(60, dtype=dtype)
    cache = stream.cache()
    s = cache.create()
    cache.append([s], *stream.part(0, 60))
    q, gates = stream.q[-1:], [g[-1:] for g in stream.gates]
    wanted = nsa_gen.nsa_decode(q, *gates, cache=cache, sequences=[s])
    for wide in ([g.float() for g in gates], [gates[0].float(), *gates[1:]], gates):
        found = nsa_gen.nsa_decode(q, *wide, cache=cache, sequences=[s])
        assert torch.equal(found, wanted)


@runs
def test_fp8_is_attention_to_what_is_stored():
    stream = Stream(120)
    cache = stream.cache(storage=torch.float8_e4m3fn, k_scale=0.02, v_scale=0.03)
    s = cache.create()
    cache.append([s], *stream.part(0, 120))
    stream.k, stream.v = ([x] for x in cache.read(s))
    k_cmp, v_cmp = cache.read(s, "compressed")
    rows = torch.zeros(30 - len(k_cmp), 2, 16, device=DEVICE), torch.zeros(30 - len(k_cmp), 2, 32, device=DEVICE)
    k_cmp, v_cmp = torch.cat([k_cmp, rows[0]]), torch.cat([v_cmp, rows[1]])
    o = nsa_gen.nsa_attention(stream.q, stream.k[0], stream.v[0], *stream.gates, spec=stream.spec, k_cmp=k_cmp, v_cmp=v_cmp)
    found = nsa_gen.nsa_decode(stream.q[-1:], *(g[-1:] for g in stream.gates), cache=cache, sequences=[s])
    torch.testing.assert_close(found, o[-1:], rtol=1e-4, atol=1e-5)


@runs
def test_layers_of_one_cache():
    streams = [Stream(n) for n in (60, 61)]  # other numbers in each
    cache = streams[0].cache(layers=2, k_scale=torch.ones(2, 2, 2, device=DEVICE))
    s = cache.create()
    cache.reserve([s], 59)
    for layer, stream in enumerate(streams):
        cache.fill([s], *stream.part(0, 59), layer=layer)
    cache.reserve([s])
    for layer, stream in enumerate(streams):
        cache.write(*stream.part(59, 60), cache.slots([s]), layer)
        given = stream.q[59:60], *(g[59:60] for g in stream.gates)
        o = stream.trained()[0][59:60]
        torch.testing.assert_close(nsa_gen.nsa_decode(*given, cache=cache, sequences=[s], layer=layer), o, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(nsa_gen.nsa_prefill(*given, cache=cache, sequences=[s], layer=layer), o, rtol=1e-4, atol=1e-5)
    for call in (nsa_gen.nsa_decode, nsa_gen.nsa_prefill):
        with pytest.raises(InputError, match="layer must be 0 to 1, got 2"):
            call(*given, cache=cache, sequences=[s], layer=2)


@runs
def test_strided_queries_and_slots():
    stream = Stream(90)
    cache = stream.cache()
    a, b = cache.create(), cache.create()
    cache.append([a, b], *(torch.cat([x[:90], x[:33]]) for x in stream.part(0, 90)), [90, 33])
    o, _ = stream.trained()
    at = torch.tensor([89, 32], device=DEVICE)
    q, gates = stream.q[at], [g[at] for g in stream.gates]
    wide = torch.full((2, 7, 24), torch.nan, device=DEVICE)
    wide[:, :6, :16] = q
    for given in (q, wide[:, :6, :16], q.transpose(1, 2).contiguous().transpose(1, 2), q.repeat(1, 1, 1)[:, :, :]):
        found = nsa_gen.nsa_decode(given, *gates, cache=cache, slots=cache.slots([a, b]))
        torch.testing.assert_close(found, o[at], rtol=1e-4, atol=1e-5)
    swapped = nsa_gen.nsa_decode(q.flip(0), *(g.flip(0) for g in gates), cache=cache, sequences=[b, a], max_seqlen=90)
    torch.testing.assert_close(swapped.flip(0), o[at], rtol=1e-4, atol=1e-5)
    empty = nsa_gen.nsa_decode(q[:0], *(g[:0] for g in gates), cache=cache, sequences=[])
    assert empty.shape == (0, 6, 32)


@runs
def test_what_is_not_decoded():
    stream = Stream(20)
    cache = stream.cache()
    s, other = cache.create(), cache.create()
    cache.append([s], *stream.part(0, 3))
    q, gates = stream.q[:1], [g[:1] for g in stream.gates]
    several = stream.q[None, :9], [g[None, :9] for g in stream.gates]
    for given, how, why in (
        ((q[0], *gates), {"sequences": [s]}, r"q must be \[S, Hq, Dqk\] or \[S, n, Hq, Dqk\], got \[6, 16\]"),
        ((q.half(), *gates), {"sequences": [s]}, "q must be torch.float32 on .* like the cache, got torch.float16"),
        ((q[:, :3], *gates), {"sequences": [s]}, "got .1, 1, 3, 16."),
        ((q[:, :5], *gates), {"sequences": [s]}, "q has 5 heads, the spec has groups of 3"),
        ((q[..., :8], *gates), {"sequences": [s]}, "q must be .*, 6, 16., got .1, 1, 6, 8."),
        ((q, gates[0][:, :5], *gates[1:]), {"sequences": [s]}, "g_cmp must be"),
        ((q, *gates), {}, "give sequences or slots, one of them"),
        ((q, *gates), {"sequences": [s], "slots": cache.slots([s])}, "give sequences or slots, one of them"),
        ((q, *gates), {"sequences": [s, s]}, r"slots must be int32 \[1\]"),
        ((q, *gates), {"slots": cache.slots([s]).long()}, r"slots must be int32 \[S\] on .*, got torch.int64"),
        ((q, *gates), {"sequences": [other]}, f"q has 1 new tokens a sequence, sequence {other} has 0"),
        ((q, *gates), {"sequences": [s], "max_seqlen": 2}, "max_seqlen: got 2, a sequence has 3 tokens"),
        ((q, *gates), {"sequences": [s], "scale": -1.0}, "scale must be a positive finite number"),
        ((q, *gates), {"slots": [0]}, r"slots must be int32 \[S\] on .*, got list"),
        ((q, *gates), {"slots": cache.slots([s]), "max_seqlen": 0}, "max_seqlen must be a whole number from 1 to the cache's, 640, got 0"),
        ((q, *gates), {"slots": cache.slots([s]), "max_seqlen": 3.5}, "max_seqlen must be a whole number"),
        ((several[0], *several[1]), {"sequences": [s]}, "q has 9 new tokens a sequence, allowed are 1 to 8"),
    ):
        with pytest.raises(InputError, match=why):
            nsa_gen.nsa_decode(*given, cache=cache, **how)
    with pytest.raises(UnknownSequence):
        nsa_gen.nsa_decode(q, *gates, cache=cache, sequences=[-5])


@runs
def test_records_of_eager_steps_do_not_recompile(monkeypatch):
    stream = Stream(40)
    cache = stream.cache()
    s = cache.create()
    cache.append([s], *stream.part(0, 40))
    q, gates, slots = stream.q[-1:], [g[-1:] for g in stream.gates], cache.slots([s])

    def step(q, *gates):
        return 2 * nsa_gen.nsa_decode(q, *gates, cache=cache, slots=slots)

    graphs = []
    compiled = torch.compile(step, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1], fullgraph=True)
    wanted = step(q, *gates)
    for i in range(10):
        monkeypatch.setitem(serving._repeats.known, (i, int, q.shape, q.dtype), step)
        assert torch.equal(compiled(q, *gates), wanted)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
def test_repeated_steps_are_checked_once(kv, single, monkeypatch):
    """From the third step on nothing is asked again, numbers are right, and what is wrong is still refused."""
    kernels.clear()  # records of other tests
    stream = Stream(400, dtype=torch.bfloat16, kv=kv)
    o, _ = stream.trained()
    cache = stream.cache()
    s, t = cache.create(), cache.create()
    cache.append([s, t], *stream.at(torch.cat([torch.arange(30), torch.arange(200)])), [30, 200])
    slots, asked = cache.slots([s, t]), []
    for module, name in ((serving, "_check"), (type(cache), "_given")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real, name=name: (asked.append(name), real(*args))[1])
    for step in range(8):
        at = torch.tensor([30 + step, 200 + step], device=DEVICE)
        cache.reserve([s, t], [1, 1])
        asked.clear()
        cache.write(*stream.at(at), slots)
        q, *gates = (x[at] if single else x[at][:, None] for x in (stream.q, *stream.gates))
        found = nsa_gen.nsa_decode(q, *gates, cache=cache, slots=slots)
        assert asked == (["_given", "_check"] if step < 2 else [])
        torch.testing.assert_close(found, o[at] if single else o[at][:, None], rtol=2e-2, atol=2e-2)
    with pytest.raises(InputError, match="q must be"):
        nsa_gen.nsa_decode(q.half(), *gates, cache=cache, slots=slots)
    with pytest.raises(InputError, match="slots must be int32"):
        nsa_gen.nsa_decode(q, *gates, cache=cache, slots=slots.long())
    with pytest.raises(InputError, match="max_seqlen must be"):
        nsa_gen.nsa_decode(q, *gates, cache=cache, slots=slots, max_seqlen=float(cache.max_seqlen))


@pytest.mark.gpu
def test_one_graph_serves_every_length():
    stream = Stream(400, dtype=torch.bfloat16)
    o, _ = stream.trained()
    cache = stream.cache()
    s, t = cache.create(), cache.create()
    cache.append([s, t], *(torch.cat([x[:30], x[:200]]) for x in stream.part(0, 200)), [30, 200])
    q = stream.q[:2].clone()
    gates, slots = [g[:2].clone() for g in stream.gates], cache.slots([s, t])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        nsa_gen.nsa_decode(q, *gates, cache=cache, slots=slots)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nsa_gen.nsa_decode(q, *gates, cache=cache, slots=slots)
    for step in range(100):
        at = torch.tensor([30 + step, 200 + step], device=DEVICE)
        cache.append([s, t], *stream.at(at))
        q.copy_(stream.q[at])
        for gate, whole in zip(gates, stream.gates, strict=True):
            gate.copy_(whole[at])
        graph.replay()
        torch.testing.assert_close(found, o[at], rtol=2e-2, atol=2e-2)
