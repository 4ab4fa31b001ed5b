"""``PagedKVCache``: what is appended, forked, taken back and freed reads as a plain contiguous model says, in every storage and pooling."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gradient_cases import DEVICE
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, precondition, rule

import nsa_gen
from nsa_gen import reference
from nsa_gen.errors import InputError, OutOfPages, UnknownSequence

SPEC = {
    "schema": 1, "name": "cached", "dtype": "float32", "heads": {"query": 4, "kv": 2}, "head_dim": {"qk": 16, "v": 32},
    "compression": {"block": 8, "stride": 4, "pooling": "mean"}, "selection": {"block": 16, "count": 4, "initial": 1, "local": 1},
    "window": 24,
}  # fmt: skip


def spec(pooling="mean", kv="shared", **changes) -> nsa_gen.Spec:
    chosen = SPEC | {"kv": kv, "compression": SPEC["compression"] | {"pooling": pooling}} | changes
    return nsa_gen.Spec.from_dict(chosen)


def phi(pooling: str, dim: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(dim)
    made = {
        "mean": [], "weighted": [(2, 8)], "linear": [(2, 8 * dim, dim)],
        "mlp": [(2, 8 * dim, dim), (2, dim), (2, dim, dim), (2, dim), (2, 8, dim)],
    }[pooling]  # fmt: skip
    return tuple((torch.randn(shape) * 0.1).to(DEVICE, dtype) for shape in made)


def cache(pooling="mean", kv="shared", pages=40, **options) -> nsa_gen.PagedKVCache:
    dtype = options.get("dtype", torch.float32)
    weights = {"phi_k": phi(pooling, 16, dtype), "phi_v": phi(pooling, 32, dtype)}
    chosen = {"page_size": 16, "max_sequences": 5, "max_seqlen": 200, "device": DEVICE, "rewind": 4} | weights | options
    return nsa_gen.PagedKVCache(spec(pooling, kv), pages, **chosen)


def tokens(n: int, kv="shared", seed=0, dtype=torch.float32):
    """Fresh K and V of n tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(3 if kv == "per_branch" else 1, n, 2, dim, generator=generator).to(DEVICE, dtype) for dim in (16, 32)]
    return tuple(tuple(x) if kv == "per_branch" else x[0] for x in made)


