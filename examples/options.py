"""The command line that the scripts share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from examples.model import ATTENTIONS, SDPA, working_backend
from nsa_gen import Spec


def base(description: str | None, out: str) -> argparse.ArgumentParser:
    """Options of every script."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--attention", type=_attentions, default=ATTENTIONS, help="nsa,full (default), nsa or full")
    made.add_argument("--seeds", type=_numbers, default=[0], help="of weights and data, e.g. 0,1,2 (default 0)")
    made.add_argument("--out", type=Path, default=Path(out), help=f"folder of the files that are written (default {out})")
    made.add_argument("--plot", type=Path, metavar="FILE", help="run nothing: draw the JSON files in --out (.png, .svg, .pdf)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--small", action="store_true", help="sizes for a CPU, which takes them in any case")
    made.add_argument("--spec", help="heads and geometry: a name or a file")
    made.add_argument("--width", type=int)
    made.add_argument("--layers", type=int)
    return made


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """Options of every training script."""
    made = base(description, out)
    made.add_argument("--minutes", type=float, help="stop after so many, with a checkpoint")
    made.add_argument("--resume", action="store_true", help="go on from checkpoints in --out, past finished runs")
    made.add_argument("--lr", type=float)
    made.add_argument("--sdpa", choices=tuple(SDPA), help="full attention's kernels on a GPU (default: the first of these that works)")
    made.add_argument("--compile", action="store_true", help="torch.compile each block")
    return made


def small(arguments: argparse.Namespace) -> bool:
    """Whether sizes are those for a CPU."""
    return arguments.small or not arguments.device.startswith("cuda")


def implementation(arguments: argparse.Namespace, spec: Spec, attention: str, seqlen: int) -> dict[str, Any]:
    """``implementation`` and ``backend`` of a ``Decoder`` on the device of the command line."""
    cuda = arguments.device.startswith("cuda")
    if attention == "nsa" or not cuda:
        return {"implementation": "kernels" if cuda else "reference", "backend": None}
    return {"implementation": "kernels", "backend": working_backend(spec, seqlen, [arguments.sdpa] if arguments.sdpa else list(SDPA))}


def _attentions(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(ATTENTIONS):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: {', '.join(ATTENTIONS)}, or several with commas")
    return found


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
