"""Cases: legal inputs, poisoned outputs, an acceptance rule that accepts PyTorch and rejects every kind of wrong kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa_gen import inputs, reference
from nsa_gen.config import KERNELS, KEY_FIELDS, Problem
from nsa_gen.errors import InputError

FIELDS = {
    "dtype": "float16", "group": 3, "head_dim": 32, "head_dim_qk": 32, "head_dim_v": 16, "block": 16, "stride": 8, "pooling": "mlp",
    "hidden": 16, "selection_block": 32, "count": 4, "initial": 1, "local": 2, "parts": 1, "mapping": "overlap", "window": 40,
    "deterministic": False, "varlen": True,
}  # fmt: skip
SEQLENS = (5, 0, 150, 97)


def problem(kernel: str, **changes) -> Problem:
    return Problem.of(kernel, {name: (FIELDS | changes)[name] for name in KEY_FIELDS[kernel]})


def make(kernel: str, **options) -> inputs.Case:
    changes = {name: options.pop(name) for name in list(options) if name in FIELDS}
    return inputs.case(problem(kernel, **changes), **{"seqlens": SEQLENS, "heads_kv": 2} | options)


def torch_module(case: inputs.Case) -> SimpleNamespace:
    """Host functions in PyTorch, signatures of docs/design.md, in the case's dtype."""
    p = case.problem

    def compress_fwd(x, weights, out, cu_seqlens, batch, max_seqlen):
        out.copy_(reference.compress(x, p.pooling, weights, p.block, p.stride, cu_seqlens))

    def attention(o, lse, found):
        o.copy_(found[0])
        lse.copy_(found[1])

    def compressed_attention_fwd(q, k_cmp, v_cmp, o, lse, scale, token_start, cu_seqlens, batch, max_seqlen):
        attention(o, lse, reference.compressed_attention(q, k_cmp, v_cmp, p.block, p.stride, scale, cu_seqlens, dtype=torch.float32))

    def importance_fwd(q, k_cmp, lse, scores, scale, token_start, cu_seqlens, batch, max_seqlen):
        tokens = torch.arange(token_start, token_start + len(q))
        geometry = (p.block, p.stride, p.selection_block, p.mapping)
        q, lse = (x.new_zeros(case.total, *x.shape[1:]).index_copy(0, tokens, x) for x in (q, lse))  # the reference takes whole tensors
        found = reference.importance(q, k_cmp, lse, *geometry, scale, cu_seqlens, tokens, torch.float32)
        scores[..., : found.shape[2]] = found

    def select_topk(scores, block_indices, token_start, cu_seqlens, batch, max_seqlen):
        tokens = torch.arange(token_start, token_start + len(scores))
        geometry = (p.selection_block, p.count, p.initial, p.local)
        block_indices.copy_(reference.select_blocks(scores, *geometry, cu_seqlens, tokens))

    def selected_attention_fwd(q, k, v, block_indices, o, lse, scale, workspace_bytes, token_start, cu_seqlens, batch, max_seqlen):
        attention(o, lse, reference.selected_attention(q, k, v, block_indices, p.selection_block, scale, cu_seqlens, dtype=torch.float32))

    def sliding_attention_fwd(q, k, v, o, lse, scale, token_start, cu_seqlens, batch, max_seqlen):
        attention(o, lse, reference.sliding_attention(q, k, v, p.window, scale, cu_seqlens, dtype=torch.float32))

    def sliding_merge_fwd(*arguments):  # up to o they are the reference's
        *given, o, scale, _, cu_seqlens, _, _ = arguments
        geometry = (p.window, p.selection_block, p.initial, p.local, p.count)
        o.copy_(reference.sliding_merge(*given, *geometry, scale, cu_seqlens, dtype=torch.float32))

    def combine_fwd(o_cmp, o_slc, o_swa, g_cmp, g_slc, g_swa, o):
        o.copy_(reference.combine(o_cmp, o_slc, o_swa, g_cmp, g_slc, g_swa, torch.float32))

    def compress_bwd(x, weights, dout, dx, dweights, dx_add, cu_seqlens, batch, max_seqlen):
        given = [a.detach().requires_grad_() for a in (x, *weights)]
        out = reference.compress(given[0], p.pooling, tuple(given[1:]), p.block, p.stride, cu_seqlens)
        blocks = out.requires_grad  # else no sequence has one
        found = torch.autograd.grad(out, given, dout.nan_to_num(0.0)) if blocks else [torch.zeros_like(a) for a in given]
        dx.copy_(found[0] + dx_add)
        for dweight, grad in zip(dweights, found[1:], strict=True):
            dweight.copy_(grad)

    def gradients(*arguments):
        """The formulas of the reference in float32, which tests of their own hold to autograd."""
        for name, found in case.expected(None, torch.float32).items():
            case.outputs[name].copy_(found)

    compressed_attention_bwd = selected_attention_bwd = sliding_attention_bwd = combine_bwd = gradients
    return SimpleNamespace(**locals())


