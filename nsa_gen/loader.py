"""Rendered source → file in the cache → imported module; and: compile everything a module launches, for any target."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from . import launch, paths
from .render import Source


@dataclass(frozen=True)
class Resources:
    """What one compiled jit function takes.

    ``shared`` in bytes; ``registers`` per thread and ``spills`` in bytes are ``None`` where no disassembler reads the binary.
    """

    name: str
    shared: int
    registers: int | None
    spills: int | None
    num_warps: int


_modules: dict[str, ModuleType] = {}


def load(source: Source) -> ModuleType:
    """Import a rendered module, written once to ``<cache>/src/<kernel>_<digest>.py``."""
    name = f"nsa_gen_rendered.{source.kernel}_{source.digest}"
    if name in _modules:
        return _modules[name]
    path = paths.writable_cache("src") / f"{source.kernel}_{source.digest}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != source.text:
        paths.write_atomic(path, source.text)
    module = load_file(path, name)
    _modules[name] = module
    return module


def load_file(path: Path, name: str) -> ModuleType:
    """Import the file at ``path`` as module ``name``."""
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def compile_all(run: Callable[[], object], target: object) -> list[Resources]:
    """Compile every kernel that ``run()`` would launch, for ``target``, without a GPU.

    Args:
        run: calls host functions of rendered modules with ``meta`` tensors.
        target: a ``GPUTarget``.

    Raises:
        CompileError: a kernel did not compile.
    """
    with launch.recording() as jobs:
        run()
    found = []
    for job in {(j.name, str(j.constants), str(j.signature)): j for j in jobs}.values():
        compiled = launch.compile_job(job, target)
        registers, spills = _usage(compiled)
        found.append(Resources(job.name, compiled.metadata.shared, registers, spills, compiled.metadata.num_warps))
    return found


@lru_cache(maxsize=1)
def _cuobjdump() -> str | None:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def _usage(compiled: object) -> tuple[int | None, int | None]:
    """Registers per thread and spilled bytes, from the binary's own resource table."""
    path = next((p for n, p in compiled.metadata_group.items() if n.endswith((".cubin", ".hsaco"))), None)
    if path is None:
        return None, None
    if str(path).endswith(".hsaco"):
        text = compiled.asm.get("amdgcn", "")
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        spills = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
    else:
        tool = _cuobjdump()
        if tool is None:
            return None, None
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=False).stdout
        registers = re.search(r"REG:(\d+)", text)
        spills = re.search(r"STACK:(\d+)", text)
    return (int(registers[1]) if registers else None), (int(spills[1]) if spills else None)
