"""What the tests of attention's backward kernels share: configs, cases, and how a case is altered before it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from nsa_gen import inputs, launch, loader, reference, render, space
from nsa_gen.acceptance import FLOOR
from nsa_gen.config import Config, Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1")
#: Tensors that kernels read by stride.
STRIDED = ("q", "k", "v", "k_cmp", "v_cmp", "do")
Alter = Callable[[inputs.Case], None]


#: Tiles that hold most of a small case: few steps, so the interpreter is fast. Those of the kernels' tests on tiles differ.
LARGE = {"DQ_M": 64, "DQ_N": 32, "KEYS": 32, "ROWS": 64, "ADD_M": 8}


def config(p: Problem, **changes: Any) -> Config:
    """The safe config with large tiles and other values of some knobs; knobs that come to exist with them take their first value."""
    knobs = space.knobs(p.kernel)
    chosen = space.safe(p).as_dict() | {knob.name: LARGE[knob.name] for knob in knobs if knob.name in LARGE} | changes
    for knob in knobs:
        if all(chosen.get(name) in values for name, values in knob.when.items()):
            chosen.setdefault(knob.name, knob.values[0])
        else:
            chosen.pop(knob.name, None)
    made = Config.of(p.kernel, chosen)
    space.check(p, made)
    return made


def module(p: Problem, c: Config) -> ModuleType:
    return loader.load(render.render(p, c))


def held(p: Problem, c: Config, seqlens: tuple[int, ...], heads: int = 1, alter: Alter | None = None, **how: Any) -> inputs.Case:
    """Run one case, which ``alter`` may change before; assert that the reference agrees, on every element of NaN-filled outputs."""
    case = inputs.case(p, seqlens=seqlens, heads_kv=heads, device=DEVICE, **how)
    if alter is not None:
        alter(case)
    case.run(module(p, c))
    check = case.check()
    assert check.ok, check
    return case


def strided(case: inputs.Case) -> None:
    """Put what may be strided into tensors of more heads and elements, NaN in between."""
    for name in STRIDED:
        if name in case.tensors:
            x = case.tensors[name]
            wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 8), torch.nan, dtype=x.dtype, device=DEVICE)
            wide[:, :-1, :-8] = x
            case.tensors[name] = wide[:, :-1, :-8]


def added(p: Problem, c: Config, seqlens: tuple[int, ...], names: tuple[str, ...] = ("dq",)) -> None:
    """An addend may be None or the gradient's own memory, whatever calls the module served before."""
    case = inputs.case(p, seqlens=seqlens, heads_kv=1, device=DEVICE)
    found, addends = {}, {name: case.tensors[f"{name}_add"] for name in names}
    rounding = 2 * FLOOR[case.dtype]
    for how in ("given", "none", "itself", "none again", "given again"):
        case.poison()
        for name, add in addends.items():
            if how == "itself":
                case.outputs[name] = add.to(case.outputs[name].dtype, copy=True)
            case.tensors[f"{name}_add"] = None if "none" in how else case.outputs[name] if how == "itself" else add
        case.run(module(p, c))
        found[how] = {name: out.clone() for name, out in case.outputs.items()}
    for name, given in found["given"].items():
        assert torch.equal(found["given again"][name], given)
        assert torch.equal(found["none again"][name], found["none"][name])
        want = found["none"][name] + addends[name] if name in addends else found["none"][name]
        torch.testing.assert_close(given, want.to(given.dtype), rtol=rounding, atol=rounding)
        torch.testing.assert_close(found["itself"][name], given, rtol=rounding, atol=rounding)
    case.tensors |= {f"{name}_add": add for name, add in addends.items()}
    case.outputs = found["given"]
    assert case.check().ok, case.check()


def others_are_not_read(p: Problem, c: Config, seqlens: tuple[int, ...], middle: int) -> None:
    """NaN in all that belongs to other sequences reaches no gradient of the sequence number ``middle``."""
    case = inputs.case(p, seqlens=seqlens, heads_kv=2, device=DEVICE)
    start, end = case.cu_seqlens[middle : middle + 2]

    def mine(x: torch.Tensor) -> slice:
        if len(x) == case.total:
            return slice(start, end)
        first = start // p.stride
        return slice(first, first + reference.compressed_count(end - start, p.block, p.stride))

    case.run(module(p, c))
    assert case.check().ok, case.check()
    clean = {name: out[mine(out)].clone() for name, out in case.outputs.items()}
    given = [y for x in case.tensors.values() for y in (x if isinstance(x, tuple) else (x,))]
    for x in given:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x[: mine(x).start] = torch.nan
            x[mine(x).stop :] = torch.nan
    case.poison()
    case.run(module(p, c))
    for name, out in case.outputs.items():
        assert torch.equal(out[mine(out)], clean[name]), name


def bound(call: Callable[[], None]) -> int:
    """Hold every launch of ``call`` (on ``meta``: nothing is compiled) to the rule of ``Launcher``: one binary for each set of extra
    constants, so one signature. Gives the number of binaries.
    """
    known: dict[tuple[Any, ...], Any] = {}
    job = launch.Launcher.job

    def watched(self: launch.Launcher, args: tuple[Any, ...], extra: dict[str, Any] | None = None) -> launch.Job:
        made = job(self, args, extra)
        none = sorted(name for name, kind in made.signature.items() if kind == "constexpr" and made.constants[name] is None)
        assert known.setdefault((id(self), *(extra or {}).values()), (made.signature, none)) == (made.signature, none), made.name
        return made

    launch.Launcher.job = watched
    try:
        with launch.recording():
            call()
    finally:
        launch.Launcher.job = job
    return len(known)
