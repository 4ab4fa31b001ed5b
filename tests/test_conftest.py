"""The test session itself: a cache of its own, kernels in the interpreter without a GPU, the real compiler in another process."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path

import pytest
import torch

from nsa_gen import paths

KERNEL = """
import os, sys, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from nsa_gen import launch, loader
assert "TRITON_INTERPRET" not in os.environ

@triton.jit
def double_kernel(x, n: tl.int32, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)

x = torch.empty(100, device="meta")
found = loader.compile_all(lambda: launch.Launcher(double_kernel, {"BLOCK": 64}, num_warps=1)((2,), x, 100), GPUTarget("cuda", 90, 32))
print(found[0].name, found[0].spills, *sys.argv[1:])
"""


def test_caches_are_the_sessions_own():
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent == paths.cache().parent
    assert paths.cache().parent.name.startswith("nsa-gen-tests-")
    assert not paths.strict()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
def test_without_a_gpu_kernels_are_interpreted():
    import triton

    @triton.jit
    def kernel():
        pass

    assert os.environ["TRITON_INTERPRET"] == "1" and not isinstance(kernel, triton.JITFunction)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU")
def test_the_interpreter_is_lighter_and_the_same(monkeypatch):
    """It replaces all of Triton's functions and puts them back, knows every dtype, and looked for no overflow to begin with."""
    global tl  # where a kernel looks for it
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    @triton.jit
    def kernel(x):
        i = tl.arange(0, 4)
        tl.store(x + i, tl.load(x + i) * 3 + 2147483647)

    packages = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    before = [dict(inspect.getmembers(package)) for package in packages]
    scope = interpreter._patch_lang(kernel.fn)
    seen = (package for package in packages if package is not tl.core)
    left = [name for package in seen for name, value in inspect.getmembers(package) if tl.core.is_builtin(value)]
    inner, standard = interpreter._patch_lang(kernel.fn), interpreter._patch_lang(tl.cdiv.fn)
    standard.restore()
    scope.restore()
    assert not left and not inner._changes
    assert all(dict(inspect.getmembers(package)) == was for package, was in zip(packages, before, strict=True))

    np_dtype_of = interpreter._get_np_dtype
    for dtype in [value for value in vars(tl).values() if isinstance(value, tl.dtype) and value.name not in ("void", "uint1")]:
        for one in (dtype, tl.block_type(dtype, [4]), tl.pointer_type(dtype), tl.block_type(tl.pointer_type(dtype), [4])):
            assert np_dtype_of(one) == np_dtype_of.__wrapped__(one) == np_dtype_of(one)

    found, options = [], interpreter.interpreter_builder.options
    assert not options.sanitize_overflow
    for looks in (False, True):
        monkeypatch.setattr(interpreter.interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=looks))
        x = torch.arange(4, dtype=torch.int32)
        kernel[(1,)](x)
        found.append(x.tolist())
    assert found[0] == found[1] == [2147483647, -2147483646, -2147483643, -2147483640]


@pytest.mark.gpu
def test_gpu_tests_have_a_gpu():
    assert torch.ones(2, device="cuda").sum().item() == 2


@pytest.mark.compile
def test_compiled_python_compiles(compiled_python):
    assert compiled_python(KERNEL, "an", "argument").split() == ["double_kernel", "0", "an", "argument"]


def test_compiled_python_fails_with_what_was_said(compiled_python):
    with pytest.raises(AssertionError, match=r"exit 1(.|\n)*ZeroDivisionError"):
        compiled_python("1 / 0")
    assert compiled_python("import os; print(os.environ['EXTRA'])", EXTRA="seen").strip() == "seen"
