"""Which way a long series goes next: NSA finds a dependence planted thousands of steps back, and finds nothing in a random walk.

    python examples/train_series.py [--kind planted,control] [--seeds 0,1,2] [--out DIR] [--minutes 9] [--resume]
    python examples/train_series.py --out DIR --plot FILE

The series and how forecasts are judged are described in ``examples/series.py``. A seed makes its own series, weights and batches. The
series is split in time before anything else: a model trains on the first piece, the weights that do best on the second are kept, and these
are tested once, at the end, on the third. A run writes ``NAME.json`` and the checkpoint ``NAME.pt``; ``--minutes`` cuts, at any step, and
``--resume`` goes on where it was cut. On a CPU everything is small and NSA runs in plain PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional

from examples import options, plots, series
from examples.model import Decoder, Size, parameters
from examples.run import Deadline, Plan, Step, Trainer, records
from nsa_gen import Spec
from nsa_gen.spec import load

#: The planted lag is out of reach of the window and of the local blocks: only a chosen block shows it.
SMALL_SPEC = {
    "schema": 1, "name": "small", "dtype": "float32", "heads": {"query": 4, "kv": 2}, "head_dim": {"qk": 16, "v": 16},
    "compression": {"block": 8, "stride": 4, "pooling": "mean"}, "selection": {"block": 16, "count": 4, "initial": 1, "local": 1},
    "window": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Everything a run is made of but kind, attention and seed."""

    spec: Spec
    lag: int = 3000
    copied: float = 0.8
    train: int = 16_000_000
    validation: int = 500_000
    test: int = 2_000_000
    windows: series.Windows = field(default_factory=lambda: series.Windows(3072, 3072))
    tokens: int = 20_000_000
    batch_tokens: int = 30_720
    width: int = 128
    layers: int = 2
    theta: float = 10_000.0
    lr: float = 2e-3

    def size(self) -> Size:
        return Size(2, 1, width=self.width, layers=self.layers, hidden=4 * self.width, theta=self.theta, rotated=1.0, shift=False)

    def plan(self) -> Plan:
        return Plan(steps=max(1, self.tokens // self.batch_tokens), lr=self.lr)

    def to_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("lag", "copied", "train", "validation", "test", "tokens", "batch_tokens")}
        return plain | {"spec": self.spec.to_dict(), "windows": asdict(self.windows), "size": self.size().to_dict()}


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The GPU's or the CPU's setup, with what the command line says."""
    if options.small(arguments):
        chosen = Setup(
            Spec.from_dict(SMALL_SPEC), lag=40, train=200_000, validation=5_000, test=15_000, windows=series.Windows(64, 64),
            tokens=300_000, batch_tokens=2048, width=64, layers=1, theta=1000.0, lr=3e-3,
        )  # fmt: skip
    else:
        chosen = Setup(load("gqa8-d64"))
    if arguments.lag:
        context = -(-arguments.lag // 64) * 64
        chosen = replace(chosen, lag=arguments.lag, windows=series.Windows(context, context))
    given = {name: getattr(arguments, name) for name in ("tokens", "batch_tokens", "width", "layers", "lr")}
    given["spec"] = load(arguments.spec) if arguments.spec else None
    return replace(chosen, **{name: value for name, value in given.items() if value is not None})


def split_of(setup: Setup, kind: str, seed: int) -> series.Split:
    """The series of a seed, split: training, a gap, validation, a gap, test."""
    steps = setup.train + setup.validation + setup.test + 2 * setup.lag
    made = series.increments(kind, steps, setup.lag, setup.copied, seed)
    return series.Split.of(made, setup.validation, setup.test, gap=setup.lag)


def logits_of(model: Decoder, features: Tensor, scored: int) -> Tensor:
    """Log-odds of up after each of the last ``scored`` steps, ``[B,scored]``."""
    batch, length, _ = features.shape
    at = torch.arange(length - scored, length, device=features.device).expand(batch, -1)
    return model.logits(model(features), at).squeeze(2)


def forecasts(model: Decoder, setup: Setup, piece: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds and outcomes ``[windows,scored]`` over a whole piece, each step once."""
    at_once = max(1, setup.batch_tokens // setup.windows.length)
    found = []
    for starts in setup.windows.starts(len(piece)).split(at_once):
        features, up = setup.windows.cut(piece, starts)
        found.append((logits_of(model, features, setup.windows.scored), up))
    logits, up = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(up)


def trainer_of(setup: Setup, kind: str, attention: str, seed: int, arguments: argparse.Namespace) -> Trainer:
    """The run of one kind, attention and seed, at its start."""
    made = options.implementation(arguments, setup.spec, attention, setup.windows.length)
    model = Decoder(setup.size(), setup.spec, attention, tokens=False, seed=seed, **made).to(arguments.device)
    if arguments.compile:
        for block in model.blocks:
            block.compile()
    config = {"kind": kind, "attention": attention, **setup.to_dict()}
    trainer = Trainer(f"series-{kind}-{attention}-seed{seed}", arguments.out, config, model, setup.plan(), seed)
    trainer.record["parameters"], trainer.notes = parameters(model), {**made, "compile": arguments.compile}
    return trainer


def run(setup: Setup, trainer: Trainer, deadline: Deadline) -> bool:
    """Train, keep the best on validation, and test that once training is done; False if the deadline came first."""
    model, device, config = trainer.model, trainer.device, trainer.record["config"]
    split = split_of(setup, config["kind"], config["seed"])
    train, validation = split.train.to(device), split.validation.to(device)
    windows, each = setup.windows, max(1, setup.batch_tokens // setup.windows.length)

    def step_of(step: int, generator: torch.Generator) -> Step:
        starts = torch.randint(len(train) - windows.length, (each,), generator=generator, device=device)
        features, up = windows.cut(train, starts)
        logits = logits_of(model, features, windows.scored)
        loss = functional.binary_cross_entropy_with_logits(logits, up)
        return Step(loss, ((logits > 0) == (up > 0.5)).float().mean(), each * windows.length, windows.length)

    def evaluate(step: int) -> dict[str, Any]:
        logits, up = forecasts(model, setup, validation)
        loss = functional.binary_cross_entropy_with_logits(logits, up).item()
        if loss < min((row["log_loss"] for row in trainer.record["evaluations"]), default=float("inf")):
            trainer.kept = {name: value.clone() for name, value in model.state_dict().items()}
        return {"log_loss": loss, "accuracy": ((logits > 0) == (up > 0.5)).double().mean().item()}

    if not trainer.train(step_of, evaluate, deadline):
        return False
    model.load_state_dict(trainer.kept)
    logits, up = trainer.evaluated(forecasts, model, setup, split.test.to(device))
    found = series.measures(logits, up, base=(train > 0).double().mean().item())
    trainer.finish({"test": found, "best": series.best(config["kind"], setup.copied), "verdict": series.verdict(config["kind"], found)})
    return True


def main(argv: list[str] | None = None) -> int:
    parser = options.parser(__doc__, out="out/series")
    parser.set_defaults(attention=("nsa",))
    parser.add_argument("--kind", type=_kinds, default=series.KINDS, help="planted,control (default), planted or control")
    parser.add_argument("--lag", type=int, help="of the planted dependence, in steps (default 3000; 40 on a CPU)")
    parser.add_argument("--tokens", type=int, help="in all (default 20 million; 300 thousand on a CPU)")
    parser.add_argument("--batch-tokens", type=int, help="a step (default 30720; 2048 on a CPU)")
    arguments = parser.parse_args(argv)
    if arguments.plot:
        plots.series(records(arguments.out), arguments.plot)
        print(f"{arguments.plot} drawn")
        return 0
    setup, deadline = setup_of(arguments), Deadline(arguments.minutes)
    with deadline.signals():
        for seed in arguments.seeds:
            for kind in arguments.kind:
                for attention in arguments.attention:
                    trainer = trainer_of(setup, kind, attention, seed, arguments)
                    if trainer.begin(arguments.resume) and not run(setup, trainer, deadline):
                        print(f"\n{trainer.name}: cut after {trainer.step} of {trainer.plan.steps} steps; --resume goes on")
                        return 0
                    print(f"{trainer.name}: {trainer.record['result']['verdict']}")
    return 0


def _kinds(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(series.KINDS):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: {', '.join(series.KINDS)}, or both with a comma")
    return found


if __name__ == "__main__":
    sys.exit(main())