def compressed(made: nsa_gen.PagedKVCache, k, v):
    """Compressed tokens of a whole sequence, by the operator that trains."""
    g, found = made.geometry, []
    for x, weights, which in ((k, made.phi[0][0], "k"), (v, made.phi[0][1], "v")):
        rows = max(0, (len(x) - g.block) // g.stride + 1)
        found.append(nsa_gen.compress(x, weights, spec=made.spec, which=which)[:rows])
    return found


class Walk(RuleBasedStateMachine):
    """The model: K and V of each sequence, in one piece."""

    sequences = Bundle("sequences")

    @initialize(target=sequences, kv=st.sampled_from(("shared", "per_branch")), pages=st.integers(0, 40), rewind=st.integers(0, 20))
    def begin(self, kv, pages, rewind):
        """One sequence is there: else most walks would end at once, for want of one."""
        self.kv, self.model, self.step = kv, {}, 0
        self.cache = cache(kv=kv, pages=pages, rewind=rewind)
        return self.made()

    def made(self):
        sequence = self.cache.create()
        self.model[sequence] = tokens(0, self.kv)
        return sequence

    def state(self):
        found = {s: [self.cache.length(s), *self.contents(s)] for s in self.model}
        return found, self.cache.pages_free

    def contents(self, s):
        held = self.cache._pages.find(s).pages
        return [self.cache.read(s, name) for name, pages in zip(self.cache.streams, held, strict=True) if None not in pages]

    def unchanged(self, before):
        after = self.state()
        assert before[1] == after[1] and before[0].keys() == after[0].keys()
        for s, (length, *contents) in before[0].items():
            assert length == after[0][s][0]
            for (k, v), (k2, v2) in zip(contents, after[0][s][1:], strict=True):
                assert torch.equal(k, k2) and torch.equal(v, v2)

    @rule(target=sequences)
    def create(self):
        if len(self.model) == 5:
            with pytest.raises(OutOfPages, match="5 sequences exist"):
                self.cache.create()
            return multiple()
        return self.made()

    @precondition(lambda self: self.model)
    @rule(some=st.dictionaries(sequences, st.integers(0, 60), min_size=1, max_size=3))
    def append(self, some):
        self.step += 1
        k, v = tokens(sum(some.values()), self.kv, self.step)
        before = self.state()
        try:
            self.cache.append(list(some), k, v, list(some.values()))
        except InputError as error:
            assert "allowed are 200" in str(error)
            assert any(self.cache.length(s) + n > 200 for s, n in some.items())
            return self.unchanged(before)
        except OutOfPages:
            assert self.cache.pages_needed(some) > self.cache.pages_free
            return self.unchanged(before)
        first = 0
        for s, n in some.items():
            self.model[s] = tuple(self.joined(a, b, first, n) for a, b in zip(self.model[s], (k, v), strict=True))
            first += n

    def joined(self, a, b, first, n):
        if self.kv == "shared":
            return torch.cat([a, b[first : first + n]])
        return tuple(torch.cat([x, y[first : first + n]]) for x, y in zip(a, b, strict=True))

    def cut(self, x, n):
        return x[:n] if self.kv == "shared" else tuple(y[:n] for y in x)

    @rule(target=sequences, parent=sequences, share=st.floats(0, 1))
    def fork(self, parent, share):
        n = round(share * self.cache.length(parent))
        if len(self.model) == 5:
            return multiple()
        before = self.state()
        try:
            made = self.cache.fork(parent, n)
        except InputError as error:
            assert self.kv == "per_branch" and "taken back" in str(error)
            self.unchanged(before)
            return multiple()
        assert self.cache.pages_free == before[1], "a fork takes no page"
        self.model[made] = tuple(self.cut(x, n) for x in self.model[parent])
        return made

    @rule(sequence=sequences, back=st.integers(0, 30))
    def truncate(self, sequence, back):
        n = max(self.cache.length(sequence) - back, 0)
        before = self.state()
        try:
            self.cache.truncate(sequence, n)
        except InputError:
            assert self.kv == "per_branch" and back > self.cache._pages.rewind
            return self.unchanged(before)
        self.model[sequence] = tuple(self.cut(x, n) for x in self.model[sequence])

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        del self.model[sequence]
        before = self.state()
        for again in (
            self.cache.free,
            self.cache.fork,
            self.cache.length,
            self.cache.read,
            lambda s: self.cache.append([s], *tokens(1, self.kv)),
        ):
            with pytest.raises(UnknownSequence, match="freed"):
                again(sequence)
        self.unchanged(before)

    @invariant()
    def reads_as_the_model(self):
        if not hasattr(self, "cache"):
            return
        made = self.cache
        for s, (k, v) in self.model.items():
            held = made._pages.find(s)
            several = [(k, v)] if self.kv == "shared" else list(zip(k, v, strict=True))
            n = len(several[0][0])
            assert made.length(s) == n == int(made.lengths[held.slot])
            for name, (x, y) in zip(made.streams, several, strict=False):
                number = made.streams.index(name)
                rows = n - made._pages.streams[number].keep if made._pages.streams[number].keep else 0
                self.same(made.gather(number, [(s, max(rows, 0), n)]), (x[max(rows, 0) :], y[max(rows, 0) :]))
            self.same(made.read(s, "compressed"), compressed(made, *several[0]))
            for number, pages in enumerate(held.pages):
                there = made.tables[number, held.slot, : len(pages)].tolist()
                assert all(page in (None, found) for page, found in zip(pages, there, strict=True))

    def same(self, found, wanted):
        for x, y in zip(found, wanted, strict=True):
            assert torch.equal(x, y)

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.free(*self.model)
            assert self.cache.pages_free == self.cache.pages_total


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=10, stateful_step_count=20, deadline=None, phases=[Phase.generate])  # shrinking takes minutes


