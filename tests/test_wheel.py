"""The wheel, installed in a fresh environment away from the checkout, renders, resolves, generates and runs; the sdist has everything."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("hatchling")


def sh(*args: object, cwd: Path, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NSA_GEN", "PYTHON", "VIRTUAL_ENV")) and k != "TRITON_INTERPRET"}
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    sh(sys.executable, "-m", "hatchling", "build", "-d", folder, "-t", "wheel", "-t", "sdist", cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """Python of a fresh environment with the wheel; torch, triton and the other dependencies are those this test runs with."""
    home = tmp_path_factory.mktemp("venv")
    sh(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    site = Path(sh(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    # After the wheel on the path; an editable install of the checkout is a .pth file there, which is not read from here.
    (site / "current.pth").write_text("\n".join(dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))))
    return python


def test_wheel_contents(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "nsa-gen = nsa_gen.cli:main" in wheel.read(entry).decode()
    for folder in ("templates", "specs", "tuned"):
        here = {
            p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in (".jinja", ".yaml", ".json")
        }
        assert {f"nsa_gen/_data/{name}" for name in here} <= names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nsa_gen").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/")) or "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_contents(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["pyproject.toml", "Makefile", "requirements-dev.txt", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"]
    wanted += ["nsa_gen/cli.py", "tests/test_wheel.py", "docs/design.md", "benchmarks/dispatch_overhead.py", "tuned/README.md"]
    for folder in ("templates", "specs", "tuned"):
        wanted += [p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.suffix in (".jinja", ".yaml", ".json")]
    assert len(wanted) > 30
    assert not [name for name in wanted if name not in names]


def test_the_wheel_of_the_sdist_is_the_wheel(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    sh(sys.executable, "-m", "hatchling", "build", "-d", tmp_path / "dist", "-t", "wheel", cwd=next(tmp_path.glob("nsa_gen-*")))
    wheels = [zipfile.ZipFile(next(folder.glob("*.whl"))) for folder in (built, tmp_path / "dist")]
    one, other = ({info.filename: info.CRC for info in wheel.infolist() if not info.is_dir()} for wheel in wheels)
    assert one == other


def test_installed_wheel_renders_resolves_and_runs(installed, tmp_path):
    code = """
import pathlib, nsa_gen, torch
from nsa_gen import config, paths, render, space, spec
home = pathlib.Path(nsa_gen.__file__).parent
assert "site-packages" in str(home), home
assert paths.templates() == home / "_data" / "templates" and paths.specs().is_dir() and paths.tuned().is_dir()
tiny = spec.load("tiny")
for problem in config.problems(tiny):
    render.render(problem, space.safe(problem))
found = nsa_gen.resolve("compressed_attention_fwd", "gqa16-d128", seqlen=65536, device="nvidia-h200")
assert found.source == "device table" and found.config.BLOCK_M >= 16
q, k = torch.randn(40, 4, 16), torch.randn(40, 2, 16)
o, lse = nsa_gen.sliding_attention(q, k, k, spec="tiny")
# In float64: logsumexp of float32 is now and then wrong by 5e-5 on a CPU.
q64, k64 = q.double(), k.double().repeat_interleave(2, 1)
score = torch.einsum("thd,shd->hts", q64, k64) / 4
t = torch.arange(40)
score = score.masked_fill((t[None] > t[:, None]) | (t[None] <= t[:, None] - 24), -torch.inf)
torch.testing.assert_close(o.double(), torch.einsum("hts,shd->thd", score.softmax(-1), k64), atol=1e-5, rtol=1e-5)
torch.testing.assert_close(lse.double(), score.logsumexp(-1).T, atol=1e-5, rtol=1e-5)
print("right")
"""
    cache = {"NSA_GEN_CACHE": str(tmp_path / "cache"), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert "right" in sh(installed, "-c", code, cwd=tmp_path, **cache)


def test_installed_command_line(installed, tmp_path):
    assert "tiny" in sh(installed, "-m", "nsa_gen", "spec", "list", cwd=tmp_path)
    said = sh(installed, "-m", "nsa_gen", "generate", "tiny", "-t", "sm_80", "-o", tmp_path / "alone", cwd=tmp_path)
    assert "kernels for sm_80" in said and (tmp_path / "alone" / "kernels.py").exists()
