"""examples/serve.py: what the engine makes of many requests is what each would get alone, no page is lost, and nobody waits for ever."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_cases import DEVICE, runs
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import few_programs

import nsa_gen
from examples import serve
from examples.backends import NSA, Full, PlainFull, PlainNSA, backend_of
from examples.engine import Clock, Engine
from examples.model import Decoder, Size
from examples.scheduler import PagePool, Request, Scheduler
from nsa_gen.errors import InputError
from nsa_gen.spec import load

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 64


class Steps(Clock):
    """Time that passes by being looked at, so that every run is scheduled alike."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        self.time += 1
        return self.time

    def wait(self, until: float) -> None:
        self.time = max(self.time, until)


@pytest.fixture(autouse=True)
def one_thread():
    with serve.one_thread(unless=False):
        yield


# --- scheduler -----------------------------------------------------------------------------------------------------------------------


def serve_all(scheduler: Scheduler, pool: PagePool, requests: list[Request]) -> list[dict[Request, int]]:
    """Serve requests, ``arrival`` counted in steps, and hold every step to what a scheduler promises; the plans."""
    coming, plans = list(requests), []
    while coming or scheduler.busy:
        while coming and coming[0].arrival <= len(plans):
            scheduler.submit(coming.pop(0))
        planned = scheduler.plan()
        plans.append(planned)
        assert sum(planned.values()) <= scheduler.budget and all(n > 0 for n in planned.values())
        assert pool.pages_needed({request.sequence: n for request, n in planned.items()}) <= pool.pages_free
        assert len(scheduler.running) <= scheduler.max_running
        in_order = [request.number for request in (*scheduler.running, *scheduler.waiting)]
        assert in_order == sorted(in_order), "first come, first served"
        assert not scheduler.running or scheduler.running[0] in planned, "the oldest always goes on"
        assert set(planned) <= set(scheduler.running)
        pool.extend({request.sequence: n for request, n in planned.items()})
        scheduler.commit(planned, {request: request.known for request in planned})
        assert len(plans) <= requests[-1].arrival + sum(len(r.prompt) + r.max_tokens for r in requests), "every request ends"
    return plans


