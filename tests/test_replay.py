"""Replayed calls do what the calls themselves do: kernels here are Python functions that read and write memory by address."""

from __future__ import annotations

import ctypes
import threading
from contextlib import nullcontext

import pytest
import torch

from nsa_gen import kernels, launch, ops, register, replay
from nsa_gen.branches import _inputs, forward
from nsa_gen.launch import TensorDescriptor

INDEX = 0


@pytest.fixture
def device(monkeypatch):
    """Tensors on the CPU taken for a GPU's, and launches counted."""
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: INDEX)
    monkeypatch.setattr(launch, "current_stream", lambda index: 7)
    monkeypatch.setattr(kernels, "_remembered", [])
    yield
    assert launch._watcher is None


def address(x):
    return x if isinstance(x, int) else x.data_ptr()


def floats(x, n):
    return (ctypes.c_float * n).from_address(address(x))


def add(grid_x, grid_y, grid_z, stream, function, metadata, _1, _2, _3, x, y, out, n, factor):
    """out = x + factor * y, for n floats; x may be a descriptor."""
    assert (grid_x, grid_y, grid_z, stream, function, metadata) == (n, 1, 1, 7, "function", "metadata")
    x = x.base if isinstance(x, TensorDescriptor) else x
    a, b, c = floats(x, n), floats(y, n), floats(out, n)
    for i in range(n):
        c[i] = a[i] + factor * b[i]


def launched(*args):
    """What ``Launcher`` does for a bound kernel."""
    n = args[-2]
    add(n, 1, 1, 7, "function", "metadata", None, None, None, *args)
    if launch._watcher is not None:
        launch._watcher(add, "function", "metadata", (n, 1, 1), args[:-1], args[-1:])


def whole(q, others, gate, factor):
    """An operator: two results, scratch in pieces, a slice, a clear, a descriptor."""
    counted.append(1)
    n = q.shape[0]
    o, lse = torch.empty_like(q), q.new_empty((n - 1,))
    scratch = torch.empty((3, n))
    first, second, third = scratch.unbind()
    second.zero_()
    launched(q, others[0], first, n, factor)
    launched(TensorDescriptor(first.view(1, n), [1, n], [n, 1], [1, 16]), second, o, n, 1.0)
    part = third[1:]
    launched(others[1][1:], o[1:], part, n - 1, 1.0)
    launched(part, part if gate is None else gate[1:], lse, n - 1, 0.5)
    return o, lse


counted: list[int] = []


def arguments(seed, n=20, gate=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator), [torch.randn(n, generator=generator) for _ in range(2)], (
        torch.randn(n, generator=generator) if gate else None
    )  # fmt: skip


