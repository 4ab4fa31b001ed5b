"""A language model that must remember: NSA against full attention on associative recall and needles, from the same weights and batches.

    python examples/train_lm.py [--attention nsa,full] [--seeds 0,1,2] [--out DIR] [--minutes 9] [--resume]
    python examples/train_lm.py --out DIR --plot FILE

The decoder (``examples/model.py``) reads sequences of noise with facts in them and is asked for the facts at the end
(``examples/tasks.py``); half of a batch is recall, half needles, and the loss is on the answers alone. Lengths double from 256 tokens to
``--length``, with as many tokens a step at each, by the same schedule for every run. A run writes ``NAME.json`` and the checkpoint
``NAME.pt``; ``--minutes`` cuts, at any step, and ``--resume`` goes on where it was cut. On a CPU everything is small and NSA runs in plain
PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional

from examples import options, plots, tasks
from examples.model import Decoder, Size, parameters
from examples.run import Deadline, Plan, Step, Trainer, records
from nsa_gen import Spec
from nsa_gen.spec import load

#: Held-out sequences have seeds from here on, the same for every run; training's count from 0.
HELD_OUT = 1_000_003
SPEC = Path(__file__).with_name("memory.yaml")
#: What a CPU trains in half a minute: two lengths, at the longer of which NSA leaves blocks out.
SMALL_SPEC = {
    "schema": 1, "name": "small", "dtype": "float32", "heads": {"query": 4, "kv": 2}, "head_dim": {"qk": 16, "v": 16},
    "compression": {"block": 8, "stride": 4, "pooling": "mean"}, "selection": {"block": 16, "count": 5, "initial": 1, "local": 1},
    "window": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Everything a run is made of but its attention and seed. ``shares``: of all tokens, those spent at each length, in this order."""

    spec: Spec
    shares: dict[int, float]
    task: str = "mixed"
    vocabulary: tasks.Vocabulary = field(default_factory=tasks.Vocabulary)
    tokens: int = 80_000_000
    batch_tokens: int = 32_768
    width: int = 256
    layers: int = 4
    lr: float = 2e-3
    held_out: int = 64

    @property
    def tasks(self) -> tuple[str, ...]:
        return tasks.TASKS if self.task == "mixed" else (self.task,)

    def size(self) -> Size:
        inputs = self.vocabulary.size
        return Size(inputs, inputs, width=self.width, layers=self.layers, hidden=4 * self.width)

    def plan(self) -> Plan:
        return Plan(steps=max(1, self.tokens // self.batch_tokens), lr=self.lr)

    def length_at(self, step: int, steps: int) -> int:
        done = 0.0
        for length, share in self.shares.items():
            done += share
            if step < round(done * steps):
                return length
        return max(self.shares)

    def to_dict(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_dict(), "shares": {str(n): share for n, share in self.shares.items()}, "task": self.task,
            "vocabulary": self.vocabulary.to_dict(), "tokens": self.tokens, "batch_tokens": self.batch_tokens,
            "size": self.size().to_dict(), "held_out": self.held_out,
        }  # fmt: skip


def curriculum(length: int, first: int = 256) -> dict[int, float]:
    """Lengths that double from ``first`` to ``length``: a quarter of all tokens at the last, the rest spread evenly over those before.

    With one before it, half of them at either.
    """
    before = []
    while (reached := first << len(before)) < length:
        before.append(reached)
    last = (1.0, 0.5, 0.25)[min(len(before), 2)]
    return {n: (1 - last) / len(before) for n in before} | {length: last}


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The GPU's or the CPU's setup, with what the command line says."""
    if options.small(arguments):
        chosen = Setup(
            Spec.from_dict(SMALL_SPEC), curriculum(arguments.length or 128, first=64), task="recall", width=64, layers=1, lr=5e-3,
            vocabulary=tasks.Vocabulary(64, 16, 16), tokens=400_000, batch_tokens=1024, held_out=32,
        )  # fmt: skip
    else:
        chosen = Setup(load(SPEC), curriculum(arguments.length or 8192))
    given = {name: getattr(arguments, name) for name in ("task", "tokens", "batch_tokens", "width", "layers", "lr")}
    given["spec"] = load(arguments.spec) if arguments.spec else None
    return replace(chosen, **{name: value for name, value in given.items() if value is not None})


def loss_of(model: Decoder, batches: list[tasks.Batch]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Mean over tasks of the cross entropy of answers; and each task's own, and which answers were right ``[B,A]``."""
    read = model(torch.cat([batch.tokens for batch in batches])).split([len(batch.tokens) for batch in batches])
    losses, right = [], []
    for x, batch in zip(read, batches, strict=True):
        logits = model.logits(x, batch.at)
        losses.append(functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()))
        right.append(logits.argmax(-1) == batch.answers)
    return torch.stack(losses).mean(), losses, right


def measured(model: Decoder, setup: Setup, length: int, sequences: int, device: torch.device) -> dict[str, Any]:
    """Loss and accuracy on held-out ``sequences`` of each task; the standard error is over sequences, as answers of one go together."""
    found: dict[str, Any] = {}
    at_once = max(1, setup.batch_tokens // length)
    for number, task in enumerate(setup.tasks):
        generator = torch.Generator(device).manual_seed(HELD_OUT + number)
        losses, shares = [], []
        for first in range(0, sequences, at_once):
            batch = tasks.make(task, min(at_once, sequences - first), length, setup.vocabulary, generator)
            loss, _, (right,) = loss_of(model, [batch])
            losses.append(loss * len(right))
            shares.append(right.double().mean(1))
        share = torch.cat(shares)
        found[task] = {
            "sequences": sequences, "loss": (torch.stack(losses).sum() / sequences).item(), "accuracy": share.mean().item(),
            "standard_error": share.std().item() / sequences**0.5,
        }  # fmt: skip
    return found


def trainer_of(setup: Setup, attention: str, seed: int, arguments: argparse.Namespace) -> Trainer:
    """The run of one attention and one seed, at its start."""
    device = torch.device(arguments.device)
    made = options.implementation(arguments, setup.spec, attention, max(setup.shares))
    model = Decoder(setup.size(), setup.spec, attention, tokens=True, seed=seed, **made).to(device)
    if arguments.compile:
        for block in model.blocks:
            block.compile()
    config = {"attention": attention, **setup.to_dict()}
    trainer = Trainer(f"lm-{attention}-seed{seed}", arguments.out, config, model, setup.plan(), seed)
    trainer.record["parameters"], trainer.notes = parameters(model), {**made, "compile": arguments.compile}
    return trainer


def run(setup: Setup, trainer: Trainer, deadline: Deadline) -> bool:
    """Train, and measure at every length once it is done; False if the deadline came first."""
    model, steps, device = trainer.model, trainer.plan.steps, trainer.device

    def step_of(step: int, generator: torch.Generator) -> Step:
        length = setup.length_at(step, steps)
        each = max(1, setup.batch_tokens // length // len(setup.tasks))
        batches = [tasks.make(task, each, length, setup.vocabulary, generator) for task in setup.tasks]
        loss, _, right = loss_of(model, batches)
        return Step(loss, torch.stack([x.float().mean() for x in right]).mean(), each * len(batches) * length, length)

    def evaluate(step: int) -> dict[str, Any]:
        length = setup.length_at(step - 1, steps)
        return {"length": length, "tasks": measured(model, setup, length, setup.held_out, device)}

    if not trainer.train(step_of, evaluate, deadline):
        return False
    final = {str(n): trainer.evaluated(measured, model, setup, n, 4 * setup.held_out, device) for n in setup.shares}
    trainer.finish({"final": final, "chance": 1 / setup.vocabulary.values})
    return True


def main(argv: list[str] | None = None) -> int:
    parser = options.parser(__doc__, out="out/lm")
    parser.add_argument("--task", choices=("mixed", *tasks.TASKS), help="default: mixed; recall on a CPU")
    parser.add_argument("--length", type=int, help="of the last sequences (default 8192; 128 on a CPU)")
    parser.add_argument("--tokens", type=int, help="in all (default 80 million; 400 thousand on a CPU)")
    parser.add_argument("--batch-tokens", type=int, help="a step (default 32768; 1024 on a CPU)")
    arguments = parser.parse_args(argv)
    if arguments.plot:
        plots.language(records(arguments.out), arguments.plot)
        print(f"{arguments.plot} drawn")
        return 0
    setup, deadline = setup_of(arguments), Deadline(arguments.minutes)
    with deadline.signals():
        for seed in arguments.seeds:
            for attention in arguments.attention:
                trainer = trainer_of(setup, attention, seed, arguments)
                if trainer.begin(arguments.resume) and not run(setup, trainer, deadline):
                    print(f"\n{trainer.name}: cut after {trainer.step} of {trainer.plan.steps} steps; --resume goes on")
                    return 0
                print(summary(trainer.record))
    return 0


def summary(record: dict[str, Any]) -> str:
    """One line on a finished run: accuracy at the longest length, and tokens a second there."""
    length, found = max(record["result"]["final"].items(), key=lambda item: int(item[0]))
    shares = ", ".join(f"{task} {x['accuracy']:.1%} ± {x['standard_error']:.1%}" for task, x in found.items())
    rate = record["result"]["tokens_per_second"][length]
    return f"{record['name']}: {length} tokens: {shares} right (chance {record['result']['chance']:.1%}); {rate:,} tokens/s in training"


if __name__ == "__main__":
    sys.exit(main())