@pytest.mark.parametrize("kind", inputs.KINDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_kernel_is_accepted(kernel, kind):
    case = make(kernel, kind=kind, seed=3)
    module = torch_module(case)
    assert not case.check().ok  # nothing written yet
    case.run(module)
    for queries in (None, inputs.sample_queries(SEQLENS, 40)):
        check = case.check(queries)
        assert check.ok and not check.message and set(check.errors) == set(case.outputs), check.message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "select_topk"])
def test_other_dtypes(kernel, dtype):
    case = make(kernel, dtype=dtype)
    case.run(torch_module(case))
    check = case.check()
    assert check.ok, check.message
    assert case.dtype == getattr(torch, dtype)


def _wrong_values(out):
    if not out.is_floating_point():
        out[-1, 0, 1] = out[-1, 0, 0]
    else:
        place = out[180:184] if len(out) > 200 else out[12:13] if len(out) > 12 else out[-1:]
        place.copy_(place.nan_to_num() * 1.5 + 0.01)


def _unwritten(out):
    out[-1].fill_(torch.nan if out.is_floating_point() else -7)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spoil", [_wrong_values, _unwritten])
def test_a_wrong_kernel_is_rejected(kernel, spoil):
    for name in make(kernel).outputs:
        case = make(kernel)
        case.run(torch_module(case))
        if kernel == "compress_fwd" and spoil is _unwritten:
            case.outputs["out"][0] = torch.nan  # a gap row: the first sequence is too short
        else:
            spoil(case.outputs[name])
        check = case.check()
        assert not check.ok and check.message.startswith(name), (check, name)


def test_unwritten_elements_are_seen_outside_the_sample():
    for kernel in KERNELS:
        case = make(kernel)
        case.run(torch_module(case))
        out = next(iter(case.outputs.values()))
        out[(13, 0, 0)[: out.dim()]] = -7 if kernel == "select_topk" else torch.nan
        assert not case.check(torch.tensor([200, 201])).ok, kernel


@pytest.mark.parametrize("kernel", ["compressed_attention_fwd", "selected_attention_fwd", "sliding_attention_fwd"])
def test_a_shifted_mask_is_rejected(kernel):
    case = make(kernel, dtype="float32")
    module, p = torch_module(case), case.problem
    if kernel == "sliding_attention_fwd":
        broken = lambda q, k, v, o, lse, *rest: module.sliding_attention_fwd(q, k.roll(1, 0), v.roll(1, 0), o, lse, *rest)  # noqa: E731
    elif kernel == "selected_attention_fwd":
        broken = lambda q, k, v, b, *rest: module.selected_attention_fwd(q, k, v, torch.where(b == 1, 0, b), *rest)  # noqa: E731
    else:

        def broken(q, k, v, o, lse, scale, start, cu, batch, longest):
            found = reference.compressed_attention(q, k, v, p.block - 1, p.stride, scale, cu)
            o.copy_(found[0].nan_to_num())
            lse.copy_(found[1].nan_to_num())  # fmt: skip

    case.run(SimpleNamespace(**{kernel: broken}))
    assert not case.check().ok


