"""``python -m nsa_gen.tune``: every option of :func:`nsa_gen.tune.run` for scripts; people use ``nsa-gen tune``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .. import console
from ..errors import NSAError


def _seconds(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    return float(text[:-1]) * unit if unit else float(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nsa_gen.tune", description=__doc__)
    parser.add_argument("specs", nargs="+", metavar="SPEC")
    parser.add_argument("--kernels", type=lambda text: text.split(","), help="comma-separated")
    parser.add_argument("--shapes", "--seqlen", action="append", help="e.g. 8k,64k,8x4k (batch x length)")
    parser.add_argument("--trials", type=int, default=64, help="configs a problem")
    parser.add_argument("--budget", type=_seconds, help="for everything: 90s, 5m, 2h")
    parser.add_argument("--out", type=Path, help="folder of tables (default: the user's cache)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--varlen", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--decode", action="store_true", help="the kernels that serve from a KV cache")
    parser.add_argument("--kv-dtype", help="with --decode: what the cache stores (default: the spec's dtype)")
    parser.add_argument("--page-size", type=int, help="with --decode: rows a page (default: 64)")
    parser.add_argument("--tokens", type=int, help="with --decode: new tokens of a sequence a step (default: 1)")
    parser.add_argument("--storage", help="Optuna storage URL several tuners share")
    parser.add_argument("--log", type=Path, help="trial log (default: in the cache)")
    parser.add_argument("--workers", type=int, help="compile processes")
    parser.add_argument("--gpus", type=lambda text: [int(i) for i in text.split(",")], default=[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deadline", type=_seconds, default=30.0, help="for one evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args(argv)

    from .drive import run

    try:
        summary = run(
            args.specs,
            kernels=args.kernels,
            shapes=console.shapes(args.shapes) or None,
            trials=args.trials,
            budget_s=args.budget,
            out=args.out,
            resume=args.resume,
            progress=not args.quiet,
            varlen=args.varlen,
            deterministic=args.deterministic,
            decode=args.decode,
            kv_dtype=args.kv_dtype,
            page_size=args.page_size,
            tokens=args.tokens,
            storage=args.storage,
            log=args.log,
            workers=args.workers,
            gpus=args.gpus,
            rounds=args.rounds,
            deadline_s=args.deadline,
            seed=args.seed,
        )
    except NSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary.to_dict(), indent=1, sort_keys=True) if args.json else summary.to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
