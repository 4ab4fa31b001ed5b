"""The oracle against brute force written from the definitions, one query and one key at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_gen import reference
from nsa_gen.config import overlap_weights
from nsa_gen.errors import ConfigError, InputError
from nsa_gen.spec import Compression, HeadDim, Heads, Selection, Spec

CU = (0, 5, 5, 42, 75)  # one too short to compress, one empty
F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def sequences(cu=CU):
    return [(b, cu[b], cu[b + 1]) for b in range(len(cu) - 1)]


def brute_attention(q, keys, values, scale):
    """One query row against a list of keys; plain softmax in Python."""
    if not len(keys):
        return torch.zeros(values.shape[-1], dtype=F64), -math.inf
    logits = [float(q @ key) * scale for key in keys]
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    o = sum(e * value for e, value in zip(exps, values, strict=True)) / sum(exps)
    return o, top + math.log(sum(exps))


# --- overlap weights -----------------------------------------------------------------------------------------------------------


def test_overlap_weights_of_the_paper_geometry():
    flat = {mapping: overlap_weights(32, 16, 64, mapping) for mapping in ("overlap", "literal")}
    at = {m: {r - 4 * lag: n for lag, row in enumerate(w) for r, n in enumerate(row) if n} for m, w in flat.items()}
    assert at["overlap"] == {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}
    assert at["literal"] == {-4: 1, -3: 2, -2: 2, -1: 2, 0: 1}


@settings(max_examples=60, deadline=None)
@given(
    stride=st.sampled_from([1, 2, 4, 16]), units=st.integers(1, 5), more=st.integers(0, 4), mapping=st.sampled_from(["overlap", "literal"])
)
def test_overlap_weights_against_counting(stride, units, more, mapping):
    block, selection_block, per_block = units * stride, (units + more) * stride, units + more
    weights = overlap_weights(block, stride, selection_block, mapping)
    assert any(weights[-1])
    i = 7
    for j in range((i + 3) * per_block):
        if mapping == "overlap":
            compressed = set(range(j * stride, j * stride + block))
            expected = len(compressed & set(range(i * selection_block, (i + 1) * selection_block))) // stride
        else:
            expected = sum(per_block * i - m - n == j for m in range(per_block) for n in range(units))
        lag, r = i - j // per_block, j % per_block
        got = weights[lag][r] if 0 <= lag < len(weights) else 0
        assert got == expected, (j, lag, r)


def test_overlap_weights_refuses():
    with pytest.raises(ConfigError, match="mapping: got 'x', allowed: overlap, literal"):
        overlap_weights(32, 16, 64, "x")
    for blocks in ((33, 16, 64), (32, 16, 72), (64, 16, 32)):
        with pytest.raises(ConfigError, match="blocks"):
            overlap_weights(*blocks, "overlap")


# --- compression ---------------------------------------------------------------------------------------------------------------


def pooling_weights(pooling, heads, block, dim, hidden=6):
    shapes = {
        "mean": [],
        "weighted": [(heads, block)],
        "linear": [(heads, block * dim, dim)],
        "mlp": [(heads, block * dim, hidden), (heads, hidden), (heads, hidden, dim), (heads, dim), (heads, block, dim)],
    }[pooling]
    return tuple(randn(*shape, seed=10 + n) for n, shape in enumerate(shapes))


@pytest.mark.parametrize("pooling", reference.POOLINGS)
@pytest.mark.parametrize("slab", [2**30, 1])
def test_compress(pooling, slab, monkeypatch):
    monkeypatch.setattr(reference, "SLAB_BYTES", slab)
    block, stride, heads, dim = 8, 4, 2, 3
    x, weights = randn(CU[-1], heads, dim), pooling_weights(pooling, heads, block, dim)
    got = reference.compress(x, pooling, weights, block, stride, CU)
    expected = torch.zeros(CU[-1] // stride, heads, dim, dtype=F64)
    for _, start, end in sequences():
        j = 0
        while j * stride + block <= end - start:
            for h in range(heads):
                rows = x[start + j * stride : start + j * stride + block, h]
                if pooling == "mean":
                    value = rows.sum(0) / block
                elif pooling == "weighted":
                    value = sum(weights[0][h, p] * rows[p] for p in range(block))
                elif pooling == "linear":
                    value = torch.cat(list(rows)) @ weights[0][h]
                else:
                    w1, b1, w2, b2, pos = (w[h] for w in weights)
                    hidden = torch.cat([rows[p] + pos[p] for p in range(block)]) @ w1 + b1
                    value = (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ w2 + b2
                expected[start // stride + j, h] = value
            j += 1
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got.count_nonzero()


def test_compressed_offsets_fit_and_never_overlap():
    cu, block, stride = (0, 3, 40, 41, 77, 110), 8, 4
    rows = [row for first, count in reference.compressed_offsets(cu, 110, block, stride) for row in range(first, first + count)]
    assert len(rows) == len(set(rows)) == 8 + 8 + 7
    assert max(rows) < reference.compressed_rows(110, stride)
    assert reference.compressed_rows(3, 4) == 1


def test_compress_refuses():
    with pytest.raises(InputError, match="pooling: got 'max'"):
        reference.compress(randn(16, 1, 2), "max", (), 8, 4)
    with pytest.raises(InputError, match="needs weights of shapes"):
        reference.compress(randn(16, 1, 2), "weighted", (randn(1, 7),), 8, 4)
    with pytest.raises(InputError, match="cu_seqlens"):
        reference.compress(randn(16, 1, 2), "mean", (), 8, 4, (0, 9, 4, 16))


# --- attention -----------------------------------------------------------------------------------------------------------------

BLOCK, STRIDE, SELECTION = 8, 4, 16
HQ, HKV, DQK, DV = 6, 2, 5, 3


def attention_inputs(kv_rows=CU[-1], dim=DQK, dim_v=DV):
    return randn(CU[-1], HQ, dim, seed=1), randn(kv_rows, HKV, dim, seed=2), randn(kv_rows, HKV, dim_v, seed=3)


def brute_rows(q, k, v, scale, see):
    """Every (token, head): attention to packed rows ``see(sequence start, position, kv head)``."""
    o, lse = torch.empty(CU[-1], HQ, DV, dtype=F64), torch.empty(CU[-1], HQ, dtype=F64)
    for _, start, end in sequences():
        for t in range(start, end):
            for head in range(HQ):
                kv = head // (HQ // HKV)
                rows = see(start, t - start, kv)
                o[t, head], lse[t, head] = brute_attention(q[t, head], k[rows, kv], v[rows, kv], scale)
    return o, lse


def check(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-10, atol=1e-12)


def seen_compressed(start, position, kv=0):
    return [start // STRIDE + j for j in range(99) if j * STRIDE + BLOCK - 1 <= position]


@pytest.mark.parametrize("slab", [2**30, 2000])
def test_compressed_attention(slab, monkeypatch):
    monkeypatch.setattr(reference, "SLAB_BYTES", slab)
    q, k, v = attention_inputs(reference.compressed_rows(CU[-1], STRIDE))
    for gap in set(range(len(k))) - {row for _, s, e in sequences() for row in seen_compressed(s, e - s - 1) if e > s}:
        k[gap], v[gap] = torch.nan, torch.nan  # gap rows are not trusted
    got = reference.compressed_attention(q, k, v, BLOCK, STRIDE, 0.7, CU)
    check(got, brute_rows(q, k, v, 0.7, seen_compressed))
    assert (got[1][:5] == -math.inf).all() and not got[0][:5].any()


@pytest.mark.parametrize("window", [1, 7, 100])
def test_sliding_attention(window):
    q, k, v = attention_inputs()
    got = reference.sliding_attention(q, k, v, window, None, CU)
    check(got, brute_rows(q, k, v, DQK**-0.5, lambda start, t, kv: [start + s for s in range(t + 1) if s > t - window]))


@pytest.mark.parametrize("mapping", ["overlap", "literal"])
def test_importance(mapping):
    q, k, v = attention_inputs(reference.compressed_rows(CU[-1], STRIDE))
    lse = reference.compressed_attention(q, k, v, BLOCK, STRIDE, 0.7, CU)[1]
    got = reference.importance(q, k, lse, BLOCK, STRIDE, SELECTION, mapping, 0.7, CU)
    assert got.shape == (CU[-1], HKV, 3)
    c, units = SELECTION // STRIDE, BLOCK // STRIDE
    for _, start, end in sequences():
        for t in range(start, end):
            rows = seen_compressed(start, t - start)
            for kv in range(HKV):
                prob = torch.zeros(100, dtype=F64)
                for head in range(3 * kv, 3 * kv + 3) if rows else ():
                    prob[: len(rows)] += torch.softmax(k[rows, kv] @ q[t, head] * 0.7, 0)
                for i in range(3):
                    if mapping == "overlap":
                        expected = sum(prob[j] for j in range(50) for u in range(units) if (j + u) // c == i)
                    else:
                        expected = sum(prob[c * i - m - n] for m in range(c) for n in range(units) if c * i - m - n >= 0)
                    assert abs(float(got[t, kv, i] - expected)) < 1e-12
    if mapping == "overlap":  # every stride unit lies in some block: nothing is lost
        full = got[41].sum()
        assert abs(float(full) - HQ * units) < 1e-9


def brute_select(row, position, count, initial, local):
    current = position // SELECTION
    forced = [i for i in range(current + 1) if i < initial or i > current - local]
    rest = sorted((i for i in range(current + 1) if i not in forced), key=lambda i: (-float(row[i]), i))
    chosen = sorted((forced + rest)[:count])
    return chosen + [-1] * (count - len(chosen))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_select_blocks(data):
    initial, local = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    count = data.draw(st.integers(max(initial + local, 1), 6))
    seed, levels = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 3, 10**6]))
    cu = (0, 90, 90, 101, 230)
    scores = torch.randint(levels, (cu[-1], 2, 9), generator=torch.Generator().manual_seed(seed)).float()
    for _, start, end in sequences(cu):
        for t in range(start, end):
            scores[t, :, (t - start) // SELECTION + 1 :] = torch.nan  # undefined columns are not read
    got = reference.select_blocks(scores, SELECTION, count, initial, local, cu)
    assert got.dtype == torch.int32
    for _, start, end in sequences(cu):
        for t in range(start, end):
            for kv in range(2):
                assert got[t, kv].tolist() == brute_select(scores[t, kv], t - start, count, initial, local), (t, kv)


def test_selected_attention():
    q, k, v = attention_inputs()
    scores = torch.rand(CU[-1], HKV, 3, generator=torch.Generator().manual_seed(4))
    chosen = reference.select_blocks(scores, SELECTION, 2, 0, 1, CU)
    assert (chosen == -1).any()

    def see(start, t, kv):
        blocks = chosen[start + t, kv].tolist()
        return [start + s for s in range(t + 1) if s // SELECTION in blocks]

    check(reference.selected_attention(q, k, v, chosen, SELECTION, 0.3, CU), brute_rows(q, k, v, 0.3, see))


def test_combine_passes_nan_gates():
    o, gates = [randn(4, 2, 3, seed=n) for n in range(3)], [randn(4, 2, seed=n + 5) for n in range(3)]
    gates[1][2, 1] = math.nan
    got = reference.combine(*o, *gates)
    assert got[2, 1].isnan().all() and got.isnan().sum() == 3
    torch.testing.assert_close(got[0, 1], sum(g[0, 1] * x[0, 1] for g, x in zip(gates, o, strict=True)))


# --- sampled queries, whole operator, gradients --------------------------------------------------------------------------------

SPEC = Spec(
    name="t",
    description="",
    heads=Heads(HQ, HKV),
    head_dim=HeadDim(16, 32),
    compression=Compression(BLOCK, STRIDE, "linear"),
    selection=Selection(SELECTION, 2, 0, 1),
    window=9,
    dtype="float32",
)


def test_queries_give_the_same_rows(monkeypatch):
    q, k, v = attention_inputs()
    k_cmp, v_cmp = (reference.compress(x, "mean", (), BLOCK, STRIDE, CU) for x in (k, v))
    queries = torch.tensor([74, 0, 42, 41, 5, 60, 13])
    lse = reference.compressed_attention(q, k_cmp, v_cmp, BLOCK, STRIDE, None, CU)[1]
    scores = reference.importance(q, k_cmp, lse, BLOCK, STRIDE, SELECTION, cu_seqlens=CU)
    chosen = reference.select_blocks(scores, SELECTION, 2, 0, 1, CU)
    calls = [
        lambda w: reference.compressed_attention(q, k_cmp, v_cmp, BLOCK, STRIDE, None, CU, w),
        lambda w: (reference.importance(q, k_cmp, lse, BLOCK, STRIDE, SELECTION, cu_seqlens=CU, queries=w),),
        lambda w: (reference.select_blocks(scores if w is None else scores[w], SELECTION, 2, 0, 1, CU, w),),
        lambda w: reference.selected_attention(q, k, v, chosen, SELECTION, None, CU, w),
        lambda w: reference.sliding_attention(q, k, v, 9, None, CU, w),
    ]
    whole = [call(None) for call in calls]
    monkeypatch.setattr(reference, "SLAB_BYTES", 3000)
    for call, expected in zip(calls, whole, strict=True):
        for got, reference_rows in zip(call(queries), expected, strict=True):
            torch.testing.assert_close(got, reference_rows[queries], rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="queries"):
        calls[0](torch.tensor([75]))


def test_nsa_attention_is_its_parts():
    q, k, v = attention_inputs(dim=16, dim_v=32)
    gates = [torch.sigmoid(randn(CU[-1], HQ, seed=n + 20)) for n in range(3)]
    weights = [pooling_weights("linear", HKV, BLOCK, dim) for dim in (16, 32)]
    got = reference.nsa_attention(q, k, v, *gates, SPEC, *weights, cu_seqlens=CU)
    k_cmp, v_cmp = (reference.compress(x, "linear", w, BLOCK, STRIDE, CU) for x, w in zip((k, v), weights, strict=True))
    o_cmp, lse = reference.compressed_attention(q, k_cmp, v_cmp, BLOCK, STRIDE, None, CU)
    chosen = reference.select_blocks(reference.importance(q, k_cmp, lse, BLOCK, STRIDE, SELECTION, cu_seqlens=CU), SELECTION, 2, 0, 1, CU)
    o_slc, o_swa = (
        reference.selected_attention(q, k, v, chosen, SELECTION, None, CU)[0],
        reference.sliding_attention(q, k, v, 9, None, CU)[0],
    )
    torch.testing.assert_close(got, reference.combine(o_cmp, o_slc, o_swa, *gates))
    queries = torch.tensor([70, 3, 41])
    some = reference.nsa_attention(q, k, v, *gates, SPEC, *weights, cu_seqlens=CU, queries=queries)
    torch.testing.assert_close(some, got[queries])
    per_branch = reference.nsa_attention(
        q, (k, k, k + 1), (v, v, v), *gates, SPEC, cu_seqlens=CU, compressed=(k_cmp, v_cmp), block_indices=chosen
    )
    o_swa = reference.sliding_attention(q, k + 1, v, 9, None, CU)[0]
    torch.testing.assert_close(per_branch, reference.combine(o_cmp, o_slc, o_swa, *gates))


def test_gradients():
    cu = (0, 3, 23)
    q, k, v = randn(23, 2, 16, seed=1), randn(23, 1, 16, seed=2), randn(23, 1, 32, seed=3)
    w1, w2 = (pooling_weights("linear", 1, BLOCK, dim)[0] * 0.1 for dim in (16, 32))
    gates = [torch.sigmoid(randn(23, 2, seed=n)) for n in range(3)]
    spec = SPEC.replace(heads={"query": 2, "kv": 1}, window=5)
    with torch.no_grad():
        scores = torch.rand(23, 1, 2)
        chosen = reference.select_blocks(scores, SELECTION, 2, 0, 1, cu)
    leaves = [x.requires_grad_() for x in (q, k, v, *gates, w1, w2)]

    def call(q, k, v, a, b, c, w1, w2):
        return reference.nsa_attention(q, k, v, a, b, c, spec, (w1,), (w2,), cu_seqlens=cu, block_indices=chosen)

    assert torch.autograd.gradcheck(call, leaves, atol=1e-7, fast_mode=True)
    lse = reference.compressed_attention(q, reference.compress(k, "mean", (), BLOCK, STRIDE, cu), v[:5], BLOCK, STRIDE, None, cu)[1]
    lse[-1].sum().backward()
    assert q.grad is not None and q.grad.isfinite().all() and q.grad[-1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_close_and_keeps_its_dtype(dtype):
    q, k, v = (x.to(dtype) for x in attention_inputs())
    o, lse = reference.sliding_attention(q, k, v, 20, None, CU)
    exact, exact_lse = reference.sliding_attention(q, k, v, 20, None, CU, dtype=F64)
    assert o.dtype == dtype and lse.dtype == torch.float32 and exact.dtype == exact_lse.dtype == F64
    assert (o.double() - exact).norm() / exact.norm() < torch.finfo(dtype).eps
    assert (lse.double() - exact_lse).abs().max() < 8 * torch.finfo(dtype).eps


def test_no_tokens():
    q, k, v = randn(0, HQ, DQK), randn(0, HKV, DQK), randn(0, HKV, DV)
    k_cmp, v_cmp = (reference.compress(x, "mean", (), BLOCK, STRIDE, (0, 0)) for x in (k, v))
    assert k_cmp.shape == (1, HKV, DQK)
    for o, lse in (
        reference.compressed_attention(q, k_cmp, v_cmp, BLOCK, STRIDE, None, (0, 0)),
        reference.sliding_attention(q, k, v, 4, None, (0, 0)),
        reference.selected_attention(q, k, v, torch.empty(0, HKV, 2, dtype=torch.int32), SELECTION, None, (0, 0)),
    ):
        assert o.shape == (0, HQ, DV) and lse.shape == (0, HQ)