@st.composite
def workloads(draw) -> dict[str, Any]:
    page_size = draw(st.sampled_from([1, 4, 16]))
    arrival, requests = 0, []
    prefixes = [draw(st.integers(1, 20)) for _ in range(2)]
    for number in range(draw(st.integers(1, 10))):
        arrival += draw(st.integers(0, 3))
        group = draw(st.sampled_from([None, 0, 1]))
        shared = 0 if group is None else prefixes[group]
        own, more = draw(st.integers(1, 20)), draw(st.integers(1, 30))
        requests.append(Request(number, arrival, [0] * (shared + own), more, group, shared))
    max_running, longest = draw(st.integers(1, 5)), max(request.longest for request in requests)
    return {
        "requests": requests, "page_size": page_size, "pages": -(-longest // page_size) + draw(st.integers(0, 8)),
        "budget": draw(st.integers(max_running, 40)), "max_running": max_running, "ahead": draw(st.sampled_from([0, 0, 2, 20])),
        "max_prefixes": draw(st.integers(0, 2)),
    }  # fmt: skip


@settings(max_examples=150)
@given(workloads())
def test_every_request_ends_within_budget_and_pages(load):
    pool = PagePool(load["pages"], load["page_size"], load["max_running"] + load["max_prefixes"] + 1, 70)
    options = {name: load[name] for name in ("budget", "max_running", "ahead", "max_prefixes")}
    scheduler = Scheduler(pool, **options)
    serve_all(scheduler, pool, load["requests"])
    assert all(request.output == list(range(len(request.prompt), request.longest + 1)) for request in load["requests"])
    scheduler.drop_prefixes()
    assert pool.pages_free == pool.pages_total


def test_long_prompts_come_in_chunks_beside_what_generates():
    pool = PagePool(100, 4, 8, 200)
    scheduler = Scheduler(pool, budget=10, max_running=4)
    a, b, c = Request(0, 0, [0] * 4, 6), Request(1, 1, [0] * 25, 1), Request(2, 1, [0] * 3, 1)
    plans = serve_all(scheduler, pool, [a, b, c])
    assert plans == [{a: 4}, {a: 1, b: 9}, {a: 1, b: 9}, {a: 1, b: 7, c: 2}, {c: 1, a: 1}, {a: 1}]


def test_the_youngest_gives_its_pages_back_and_goes_on_where_it_was():
    pool = PagePool(4, 4, 8, 16)
    scheduler = Scheduler(pool, budget=16, max_running=4, ahead=0)
    a, b = Request(0, 0, [0] * 8, 8), Request(1, 0, [0] * 8, 4)
    plans = serve_all(scheduler, pool, [a, b])
    assert (a.preemptions, b.preemptions) == (0, 1)
    assert b.output == [8, 9, 10, 11], "nothing is made twice"
    assert plans[:2] == [{a: 8, b: 8}, {a: 1}], "a has the last page: 17 rows do not fit into 4 pages of 4"
    assert plans[8:10] == [{b: 9}, {b: 1}], "prompt and output in one go"


def test_an_admission_leaves_room_for_what_runs():
    for ahead, together in ((0, True), (8, False)):
        pool = PagePool(4, 4, 8, 16)
        scheduler = Scheduler(pool, budget=16, max_running=4, ahead=ahead)
        plans = serve_all(scheduler, pool, [Request(0, 0, [0] * 8, 8), Request(1, 0, [0] * 8, 4)])
        assert (len(plans[0]) == 2) == together


def test_prefixes_are_computed_once_and_go_before_requests_do():
    pool = PagePool(12, 4, 8, 48)
    scheduler = Scheduler(pool, budget=40, max_running=4, ahead=0, max_prefixes=1)
    requests = [Request(i, 2 * i, [0] * 20, 2, "system", 18) for i in range(3)]
    plans = serve_all(scheduler, pool, requests)
    assert [request.reused for request in requests] == [0, 18, 18]
    assert [n for plan in plans for n in plan.values()] == [20, 1, 2, 1, 2, 1]
    assert list(scheduler.prefixes) == ["system"] and pool.pages_free == 7
    long = Request(9, 0, [0] * 40, 8)
    serve_all(scheduler, pool, [long])
    assert long.preemptions == 0 and not scheduler.prefixes and pool.pages_free == 12


def test_what_is_not_scheduled():
    pool = PagePool(4, 4, 8, 32)
    with pytest.raises(ValueError, match="max_running must be 1 to budget, 2"):
        Scheduler(pool, budget=2, max_running=3)
    scheduler = Scheduler(pool, budget=4, max_running=2)
    with pytest.raises(ValueError, match="request 7 takes 5 pages at its end, there are 4"):
        scheduler.submit(Request(7, 0, [0] * 10, 8))
    with pytest.raises(InputError, match="allowed are 32"):
        scheduler.submit(Request(7, 0, [0] * 30, 8))
    for request in (Request(7, 0, [], 1), Request(7, 0, [0], 0), Request(7, 0, [0, 0], 1, "a", 2), Request(7, 0, [0, 0], 1, None, 1)):
        with pytest.raises(ValueError, match="request 7: a prompt of"):
            scheduler.submit(request)
    assert not scheduler.busy and pool.pages_free == 4
    scheduler.submit(Request(7, 0, [0] * 10, 7))


def test_the_scheduler_needs_no_torch():
    code = "import sys, examples.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- engine --------------------------------------------------------------------------------------------------------------------------


def model_of(attention: str, layers: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    size = Size(VOCABULARY, VOCABULARY, width=64, layers=layers, hidden=128, shift=False)
    model = Decoder(size, load("tiny"), attention, tokens=True, implementation="reference", seed=3)
    if attention == "nsa":
        torch.manual_seed(0)
        for block in model.blocks:  # other gates for each token
            torch.nn.init.normal_(block.attention.gate_proj.weight, std=0.3)
    return model.to(device, dtype).eval()


def requests_of(count: int, seed: int = 0) -> list[Request]:
    workload = serve.Workload(count, rate=0.07, prompt=(3, 30), output=(8, 60), share=0.6, prefixes=2, prefix=21)
    return workload.make(VOCABULARY, seed)


def surprise(model: Decoder, request: Request) -> torch.Tensor:
    """By how much the model, which reads the whole sequence at once, prefers another token to each of the output; of the logits' spread."""
    tokens = torch.tensor([request.prompt + request.output], device=model.head.weight.device)
    with torch.no_grad():
        logits = model.head(model(tokens))[0, len(request.prompt) - 1 : -1].float()
    chosen = logits.gather(1, tokens[0, len(request.prompt) :, None])[:, 0]
    return (logits.amax(1) - chosen) / logits.std(1)


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_tokens_are_those_of_each_request_alone(attention):
    model, requests = model_of(attention), requests_of(20)
    backend = backend_of(model, pages=11, page_size=16, sequences=8, max_seqlen=128)
    engine = Engine(model, backend, budget=24, max_running=4, ahead=0, max_prefixes=2)
    streamed: dict[Request, list[int]] = {request: [] for request in requests}
    for request, token in engine.run(requests, Steps()):
        streamed[request].append(token)
        assert request.output == streamed[request], "a token is there when it is made"
    assert sum(request.preemptions for request in requests) > 2 and sum(request.reused for request in requests) > 42
    assert any(step["prompt_tokens"] and step["output_tokens"] > 1 for step in engine.steps)
    engine.close()
    assert backend.pages_free == backend.pages_total == 11
    for request in requests:
        assert len(request.output) == len(request.times) == request.max_tokens and request.times == sorted(request.times)
        assert surprise(model, request).max() < 1e-3
        other = Engine(model, backend, budget=200, max_running=1)
        alone = Request(0, 0.0, request.prompt, request.max_tokens)
        assert [token for _, token in other.run([alone], Steps())] == request.output


def test_what_came_before_matters():
    """Otherwise the test above would say little: both attentions and a changed first token lead elsewhere."""
    outputs = []
    for attention, first in (("nsa", 0), ("full", 0), ("nsa", 1)):
        model = model_of(attention)
        engine = Engine(model, backend_of(model, pages=20, page_size=16, sequences=8, max_seqlen=128), budget=200, max_running=1)
        request = Request(0, 0.0, [first, *range(40)], 20)
        list(engine.run([request], Steps()))
        outputs.append(request.output)
    assert len({tuple(output) for output in outputs}) == 3


@runs
def test_kernels_make_the_same_tokens():
    """A GPU's path, in the interpreter without its graphs: pages written and read by kernels, batches filled up."""
    outputs = []
    model = model_of("nsa", layers=2, device=DEVICE)
    for made in (PlainNSA, NSA):
        backend = made(model, pages=12, page_size=32, sequences=7, max_seqlen=96)
        with nsa_gen.override(*([few_programs(8)] if DEVICE == "cpu" else [])):
            engine = Engine(model, backend, budget=70, max_running=4, max_prefixes=1)
            prompt = random.Random(5).choices(range(VOCABULARY), k=60)
            requests = [Request(i, 5.0 * i, prompt[: 60 - 5 * i], 4, "begin", 37) for i in range(3)]
            list(engine.run(requests, Steps()))
            engine.close()
        assert backend.pages_free == 12 and requests[2].reused == 37
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_graphs_make_the_tokens_of_the_model(attention):
    model, requests = model_of(attention, device="cuda", dtype=torch.bfloat16), requests_of(20)
    backend = backend_of(model, pages=12, page_size=16, sequences=8, max_seqlen=128)
    assert type(backend) is (NSA if attention == "nsa" else Full)
    engine = Engine(model, backend, budget=24, max_running=4, ahead=0, max_prefixes=2)
    assert sorted(engine.decoding.graphs) == [1, 2, 4]
    list(engine.run(requests, Steps()))
    assert sum(request.preemptions for request in requests) and sum(request.reused for request in requests)
    off = torch.cat([surprise(model.float(), request) for request in requests])
    assert (off < 0.1).float().mean() > 0.95, "bfloat16 decides near ties, and seldom takes another block"
    engine.close()
    assert backend.pages_free == backend.pages_total


def test_what_is_not_served():
    size = Size(VOCABULARY, VOCABULARY, width=16, layers=1, hidden=16)
    described = load("tiny").to_dict()
    sizes = {"pages": 4, "page_size": 16, "sequences": 8, "max_seqlen": 64}
    model = Decoder(size, load("tiny"), "nsa", tokens=True)
    with pytest.raises(ValueError, match=r"Size\(shift=False\)"):
        Engine(model, backend_of(model, **sizes), budget=8, max_running=2)
    for change, why in (
        ({"kv": "per_branch"}, "got kv per_branch"), ({"compression": {"block": 8, "stride": 4, "pooling": "mlp"}}, "pooling mlp"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            backend_of(Decoder(size, nsa_gen.Spec.from_dict(described | change), "nsa", tokens=True), **sizes)
    assert type(backend_of(Decoder(size, load("tiny"), "full", tokens=True), **sizes)) is PlainFull


# --- script --------------------------------------------------------------------------------------------------------------------------


def test_workload_is_as_described_and_the_same_again():
    workload = serve.Workload(400, rate=5.0, prompt=(10, 1000), output=(2, 20), share=0.25, prefixes=3, prefix=50)
    made, again = workload.make(100, 1), workload.make(100, 1)
    assert [(r.arrival, r.prompt, r.max_tokens) for r in made] == [(r.arrival, r.prompt, r.max_tokens) for r in again]
    assert made[-1].arrival == pytest.approx(400 / 5, rel=0.15)
    own = [len(request.prompt) - request.prefix for request in made]
    assert 10 <= min(own) < 15 and 700 < max(own) <= 1000 and 80 < sorted(own)[200] < 125
    assert {request.max_tokens for request in made} == set(range(2, 21))
    shared = [request for request in made if request.group is not None]
    assert len(shared) == pytest.approx(100, abs=25)
    assert len({(request.group, *request.prompt[:50]) for request in shared}) == 3
    assert max(len(request.prompt) + request.max_tokens for request in made) <= workload.longest


def test_percentiles_and_timeline():
    assert serve.percentiles([float(i) for i in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert serve.percentiles([]) is None
    steps = [
        {"time": 0.1 * i, "output_tokens": i % 3, "prompt_tokens": 2, "running": 1, "waiting": 0, "pages_free": 4} for i in range(1, 101)
    ]
    rows = serve.timeline(steps, parts=20)
    assert len(rows) == 20 and all(row["running"] == 1 and row["pages_free"] == 4 for row in rows)
    assert sum(row["output_tokens_per_second"] for row in rows) * 0.5 == pytest.approx(sum(i % 3 for i in range(1, 101)))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--requests", "12", "--rate", "300", "--output", "4,24", "--pages", "24"]
    assert serve.main([*arguments, "--stream"]) == 0
    printed = capsys.readouterr().out
    for attention in ("nsa", "full"):
        found = json.loads((tmp_path / f"serve-{attention}-seed0.json").read_text(encoding="utf-8"))
        result, rows = found["result"], found["requests"]
        assert found["config"]["attention"] == attention and found["config"]["workload"]["count"] == len(rows) == 12
        assert result["output_tokens"] == sum(row["output"] for row in rows) and all(4 <= row["output"] <= 24 for row in rows)
        assert result["output_tokens_per_second"] == pytest.approx(result["output_tokens"] / result["seconds"])
        assert result["prompt_tokens_computed"] >= result["prompt_tokens"] - result["reused_tokens"] > 0
        for name in ("time_to_first_token", "time_per_output_token", "longest_pause"):
            assert 0 < result[name]["p50"] <= result[name]["p95"] <= result[name]["p99"] <= max(row[name] for row in rows)
        assert f"serve-{attention}-seed0: " in printed
    theirs = [json.loads(path.read_text(encoding="utf-8"))["requests"] for path in sorted(tmp_path.glob("*.json"))]
    assert [[row[name] for name in ("arrival", "prompt", "output")] for row in theirs[0]] == [
        [row[name] for name in ("arrival", "prompt", "output")] for row in theirs[1]
    ]
    assert printed.count(", token ") == 2 * sum(row["output"] for row in theirs[0])
    assert serve.main(["--out", str(tmp_path), "--plot", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("option", "why"), [
    (["--prompt", "9"], "two numbers from 1 with a comma"), (["--prompt", "9,3"], "the smaller first"), (["--pages", "3"], "takes"),
    (["--budget", "2"], "max_running must be 1 to budget"),
])  # fmt: skip
def test_bad_options(option: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.main(["--device", "cpu", "--out", str(tmp_path), *option])
    assert why in capsys.readouterr().err
