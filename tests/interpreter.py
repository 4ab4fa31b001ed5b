"""Triton's interpreter without work that changes nothing: kernels give the same bits in half the time.

``tests/test_conftest.py`` holds every change to what it stands for.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any


def lighten() -> None:
    """To be called once, before any kernel runs, with ``TRITON_INTERPRET=1``."""
    import triton.language as tl
    from triton.runtime import interpreter

    # For each addition and product of integers five more operations look for an overflow, and drop what they find unless in debug mode.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # Each call of a device function looks through Triton's modules for the functions to replace. Their names stay the same.
    packages = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    names = {package: [name for name, value in inspect.getmembers(package) if tl.core.is_builtin(value)] for package in packages}
    patch_builtin = interpreter._patch_builtin

    @functools.wraps(patch_builtin)
    def patch_known(package: Any, *how: Any) -> None:
        if package not in names:
            patch_builtin(package, *how)
            return
        for name in names[package]:
            value = getattr(package, name)
            if tl.core.is_builtin(value):
                interpreter._patch_attr(package, name, value, *how)

    # ... and finds, within a launch, that the launch has replaced all of them.
    patch_lang = interpreter._patch_lang

    @functools.wraps(patch_lang)
    def patch_once(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if seen and not any(tl.core.is_builtin(one) for one in (tl.tensor.__add__, *(language.load for language in seen))):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    interpreter._patch_builtin = patch_known
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)


def by_name(np_dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function of a Triton dtype, a block's or a scalar's, asked once for each scalar: it builds a table of all each time."""
    known: dict[str, Any] = {}

    @functools.wraps(np_dtype_of)
    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype_of(dtype)
        return known[name]

    return remembered


def few_programs(least: int) -> Any:
    """Decoding by few programs, ``least`` tiles each at least: the interpreter takes a twentieth of a second for each."""
    from nsa_gen.config import Config

    return Config.of(
        "decode_fwd",
        {
            "BLOCK_N": 32, "PROGRAMS": 64, "LEAST": least, "TOGETHER": 64, "BLOCK_B": 64, "block_stages": 1, "keep_sums": True,
            "CHOSEN_PROGRAMS": 64, "CHOSEN_LEAST": 4, "chosen_blocks": 1, "chosen_warps": 4, "chosen_stages": 1, "sum_stages": 1,
            "chain": False, "num_warps": 4, "num_stages": 1, "maxnreg": None, "asm": False,
        },
    )  # fmt: skip
