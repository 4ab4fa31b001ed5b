"""What the training scripts share: a loop that may be cut at any step and goes on bit for bit, and the files it writes.

A run is two files in its folder. ``NAME.pt``, the checkpoint, has the model, the optimiser, all random states and the record so far;
``NAME.json`` is the record alone, for people and plots: configuration, environment, curves, results. Both are written whole or not at all.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import nsa_gen

SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """How long and how fast: the learning rate rises over ``warmup`` of the steps, stays, and falls to a tenth over the last ``decay``."""

    steps: int
    lr: float
    warmup: float = 0.05
    decay: float = 0.3
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluations: int = 20
    log_every: int = 10

    def lr_at(self, step: int) -> float:
        rise, fall = max(1, round(self.steps * self.warmup)), max(1, round(self.steps * self.decay))
        return self.lr * min(1.0, (step + 1) / rise, 0.1 + 0.9 * (self.steps - step) / fall)

    def evaluates_after(self, step: int) -> bool:
        """Whether ``step`` steps are a multiple of an equal share of all, or all."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps


class Step(NamedTuple):
    """What a step is made of: the loss to descend, the share of right answers, tokens read, and their sequences' length."""

    loss: Tensor
    accuracy: Tensor
    tokens: int
    length: int


class Deadline:
    """When to stop: after ``minutes``, or after the step in which SIGTERM or SIGINT came."""

    def __init__(self, minutes: float | None = None):
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")

    def reached(self) -> bool:
        return time.monotonic() >= self.end

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within it signals bring the deadline forward to now."""

        def now(number: int, frame: Any) -> None:
            self.end = 0.0

        before = {number: signal.signal(number, now) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Trainer:
    """One run.

    Args:
        name: of its files.
        folder: where they go.
        config: plain values that say all that makes the run what it is; a checkpoint of another config is refused.
        model: on its device, with float32 parameters; autocast to bfloat16 on a GPU.
        plan: steps and learning rate.
        seed: of the batches; one generator on the model's device draws them all.

    ``kept`` is the user's: tensors that the checkpoint holds as well. ``notes`` go into the record beside the environment.
    """

    def __init__(self, name: str, folder: Path, config: dict[str, Any], model: nn.Module, plan: Plan, seed: int):
        self.name, self.folder, self.model, self.plan = name, folder, model, plan
        self.device = next(model.parameters()).device
        decayed = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=True)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.step, self.kept, self.notes = 0, dict[str, Tensor](), dict[str, Any]()
        config = json.loads(json.dumps({**config, "plan": asdict(plan), "seed": seed}))
        self.record: dict[str, Any] = {
            "name": name, "finished": False, "config": config, "environment": [], "curve": [], "evaluations": [], "result": {},
        }  # fmt: skip

    # --- files -------------------------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def save(self) -> None:
        """Write both files; one that is there stays as it is until the new one is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "kept": self.kept,
            "generator": self.generator.get_state(), "rng": torch.get_rng_state(), "record": self.record,
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }  # fmt: skip
        with replacing(self.checkpoint) as path:
            torch.save(state, path)
        write_json(self.folder / f"{self.name}.json", self.record)

    def begin(self, resume: bool) -> bool:
        """Take up the checkpoint, if there is one; False if the run is finished.

        Raises:
            SystemExit: there is one and ``resume`` is not set, or it is of another configuration.
        """
        if not self.checkpoint.exists():
            return True
        if not resume:
            sys.exit(f"{self.checkpoint} is there already: --resume goes on with it, another --out begins anew")
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        theirs, ours = state["record"]["config"], self.record["config"]
        other = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if other:
            sys.exit(f"{self.checkpoint} was trained with another {', '.join(other)}: give the same options, or another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step, self.record = state["step"], state["record"]
        self.kept = {name: value.to(self.device) for name, value in state["kept"].items()}
        return not self.record["finished"]

    # --- training ----------------------------------------------------------------------------------------------------------------

    def train(self, step_of: Callable[[int, torch.Generator], Step], evaluate: Callable[[int], dict[str, Any]], deadline: Deadline) -> bool:
        """Steps until the plan is done (True) or the deadline reached (False); saved in either case, and once a minute.

        Args:
            step_of: the loss of step ``i``, its batch drawn from the generator.
            evaluate: a row for ``evaluations`` after ``step`` steps, in evaluation mode and without gradients.
        """
        self.record["environment"].append({"from_step": self.step, **environment(self.device), **self.notes})
        saved, window = time.monotonic(), _Window(self.device)
        while self.step < self.plan.steps:
            if deadline.reached():
                self.save()
                return False
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.lr_at(self.step)
            with self.autocast():
                done = step_of(self.step, self.generator)
            self.optimizer.zero_grad(set_to_none=True)
            done.loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
            self.optimizer.step()
            self.step += 1
            window.add(done, norm)
            evaluates = self.plan.evaluates_after(self.step)
            if evaluates or self.step % self.plan.log_every == 0:
                row = {"step": self.step, "lr": self.plan.lr_at(self.step - 1), **window.close()}
                self.record["curve"].append(row)
                if row["loss"] != row["loss"]:
                    write_json(self.folder / f"{self.name}.json", self.record)
                    sys.exit(f"{self.name}: the loss is not a number at step {self.step}")
                self.show(row, last=evaluates)
            if evaluates:
                self.record["evaluations"].append({"step": self.step, **self.evaluated(evaluate, self.step)})
            if evaluates or self.step % self.plan.log_every == 0:
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                window = _Window(self.device)
        self.save()
        return True

    def evaluated(self, evaluate: Callable[..., Any], *args: Any) -> Any:
        """``evaluate(*args)`` in evaluation mode, without gradients, in the dtype of training."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            found = evaluate(*args)
        self.model.train()
        return found

    def finish(self, result: dict[str, Any]) -> None:
        """The run's last words: ``result``, with the speed at each length, saved as finished."""
        self.record["result"] = {**result, "tokens_per_second": speeds(self.record["curve"])}
        self.record["finished"] = True
        self.save()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def show(self, row: dict[str, Any], last: bool) -> None:
        """Progress on one line, which the next one takes the place of; where nobody watches, only lines with an evaluation."""
        text = (
            f"{self.name}  step {row['step']}/{self.plan.steps}  length {row['length']}  loss {row['loss']:.3f}  "
            f"accuracy {row['accuracy']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
        )
        if sys.stdout.isatty():
            print(f"\r{text}\x1b[K", end="\n" if row["step"] == self.plan.steps else "", flush=True)
        elif last:
            print(text, flush=True)


class _Window:
    """Means over the steps since it was made; read from the device once, when it closes."""

    def __init__(self, device: torch.device):
        self.device, self.sums, self.steps, self.tokens, self.length = device, torch.zeros(3, device=device), 0, 0, 0
        self.start = time.perf_counter()

    def add(self, step: Step, norm: Tensor) -> None:
        self.sums += torch.stack([step.loss.detach().float(), step.accuracy.detach().float(), norm.float()])
        self.steps, self.tokens, self.length = self.steps + 1, self.tokens + step.tokens, step.length

    def close(self) -> dict[str, Any]:
        loss, accuracy, norm = (self.sums / self.steps).tolist()
        seconds = time.perf_counter() - self.start
        return {
            "length": self.length, "tokens": self.tokens, "loss": loss, "accuracy": accuracy, "gradient_norm": norm,
            "tokens_per_second": self.tokens / seconds,
        }  # fmt: skip


# --- files and facts ---------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place if the block ends well."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def records(folder: Path) -> list[dict[str, Any]]:
    """The runs of a folder, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]


def speeds(curve: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Median tokens a second at each length, without the first interval at each, in which kernels are compiled."""
    found: dict[int, list[float]] = {}
    for row in curve:
        found.setdefault(row["length"], []).append(row["tokens_per_second"])
    return {str(length): round(statistics.median(rates[1:] or rates)) for length, rates in found.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beside the configuration."""
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "python": platform.python_version(), "torch": str(torch.__version__), "nsa_gen": nsa_gen.__version__,
        "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    if device.type == "cuda":
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found
