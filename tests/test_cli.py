"""The command line: what it prints, its exit codes, its errors, and that the light commands stay light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nsa_gen import bench, bench_decode, bench_report, config, console, demo, doctor, paths, precompile, space, spec, tables, timing
from nsa_gen.cli import main
from nsa_gen.errors import InputError
from nsa_gen.geometry import TuneShape
from nsa_gen.render import render
from nsa_gen.row import Row
from nsa_gen.table import Table
from nsa_gen.tune import __main__ as tune_module
from nsa_gen.tune.summary import Summary

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def nsa(capsys):
    """``nsa("spec", "list")`` → exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def subprocess_python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False)


def a_row(seqlen: tuple[int, int] = (1024, 65536), speedup: float = 1.25, which: int = 0) -> Row:
    problem = config.problem("sliding_attention_fwd", spec.load("gqa16-d128"))
    chosen = list(space.candidates(problem))[which]
    return Row(
        problem=problem,
        seqlen=seqlen,
        batch_heads=(1, 8),
        config=chosen,
        perf={"median_ms": 2.0, "spread": 0.01, "default_ms": 2.0 * speedup, "verdict": "tuned wins"}
        | {"speedup": speedup, "speedup_low": speedup - 0.01, "speedup_high": speedup + 0.01},
        resources={"shared": 4096, "registers": 128, "spills": 0},
        correctness={"max_rel_err": 1e-3, "reference": "float64", "cases": 3},
        environment={name: "1" for name in ("triton", "torch", "driver", "device", "python")},
        source_digest=render(problem, chosen).digest,
        date="2026-01-01",
    )


def save(folder: Path, *rows: Row, slug: str = "nvidia-h200") -> Path:
    path = folder / slug / "sliding_attention_fwd.json"
    Table(slug, "sliding_attention_fwd", rows).save(path)
    return path


def test_light_commands_import_no_torch():
    done = subprocess_python("-X", "importtime", "-m", "nsa_gen", "spec", "list")
    assert done.returncode == 0 and "gqa16-d128" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "nsa_gen.cli" in imported and not imported & {"torch", "triton", "numpy", "optuna", "matplotlib"}


def test_help_names_every_command(nsa):
    code, out, _ = nsa("--help")
    assert code == 0
    for command in ("spec", "generate", "tune", "verify", "bench", "table", "report", "doctor", "demo"):
        assert f" {command} " in out
    assert nsa("--version")[1].startswith("nsa-gen ")


def test_spec_list_and_show(nsa):
    code, out, _ = nsa("spec", "list", "--json")
    assert code == 0 and [one["name"] for one in json.loads(out)] == spec.names()
    code, out, _ = nsa("spec", "show", "tiny", "--json")
    assert code == 0 and json.loads(out) == spec.load("tiny").to_dict()
    assert "window: 24" in nsa("spec", "show", "tiny")[1]
    assert json.loads(nsa("spec", "schema")[1])["title"]


