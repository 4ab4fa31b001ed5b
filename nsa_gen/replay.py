"""A call like an earlier one launches the same kernels with the same numbers; only addresses differ. So it is replayed from a record.

What an operator does on the host (choose kernels, compute grids and strides, slice, allocate) depends on the shapes, strides and dtypes of
its tensors and on its other arguments, never on what tensors hold. The first call with some of these runs as written; the second is
watched: its launches, the memory it allocates and what it clears; later ones fill addresses into that record. A warm call then costs a
look-up, one allocation for its results each and one for all scratch, and its bare launches. A call that does anything else with torch
(copies an input that kernels cannot read in place, say) is not replayed, nor is one on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import kernels, launch, paths
from .launch import TensorDescriptor

#: Calls of an operator that are remembered; past it, all are forgotten. Of its callers' there are more: those of each layer of a cache.
MOST, MOST_REPEATS = 1024, 16384
_SEEN, _NEVER = "seen once", "not replayable"
_PLAIN = (int, float, NoneType)
_ALIGNMENT = 256
_aten = torch.ops.aten
_ALLOCATE = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)
_one_at_a_time = threading.Lock()


class replayed:
    """``call``, replayed where it can be.

    Args:
        call: takes tensors (always one first), lists or tuples of tensors, None, strings and numbers; returns a tensor that it made, or a
            tuple of such, which may be empty. Besides its arguments it depends on ``kernels.state()`` only, and on what
            ``kernels.clear()`` has read anew.
    """

    def __init__(self, call: Callable[..., Any]):
        update_wrapper(self, call)
        self.call = call
        self.known: dict[tuple[Any, ...], Any] = kernels.remember({})

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        index = first.get_device()
        if index < 0:
            return self.call(first, *rest)
        key, tensors = _like(index, first, rest)
        found = self.known.get(key)
        if type(found) is FunctionType:
            result = found(*tensors)
            return self.call(first, *rest) if result is None else result
        # One tensor in two places may be two the next time: such a call says nothing about others.
        if found is _SEEN and len({id(x) for x in tensors}) == len(tensors) and _one_at_a_time.acquire(blocking=False):
            try:
                result, made = _record(self.call, (first, *rest), tensors)
            finally:
                _one_at_a_time.release()
            if self.known.get(key) is _SEEN:  # else its kernels were forgotten meanwhile
                self.known[key] = made
            return result
        if found is None:
            _remember(self.known, key, _SEEN, MOST)
        return self.call(first, *rest)

    def record(self, first: Tensor, *rest: Any) -> FunctionType | None:
        """What replays such a call now: a function of all its tensors, in order. It gives None for tensors that are aligned otherwise."""
        found = self.known.get(_like(first.get_device(), first, rest)[0])
        return found if type(found) is FunctionType else None


class Repeats:
    """Records of calls by the few tensors and numbers in which they differ, for callers that check arguments and hold the other tensors.

    What was checked once is not checked again, nor asked of tensors that stay as they are. So a key must tell all that checks look at.
    """

    def __init__(self) -> None:
        self.known: dict[Any, FunctionType] = kernels.remember({})

    def find(self, tensors: Sequence[Any], *rest: Any) -> tuple[Any, FunctionType | None]:
        """The key of a call, for :meth:`note`, and its record if there is one."""
        key = self.key(tensors, *rest)
        return key, None if key is None else self.known.get(key)  # a traced call would depend on all that is known

    @staticmethod
    def key(tensors: Sequence[Any], *rest: Any) -> Any:
        """None of a call that takes the long way: traced, under a mode of torch, for gradients, not on the current GPU."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return None
        first = tensors[0]
        if type(first) is not Tensor or (index := first.get_device()) < 0 or index != launch.current_device():
            return None
        like: list[Any] = [index, kernels.state()]
        gradients = torch.is_grad_enabled()
        for x in rest:
            if type(x) not in _PLAIN:
                return None
            like += x, type(x)
        for x in tensors:
            if type(x) is not Tensor or x.get_device() != index or (gradients and x.requires_grad):
                return None
            like += x.shape, x.stride(), x.dtype
        return tuple(like)

    def note(self, key: Any, operator: replayed, *args: Any) -> None:
        """After a call of ``operator`` as it is called where ``key`` is that of its caller."""
        if key is not None and (record := operator.record(*args)) is not None:
            _remember(self.known, key, record, MOST_REPEATS)


