"""Folders: where writing is not possible, what serves instead and what is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_gen import loader, paths
from nsa_gen.errors import CacheError, InputError
from nsa_gen.render import Source

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["a file in its place", "read-only"])
def unwritable(request, tmp_path, monkeypatch):
    """A cache that cannot be written; root may write anywhere, so for it the system's answer is given by hand."""
    folder = tmp_path / "cache"
    if request.param == "read-only":
        folder.mkdir()
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(folder)) and access(path, mode))
    else:
        folder.write_text("")
    monkeypatch.setenv("NSA_GEN_CACHE", str(folder))
    return folder


def test_modules_load_without_a_writable_cache(unwritable):
    first, second = paths.writable_cache("src"), paths.writable_cache("src")
    assert first == second and first.is_dir() and unwritable not in first.parents
    module = loader.load(Source("somewhere_else_fwd", f"X = {str(unwritable)!r}\n"))
    assert str(unwritable) == module.X and Path(module.__file__).parent == first


def test_the_temporary_cache_goes_with_its_process(tmp_path):
    (tmp_path / "cache").write_text("")
    code = "from nsa_gen import paths; print(paths.writable_cache('src'))"
    env = os.environ | {"NSA_GEN_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "nsa-gen-")) and not list(tmp_path.glob("nsa-gen-*"))


def test_writing_is_whole_or_an_error(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    paths.write_atomic(path, "one")
    paths.write_atomic(path, "two")
    assert path.read_text() == "two" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(CacheError, match="set NSA_GEN_CACHE to a writable folder"):
        paths.write_atomic(path / "below a file", "x")


@pytest.mark.parametrize(("text", "size"), [("2G", 2**31), ("512M", 2**29), ("1.5kb", 1536), ("4096", 4096), (" 1 g ", 2**30)])
def test_workspace(text, size, monkeypatch):
    monkeypatch.setenv("NSA_GEN_WORKSPACE", text)
    assert paths.workspace_bytes() == size


@pytest.mark.parametrize("text", ["", "lots", "0", "-1G", "G", "nan", "inf"])
def test_workspace_that_is_no_size(text, monkeypatch):
    monkeypatch.setenv("NSA_GEN_WORKSPACE", text)
    with pytest.raises(InputError, match="NSA_GEN_WORKSPACE must be a positive size such as 512M or 2G"):
        paths.workspace_bytes()
