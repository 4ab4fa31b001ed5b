"""A machine that does not exist: a Backend whose times come from a formula and whose faults are chosen by config."""

from __future__ import annotations

import os
import signal
import time

from nsa_gen.config import Config, Problem
from nsa_gen.device import from_name
from nsa_gen.space import Knob, Space
from nsa_gen.tune.backend import Final, Identity
from nsa_gen.tune.records import Built, Failure, Measured, Point

KERNEL = "sliding_attention_fwd"
KEY = {"dtype": "bfloat16", "group": 16, "head_dim_qk": 128, "head_dim_v": 128, "window": 512, "varlen": False}
PROBLEM = Problem.of(KERNEL, KEY)
DEVICE = from_name("nvidia-h200")
ENVIRONMENT = {"device": "NVIDIA H200", "driver": "1", "python": "3.12", "torch": "2.13", "triton": "3.7"}

KNOBS = (
    Knob("loop", ("flat", "split")),
    Knob("BLOCK_M", (32, 64, 128)),
    Knob("num_stages", (1, 2, 3)),
    Knob("CHUNK", (256, 512, 1024), {"loop": ("split",)}),
)


def default(problem: Problem) -> dict:
    return {"loop": "flat", "BLOCK_M": 32, "num_stages": 1}


def illegal(problem: Problem, config: Config) -> str | None:
    return "no such tile" if config.loop == "split" and config.BLOCK_M == 32 else None


SPACE = Space(KNOBS, {"": default}, lambda p: {"loop": "flat", "BLOCK_M": 32, "num_stages": 2}, illegal)


def config(**changes: object) -> Config:
    return Config.of(KERNEL, {**default(PROBLEM), **changes})


def milliseconds(config: Config, point: Point) -> float:
    """Short sequences like ``flat`` with 64 rows, long ones ``split`` with chunks of 512."""
    values = config.as_dict()
    per_token = {32: 1.0, 64: 0.7, 128: 0.8}[values["BLOCK_M"]] * {1: 1.0, 2: 0.95, 3: 1.1}[values["num_stages"]]
    if values["loop"] == "split":
        per_token *= {256: 0.9, 512: 0.6, 1024: 0.8}[values["CHUNK"]]
        return 0.02 + per_token * point.seqlen / 2**16
    return per_token * point.seqlen / 2**16


class Machine:
    """``faults`` maps a config to what it does at ``evaluate``; ``slow_s`` is slept on every evaluation."""

    def __init__(self, device=None, index=0, *, faults=None, slow_s=0.0, version="1", model=milliseconds):
        self.faults, self.slow_s, self.version, self.model = faults or {}, slow_s, version, model
        self.calls: list[tuple] = []

    def digest(self, problem, config):
        return f"{config.digest}-{self.version}"

    def identify(self):
        return Identity(DEVICE, ENVIRONMENT)

    def compile(self, problem, config, point):
        self.calls.append(("compile", config))
        fault = self.faults.get(config)
        if fault == "compiler crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "compile":
            return Failure("compile", "refused")
        shared = 300_000 if fault == "shared" else 1024
        return Built(self.digest(problem, config), shared, 128, 4096 if fault == "spills" else 0)

    def _fail(self, config):
        fault = self.faults.get(config)
        if fault == "hang":
            time.sleep(3600)
        if fault == "crash":
            os._exit(7)
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raise":
            raise RuntimeError("something odd\nwith a second line")
        if fault in ("wrong", "illegal_access", "memory"):
            return Failure(fault, f"made to fail: {fault}")
        return None

    def evaluate(self, problem, config, point, best_ms):
        self.calls.append(("evaluate", config, point))
        time.sleep(self.slow_s)
        failure = self._fail(config)
        if failure:
            return failure
        ms = self.model(config, point)
        return Measured(ms, 0.01, 1e-3, best_ms is not None and ms > 1.3 * best_ms)

    def final(self, problem, configs, point, rounds):
        self.calls.append(("final", tuple(configs), point))
        samples, errors = [], []
        for config in configs:
            failure = self._fail(config)
            if failure and failure.fatal:
                return failure
            ms = self.model(config, point)
            samples.append(failure or tuple(ms * (1 + 0.002 * ((7 * r) % 5 - 2)) for r in range(rounds)))
            errors.append(0.0 if failure else 1e-3)
        return Final(tuple(samples), tuple(errors))
