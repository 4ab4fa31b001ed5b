"""Versions that are too old are named, with what mends it, before anything is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_gen import versions
from nsa_gen.errors import UnsupportedVersion

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "number"),
    [("3.6.0", (3, 6)), ("2.11.0+cu130", (2, 11)), ("2.12.0a0+git1", (2, 12)), ("3.6rc1", (3, 61)), ("4", (4, 0)), ("", (0, 0))],
)
def test_parsed(text, number):
    assert versions.parsed(text) == number


def test_require():
    versions.require(torch="2.11.0", triton="3.6.0")
    versions.require(torch="10.0", triton="4.0")
    with pytest.raises(
        UnsupportedVersion, match=r"triton 3\.5\.1 is older than 3\.6, which the kernels need: pip install -U 'triton>=3\.6'"
    ):
        versions.require(torch="2.11.0", triton="3.5.1")
    with pytest.raises(UnsupportedVersion, match=r"torch 2\.9\.0\+cpu is older than 2\.11"):
        versions.require(torch="2.9.0+cpu", triton="3.6.0")


@pytest.mark.parametrize(
    ("doctored", "said"),
    [
        ("import triton; triton.__version__ = '3.1.0'", "triton 3.1.0 is older than 3.6"),
        ("import sys; sys.modules['triton'] = None", "triton is missing or too old"),
        ("import sys; sys.modules['triton.tools.tensor_descriptor'] = None", "triton is missing or too old"),
        ("import torch; torch.__version__ = '2.4.1'", "torch 2.4.1 is older than 2.11"),
    ],
)
def test_an_unsupported_version_is_one_clear_error(doctored, said):
    code = (
        f"{doctored}\nimport nsa_gen\ntry:\n    nsa_gen.nsa_attention\nexcept nsa_gen.errors.UnsupportedVersion as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "pip install -U" in done.stdout and done.stdout.count("\n") == 1