@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize("pooling", ["mean", "weighted", "linear", "mlp"])
def test_tokens_one_by_one_are_tokens_at_once(pooling, kv):
    """The compressed tokens are those of training, whatever the portions that tokens came in."""
    made, n = cache(pooling, kv), 45
    k, v = tokens(n, kv)
    whole, parts = made.create(), made.create()
    made.append([whole], k, v)
    cuts = [0, 1, 8, 9, 12, 13, 14, 30, 31, 45]
    for a, b in pairwise(cuts):
        made.append([parts], *((tuple(y[a:b] for y in x) if kv == "per_branch" else x[a:b]) for x in (k, v)))
    first = (k[0], v[0]) if kv == "per_branch" else (k, v)
    g = made.geometry
    for found, again, x, weights in zip(made.read(whole, "compressed"), made.read(parts, "compressed"), first, made.phi[0], strict=True):
        wanted = reference.compress(x, pooling, weights, g.block, g.stride, (0, n), torch.float64)
        torch.testing.assert_close(found.double(), wanted[: len(found)], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, again, rtol=1e-6, atol=1e-6)
        assert len(found) == (n - 8) // 4 + 1


def test_several_sequences_at_once():
    made = cache()
    a, b, c = (made.create() for _ in range(3))
    k, v = tokens(60)
    made.append([a, b, c], k, v, [33, 0, 27])
    made.append([c, a], k[:4], v[:4])  # two tokens of each
    assert [made.length(s) for s in (a, b, c)] == [35, 0, 29]
    for found, x in zip(made.read(a), (k, v), strict=True):
        assert torch.equal(found, torch.cat([x[:33], x[2:4]]))
    for found, x in zip(made.read(c), (k, v), strict=True):
        assert torch.equal(found, torch.cat([x[33:], x[:2]]))
    assert made.read(b)[0].shape == (0, 2, 16) and made.read(b, "compressed")[1].shape == (0, 2, 32)
    assert made.slots([c, a]).tolist() == [made._pages.find(s).slot for s in (c, a)]


@pytest.mark.parametrize("kv", ["shared", "per_branch"])
def test_room_first_then_rows_is_append(kv):
    """As a CUDA graph has it: where rows go is in the tables and lengths alone. Strided K and V too."""
    made = cache(kv=kv, max_seqlen=60)
    a, b, one, two = (made.create() for _ in range(4))
    for step, n in enumerate((1, 3, 8, 2, 8, 8)):
        k, v = tokens(2 * n, kv, step)
        made.append([a, b], k, v)
        made.reserve([one, two], n)
        wide = [
            torch.full((len(several), 2 * n, 3, 40), torch.nan, device=DEVICE)
            for several in ((k, v) if kv == "per_branch" else ((k,), (v,)))
        ]
        for x, several in zip(wide, (k, v), strict=True):
            for y, part in zip(x, several if kv == "per_branch" else (several,), strict=True):
                y[:, :2, : part.shape[-1]] = part
        given = [tuple(x[:, :, :2, :dim]) if kv == "per_branch" else x[0, :, :2, :dim] for x, dim in zip(wide, (16, 32), strict=True)]
        made.write(*given, made.slots([one, two]))
    for name in made.streams:
        if kv == "shared" or name in ("selected", "compressed"):
            for s, t in ((a, one), (b, two)):
                assert all(torch.equal(x, y) for x, y in zip(made.read(s, name), made.read(t, name), strict=True))
    k, v = tokens(2, kv)
    for call, why in (
        (lambda: made.reserve([one], [2, 3]), "tokens must be 1 numbers from 0"),
        (lambda: made.fill([made.create()], k, v), r"2 tokens for sequence \d+: the last reserve made room for 0"),
        (lambda: made.write(k, v, made.slots([one]).long()), r"slots must be int32 \[S\]"),
        (lambda: made.write(k, v, made.slots([a, b, one])), "2 tokens for 3 sequences"),
        (lambda: made.write(k, v, torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)[:, 0]), "slots must be contiguous"),
        (lambda: made.reserve([one], 8) or made.reserve([one], 8) or made.reserve([one], 8) or made.reserve([one], 8), "allowed are 60"),
    ):
        with pytest.raises(InputError, match=why):
            call()