def _like(index: int, first: Tensor, rest: Sequence[Any]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """All that a call depends on but addresses, and its tensors."""
    tensors = [first]
    like = [index, kernels.state(), first.shape, first.stride(), first.dtype]
    for x in rest:
        if isinstance(x, Tensor):
            tensors.append(x)
            like += x.shape, x.stride(), x.dtype
        elif type(x) is list or type(x) is tuple:
            tensors += x
            like.append(len(x))
            for y in x:
                like += y.shape, y.stride(), y.dtype
        else:
            like.append(x)
    return tuple(like), tensors


def _remember(known: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    if len(known) >= most:
        known.clear()
    known[key] = value


class _Address:
    """What a descriptor's base must be for a launch."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Descriptor:
    """A descriptor argument of a record: all but its base, and the last one made."""

    __slots__ = ("fields", "last")

    def __init__(self, descriptor: TensorDescriptor):
        self.fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
        self.last: tuple[int, Any] = (-1, None)

    def at(self, address: int) -> TensorDescriptor:
        known, descriptor = self.last
        if known != address:
            descriptor = object.__new__(TensorDescriptor)  # the constructor checked these fields when the call was recorded
            descriptor.__dict__ = {"base": _Address(address), **self.fields}
            self.last = address, descriptor
        return descriptor


class _Script:
    """Python code that replays a call: looping over what was recorded would cost as much as the launches.

    The function takes the call's tensors ``x0, x1, …``. Memory has owners, numbered: those, then the results, then the scratch pool; owner
    ``i`` begins at address ``a<i>``.
    """

    def __init__(self, inputs: int):
        self.names: dict[str, Any] = {"empty": torch.empty, "stream_of": launch.current_stream}
        self.lines = [f"def replay({', '.join(f'x{i}' for i in range(inputs))}):"]

    def value(self, x: Any) -> str:
        """The code of a constant."""
        if x is None or type(x) in (bool, int):
            return repr(x)
        name = f"c{len(self.names)}"
        self.names[name] = x
        return name

    def line(self, text: str) -> None:
        self.lines.append(f"    {text}")

    def own(self, i: int) -> None:
        """Take the address of ``x<i>``."""
        self.line(f"a{i} = x{i}.data_ptr()")

    def make(self, i: int, size: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate ``x<i>``."""
        self.line(f"x{i} = empty({size}, dtype={self.value(dtype)}, device={self.value(device)})")
        self.own(i)

    def function(self) -> FunctionType:
        exec("\n".join(self.lines), self.names)
        return self.names["replay"]  # type: ignore[no-any-return]


def _record(call: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Any, FunctionType | str]:
    """The call's result, and what replays it."""
    watcher = _Watcher(tensors)
    with launch.watched_by(watcher.launched), watcher:
        result = call(*args)
    return result, watcher.script(result) or _NEVER


@dataclass(frozen=True)
class _Pointer:
    """An argument of a launch by its place in memory, of what a descriptor describes where there is one."""

    owner: int
    offset: int
    descriptor: _Descriptor | None = None


class _Watcher(TorchDispatchMode):
    """Sees what a call allocates, views, clears and launches. ``fault``: it did what cannot be replayed."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.thread = threading.get_ident()
        self.tensors = tensors
        self.made: list[Tensor] = []
        self.bases = [x.data_ptr() for x in tensors]
        self.owner = {id(x): i for i, x in enumerate(tensors)}
        self.bytes = 0
        self.alive: list[Any] = []  # an id is only that of one object as long as it lives
        self.steps: list[Any] = []  # (owner, offset, bytes) cleared, or (launched, arguments)
        self.fault = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.fault:
            return out
        packet = func.overloadpacket
        if func.is_view and id(args[0]) in self.owner:
            for x in [out] if isinstance(out, Tensor) else out:
                # Below autograd reshape and contiguous come whole: their schema says view, and they may have copied.
                if x.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
                    self._give_up()
                    return out
                self._own(x, self.owner[id(args[0])])
        elif packet in _ALLOCATE:
            self._own(out, len(self.tensors) + len(self.made))
            self.made.append(out)
            self.bases.append(out.data_ptr())
            self.bytes += out.untyped_storage().nbytes()
            if self.bytes > paths.workspace_bytes():  # results too: what is watched stays allocated
                self._give_up()
        elif packet is _aten.zero_ and out.is_contiguous() and self.owner.get(id(out), -1) >= len(self.tensors):
            self.steps.append((*self._place(out), out.numel() * out.element_size()))
        else:
            self._give_up()
        return out

    def _give_up(self) -> None:
        """The call cannot be replayed: let go of what it has allocated."""
        self.fault = True
        self.made, self.alive, self.steps, self.owner = [], [], [], {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports all of torch._dynamo for the first call that is watched

    def _own(self, x: Tensor, owner: int) -> None:
        self.owner[id(x)] = owner
        self.alive.append(x)

    def _place(self, x: Tensor) -> tuple[int, int]:
        owner = self.owner.get(id(x))
        if owner is None:
            self._give_up()
            return 0, 0
        return owner, x.data_ptr() - self.bases[owner]

    def launched(self, run: Any, function: Any, metadata: Any, grid: tuple[int, ...], args: tuple[Any, ...], tail: tuple[Any, ...]) -> None:
        """A launch of some thread, seen by ``Launcher``."""
        if self.fault or threading.get_ident() != self.thread:
            return
        placed: list[Any] = []
        for x in (*args, *tail):
            if isinstance(x, Tensor):
                placed.append(_Pointer(*self._place(x)))
            elif isinstance(x, TensorDescriptor):
                placed.append(_Pointer(*self._place(x.base), _Descriptor(x)))
            else:
                placed.append(x)
        self.steps.append(((run, function, metadata, grid), placed))

    def script(self, result: Any) -> FunctionType | None:
        """What replays the call, given its tensors: the result, or None if one is aligned otherwise now. All scratch is one pool.

        None if the call cannot be replayed.
        """
        if self.fault:
            return None
        single = isinstance(result, Tensor)
        results, inputs = [result] if single else list(result), len(self.tensors)
        place = {}  # of what the call made: owner and offset in a record
        for x in results:
            owner, offset = self._place(x)
            whole = x.is_contiguous() and x.numel() * x.element_size() == x.untyped_storage().nbytes()
            if owner < inputs or offset or not whole or x.dtype is torch.uint8:
                return None
            place[owner] = inputs + len(place), 0
        pool = 0
        for i, x in enumerate(self.made, inputs):
            if i not in place:
                place[i] = inputs + len(results), pool
                pool += (x.untyped_storage().nbytes() // _ALIGNMENT + 1) * _ALIGNMENT
        if self.fault or pool > paths.workspace_bytes() or not any(len(step) == 2 for step in self.steps):
            return None

        def moved(owner: int, offset: int) -> tuple[int, int]:
            new, start = place.get(owner, (owner, 0))
            return new, start + offset

        script, device = _Script(inputs), self.tensors[0].device
        for i in range(inputs):
            script.own(i)
        residues = [x.data_ptr() & 15 for x in self.tensors]
        aligned = [f"a{i}" if not residue else f"a{i} - {residue}" for i, residue in enumerate(residues)]
        script.line(f"if ({' | '.join(aligned)}) & 15: return None")  # an input that may need a copy now
        for i, x in enumerate(results, inputs):
            script.make(i, tuple(x.shape), x.dtype, device)
        scratch = inputs + len(results)
        if pool:
            script.make(scratch, pool, torch.uint8, device)
        script.line(f"stream = stream_of({device.index})")
        for step in self.steps:
            if len(step) == 3:
                owner, offset, size = step
                new, offset = moved(owner, offset)
                if new < scratch and size != self.made[owner - inputs].untyped_storage().nbytes():
                    return None
                script.line(f"x{new}.zero_()" if new < scratch else f"x{new}[{offset}:{offset + size}].zero_()")
                continue
            (run, function, metadata, grid), args = step
            code = [str(n) for n in grid] + ["stream", script.value(function), script.value(metadata), "None", "None", "None"]
            for x in args:
                if type(x) is not _Pointer:
                    code.append(script.value(x))
                    continue
                new, offset = moved(x.owner, x.offset)
                address = f"a{new} + {offset}" if offset else f"a{new}"
                code.append(address if x.descriptor is None else f"{script.value(x.descriptor.at)}({address})")
            script.line(f"{script.value(run)}({', '.join(code)})")
        made = "".join(f"x{i}, " for i in range(inputs, scratch))
        script.line(f"return x{inputs}" if single else f"return ({made})")
        return script.function()