def test_spec_validate(nsa, tmp_path):
    good = (paths.specs() / "tiny.yaml").read_text()
    (tmp_path / "good.yaml").write_text(good)
    (tmp_path / "bad.yaml").write_text(good.replace("window: 24", "windw: 24"))
    assert nsa("spec", "validate", tmp_path / "good.yaml")[:2] == (0, f"{tmp_path}/good.yaml: ok, tiny\n")
    code, out, _ = nsa("spec", "validate", tmp_path / "good.yaml", tmp_path / "bad.yaml")
    line = good.splitlines().index("window: 24") + 1
    assert code == 1 and f"bad.yaml:{line}: windw" in out and "window" in out.partition("windw")[2]
    found = json.loads(nsa("spec", "validate", "--json", tmp_path / "bad.yaml")[1])
    assert not found[0]["ok"] and found[0]["line"] == line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("spec", "show", "gqa16-d182"), "gqa16-d128"),
        (("generate", "tiny", "-t", "h100", "-o", "x"), "allowed: nvidia-a100-40gb"),
        (("verify", "tiny", "-k", "sliding"), "sliding_attention_fwd"),
        (("bench", "tiny", "-n", "64x"), "32x64k is 32 sequences of 65536"),
        (("tune", "tiny", "--budget", "soon"), "90s, 5m, 2h"),
        (("tune", "tiny", "-n", "32x"), "LENGTH or BATCHxLENGTH"),
        (("tune", "tiny", "--decode", "--kv-dtype", "int8"), "allowed: float32, float8_e4m3fn"),
        (("tune", "tiny", "--decode", "--page-size", "40"), "multiples of the selection block, 16"),
        (("tune", "tiny", "--tokens", "2"), "only with decode"),
        (("tune", "tiny", "-k", "decode_fwd"), "with decode also: decode_fwd"),
        (("table", "show", "nowhere"), "nowhere"),
        (("generate", ROOT / "Makefile", "-t", "sm_90", "-o", "x"), "Makefile"),
        (("tune", "tiny"), "no GPU is visible"),
        (("doctor", "-t", "sm_75"), "allowed: nvidia-a100-40gb"),
    ],
)
def test_errors_are_one_line_with_the_mend(nsa, args, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = nsa(*args)
    assert code == 2 and not out
    assert err.startswith("nsa-gen: error: ") and err.count("\n") == 1 and said in err


def test_debug_shows_the_traceback():
    done = subprocess_python("-m", "nsa_gen", "spec", "show", "nowhere", NSA_GEN_DEBUG="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "SpecError" in done.stderr


def test_wrong_usage_exits_2(nsa):
    assert nsa("generate", "tiny")[0] == 2
    assert nsa("nothing")[0] == 2


def test_missing_extra_is_named(nsa, monkeypatch, tmp_path):
    monkeypatch.setenv("NSA_GEN_TUNED", str(tmp_path))
    save(tmp_path, a_row())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    code, _, err = nsa("report", "--plot", tmp_path / "x.svg")
    assert code == 1 and "pip install 'nsa-gen[report]'" in err


def test_generate(nsa, tmp_path):
    code, out, _ = nsa("generate", "tiny", "-t", "sm_90", "-o", tmp_path / "nsa_tiny", "--json")
    found = json.loads(out)
    assert code == 0 and found["target"] == "sm_90" and "sliding_attention_fwd" in found["kernels"] and found["check"] == []
    assert (tmp_path / "nsa_tiny" / "rendered" / "sliding_attention_fwd.py").exists()
    assert "kernels for sm_90" in nsa("generate", "tiny", "-t", "sm_90", "-o", tmp_path / "nsa_tiny")[1]


def test_generate_check_shows_what_each_kernel_takes(nsa, tmp_path, monkeypatch):
    def compile_many(builds, jobs):
        for number, build in enumerate(builds):
            shared, error = (999_999, None) if number == 1 else (0, "no such layout") if number == 2 else (4096, None)
            yield precompile.Built(build, 1, shared, 40 + number, 8 * number, build.target.shared_bytes, error, 1.0)

    monkeypatch.setattr(precompile, "compile_many", compile_many)
    args = ("generate", "tiny", "-t", "sm_80", "-o", tmp_path / "nsa_tiny", "--check")
    code, out, _ = nsa(*args)
    lines = [line.split() for line in out.splitlines()[1:]]
    assert code == 1 and lines[0] == ["kernel", "shared", "bytes", "registers", "spilled", "bytes"]
    assert [line[1:] for line in lines[1:] if line[2] == "40"] == [["4096", "40", "0", "fits"]]
    assert "does not fit: 999999 > 166912 bytes of shared memory" in out and "no such layout" in out
    found = json.loads(nsa(*args, "--json")[1])
    assert len(found["check"]) == len(found["kernels"]) == len(lines) - 1
    assert [one["fits"] for one in found["check"]] == [number not in (1, 2) for number in range(len(found["check"]))]


def test_table_commands(nsa, tmp_path, monkeypatch):
    shipped, other = tmp_path / "tuned", tmp_path / "other"
    monkeypatch.setenv("NSA_GEN_TUNED", str(shipped))
    path = save(shipped, a_row())
    assert nsa("table", "lint")[:2] == (0, "ok\n")
    code, out, _ = nsa("table", "show", "nvidia-h200")
    assert code == 0 and "1024-65536" in out and "1.250 [1.240, 1.260]" in out
    assert json.loads(nsa("table", "show", "--json")[1])[0]["rows"] == [a_row().to_dict()]
    assert nsa("table", "diff", shipped, shipped)[:2] == (0, "")

    newer = replace(a_row((32768, 131072), 1.5, which=1), date="2026-02-01")
    save(other, newer)
    code, out, _ = nsa("table", "diff", shipped, other)
    assert code == 1 and "nvidia-h200/sliding_attention_fwd: - " in out and ": + " in out
    code, out, _ = nsa("table", "merge", other)
    assert code == 0 and "added:" in out and "trimmed:" in out
    assert [row.seqlen for row in Table.load(path).rows] == [(1024, 32767), (32768, 131072)]
    assert "0 kept" not in nsa("table", "merge", other)[1]  # again: nothing changes
    path.write_text(path.read_text().replace("1024", "1023"))
    code, out, _ = nsa("table", "lint")
    assert code == 1 and "torn or edited" in out
    assert nsa("table", "show")[0] == 2


def test_lint_finds_stale_rows_and_wrong_places(tmp_path, monkeypatch):
    folder = tmp_path / "tuned"
    monkeypatch.setenv("NSA_GEN_TUNED", str(folder))
    path = save(folder, replace(a_row(), source_digest="0" * 16))
    assert any("stale" in fault for fault in tables.lint(None))
    (folder / "nvidia-b200").mkdir()
    path.rename(folder / "nvidia-b200" / path.name)
    assert any("never read from here" in fault for fault in tables.lint(None))


def test_report(nsa, tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_GEN_TUNED", str(tmp_path))
    assert "No tuned rows." in nsa("report")[1]
    assert nsa("report", "--plot", tmp_path / "x.svg")[0] == 2
    save(tmp_path, a_row((1, 100)), a_row((101, 200), 1.75, which=2))
    code, out, _ = nsa("report")
    assert code == 0 and "| sliding_attention_fwd | 2 | 2 | 1.50 | 1.75 |" in out
    assert [gain["speedup"] for gain in json.loads(nsa("report", "--json")[1])] == [1.25, 1.75]
    pytest.importorskip("matplotlib")
    assert nsa("report", "-o", tmp_path / "r.md", "--plot", tmp_path / "r.svg")[0] == 0
    assert (tmp_path / "r.md").read_text() == out and "<svg" in (tmp_path / "r.svg").read_text()


def test_doctor_explains_a_resolution(nsa, tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_GEN_TUNED", str(tmp_path))
    save(tmp_path, a_row())
    code, out, _ = nsa("doctor", "-t", "nvidia-h200", "-n", "32k")
    assert code == 0 and "resolution of gqa16-d128 at 32768 tokens on nvidia-h200" in out
    assert "sliding_attention_fwd (device table)" in out and "importance_fwd (default)" in out and "NSA_GEN_TUNED=" in out
    assert "decode_fwd (default)" in out
    found = json.loads(nsa("doctor", "-t", "nvidia-h100-pcie", "--json")[1])
    taken = [one["text"] for one in found["findings"] if "sliding_attention_fwd (same arch)" in one["text"]]
    assert found["ok"] and len(taken) == 1
    save(tmp_path, a_row()).write_text("torn")
    code, out, _ = nsa("doctor", "-t", "nvidia-h200")
    assert code == 1 and "torn or edited" in out


def test_doctor_says_what_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "3.5.1+cu130" if name == "triton" else "99.0")
    found = doctor.Examination()
    doctor._versions(found)
    assert not found.ok
    assert [one.text for one in found.findings if one.level == "bad"] == ["triton 3.5.1+cu130 is older than 3.6: pip install -U triton"]


def test_lengths_and_times():
    assert console.lengths(["8192,64k", "1K"]) == [8192, 65536, 1024]
    assert [console.seconds(text) for text in ("90", "90s", "5m", "0.5h", None)] == [90, 90, 300, 1800, None]
    for wrong in (["0"], ["x"], ["-1"]):
        with pytest.raises(InputError):
            console.lengths(wrong)
    found = console.shapes(["8192,32x64k", "2X4K".lower()])
    assert [(shape.batch, shape.seqlen) for shape in found] == [(1, 8192), (32, 65536), (2, 4096)] and console.shapes(None) == []
    for wrong in ("x64k", "32x", "0x64k", "32x0", "2x3x4", "32*64k"):
        with pytest.raises(InputError, match="BATCHxLENGTH"):
            console.shapes([wrong])


def test_tune_passes_on_what_is_asked(nsa, monkeypatch, capsys):
    """Both command lines, in the same words."""
    asked = []

    def run(specs, **options):
        asked.append({name: value for name, value in options.items() if value not in (None, False)})
        return Summary("nvidia-h200", {})

    monkeypatch.setattr("nsa_gen.tune.drive.run", run)
    monkeypatch.setattr("nsa_gen.tune.run", run, raising=False)
    cache = ("--decode", "--kv-dtype", "float8_e4m3fn", "--page-size", "128", "--tokens", "4")
    assert nsa("tune", "tiny", "-n", "32x64k", "--seqlen", "8k,1x9", "-k", "decode_fwd", *cache)[0] == 0
    assert tune_module.main(["tiny", "--shapes", "32x64k", "--shapes", "8k,1x9", "--kernels", "decode_fwd", *cache]) == 0
    for options in asked:
        assert [(s.batch, s.seqlen) for s in options["shapes"]] == [(32, 65536), (1, 8192), (1, 9)]
        assert options["decode"] and options["kv_dtype"] == "float8_e4m3fn" and (options["page_size"], options["tokens"]) == (128, 4)
        assert options["kernels"] == ["decode_fwd"] and not {"varlen", "deterministic", "storage"} & set(options)
    assert nsa("tune", "tiny")[0] == 0
    assert not {"shapes", "decode", "kv_dtype", "page_size", "tokens"} & set(asked[-1])
    capsys.readouterr()
    assert tune_module.main(["tiny", "--shapes", "8y"]) == 1
    assert "BATCHxLENGTH" in capsys.readouterr().err


def test_bench_shows_and_draws_a_result(tmp_path):
    entry = {"peak_mib": 12.0, "note": "", "p20_ms": 1.0, "median_ms": 1.5, "p80_ms": 2.0, "tflop_s": 300.0}
    shapes = [
        {
            "seqlen": n,
            "entries": [
                {"name": name, **entry} for name in ("whole forward", "selected, sliding, gates", "full, flash")
            ] + [{"name": "full, cuDNN", "error": "not for this geometry"}],
            "speedups": {"full, flash": {"estimate": 2.0, "low": 1.9, "high": 2.1}},
        }
        for n in (8192, 16384)
    ]  # fmt: skip
    there = {"slug": "nvidia-h200", "device": "NVIDIA H200", "torch": "2.13", "triton": "3.7"}
    result = {
        "spec": spec.load("tiny").to_dict(), "environment": there, "shapes": shapes,
        "ceilings": {"copy_tb_s": 4.27, "matmul_bf16_tflop_s": 686.0},
    }  # fmt: skip
    columns, rows = bench_report.rows(result)
    assert all(len(row) == len(columns) for row in rows)
    assert (8192, "full, flash", "1.500", "1.000 - 2.000", "300", "12", "2.00 [1.90, 2.10]") in rows
    assert (16384, "full, cuDNN", "not for this geometry", None, None, None, None) in rows
    assert "4.27 TB/s" in bench_report.title(result)
    pytest.importorskip("matplotlib")
    bench_report.plot(result, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError):
        bench_report.plot({**result, "shapes": []}, tmp_path / "none.png")


def test_bench_of_decoding_shows_and_draws_a_result(tmp_path):
    entry = {"peak_mib": 1.0, "note": "", "p20_ms": 0.1, "median_ms": 0.125, "p80_ms": 0.2}
    shapes = [
        {
            "batch": batch, "seqlen": 65536, "limit_ms": 0.0625, "speedups": {},
            "entries": [{"name": name, **entry} for name in ("decode step", "append", "full, flash", "decode step, eager")],
        }
        for batch in (1, 32)
    ]  # fmt: skip
    there = {"slug": "nvidia-h200", "device": "NVIDIA H200", "torch": "2.13", "triton": "3.7"}
    result = {
        "spec": spec.load("tiny").to_dict(), "environment": there, "shapes": shapes, "whole": "decode step",
        "cached": {"storage": "float8_e4m3fn", "page_size": 64, "tokens": 1, "branches": 1},
        "ceilings": {"copy_tb_s": 4.27, "matmul_bf16_tflop_s": 686.0},
    }  # fmt: skip
    columns, rows = bench_report.rows(result)
    assert all(len(row) == len(columns) for row in rows)
    assert ("32x64k", "decode step", "0.1250", "0.1000 - 0.2000", None, "1", None) in rows
    assert any(row[:3] == ("1x64k", "bytes that must be read, at the copy bandwidth", "0.0625") for row in rows)
    pytest.importorskip("matplotlib")
    bench_report.plot(result, tmp_path / "b.svg")
    drawn = (tmp_path / "b.svg").read_text()
    assert "<svg" in drawn


def test_bench_of_decoding_puts_together_what_it_measures(monkeypatch):
    """Without a GPU: only what is timed is replaced."""
    calls = {name: lambda: None for name in ("decode step", "append")}

    def refused(*_):
        raise RuntimeError("no such backend\nand more")

    monkeypatch.setattr(bench, "current", lambda: SimpleNamespace(slug="test"))
    monkeypatch.setattr(bench, "_environment", dict)
    monkeypatch.setattr(bench, "_ceilings", lambda: {"copy_tb_s": 4.0, "matmul_bf16_tflop_s": 1.0})
    monkeypatch.setattr(bench, "_peak_mib", lambda call: 1.0)
    monkeypatch.setattr(bench, "tensors", lambda *_: {})
    monkeypatch.setattr(bench_decode, "parts", lambda *_: dict(calls))
    monkeypatch.setattr(bench_decode, "full_attention", refused)
    monkeypatch.setattr(timing, "interleaved", lambda functions, rounds: [[0.25] * rounds for _ in functions])
    monkeypatch.setattr(timing, "streamed", lambda call: timing.Timing.of([0.5]))
    chosen, shapes = spec.load("gqa16-d128"), [TuneShape(2, 4096), TuneShape(1, 64)]
    result = bench.run(chosen, shapes, rounds=3, cached=config.cache_of(chosen, config.FP8))
    assert json.loads(json.dumps(result))["cached"] == {"storage": config.FP8, "page_size": 64, "tokens": 1, "branches": 1}
    assert [(s["batch"], s["seqlen"]) for s in result["shapes"]] == [(2, 4096), (1, 64)]
    entries = {e["name"]: e for e in result["shapes"][0]["entries"]}
    assert entries["decode step"]["median_ms"] == 0.25 and entries["decode step, eager"]["median_ms"] == 0.5
    assert entries["full, cuDNN"]["error"] == "no such backend"
    assert result["shapes"][0]["limit_ms"] == bench_decode.needed(chosen, config.cache_of(chosen, config.FP8), shapes[0]) / 4e9
    assert len(bench_report.rows(result)[1]) == 2 * 6
    with pytest.raises(InputError, match="goes with --decode"):
        bench.run(chosen, shapes)


def test_bytes_that_a_step_must_read():
    chosen = spec.load("gqa16-d128")
    a_row = 4 * 256
    for n, rows in ((65536, 4095 + 14 * 64 + 512), (100, 5 + 100), (8, 0 + 8)):
        assert bench_decode.needed(chosen, config.cache_of(chosen), TuneShape(3, n)) == 3 * rows * a_row * 2
        assert bench_decode.needed(chosen, config.cache_of(chosen, config.FP8), TuneShape(3, n)) == 3 * rows * a_row


def test_bench_refuses_options_that_do_not_go_together(nsa):
    for options, why in (
        (("--training", "--decode"), "one of them"),
        (("--kv-dtype", "float8_e4m3fn"), "go with --decode"),
        (("--decode", "--kv-dtype", "int8"), "storage of a cache"),
    ):
        code, _, err = nsa("bench", "tiny", *options)
        assert code == 2 and why in err


def test_bench_without_a_gpu_says_so(nsa, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = nsa("bench", "gqa16-d128")
    assert code == 2 and "no GPU" in err


def test_bench_inputs_fit_the_operators():
    for name in ("nsa-paper", "tiny"):
        chosen = spec.load(name)
        given = bench.tensors(chosen, 64, "cpu")
        assert given["q"].shape == (64, chosen.heads.query, chosen.head_dim.qk)
        assert isinstance(given["k"], tuple) == (chosen.kv == "per_branch")
        work = bench._flops(chosen, 4096)
        assert work["full, flash"] > work["whole forward"] > work["selected attention"] > 0


def test_demo_forward_holds_against_the_reference():
    done = subprocess_python("-c", "from nsa_gen import demo; demo.forward('tiny', (70, 9), 'cpu')", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["error"] <= 2 * found["eager"] + found["floor"]


def test_demo_calls_a_wrong_forward_wrong(capsys):
    found = {"error": 1e-3, "eager": 1e-7, "floor": 1e-7, "dtype": "float32", "seconds": 1.0}
    assert not demo._show_forward(found) and "WRONG" in capsys.readouterr().out
    assert demo._show_forward({**found, "error": 2e-7})


@pytest.mark.gpu
def test_bench_measures(nsa, tmp_path):
    code, out, _ = nsa("bench", "gqa16-d128", "-n", "4096", "--rounds", "3", "--json", tmp_path / "b.json")
    assert code == 0 and "whole forward" in out
    result = json.loads((tmp_path / "b.json").read_text())
    entries = {entry["name"]: entry for entry in result["shapes"][0]["entries"]}
    assert entries["whole forward"]["median_ms"] > entries["sliding attention"]["median_ms"] > 0
    assert result["ceilings"]["copy_tb_s"] > 0.1


def test_bench_parts_are_calls_the_operators_take():
    code = """
from nsa_gen import bench, spec
for changes in ({}, {"kv": "per_branch", "compression": {"block": 16, "stride": 8, "pooling": "mlp"}}):
    chosen = spec.Spec.from_dict(spec.load("tiny").to_dict() | changes)
    made = bench.parts(chosen, bench.tensors(chosen, 20, "cpu"))
    assert list(made)[0] == "whole forward" and len(made) == 8
    made["whole forward"](), made["selected, sliding, gates"](), made["combine"]()
"""
    done = subprocess_python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
