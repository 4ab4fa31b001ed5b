from __future__ import annotations

import itertools
import json

import pytest
import torch
from gradient_cases import DEVICE

from nsa_gen import InputError, kernels, verify
from nsa_gen.config import FP8, KERNELS, SERVING
from nsa_gen.errors import ConfigError


def test_kernels_are_right_and_the_report_says_so(capsys):
    seen = []
    report = verify.run("tiny", kernels=["sliding_attention_fwd", "compress_fwd"], on_result=seen.append)
    assert report.ok, [r.message for r in report.results if not r.ok]
    assert seen == report.results
    assert {r.kernel for r in seen} == {"sliding_attention_fwd", "compress_fwd"}
    assert {"ragged", "all empty", "ties", "huge", "batched, strided", "shorter than a block"} <= {r.case for r in seen}
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True and len(data["results"]) == len(seen)
    assert data["results"][0]["errors"]["out"]["rel_fro"] < 1e-5
    report.print()
    printed = capsys.readouterr().out
    assert "sliding_attention_fwd" in printed and f"{len(seen)} of {len(seen)} cases right" in printed


def test_the_whole_operator_is_right():
    report = verify.run("tiny", kernels=["nsa_attention"])
    assert report.ok, [r.message for r in report.results if not r.ok]
    assert len(report.results) == 3


def test_kernels_that_serve_are_right():
    report = verify.run("tiny", kernels=SERVING, seqlens=[50])
    assert report.ok, [(r.kernel, r.case, r.message) for r in report.results if not r.ok]
    seen = {(r.kernel, r.case) for r in report.results}
    storages = ("float32", FP8) if DEVICE == "cpu" or kernels.default_device().fp8 else ("float32",)
    for kernel, (tokens, storage) in itertools.product(SERVING, zip((1, 4), storages, strict=False)):
        ran = {f"ragged, {tokens} new, {storage}", f"given length, {tokens} new, {storage}"} <= {
            case for name, case in seen if name == kernel
        }
        assert ran == (DEVICE == "cuda" or kernel != "cache_append" or storage != FP8), (kernel, storage)


def test_a_wrong_cache_or_choice_is_found(monkeypatch):
    def other_block(*given):
        block_indices = given[-4]
        block_indices[0, 0, 0, 1] += 1

    def lost_row(k, v, k_pages, v_pages, tables, k_scale, v_scale, slots, lengths, *rest):
        row = int(lengths[slots[0]]) - 1
        k_pages[tables[0, slots[0], row // k_pages.shape[2]], :, row % k_pages.shape[2]] = 0.0

    for kernel, spoil, said in (("decode_fwd", other_block, "block_indices"), ("cache_append", lost_row, "k0: ")):
        with monkeypatch.context() as patch:
            _break(patch, kernel, spoil)
            report = verify.run("tiny", kernels=[kernel])
            assert not report.ok and all(said in r.message for r in report.results if not r.ok), report.results


def test_backward_kernels_read_by_stride(monkeypatch):
    """Of what they may not, addends and branches' outputs, nothing is made strided."""
    cases = verify._cases
    monkeypatch.setattr(verify, "_cases", lambda *args: (case for case in cases(*args) if case[1] == "batched, strided"))
    report = verify.run("tiny", kernels=[kernel for kernel in KERNELS if kernel.endswith("_bwd")])
    assert report.ok, [(r.kernel, r.message) for r in report.results if not r.ok]
    assert {r.kernel for r in report.results} == {kernel for kernel in KERNELS if kernel.endswith("_bwd")}


def _break(monkeypatch: pytest.MonkeyPatch, name: str, spoil) -> None:
    get = kernels.get

    class Broken:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getattr__(self, attribute):
            def run(*args):
                made = getattr(self.kernel, attribute)(*args)
                spoil(*args)
                return made

            return run

    monkeypatch.setattr(
        kernels, "get", lambda problem, *rest: Broken(get(problem, *rest)) if problem.kernel == name else get(problem, *rest)
    )


def test_a_wrong_kernel_is_found_and_hides_no_other_case(monkeypatch, capsys):
    _break(monkeypatch, "combine_fwd", lambda *args: args[-1][-1:].mul_(1.01))
    report = verify.run("tiny", kernels=["combine_fwd"])
    assert not report.ok
    assert all(not r.ok and (">" in r.message or "NaN" in r.message) for r in report.results)
    report.print()
    assert "WRONG" in capsys.readouterr().out


def test_an_exception_is_one_failed_case(monkeypatch):
    def crash(x, *args):
        if len(x) == 7:
            raise RuntimeError("illegal address\nmore")

    _break(monkeypatch, "compress_fwd", crash)
    report = verify.run("tiny", kernels=["compress_fwd"])
    failed = [r for r in report.results if not r.ok]
    assert [(r.case, r.message) for r in failed] == [("shorter than a block", "RuntimeError: illegal address")]
    assert len(report.results) > 5


def test_a_wrong_selection_is_found(monkeypatch):
    def other_block(scores, block_indices, *rest):
        block_indices[..., 1][(block_indices[..., 3] > 4) & (block_indices[..., 1] > 1)] = 1

    _break(monkeypatch, "select_topk", other_block)
    cases = verify._cases
    monkeypatch.setattr(verify, "_cases", lambda *args: (case for case in cases(*args) if case[:2] == ("nsa_attention", "ragged")))
    (ragged,) = verify.run("tiny").results
    assert not ragged.ok and "block_indices differ" in ragged.message


def test_bad_arguments():
    with pytest.raises(InputError, match="positive"):
        verify.run("tiny", seqlens=[0])
    with pytest.raises(ConfigError, match="unknown kernel"):
        verify.run("tiny", kernels=["nothing"])


@pytest.mark.gpu
def test_gqa_on_the_gpu():
    report = verify.run("gqa16-d128")
    assert report.ok, [(r.kernel, r.case, r.message) for r in report.results if not r.ok]
    assert {r.dtype for r in report.results} == {"bfloat16"}
    assert torch.cuda.is_available()