def same(got, expected):
    assert type(got) is type(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def calls(run, *args):
    """The result, and whether the operator's own code ran."""
    counted.clear()
    result = run(*args)
    return result, bool(counted)


@pytest.mark.parametrize("gate", [True, False])
def test_the_third_call_is_replayed_on_other_tensors(device, gate):
    run = replay.replayed(whole)
    for seed, ran in enumerate((True, True, False, False, False)):
        given = arguments(seed, gate=gate)
        got, itself = calls(run, *given, 0.25)
        assert itself is ran
        same(got, whole(*given, 0.25))


def test_results_and_scratch_are_new_each_time(device):
    run = replay.replayed(whole)
    results = [run(*arguments(seed), 0.25) for seed in range(5)]
    for seed, got in enumerate(results):
        same(got, whole(*arguments(seed), 0.25))


def test_other_shapes_strides_numbers_and_overrides_are_other_calls(device, monkeypatch):
    run = replay.replayed(whole)
    base = arguments(0)
    for _ in range(3):
        run(*base, 0.25)
    q, others, gate = base
    wide = torch.stack([q, q], 1)[:, 0]
    changed = [
        (*arguments(1, n=24), 0.25), (*base, 0.5), (q, others, None, 0.25), (q, [wide, others[1]], gate, 0.25),
        (q, [*others, q], gate, 0.25),
    ]  # fmt: skip
    for given in changed:
        if given[1][0] is not wide:
            same(calls(run, *given)[0], whole(*given))
        assert calls(run, *given)[1]
    assert not calls(run, *base, 0.25)[1]
    monkeypatch.setattr(kernels, "state", lambda: ("an override",))
    assert calls(run, *base, 0.25)[1]


def test_a_tensor_aligned_otherwise_is_not_replayed(device):
    run = replay.replayed(whole)
    for _ in range(3):
        run(*arguments(0), 0.25)
    q, others, gate = arguments(1)
    moved = torch.cat([q.new_zeros(1), q])[1:]
    assert moved.data_ptr() & 15
    got, itself = calls(run, moved, others, gate, 0.25)
    assert itself
    same(got, whole(q, others, gate, 0.25))
    assert not calls(run, q, others, gate, 0.25)[1]


def copies(q, n):
    launched(q.clone(), q, out := torch.empty_like(q), n, 1.0)
    return out


def returns_its_argument(q, n):
    launched(q, q, q, n, 0.0)
    return q


def launches_nothing(q, n):
    return torch.empty_like(q)


def reads_what_is_no_argument(q, n):
    launched(q, CONSTANT, out := torch.empty_like(q), n, 1.0)
    return out


def reads_values(q, n):
    launched(q, q, out := torch.empty_like(q), n, float(q[0]))
    return out


def copies_a_strided_argument(q, n):
    launched(q.view(4, 5).T.reshape(20), q, out := torch.empty_like(q), n, 1.0)
    return out


CONSTANT = torch.ones(20)


@pytest.mark.parametrize("below_autograd", [False, True])
@pytest.mark.parametrize(
    "call", [copies, copies_a_strided_argument, returns_its_argument, launches_nothing, reads_what_is_no_argument, reads_values]
)
def test_what_cannot_be_replayed_runs_itself_always(device, call, below_autograd):
    """Operators run below autograd, where ``reshape`` and ``contiguous`` reach the watcher whole."""
    ran = []

    def spied(q, n):
        ran.append(1)
        return call(q, n)

    run = replay.replayed(spied)
    for seed in range(5):
        q, *_ = arguments(seed)
        expected = call(q.clone(), 20)
        with torch._C._AutoDispatchBelowAutograd() if below_autograd else nullcontext():
            got = run(q, 20)
        assert call is launches_nothing or torch.equal(got, expected)
    assert len(ran) == 5


def test_one_tensor_in_two_places_is_not_replayed(device):
    run = replay.replayed(whole)
    q, _, gate = arguments(0)
    for _ in range(4):
        got, itself = calls(run, q, [q, q], gate, 0.25)
        assert itself
        same(got, whole(q, [q, q], gate, 0.25))
    for seed in range(3):  # three tensors of the same kind are
        given = q.clone(), [q.clone(), q.clone()], gate, 0.25
        got, itself = calls(run, *given)
        assert itself == (seed < 1)
        same(got, whole(*given))


def test_scratch_past_the_workspace_is_not_replayed(device, monkeypatch):
    monkeypatch.setenv("NSA_GEN_WORKSPACE", "100B")
    run = replay.replayed(whole)
    assert all(calls(run, *arguments(seed), 0.25)[1] for seed in range(4))


def test_launches_of_other_threads_stay_out_of_a_record(device):
    stray = [torch.full((20,), float(i)) for i in range(3)]

    def call(q, n):
        thread = threading.Thread(target=launched, args=(*stray, 20, 1.0))
        thread.start()
        thread.join()
        launched(q, q, out := torch.empty_like(q), n, 1.0)
        return out

    run = replay.replayed(call)
    for seed in range(2):
        run(arguments(seed)[0], 20)
    stray[2].fill_(-1)
    q, *_ = arguments(9)
    assert torch.equal(run(q, 20), 2 * q)
    assert bool((stray[2] == -1).all())


def test_clear_forgets_records(device):
    run = replay.replayed(whole)
    for seed in range(3):
        run(*arguments(seed), 0.25)
    assert not calls(run, *arguments(3), 0.25)[1]
    kernels.clear()
    assert calls(run, *arguments(3), 0.25)[1]


def test_what_was_recorded_of_forgotten_kernels_is_dropped(device):
    def call(q, n):
        if len(ran) == 1:  # while it is watched
            kernels.clear()
        ran.append(1)
        launched(q, q, out := torch.empty_like(q), n, 1.0)
        return out

    ran: list[int] = []
    run = replay.replayed(call)
    for seed in range(5):
        q, *_ = arguments(seed)
        assert torch.equal(run(q, 20), 2 * q)
    assert len(ran) == 4  # once, watched in vain, once more, watched; then replayed


def test_what_is_remembered_is_bounded(device, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    run = replay.replayed(whole)
    for n in range(16, 80, 4):
        for seed in range(3):
            same(run(*arguments(seed, n=n), 0.25), whole(*arguments(seed, n=n), 0.25))
    (known,) = kernels._remembered
    assert len(known) <= 3


def test_a_caller_finds_the_record_of_a_call_that_was_replayed(device, monkeypatch):
    """By what it was given itself, and again only after `kernels.clear` if that has forgotten it."""
    monkeypatch.setattr(launch, "current_device", lambda: INDEX)
    run, repeats = replay.replayed(whole), replay.Repeats()

    def caller(q, a, b, gate, factor):
        key, record = repeats.find((q, gate), factor)
        if record is not None:
            return record(q, a, b, gate)
        result = run(q, [a, b], gate, factor)
        repeats.note(key, run, q, [a, b], gate, factor)
        return result

    found = []
    for seed in range(5):
        q, (a, b), gate = arguments(seed)
        got, itself = calls(caller, q, a, b, gate, 0.25)
        same(got, whole(q, [a, b], gate, 0.25))
        found.append(itself)
    assert found == [True, True, False, False, False] and len(repeats.known) == 1
    kernels.clear()
    assert not repeats.known
    assert calls(caller, q, a, b, gate, 0.25)[1]


def test_what_tells_calls_of_a_caller_apart(device, monkeypatch):
    monkeypatch.setattr(launch, "current_device", lambda: INDEX)
    x, y = torch.zeros(4, 6), torch.zeros(4)
    key = replay.Repeats.key
    base = key((x, y), 3, None)
    assert base is not None and base == key((x.clone(), torch.ones(4)), 3, None)
    others = [
        key((x[:3], y), 3, None), key((x.t().contiguous().t(), y), 3, None), key((x.double(), y), 3, None), key((x, y), 3.0, None),
        key((x, y), 4, None),
    ]  # fmt: skip
    wanting = x.clone().requires_grad_()
    assert key((wanting, y), 3, None) is None, "whoever asks for gradients is told what the operator says to that"
    with torch.no_grad():
        assert key((wanting, y), 3, None) == base
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "state", lambda: ("an override",))
        others.append(key((x, y), 3, None))
    assert len({base, *others}) == 1 + len(others) and None not in others


def test_calls_of_other_things_take_the_long_way(device, monkeypatch):
    monkeypatch.setattr(launch, "current_device", lambda: INDEX)
    x, key = torch.zeros(4), replay.Repeats.key
    assert key((x,), 1) is not None
    for tensors, number in (
        ((x, None), 1),
        ((x, "x"), 1),
        ((None,), 1),
        ((torch.nn.Parameter(x),), 1),
        ((x,), True),
        ((x,), [1]),
        ((x,), x),
    ):
        assert key(tensors, number) is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert key((x,), 1) is None
    monkeypatch.setattr(launch, "current_device", lambda: INDEX + 1)
    assert key((x,), 1) is None
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: -1)
    assert key((x,), 1) is None


