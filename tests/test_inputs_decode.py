"""Cases of the serving kernels: pages anywhere, kernels in plain loops accepted, every kind of wrong one rejected, large caches quick."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from nsa_gen import config, inputs, kernels, reference, spec
from nsa_gen.config import FP8, KEY_FIELDS, SERVING, Problem, Shape

FIELDS = {
    "dtype": "float16", "storage": "float16", "group": 3, "head_dim_qk": 32, "head_dim_v": 16, "block": 8, "stride": 4, "pooling": "mlp",
    "hidden": 16, "hidden_v": 48, "branches": 3, "selection_block": 16, "count": 4, "initial": 1, "local": 1, "mapping": "overlap",
    "window": 24, "page_size": 16, "tokens": 3,
}  # fmt: skip
SEQLENS = (5, 0, 90, 48, 8)
CACHES = [("float16", 1), ("float16", 3), (FP8, 1), (FP8, 3)]


def make(kernel: str, **options) -> inputs.Case:
    fields = FIELDS | {name: options.pop(name) for name in list(options) if name in FIELDS}
    problem = Problem.of(kernel, {name: fields[name] for name in KEY_FIELDS[kernel]})
    return inputs.case(problem, **{"seqlens": SEQLENS, "heads_kv": 2} | options)


def torch_module(case: inputs.Case) -> SimpleNamespace:
    """Host functions as loops over sequences and rows, on whole queries, in float32: as one reads docs/design.md, and slow."""
    p, heads = case.problem, case.heads_kv

    def place(table, slot, row):
        return int(table[slot, row // p.page_size]), slice(None), row % p.page_size

    def stream(pages, scale, table, slot, rows):
        held = pages.float()
        x = torch.stack([held[place(table, slot, row)] for row in rows]) if rows else held.new_zeros(1, heads, held.shape[3])
        return x if scale is None else x * scale[:, None]

    def each(q, slots, lengths):
        """Number, slot, length, queries of all tokens, and which of these are new."""
        for number, slot in enumerate(slots.tolist()):
            length = int(lengths[slot])
            new = torch.arange(length - p.tokens, length)
            yield number, slot, length, q.new_zeros(length, *q.shape[2:]).index_copy(0, new, q[number]), new

    def spread(x, new, length):
        return x.new_full((length, *x.shape[1:]), -1).index_copy(0, new, x)

    def decode_fwd(q, k_pages, v_pages, k_scale, v_scale, compressed, selected, sliding, slots, lengths, arrived, g_cmp, g_slc, g_swa,
                   block_indices, o, max_seqlen, scale):  # fmt: skip
        by_k, by_v = ((None,) * 3 if scale_of is None else scale_of for scale_of in (k_scale, v_scale))
        for number, slot, length, whole, new in each(q, slots, lengths):
            first = max(0, length - p.tokens - p.window + 1)
            held = range(reference.compressed_count(length, p.block, p.stride)), range(length), range(first, length)
            tables = compressed, selected, sliding
            k_cmp, k_slc, k_swa = (stream(k_pages, by_k[i], tables[i], slot, held[i]) for i in range(3))
            v_cmp, v_slc, v_swa = (stream(v_pages, by_v[i], tables[i], slot, held[i]) for i in range(3))
            at = {"scale": scale, "queries": new, "dtype": torch.float32}
            o_cmp, lse = reference.compressed_attention(whole, k_cmp, v_cmp, p.block, p.stride, **at)
            scores = reference.importance(whole, k_cmp, spread(lse, new, length), p.block, p.stride, p.selection_block, p.mapping, **at)
            block_indices[number] = reference.select_at(scores, new, p.selection_block, p.count, p.initial, p.local)
            blocks = spread(block_indices[number], new, length)
            o_slc, _ = reference.selected_attention(whole, k_slc, v_slc, blocks, p.selection_block, **at)
            o_swa, _ = reference.sliding_attention(whole[first:], k_swa, v_swa, p.window, **at | {"queries": new - first})
            o[number] = reference.combine(o_cmp, o_slc, o_swa, g_cmp[number], g_slc[number], g_swa[number], torch.float32)

    def cache_append(k, v, k_pages, v_pages, tables, k_scale, v_scale, slots, lengths, phi_k, phi_v):
        def store(pages, where, x, scale):
            x = x if scale is None else (x.float() / scale[:, None]).clamp(-448, 448)
            bits = pages.view(torch.uint8) if pages.element_size() == 1 else pages
            bits[where] = x.to(pages.dtype).view(bits.dtype)

        for number, slot in enumerate(slots.tolist()):
            length = int(lengths[slot])
            for x, pages, scale, phi in ((k, k_pages, k_scale, phi_k), (v, v_pages, v_scale, phi_v)):
                by = [None] * len(tables) if scale is None else scale
                for i, given in enumerate(x):
                    for token in range(p.tokens):
                        where = place(tables[i], slot, length - p.tokens + token)
                        store(pages, where, given[number * p.tokens + token], by[i])
                done, rows = (reference.compressed_count(n, p.block, p.stride) for n in (length - p.tokens, length))
                for row in range(done, rows):
                    held = stream(pages, None if scale is None else by[0], tables[0], slot, range(row * p.stride, row * p.stride + p.block))
                    made = reference.compress(held.to(case.dtype), p.pooling, tuple(phi), p.block, p.stride, None, torch.float32)[0]
                    store(pages, place(tables[-1], slot, row), made.to(case.dtype), by[-1])

    return SimpleNamespace(**locals())


@pytest.mark.parametrize(("storage", "tokens"), CACHES)
@pytest.mark.parametrize("kernel", SERVING)
def test_a_right_kernel_is_accepted(kernel, storage, tokens):
    for kind in inputs.KINDS if kernel != "cache_append" and tokens == 1 else ("random",):
        case = make(kernel, storage=storage, tokens=tokens, kind=kind, seed=3)
        assert case.seqlens == tuple(max(n, tokens) for n in SEQLENS)
        assert not case.check().ok  # nothing written yet
        for _ in range(2):
            case.run(torch_module(case))
            check = case.check(inputs.sample_queries(case.seqlens, 40))
            assert check.ok and not check.message and check.errors, check.message
            case.poison()
            assert not case.check().ok


@pytest.mark.parametrize("storage", ["float16", FP8])
def test_one_k_and_v_for_all_branches(storage):
    case = make("decode_fwd", storage=storage, branches=1)
    case.run(torch_module(case))
    assert case.check().ok and torch.equal(case.tensors["tables"][1], case.tensors["tables"][2])


def test_poolings_and_shared_k_and_v():
    for pooling in ("mean", "weighted", "linear"):
        case = make("cache_append", pooling=pooling, hidden=0, hidden_v=0, branches=1, seqlens=(8, 20, 41))
        case.run(torch_module(case))
        check = case.check()
        assert check.ok and set(check.errors) == {"k0", "v0", "k", "v"}, check.message


@pytest.mark.parametrize("storage", ["float16", FP8])
@pytest.mark.parametrize("number", range(len(SEQLENS)))
def test_a_sequence_that_is_wrong_is_found(number, storage):
    """However many there are: each is held to the reference."""
    for out in ("block_indices", "o"):
        case = make("decode_fwd", storage=storage)
        case.run(torch_module(case))
        row = case.outputs[out][number, -1]
        row[0] = row[0] + 0.1 if out == "o" else -1
        assert not case.check().ok, out


def test_what_is_not_written_or_left_behind_is_found():
    for name in ("block_indices", "o"):
        case = make("decode_fwd")
        case.run(torch_module(case))
        written = case.outputs[name].clone()
        case.outputs[name][2, 1, 0, -1] = torch.nan if name == "o" else -7
        assert "written" in case.check().message
        case.outputs[name].copy_(written)
        case.tensors["arrived"][1] = 1
        assert case.check().message == "arrived is not 0 again"
        case.poison()
        assert not case.tensors["arrived"].any(), "else every later candidate would be called wrong"


@pytest.mark.parametrize("storage", ["float16", FP8])
def test_rows_that_are_wrong_or_should_have_been_let_be_are_found(storage):
    def spoil(pages, where, value=9.0):
        held = pages.float()
        held[where] = value
        pages.copy_(held.to(pages.dtype))

    case = make("cache_append", storage=storage)
    size, slot = case.problem.page_size, int(case.tensors["slots"][2])  # of 90 tokens
    row_of = {"k0": (0, 89), "v1": (1, 87), "k2": (2, 88), "v": (3, 20)}
    for name, (stream, row) in row_of.items():
        case.poison()
        case.run(torch_module(case))
        where = int(case.tensors["tables"][stream, slot, row // size]), 1, row % size
        spoil(case.outputs[f"{name[0]}_pages"], where)
        assert case.check().message.startswith(f"{name}: "), name
    for stream, row in ((0, 86), (3, 19), (1, 80)):  # older tokens, and rows that nobody holds
        case.poison()
        case.run(torch_module(case))
        assert case.check().ok
        where = int(case.tensors["tables"][stream, slot, row // size]), 1, row % size
        spoil(case.outputs["k_pages"], where)
        assert case.check().message == "rows that are not new have changed", (stream, row)
    if storage == "float16":
        case.poison()
        case.run(torch_module(case))
        case.outputs["k_pages"].mul_(1.001)
        assert "as they are" in case.check().message or "max_abs" in case.check().message


@pytest.mark.parametrize("kernel", SERVING)
def test_a_page_is_one_streams_and_the_rest_is_nan(kernel):
    case = make(kernel)
    t = case.tensors | case.outputs
    tables = list(t["tables"])
    pages, slots = t["k_pages"], t["slots"].long()
    assert t["lengths"][slots].tolist() == list(case.seqlens) and int((t["lengths"] == -1).sum()) == 1
    spare = [n for n in range(len(t["lengths"])) if n not in slots.tolist()]
    nobodys = int(tables[0][spare[0], 0])
    held = torch.cat([table[table != nobodys] for table in tables])
    assert len(held) == len(held.unique()) == len(pages) - 1 and nobodys not in held.tolist()
    assert bool(pages[nobodys].isnan().all())
    if kernel == "decode_fwd":
        selected = tables[1]
        assert int((~pages[selected[selected != nobodys].long(), 0, :, 0].isnan()).sum()) == case.total


@pytest.mark.parametrize("storage", ["float16", FP8])
@pytest.mark.parametrize("kernel", SERVING)
def test_meta(kernel, storage):
    real, meta = make(kernel, storage=storage), make(kernel, storage=storage, device="meta")
    calls = []
    meta.run(SimpleNamespace(**{kernel: lambda *args: calls.append(args)}))
    assert calls and real.seqlens == meta.seqlens and real.flops() == meta.flops() > 0
    for name, value in (real.tensors | real.outputs).items():
        other = (meta.tensors | meta.outputs)[name]
        several = zip(value, other, strict=True) if isinstance(value, tuple | list) else [(value, other)]
        for x, y in several:
            if isinstance(x, torch.Tensor):
                assert y.is_meta and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()), name


@pytest.mark.parametrize("kernel", SERVING)
def test_seeded_and_moved(kernel):
    one, same, other = make(kernel, storage=FP8, seed=1), make(kernel, storage=FP8, seed=1), make(kernel, storage=FP8, seed=2)
    names = [name for name, x in one.tensors.items() if isinstance(x, torch.Tensor)]

    def equal(a, b):
        return all(torch.equal(a.tensors[n].float().nan_to_num(), b.tensors[n].float().nan_to_num()) for n in names)

    assert equal(one, same) and not equal(one, other)
    moved = one.to("meta")
    assert moved.device.type == "meta" and moved.problem == one.problem and moved.seqlens == one.seqlens
    for x in (moved.tensors | moved.outputs).values():
        assert all(y.is_meta for y in (x if isinstance(x, tuple | list) else (x,)) if isinstance(y, torch.Tensor))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32, 65536), (64, 32768)])
@pytest.mark.parametrize("storage", ["bfloat16", FP8])
@pytest.mark.parametrize("kernel", SERVING)
def test_large_caches_on_a_gpu(kernel, storage, shape):
    """Made, run and checked in seconds, two at a time in the memory of one GPU."""
    chosen = spec.load("gqa16-d128")
    device = kernels.default_device()
    if storage == FP8 and not device.fp8:
        pytest.skip("no fp8")
    problem = config.problem(kernel, chosen, which=config.cache_of(chosen, storage))
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for case in [inputs.case(problem, seqlens=(shape[1],) * shape[0], heads_kv=4, device="cuda", seed=seed) for seed in (0, 1)]:
        case.run(kernels.get(problem, Shape(shape[1], shape[0] * 4), device))
        check = case.check()
        assert check.ok, check.message
    assert time.perf_counter() - began < 60
    assert torch.cuda.max_memory_allocated() < 60 * 2**30
