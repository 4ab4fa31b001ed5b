"""From an empty cache to the first result: a fresh process, then a second one that finds the compiled kernels.

    python benchmarks/cold_start.py [--json FILE]

Three processes: one that only imports torch and makes the inputs (the base both others pay), one with empty caches (renders, compiles and
runs the whole forward with the shipped tables, never tunes), one more with the caches that left. The forward runs once before, with a
cache of its own, so that no process waits for files that the system has never read. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

INPUTS = """
import time; start = time.perf_counter()
import torch
T, Hq, Hkv, D = 16384, 64, 4, 128
made = dict(device="cuda", dtype=torch.bfloat16)
q = torch.randn(T, Hq, D, **made)
k, v = (torch.randn(T, Hkv, D, **made) for _ in range(2))
gates = [torch.rand(T, Hq, **made) for _ in range(3)]
"""
CHECK = """
assert torch.isfinite(o).all()
print(time.perf_counter() - start)
"""
BASE = INPUTS + "o = q" + CHECK
FORWARD = INPUTS + 'import nsa_gen; o = nsa_gen.nsa_attention(q, k, v, *gates, spec="gqa16-d128")' + CHECK


def seconds(code: str, cache: str) -> float:
    """Wall time a fresh process reports for ``code`` with every cache under ``cache``."""
    env = {**os.environ, "NSA_GEN_CACHE": f"{cache}/nsa-gen", "TRITON_CACHE_DIR": f"{cache}/triton"}
    env["PYTHONPATH"] = os.pathsep.join(part for part in (str(ROOT), env.get("PYTHONPATH")) if part)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        seconds(FORWARD, cache)
    with tempfile.TemporaryDirectory() as cache:
        found = {"torch and inputs": seconds(BASE, cache)}
        for name in ("first process", "second process"):
            found[name] = seconds(FORWARD, cache)
    found["first, beyond torch"] = found["first process"] - found["torch and inputs"]
    found["second, beyond torch"] = found["second process"] - found["torch and inputs"]
    for name, value in found.items():
        print(f"{name:22} {value:7.2f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