def test_operators_are_replayed_and_calls_on_the_cpu_are_not():
    run = replay.replayed(whole)
    assert all(calls(run, *arguments(seed), 0.25)[1] for seed in range(4))
    assert len(kernels._remembered) >= 8  # one a registered operator
    assert register.replayed is replay.replayed


@pytest.mark.gpu
@pytest.mark.parametrize("varlen", [False, True])
def test_replays_on_the_gpu_give_the_same_bits(varlen):
    torch.manual_seed(0)
    tokens, spec = 700, "gqa16-d128"
    cu = torch.tensor([0, 130, 130, 700], dtype=torch.int32, device="cuda") if varlen else None
    made = {"device": "cuda", "dtype": torch.bfloat16}
    for _ in range(5):  # new tensors each time: the fourth and fifth are replayed
        q = torch.randn(tokens, 32, 128, **made)
        k, v = (torch.randn(tokens, 2, 128, **made) for _ in range(2))
        gates = [torch.rand(tokens, 32, **made) for _ in range(3)]
        o = ops.nsa_attention(q, k, v, *gates, spec=spec, cu_seqlens=cu)
        tail = (cu, _inputs.geometry_of(spec).key, 1 if cu is None else 3, tokens, 128**-0.5)
        assert torch.equal(o, forward.inference(q, [k], [v], *gates, [], [], None, None, *tail))
