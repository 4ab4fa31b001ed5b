"""Launching: what is compiled, what is bound, and what goes wrong; with the real compiler, without a GPU."""

from __future__ import annotations

import pytest

PREAMBLE = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from nsa_gen import launch
from nsa_gen.errors import CacheError, CompileError
from nsa_gen.launch import Launcher

@triton.jit
def scale_kernel(x, y, factor: tl.float32, rows: tl.int32, stride_row: tl.int64, BLOCK: tl.constexpr, SQUARE: tl.constexpr = False):
    at = tl.program_id(0) * stride_row + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=tl.arange(0, BLOCK) < rows)
    tl.store(x + at, value * value if SQUARE else value * factor)

@triton.jit
def untyped_kernel(x, rows, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), rows)

x = torch.empty(8, 64, device="meta", dtype=torch.bfloat16)
H200 = GPUTarget("cuda", 90, 32)
"""


@pytest.mark.compile
def test_jobs_say_what_is_compiled(compiled_python):
    code = """
run = Launcher(scale_kernel, {"BLOCK": 64}, num_warps=2, maxnreg=None)
with launch.recording() as jobs:
    run((8,), x, None, 2.0, 8, 64)
    run((8, 1), x, x.float(), 2.0, 8, 64, SQUARE=True)
    with launch.recording() as inner:
        run((0,), x, None, 2.0, 8, 64)
plain, squared = jobs
assert len(inner) == 1 and plain.name == "scale_kernel" and plain.options == {"num_warps": 2}
assert list(plain.signature.values()) == ["*bf16", "constexpr", "fp32", "i32", "i64", "constexpr", "constexpr"]
assert plain.constants == {"BLOCK": 64, "y": None, "SQUARE": False} and squared.constants == {"BLOCK": 64, "SQUARE": True}
assert squared.signature["y"] == "*fp32"
text = launch.compile_job(plain, H200).asm["ttir"]
assert text.count("tt.divisibility = 16 : i32") == 1 and text.count("tt.divisibility = 8 : i32") == 1
print("right")
"""
    assert "right" in compiled_python(PREAMBLE + code)


@pytest.mark.compile
def test_a_launch_binds_once_a_device_and_set_of_constants(compiled_python):
    code = """
launched, compiled = [], []
class Compiled:
    function, packed_metadata = "function", "metadata"
    def run(self, *args):
        launched.append(args)
def compile_job(job, target):
    compiled.append(job.constants["SQUARE"])
    return Compiled()
launch.compile_job, launch.current_device, launch.current_stream = compile_job, lambda: 1, lambda device: 1000 + device
triton.runtime.driver.set_active(type("Driver", (), {"get_current_target": lambda self: H200})())
run = Launcher(scale_kernel, {"BLOCK": 64})
with launch.recording() as jobs:
    run.load(x, None, 2.0, 8, 64)
assert not compiled and not jobs
run.load(x, None, 2.0, 8, 64)
assert compiled == [False] and not launched
for _ in range(2):
    run((3,), x, None, 2.0, 8, 64)
    run((3, 4, 5), x, None, 2.0, 8, 64, SQUARE=True)
run((3, 0), x, None, 2.0, 8, 64)
assert compiled == [False, True] and len(launched) == 4
assert launched[0] == (3, 1, 1, 1001, "function", "metadata", None, None, None, x, None, 2.0, 8, 64, 64, False)
assert launched[1][:3] == (3, 4, 5) and launched[1][-1] is True
print("right")
"""
    assert "right" in compiled_python(PREAMBLE + code)


def test_a_descriptor_is_what_triton_makes():
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    from nsa_gen.launch import Launcher

    for x in (torch.zeros(6, 4, 32), torch.zeros(6, 9, 64, dtype=torch.float16)[:, 1:5, :32]):
        assert Launcher.in_rows(x) is x
        stride = x.stride(1)
        found, want = Launcher.rows(x, 16), TensorDescriptor(x, [6, 3 * stride + 32], [x.stride(0), 1], [16, 32])
        assert found.base is x and vars(found).keys() <= vars(want).keys()
        assert all(getattr(found, name) == value for name, value in vars(want).items() if name != "base")
    for x in (torch.rand(4, 6, 32).transpose(0, 1), torch.rand(1, 4, 33)[..., :32]):  # heads outside the rows, a stride of 33 elements
        copy = Launcher.in_rows(x)
        assert torch.equal(copy, x) and copy.is_contiguous() and not copy.stride(0) % 8
    empty = Launcher.rows(torch.zeros(0, 4, 32), 16)  # the driver describes no empty tensor
    assert empty.shape == [1, 128] and empty.strides == [128, 1] and empty.base.numel() == 128


@pytest.mark.compile
def test_errors_name_the_kernel_or_the_folder(compiled_python, tmp_path):
    code = """
import sys
with launch.recording() as jobs:
    Launcher(scale_kernel, {"BLOCK": 48})((8,), x, None, 2.0, 8, 64)
    Launcher(scale_kernel, {"BLOCK": 32})((8,), x, None, 2.0, 8, 64)
    try:
        Launcher(untyped_kernel, {"BLOCK": 64})((8,), x, 3)
    except CompileError as error:
        assert "untyped_kernel: parameter 'rows' needs a type annotation" in str(error)
    else:
        raise AssertionError
try:
    launch.compile_job(jobs[0], H200)
except CompileError as error:
    assert "scale_kernel for cuda:90" in str(error) and "power of 2" in str(error), error
else:
    raise AssertionError
triton.knobs.cache.dir = sys.argv[1] + "/triton"
try:
    launch.compile_job(jobs[1], H200)
except CacheError as error:
    assert "set TRITON_CACHE_DIR to a writable folder" in str(error) and sys.argv[1] in str(error), error
else:
    raise AssertionError
print("right")
"""
    (tmp_path / "file").write_text("")
    assert "right" in compiled_python(PREAMBLE + code, str(tmp_path / "file"))
