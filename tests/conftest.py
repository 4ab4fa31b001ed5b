"""Test session: where kernels run, what needs a GPU, and a cache of its own.

With a GPU, kernels run on it. Without one, ``TRITON_INTERPRET=1`` is set before Triton is first imported and they run in Triton's
interpreter; tests that need the real compiler use ``compiled_python``. Nothing is read from or written to the user's caches.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(tempfile.mkdtemp(prefix="nsa-gen-tests-"))
GPU = torch.cuda.is_available()

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
for name in ("NSA_GEN_TUNED", "NSA_GEN_STRICT", "NSA_GEN_WORKSPACE"):
    os.environ.pop(name, None)
os.environ["NSA_GEN_CACHE"] = str(CACHE / "nsa-gen")
os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import interpreter

    interpreter.lighten()
# Every worker of pytest-xdist would take all cores for torch: they would wait for one another most of the time.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

settings.register_profile("nsa-gen", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nsa-gen")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write the golden files and emitted schemas anew instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm GPU")
    config.addinivalue_line("markers", "compile: needs Triton's compiler (no GPU): runs it in a process of its own")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    no_gpu = pytest.mark.skip(reason="needs a GPU" if not GPU else "TRITON_INTERPRET=1 keeps kernels off the GPU")
    no_compiler = pytest.mark.skip(reason="needs triton")
    for item in items:
        if "gpu" in item.keywords and (not GPU or interpreted):
            item.add_marker(no_gpu)
        if "compile" in item.keywords and importlib.util.find_spec("triton") is None:
            item.add_marker(no_compiler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture
def update_goldens(request: pytest.FixtureRequest) -> bool:
    """Whether ``--update-goldens`` was given."""
    return bool(request.config.getoption("--update-goldens"))


@pytest.fixture
def compiled_python(tmp_path: Path) -> Callable[..., str]:
    """``run(code, *args, timeout=300, **env)``: run Python without the interpreter, return its stdout, fail with its stderr.

    The code is a file, so that it may define ``@triton.jit`` functions; ``nsa_gen`` and the ``tests`` folder are importable.
    """

    def run(code: str, *args: str, timeout: float = 300, **env: str) -> str:
        script = tmp_path / "script.py"
        script.write_text(code, encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, str(script), *args]
        done = subprocess.run(command, cwd=ROOT, env=environment | env, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run