@pytest.mark.parametrize("kv", ["shared", "per_branch"])
def test_layers_are_caches_that_share_their_tables(kv):
    """Each like a cache of one layer, with weights of its own; pages are taken once for all, and copied in all."""
    generator = torch.Generator().manual_seed(0)
    weights = [[torch.rand(2, 8, generator=generator).to(DEVICE)] for _ in range(3)]
    made = cache("weighted", kv, layers=3, phi_k=weights, phi_v=weights[::-1], rewind=60)
    alone = [cache("weighted", kv, phi_k=x, phi_v=y, rewind=60) for x, y in zip(weights, weights[::-1], strict=True)]
    ids = [[one.create() for one in (made, *alone)] for _ in range(2)]

    def bring(which, counts, seed):
        of_made = [ids[i][0] for i in which]
        made.reserve(of_made, counts)
        for layer, one in enumerate(alone):
            k, v = tokens(sum(counts), kv, 10 * seed + layer)
            one.append([ids[i][layer + 1] for i in which], k, v, counts)
            if seed % 2:
                made.write(k, v, made.slots(of_made), layer)
            else:
                made.fill(of_made, k, v, counts, layer)

    bring((0, 1), (50, 0), 0)
    ids.append([one.fork(i, 41) for one, i in zip((made, *alone), ids[0], strict=True)])
    bring((2, 1), (13, 21), 2)
    bring((1, 2), (3, 3), 3)
    bring((0,), (1,), 5)
    assert made.pages_free == alone[0].pages_free
    for layer, one in enumerate(alone):
        for several in ids:
            for name in made.streams:
                if kv == "shared" or name in ("selected", "compressed"):
                    pairs = zip(made.read(several[0], name, layer), one.read(several[layer + 1], name), strict=True)
                    assert all(torch.equal(x, y) for x, y in pairs), (layer, name)
    k, v = tokens(1, kv)
    for call, why in (
        (lambda: made.append([ids[0][0]], k, v), "append is for caches of one layer, this one has 3"),
        (lambda: made.fill([ids[0][0]], k, v, layer=3), "layer must be 0 to 2, got 3"),
        (lambda: made.read(ids[0][0], "compressed", -1), "layer must be 0 to 2, got -1"),
        (lambda: cache("weighted", layers=2, phi_k=weights, phi_v=weights), "phi_k must have weights for each of 2 layers, got 3"),
    ):
        with pytest.raises(InputError, match=why):
            call()


@pytest.mark.parametrize("kv", ["shared", "per_branch"])
def test_fp8_rounds_within_its_step_and_clips(kv):
    scale = torch.tensor([0.5, 0.01], device=DEVICE)
    made = cache(kv=kv, storage=torch.float8_e4m3fn, k_scale=scale, v_scale=0.02)
    assert made.k_pages.dtype is torch.float8_e4m3fn
    s = made.create()
    k, v = tokens(50, kv)
    k = tuple(x * 100 for x in k) if kv == "per_branch" else k * 100  # beyond 448 * 0.01 in the second head
    made.append([s], k, v)
    stream = "selected" if kv == "per_branch" else "tokens"
    x, y = (k[1], v[1]) if kv == "per_branch" else (k, v)
    found_k, found_v = made.read(s, stream)
    limit = 448 * scale[:, None]
    wanted = x.clamp(-limit, limit)
    assert bool((x.abs() > limit).any())
    torch.testing.assert_close(found_k, wanted, rtol=2**-4, atol=0.5 * 2**-9)
    torch.testing.assert_close(found_v, y, rtol=2**-4, atol=0.02 * 2**-9)
    if kv == "shared":  # φ reads what is stored
        c_k, _ = made.read(s, "compressed")
        torch.testing.assert_close(c_k, found_k.unfold(0, 8, 4).mean(-1), rtol=2**-4, atol=0.5 * 2**-9)


