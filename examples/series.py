"""A long numeric series with a planted dependence, its split in time, and measures of a forecast that do not flatter it.

The series is a walk; what a model reads are its increments, what it forecasts is whether the next one is up. An increment's size is the
absolute value of a standard normal number, and its sign

* ``planted``: with probability ``copied`` that of the increment exactly ``lag`` steps back, otherwise a fair coin's. It agrees with it in
  ``(1 + copied) / 2`` of all steps, and nobody can forecast better. Nothing nearer says anything.
* ``control``: a fair coin's, so that nobody can forecast at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

KINDS = ("planted", "control")
#: Of all intervals, and so of what is said in words.
LEVEL = 0.99
RESAMPLES = 10_000


def increments(kind: str, steps: int, lag: int, copied: float, seed: int) -> Tensor:
    """``[steps]`` float32 increments."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, (steps,), generator=generator, dtype=torch.float32) * 2 - 1
    copies = torch.rand(steps, generator=generator) < copied
    if kind == "planted":
        for start in range(lag, steps, lag):
            end = min(start + lag, steps)
            sign[start:end] = torch.where(copies[start:end], sign[start - lag : end - lag], sign[start:end])
    return sign * torch.randn(steps, generator=generator).abs()


@dataclass(frozen=True)
class Split:
    """Training, validation and test: three pieces of time in this order, ``gap`` steps apart, so that none reads or copies another's."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def of(cls, series: Tensor, validation: int, test: int, gap: int) -> Split:
        """The last ``test`` steps, ``validation`` steps before them, and the rest, scaled by what the training piece is like."""
        end = len(series) - test - gap
        train = series[: end - validation - gap]
        mean, std = train.mean(), train.std()
        return cls(*((x - mean) / std for x in (train, series[end - validation : end], series[len(series) - test :])))


@dataclass(frozen=True)
class Windows:
    """How a piece is cut: ``context + scored`` steps are read, and the last ``scored`` of them forecast the step after."""

    context: int
    scored: int

    @property
    def length(self) -> int:
        return self.context + self.scored

    def starts(self, steps: int) -> Tensor:
        """Starts of windows whose scored steps are all different and follow each other through a piece of ``steps`` steps."""
        return torch.arange(0, steps - self.length, self.scored)

    def cut(self, piece: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B,context+scored,2]``, each increment and its sign, and whether the next one is up, float ``[B,scored]``."""
        window = piece[starts[:, None].to(piece.device) + torch.arange(self.length + 1, device=piece.device)]
        known = window[:, :-1]
        return torch.stack([known.clamp(-4, 4), known.sign()], 2), (window[:, self.context + 1 :] > 0).float()


# --- measures ----------------------------------------------------------------------------------------------------------------------


def measures(logits: Tensor, up: Tensor, base: float, seed: int = 0) -> dict[str, Any]:
    """How good forecasts are, with intervals at ``LEVEL``.

    Steps of one window are judged together: a window's mean is one sample, and intervals are percentiles over ``RESAMPLES`` draws of as
    many windows with replacement (block bootstrap). ``wilson`` takes every step for a sample of its own, which is right where hits are
    independent: on the control, where the next sign is independent of all that came before, the forecast included.

    Args:
        logits, up: ``[windows,scored]``, log-odds of up and what came.
        base: share of ups in training: the forecast of one who has seen nothing else.

    Returns:
        ``steps, windows``; ``accuracy``, ``log_loss`` (nats) and ``gain`` (log loss of the base rate less the forecast's), each with
        ``value``, ``low``, ``high``; ``accuracy`` also with ``wilson``; ``base`` with ``rate``, ``accuracy`` and ``log_loss``.
    """
    logits, up = logits.double().cpu(), up.double().cpu()
    hit = ((logits > 0) == (up > 0.5)).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, up, reduction="none")
    base_loss = -(up * math.log(base) + (1 - up) * math.log(1 - base))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(up), (RESAMPLES, len(up)), generator=generator)
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    found: dict[str, Any] = {"level": LEVEL, "steps": up.numel(), "windows": len(up)}
    for name, x in (("accuracy", hit), ("log_loss", loss), ("gain", base_loss - loss)):
        low, high = x.mean(1)[drawn].mean(1).quantile(edges).tolist()
        found[name] = {"value": x.mean().item(), "low": low, "high": high}
    found["accuracy"]["wilson"] = wilson(int(hit.sum()), hit.numel())
    right = up.mean().item() if base > 0.5 else 1 - up.mean().item()
    return found | {"base": {"rate": base, "accuracy": right, "log_loss": base_loss.mean().item()}}


def wilson(hits: int, of: int) -> list[float]:
    """Wilson's interval of a share at ``LEVEL`` (J. Am. Stat. Assoc. 22, 1927)."""
    z, share = NormalDist().inv_cdf((1 + LEVEL) / 2), hits / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return [(middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)]


def best(kind: str, copied: float) -> dict[str, float]:
    """Accuracy and log loss (nats) of one who knows how the series was made."""
    p = (1 + copied) / 2 if kind == "planted" else 0.5
    return {"accuracy": p, "log_loss": -p * math.log(p) - (0 if p == 1 else (1 - p) * math.log(1 - p))}


def verdict(kind: str, found: dict[str, Any]) -> str:
    """One sentence on whether the forecast did what it should: beat chance where there is something to find, and not where there is not."""
    accuracy, gain = found["accuracy"], found["gain"]
    low, high = accuracy["low"], accuracy["high"]
    share = f"{accuracy['value']:.2%} of {found['steps']} steps right, {found['level']:.0%} interval {low:.2%} to {high:.2%}"
    if kind == "control":
        inside = low <= 0.5 <= high
        return f"control {'at chance, as it must be' if inside else 'NOT at chance'}: {share}, 50% {'inside' if inside else 'outside'}"
    above = low > max(0.5, found["base"]["accuracy"]) and gain["low"] > 0
    better = f"log loss {gain['value']:+.4f} nats better than the base rate's"
    return f"planted dependence {'found' if above else 'NOT found'}: {share}, {better}"
