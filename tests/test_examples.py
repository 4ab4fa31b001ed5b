"""examples/: both scripts learn on a CPU, forecast nothing in a random walk, go on bit for bit, and draw."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import series, tasks, train_lm, train_series
from examples.model import Decoder, FullAttention, Size, parameters
from examples.run import Plan, replacing
from nsa_gen import Spec

LM = ["--device", "cpu", "--attention", "nsa"]
SERIES = ["--device", "cpu"]


def record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    """A record less what differs from one run to the next: speeds, and how often it was started."""
    text = json.dumps({name: value for name, value in found.items() if name != "environment"})
    return json.loads(text, object_hook=lambda d: {name: value for name, value in d.items() if name != "tokens_per_second"})


# --- training ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_language_model_learns(tmp_path: Path, attention: str) -> None:
    arguments = ["--device", "cpu", "--attention", attention, "--out", str(tmp_path), "--length", "64", "--tokens", "160000"]
    assert train_lm.main(arguments) == 0
    found = record(tmp_path / f"lm-{attention}-seed0.json")
    assert found["finished"]
    losses = [row["loss"] for row in found["curve"]]
    assert losses[0] > 0.9 * math.log(16)
    assert losses[-1] < 0.5 * losses[0]
    assert found["result"]["final"]["64"]["recall"]["accuracy"] > 0.6
    assert found["parameters"]["gates"] == (0 if attention == "full" else 64 * 12 + 12)


def test_planted_dependence_is_found_and_the_control_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_series.main([*SERIES, "--out", str(tmp_path), "--tokens", "150000"]) == 0
    planted, control = (record(tmp_path / f"series-{kind}-nsa-seed0.json")["result"] for kind in ("planted", "control"))
    assert planted["test"]["accuracy"]["low"] > 0.6
    assert planted["test"]["gain"]["low"] > 0
    # Four standard errors of a fair coin: a fault moves it further, chance once in 16000 machines.
    assert abs(control["test"]["accuracy"]["value"] - 0.5) < 4 * 0.5 / control["test"]["steps"] ** 0.5
    assert control["test"]["gain"]["low"] < 0.001
    printed = capsys.readouterr().out
    assert "planted dependence found" in printed and "control" in printed


# --- cutting and going on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [train_lm, train_series], ids=["lm", "series"])
def test_resumes_bit_for_bit(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "lm-nsa-seed3" if script is train_lm else "series-planted-nsa-seed3"
    arguments = ["--device", "cpu", "--attention", "nsa", "--seeds", "3", "--tokens", "4096", "--batch-tokens", "512"]
    arguments += ["--length", "64"] if script is train_lm else ["--kind", "planted"]
    assert script.main([*arguments, "--out", str(tmp_path / "whole")]) == 0

    class Cut(script.Deadline):
        left = 3

        def reached(self) -> bool:
            self.left -= 1
            return self.left < 0

    monkeypatch.setattr(script, "Deadline", Cut)
    for time in range(3):
        assert script.main([*arguments, "--out", str(tmp_path / "cut"), *(["--resume"] if time else [])]) == 0
        assert record(tmp_path / "cut" / f"{name}.json")["finished"] == (time == 2)
    whole, cut = (torch.load(tmp_path / folder / f"{name}.pt", weights_only=True) for folder in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 8
    for key, value in whole["model"].items():
        assert torch.equal(value, cut["model"][key]), key
    for index, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, cut["optimizer"]["state"][index][key]) for key, value in state.items())
    assert torch.equal(whole["generator"], cut["generator"])
    curves = [{row["step"]: row for row in state["record"]["evaluations"]} for state in (whole, cut)]
    assert curves[0] == curves[1]
    assert without_times(whole["record"]["result"]) == without_times(cut["record"]["result"])
    assert [found["from_step"] for found in cut["record"]["environment"]] == [0, 3, 6]


def test_a_run_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    arguments = [*LM, "--out", str(tmp_path), "--length", "64", "--tokens", "1024", "--batch-tokens", "512"]
    assert train_lm.main(arguments) == 0
    before = (tmp_path / "lm-nsa-seed0.pt").read_bytes()
    with pytest.raises(SystemExit, match="--resume"):
        train_lm.main(arguments)
    with pytest.raises(SystemExit, match="another plan"):
        train_lm.main([*arguments, "--lr", "0.1", "--resume"])
    assert train_lm.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "lm-nsa-seed0.pt").read_bytes() == before


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as beside:
        beside.write_text("new")
    assert [found.read_text() for found in tmp_path.iterdir()] == ["new"]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--device", "cpu", "--attention", "full", "--seeds", "0,1", "--out", str(tmp_path), "--batch-tokens", "512"]
    assert train_lm.main([*sizes, "--length", "128", "--tokens", "4096", "--task", "mixed"]) == 0
    assert train_series.main([*sizes, "--tokens", "4096"]) == 0
    for script, folder in ((train_lm, tmp_path / "lm"), (train_series, tmp_path / "series")):
        folder.mkdir()
        for path in tmp_path.glob(f"{folder.name}-*.json"):
            path.rename(folder / path.name)
        assert script.main(["--out", str(folder), "--plot", str(folder / "figure.png")]) == 0
        assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no runs"):
        train_lm.main(["--out", str(tmp_path / "none"), "--plot", str(tmp_path / "none.png")])


# --- parts -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("seqlen", [64, 200, 8192])
def test_answers_are_in_the_context(task: str, seqlen: int) -> None:
    vocabulary = tasks.Vocabulary()
    tokens, at, answers = tasks.make(task, 3, seqlen, vocabulary, torch.Generator().manual_seed(1))
    count, length = tasks.facts(task, seqlen)
    assert at.shape == answers.shape == (3, count * length)
    assert torch.equal(tokens[:, 1:].gather(1, at), answers)
    context = seqlen - count * (1 + length)
    for row, places in zip(tokens.tolist(), at.tolist(), strict=True):
        keys = [token for token in row[:context] if token < vocabulary.keys]
        assert len(keys) == len(set(keys)) == count
        for place in places[::length]:
            there = row.index(row[place])
            assert there < context and row[there : there + 1 + length] == row[place : place + 1 + length]


def test_tasks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 8 keys and 32 tokens, got 4 and 64"):
        tasks.make("recall", 1, 64, tasks.Vocabulary(keys=4), torch.Generator())


def test_curriculum_spends_all_tokens() -> None:
    for length in (64, 128, 256, 3000, 8192):
        shares = train_lm.curriculum(length)
        assert sum(shares.values()) == pytest.approx(1) and max(shares) == length and list(shares) == sorted(shares)
    setup = train_lm.Setup(Spec.from_dict(train_lm.SMALL_SPEC), train_lm.curriculum(1024))
    assert {setup.length_at(step, 100) for step in range(100)} == {256, 512, 1024}


def test_learning_rate_and_evaluations() -> None:
    plan = Plan(steps=100, lr=1.0)
    assert [plan.lr_at(step) for step in (0, 4, 50)] == [0.2, 1.0, 1.0]
    assert 0.1 < plan.lr_at(99) < 0.14
    assert sum(plan.evaluates_after(step) for step in range(1, 101)) == 20 and plan.evaluates_after(100)


def test_both_attentions_start_from_the_same_weights() -> None:
    spec = Spec.from_dict(train_lm.SMALL_SPEC)
    nsa, full = (Decoder(Size(20, 20, width=32, layers=2, hidden=64), spec, name, tokens=True, seed=5) for name in ("nsa", "full"))
    theirs = nsa.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in full.state_dict().items())
    counts = parameters(nsa)
    assert counts["all"] - counts["gates"] - counts["phi"] == parameters(full)["all"]


def test_full_attention_is_causal_attention_with_grouped_heads() -> None:
    torch.manual_seed(0)
    spec = Spec.from_dict(train_lm.SMALL_SPEC)
    layer = FullAttention(32, spec, rope=lambda x, positions: x)
    x = torch.randn(2, 9, 32)
    q, k, v = (proj(x).view(2, 9, -1, 16).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    logits = q @ k.repeat_interleave(2, 1).mT / 4 + torch.full((9, 9), -torch.inf).triu(1)
    expected = layer.o_proj((logits.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(layer(x), expected)


def test_series_depends_on_its_lag_and_on_nothing_else() -> None:
    planted, control = (series.increments(kind, 100_000, 40, 0.8, 3).sign() for kind in series.KINDS)
    for lag in (1, 39, 40, 41):
        agree = [(x[lag:] == x[:-lag]).float().mean().item() for x in (planted, control)]
        assert agree[0] == pytest.approx(0.9 if lag == 40 else 0.5, abs=0.02) and agree[1] == pytest.approx(0.5, abs=0.01)


def test_split_and_windows_touch_nothing_twice() -> None:
    split = series.Split.of(torch.arange(1000.0), validation=100, test=200, gap=40)
    pieces = [x - split.train[0] for x in (split.train, split.validation, split.test)]
    step = pieces[0][1].item()
    bounds = [(round(x[0].item() / step), round(x[-1].item() / step)) for x in pieces]
    assert bounds == [(0, 619), (660, 759), (800, 999)]
    windows, piece = series.Windows(context=8, scored=4), torch.arange(50.0)
    features, up = windows.cut(piece, windows.starts(len(piece)))
    assert features.shape == (10, 12, 2) and up.shape == (10, 4)
    forecast = (windows.starts(50)[:, None] + torch.arange(9, 13)).flatten()
    assert torch.equal(forecast, torch.arange(9, 49))


def test_measures() -> None:
    torch.manual_seed(0)
    up = (torch.rand(200, 50) < 0.5).float()
    right = torch.where(torch.rand(200, 50) < 0.8, up, 1 - up)
    found = series.measures((right * 2 - 1) * math.log(4), up, base=0.5)
    accuracy = found["accuracy"]
    assert accuracy["low"] < 0.8 < accuracy["high"] and accuracy["value"] == pytest.approx(0.8, abs=0.02)
    assert accuracy["wilson"] == pytest.approx([accuracy["low"], accuracy["high"]], abs=0.004)
    assert found["gain"]["value"] == pytest.approx(math.log(2) - 0.5004, abs=0.03)
    # Windows that are all right or all wrong are as many samples as windows: the bootstrap knows, Wilson does not.
    whole = torch.where(torch.rand(200, 1) < 0.8, up, 1 - up)
    clustered = series.measures(whole * 2 - 1, up, base=0.5)["accuracy"]
    assert clustered["high"] - clustered["low"] > 4 * (clustered["wilson"][1] - clustered["wilson"][0])
    assert series.wilson(50, 100) == pytest.approx([0.3753, 0.6247], abs=1e-3)


def test_verdict_in_words() -> None:
    up = (torch.rand(100, 50, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    good, coin = (up * 2 - 1), torch.randn(100, 50, generator=torch.Generator().manual_seed(1)) * 1e-3
    given = {"good": good, "coin": coin}
    say = {(kind, name): series.verdict(kind, series.measures(x, up, 0.5)) for kind in series.KINDS for name, x in given.items()}
    assert say["planted", "good"].startswith("planted dependence found")
    assert say["planted", "coin"].startswith("planted dependence NOT found")
    assert say["control", "coin"].startswith("control at chance, as it must be") and "50% inside" in say["control", "coin"]
    assert say["control", "good"].startswith("control NOT at chance")