def test_streams_may_have_scales_of_their_own():
    scale = torch.tensor([[1.0, 1.0], [0.25, 0.25]], device=DEVICE)
    made = cache(storage=torch.float8_e4m3fn, k_scale=scale)
    s = made.create()
    k, v = tokens(8)
    made.append([s], torch.full_like(k, 99.0), v)
    assert float(made.k_pages.float().max()) == 384.0, "99 is stored as 96, and the mean of those by four"
    assert bool((made.read(s, "compressed")[0] == 96).all())


def test_half_precision_is_kept_to_the_bit():
    made = cache(dtype=torch.bfloat16)
    s = made.create()
    k, v = tokens(40, dtype=torch.bfloat16)
    made.append([s], k, v)
    assert torch.equal(made.read(s)[0], k) and torch.equal(made.read(s)[1], v)


def test_a_fork_writes_into_pages_of_its_own():
    made = cache(pages=6)
    s = made.create()
    k, v = tokens(24)
    made.append([s], k, v)  # two pages, and one of compressed tokens
    fork = made.fork(s)
    assert made.pages_free == 3 and made.pages_needed({fork: 1}) == 1
    made.append([fork], k[:1] + 1, v[:1])
    assert made.pages_free == 2
    assert torch.equal(made.read(s)[0], k) and torch.equal(made.read(fork)[0], torch.cat([k, k[:1] + 1]))
    made.append([s], k[:1], v[:1])
    assert made.pages_free == 2, "the other has gone: nothing is shared, nothing copied"


def test_a_window_keeps_its_pages_few():
    made = cache(kv="per_branch", pages=100, max_seqlen=1000)
    s = made.create()
    for step in range(12):
        made.append([s], *tokens(16, "per_branch", step))
    held = made._pages.find(s).pages
    count = {name: sum(page is not None for page in pages) for name, pages in zip(made.streams, held, strict=True)}
    assert count == {"pooled": 2, "selected": 12, "sliding": 4, "compressed": 3}
    with pytest.raises(InputError, match="given its first rows up"):
        made.read(s, "sliding")
    assert len(made.read(s, "selected")[0]) == 192


def test_nothing_is_freed_of_nothing():
    made = cache()
    made.append([made.create()], *tokens(20))
    free = made.pages_free
    made.free()
    assert made.pages_free == free


def test_a_freed_slot_writes_nothing():
    """As a CUDA graph may still have it."""
    made = cache()
    gone, s = made.create(), made.create()
    made.append([gone], *tokens(32))
    slots = made.slots([gone])
    made.free(gone)
    made.append([s], *tokens(40, seed=1))
    before = made.k_pages.clone()
    made.write(*tokens(1, seed=2), slots)
    assert torch.equal(made.k_pages, before)


def test_rows_may_want_gradients_and_get_none():
    made = cache()
    s = made.create()
    k, v = tokens(20)
    made.append([s], k.requires_grad_(), v)
    assert not made.k_pages.requires_grad and torch.equal(made.read(s)[0], k.detach())


def test_what_the_host_places_is_not_captured(monkeypatch):
    made = cache()
    s = made.create()
    made.reserve([s], 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match=r"fill cannot be captured.*write can"):
        made.fill([s], *tokens(3))