def test_one_key_too_many_of_a_thousand_is_rejected():
    case = make("compressed_attention_fwd", seqlens=(16384,), stride=16, group=1, heads_kv=1)
    case.run(torch_module(case))
    assert case.check(torch.tensor([16383])).ok
    case.outputs["lse"] += 1 / 1024
    assert "lse: max_abs" in case.check(torch.tensor([16383])).message


def test_a_score_of_the_wrong_small_size_is_rejected():
    case = make("importance_fwd", kind="peaky")
    case.run(torch_module(case))
    scores, position = case.outputs["scores"], inputs.positions(SEQLENS)
    defined = (torch.arange(scores.shape[2]) <= position[:, None] // 32)[:, None] & (scores > 0)
    smallest = torch.where(defined, scores, torch.inf).flatten().argmin()
    scores.view(-1)[smallest] *= 1.01
    assert scores.view(-1)[smallest] < 1e-3
    assert "relative error" in case.check().message


@pytest.mark.parametrize("kernel", ["importance_fwd", "select_topk"])
def test_chunks(kernel):
    seqlens = (300, 450)
    case = make(kernel, seqlens=seqlens, workspace_bytes=1)
    assert case.chunks == ((0, 256), (256, 512), (512, 750))
    case.run(torch_module(case))
    buffer = (case.outputs | case.tensors)["scores"]
    assert len(buffer) == 256 and buffer.stride(1) % 8 == 0
    assert case.check().ok
    check = case.check(inputs.sample_queries(seqlens, 60))
    assert check.ok, check.message
    if kernel == "importance_fwd":
        with pytest.raises(InputError, match="last chunk"):
            case.expected(torch.tensor([5]))


@pytest.mark.parametrize("kind", inputs.KINDS)
@pytest.mark.parametrize("kernel", ["selected_attention_fwd", "select_topk"])
def test_block_indices_are_legal(kind, kernel):
    case = make(kernel, kind=kind)
    chosen = case.tensors["block_indices"] if kernel == "selected_attention_fwd" else case.expected()["block_indices"]
    assert chosen.dtype == torch.int32
    for t, position in enumerate(inputs.positions(SEQLENS).tolist()):
        for row in chosen[t].tolist():
            blocks = [i for i in row if i >= 0]
            current = position // 32
            assert blocks == sorted(set(blocks)) and row == blocks + [-1] * (4 - len(blocks))
            assert len(blocks) == min(4, current + 1) and {0, current, max(current - 1, 0)} <= set(blocks) and max(blocks) == current


def logits(case):
    q, k = case.tensors["q"].double(), case.tensors["k"].double()
    return torch.einsum("thgd,shd->htgs", q.unflatten(1, (2, 3)), k) * case.tensors["scale"]


def test_kinds_are_what_they_say():
    found = {kind: logits(make("sliding_attention_fwd", kind=kind)) for kind in inputs.KINDS}
    assert 3 < found["random"].abs().max() < 8
    assert 60 < found["huge"].abs().max() < 110
    assert found["equal"].var(-1).max() < 1e-20
    assert max(len(row.unique()) for row in found["ties"][:, :3].flatten(0, 2).round(decimals=9)) == 4
    heavy = found["peaky"].softmax(-1).sort(-1, descending=True).values
    assert heavy[..., :8].sum(-1).mean() > 0.95 > 0.5 > found["random"].softmax(-1).sort(-1, descending=True).values[..., :8].sum(-1).mean()


def test_seeded():
    for kernel in KERNELS:
        a, b, c = make(kernel), make(kernel), make(kernel, seed=1)
        name = next(n for n, x in a.tensors.items() if isinstance(x, torch.Tensor) and n != "cu_seqlens")
        assert torch.equal(a.tensors[name].nan_to_num(), b.tensors[name].nan_to_num())
        assert not torch.equal(a.tensors[name].nan_to_num(), c.tensors[name].nan_to_num())


def test_untrusted_input_is_poisoned():
    case = make("compressed_attention_fwd")
    held = {row for first, count in reference.compressed_offsets(case.cu_seqlens, case.total, 16, 8) for row in range(first, first + count)}
    assert 0 < len(held) < len(case.tensors["k_cmp"])
    for row in range(len(case.tensors["k_cmp"])):
        for name in ("k_cmp", "v_cmp"):
            assert case.tensors[name][row].isnan().all() == (row not in held)
    for parts in (1, 3):
        t = make("sliding_merge_fwd", count=6, parts=parts).tensors
        listed = (inputs.positions(SEQLENS) // 32 + 1).clamp(max=6) - 3
        nothing = torch.arange(parts)[:, None] >= listed
        assert t["part"].shape == (2, parts, sum(SEQLENS), 3, 16) and bool(nothing.any()) and not bool(nothing.all())
        assert torch.equal(t["part_lse"].isnan().all(-1), nothing.expand(2, -1, -1))
        assert torch.equal(t["part"].isnan().flatten(3).any(-1), nothing.expand(2, -1, -1))
    scores = make("select_topk").tensors["scores"]
    assert torch.equal(scores[:, 0].isnan(), torch.arange(scores.shape[2]) > inputs.positions(SEQLENS)[:, None] // 32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_meta(kernel):
    real, meta = make(kernel), make(kernel, device="meta")
    calls = []
    meta.run(SimpleNamespace(**{kernel: lambda *args: calls.append(args)}))
    assert calls and {n: (x.shape, x.dtype) for n, x in real.outputs.items()} == {n: (x.shape, x.dtype) for n, x in meta.outputs.items()}
    for name, value in real.tensors.items():
        other = meta.tensors[name]
        if isinstance(value, torch.Tensor):
            assert other.is_meta and (value.shape, value.dtype, value.stride()) == (other.shape, other.dtype, other.stride()), name
    assert (real.flops(), real.bytes()) == (meta.flops(), meta.bytes())


@pytest.mark.parametrize("kernel", [k for k in KERNELS if not k.startswith("combine")])
def test_batched_and_no_tokens(kernel):
    case = make(kernel, varlen=False, seqlens=(64, 64))
    assert case.tensors["cu_seqlens"] is None
    with pytest.raises(InputError, match="not varlen"):
        make(kernel, varlen=False, seqlens=(64, 65))
    for seqlens in ((0, 0), (3,)):
        case = make(kernel, seqlens=seqlens)
        case.run(torch_module(case))
        assert case.check().ok
    with pytest.raises(InputError, match="kind: got 'odd', allowed: random"):
        make(kernel, kind="odd")


def test_flops_and_bytes_count_visible_pairs():
    position = inputs.positions(SEQLENS).tolist()
    pairs = sum(sum(j * 8 + 15 <= t for j in range(99)) for t in position)
    assert make("compressed_attention_fwd").flops() == 2 * 6 * (32 + 16) * pairs
    assert make("importance_fwd").flops() == 2 * 6 * 32 * pairs
    assert make("sliding_attention_fwd").flops() == 2 * 6 * 48 * sum(min(t + 1, 40) for t in position)
    case = make("selected_attention_fwd")
    chosen, seen = case.tensors["block_indices"], 0
    for t, at in enumerate(position):
        seen += sum(1 for i in chosen[t, 0].tolist() if i >= 0 for s in range(32 * i, 32 * i + 32) if s <= at)
    assert case.flops() == 2 * 6 * 48 * seen
    total = sum(SEQLENS)
    assert case.bytes() == 2 * total * (6 * 32 + 2 * 32 + 2 * 16 + 6 * 16) + 4 * total * (2 * 4 + 6) + 4 * 5
    assert make("combine_fwd", heads_query=6).bytes() == 2 * total * 6 * (4 * 16 + 3)
    assert make("compress_fwd", pooling="linear", hidden=0).flops() == 2 * 28 * 2 * (16 * 32) * 32
    assert make("compress_bwd", pooling="linear", hidden=0).flops() == 2 * make("compress_fwd", pooling="linear", hidden=0).flops()


def test_sample_queries():
    assert inputs.sample_queries((3, 4), 10).tolist() == list(range(7))
    seqlens = (70000, 0, 1, 300)
    found = inputs.sample_queries(seqlens, 200, seed=1)
    assert torch.equal(found, found.unique()) and 150 < len(found) <= 202
    assert {0, sum(seqlens) - 1} <= set(found.tolist()) and int(found.max()) < sum(seqlens)
    assert torch.equal(found, inputs.sample_queries(seqlens, 200, seed=1))
    assert len({70000, 70001, 69999} & set(inputs.sample_queries(seqlens, 1000).tolist())) == 3
    assert len(inputs.sample_queries((64,) * 1000, 100)) <= 102


def write_sampled(case: inputs.Case, queries: torch.Tensor) -> None:
    """The reference's rows where ``queries`` are, and where the keys are that go with them; 0 elsewhere."""
    call, found = inputs.CALLS[case.problem.kernel], case.expected(queries, torch.float32)
    for name, out in case.outputs.items():
        rows = found[name].to(out.dtype)
        out.zero_()
        if rows.shape == out.shape:
            out.copy_(rows)
        elif name == "scores":
            out[queries, :, : rows.shape[2]] = rows
        else:
            of_keys = name != "dq" and hasattr(call, "key_rows")
            out[call.key_rows(case, queries) if of_keys else queries] = rows


@pytest.mark.parametrize("kernel", KERNELS)
def test_sampled_rows_are_enough(kernel):
    case = make(kernel)
    queries = inputs.sample_queries(SEQLENS, 40)
    write_sampled(case, queries)
    check = case.check(queries)
    assert check.ok, check.message
    next(iter(case.outputs.values())).zero_()
    assert not case.check(queries).ok


def test_a_case_moves_with_all_it_has():
    for kernel in KERNELS:
        case = make(kernel)
        moved = case.to("meta")
        alike = make(kernel, device="meta")
        assert moved.device.type == "meta" and case.device.type == "cpu" and list(moved.tensors) == list(case.tensors)
        for name, x in (moved.tensors | moved.outputs).items():
            other = (alike.tensors | alike.outputs)[name]
            several = zip(x, other, strict=True) if isinstance(x, tuple | list) else [(x, other)]
            for mine, wanted in several:
                assert type(mine) is type(wanted), name
                if isinstance(mine, torch.Tensor):
                    assert mine.is_meta and (mine.shape, mine.dtype, mine.stride()) == (wanted.shape, wanted.dtype, wanted.stride()), name
        assert all(not x.is_meta for x in case.outputs.values())


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_long_cases_on_a_gpu(kernel):
    """64k tokens: made and checked on sampled queries in bounded time and memory."""
    long = {"block": 32, "stride": 16, "selection_block": 64, "count": 16, "window": 512, "head_dim_qk": 128, "head_dim_v": 128}
    torch.cuda.reset_peak_memory_stats()
    case = make(kernel, dtype="bfloat16", group=16, seqlens=(65536,), heads_kv=4, device="cuda", **long)
    queries = inputs.sample_queries((65536,), 64).cuda()
    write_sampled(case, queries)
    check = case.check(queries)
    assert check.ok, check.message
    assert torch.cuda.max_memory_allocated() < 40 * 2**30
