"""The test session itself: a cache of its own, kernels in the interpreter without a GPU, the real compiler in another process."""

from __future__ import annotations

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