def test_only_fresh_rows_are_filled():
    made = cache()
    s = made.create()
    made.append([s], *tokens(32))
    fork = made.fork(s)
    made.reserve([s])
    with pytest.raises(InputError, match="the last reserve made room for 1"):
        made.fill([s], *tokens(4))
    made.reserve([s], 6)
    made.truncate(s, 37)
    with pytest.raises(InputError, match="the last reserve made room for 4"):
        made.fill([s], *tokens(5))
    kept = made.read(fork)
    made.fill([s], *tokens(4, seed=3))
    assert all(torch.equal(x, y) for x, y in zip(kept, made.read(fork), strict=True)) and made.length(fork) == 32


def test_pages_are_not_leaked():
    made = cache()
    for step in range(20):
        s = made.create()
        made.append([s], *tokens(30, seed=step))
        forks = [made.fork(s, n) for n in (10, 30)]
        made.append(forks, *tokens(2, seed=step))
        made.free(s, *forks)
    assert made.pages_free == made.pages_total


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"page_size": 24}, "multiple of the selection block, 16, got 24"),
        ({"pages": -1}, "pages must be a whole number from 0, got -1"),
        ({"max_sequences": 0}, "max_sequences must be a whole number from 1"),
        ({"storage": torch.float16}, "storage: got torch.float16, allowed: torch.float32, torch.float8_e4m3fn"),
        ({"dtype": torch.float64}, "dtype: got torch.float64"),
        ({"k_scale": torch.ones(3)}, "k_scale must be a number, .2., .2, 2. .tokens, compressed. or .1, 2, 2., got .3."),
        ({"v_scale": 0.0}, "v_scale must be positive and finite, got 0.0"),
    ],
)
def test_impossible_caches_are_refused(options, why):
    with pytest.raises(InputError, match=why):
        cache(**options)
    with pytest.raises(InputError, match="phi_k: pooling mlp of the spec takes 5 tensors"):
        nsa_gen.PagedKVCache(spec("mlp"), 4, page_size=16, device=DEVICE)


def test_wrong_appends_are_refused_and_change_nothing():
    made, other = cache(), cache()
    a, b, foreign = made.create(), made.create(), other.create()
    k, v = tokens(6)
    made.append([a], k, v)
    for sequences, given, counts, why in (
        ([a, a], (k, v), None, "each once"),
        ([a, b], (k[:5], v[:5]), None, "5 tokens for 2 sequences"),
        ([a, b], (k, v), [3, 4], "add up to 6"),
        ([a, b], (k, v), [7, -1], "numbers from 0"),
        ([], (k, v), None, "6 tokens for 0 sequences"),
        ([a], (k, v[:5]), None, "same tokens"),
        ([a], (k[..., :8], v), None, r"k must be \[T, Hkv, D\] = \[T, 2, 16\], got \[6, 2, 8\]"),
        ([a], (k, v.half()), None, "v must be torch.float32"),
        ([a], ((k, k, k), v), None, "k must be one tensor .kv: shared., got 3"),
        ([a], (k, None), None, "got NoneType"),
    ):
        with pytest.raises(InputError, match=why):
            made.append(sequences, *given, counts)
    for unknown in (foreign, -1):
        with pytest.raises(UnknownSequence, match=f"sequence {unknown} is not in this cache"):
            made.append([a, unknown], k, v)
    with pytest.raises(InputError, match="would have 206 tokens, allowed are 200"):
        made.append([a], *tokens(200))
    with pytest.raises(InputError, match="stream: got 'sliding', allowed: tokens, compressed"):
        made.read(a, "sliding")
    with pytest.raises(InputError, match=r"three tensors, .* \(kv: per_branch\), got 1"):
        branches = cache(kv="per_branch")
        branches.append([branches.create()], k, v)
    assert made.length(a) == 6 and made.length(b) == 0 and torch.equal(made.read(a)[0], k)
    made.append([], k[:0], v[:0])
