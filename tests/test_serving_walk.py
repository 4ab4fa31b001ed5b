"""benchmarks/serving_walk.py: a short walk finds nothing in the cache as it is, and finds what is broken in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradient_cases import DEVICE, runs
from test_serving import FEW

import nsa_gen
from benchmarks import serving_walk
from nsa_gen.pages import Change, Pages

#: Steps that are fast in the interpreter, and those that attend.
CHEAP = {"create": 2, "prompt": 4, "fork": 4, "truncate": 2, "free": 1}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch):
    sized(monkeypatch)
    with nsa_gen.override(*(FEW if DEVICE == "cpu" else ())):
        yield


def sized(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Have walks be small on a GPU too, and otherwise as ``changes`` say."""
    for name in ("SMALL", "LARGE"):
        monkeypatch.setattr(serving_walk, name, replace(serving_walk.SMALL, **changes))


@runs
@pytest.mark.parametrize(("kv", "seed"), [("shared", 16), ("per_branch", 11)])
def test_nothing_is_wrong(kv, seed):
    found = serving_walk.walk(kv, "float32", 45, seed, DEVICE)
    assert found["steps"] == 45 and found["out_of_pages"] and found["longest"] > 60
    assert found["decodes"] and found["prefills"] and found["queries"] > found["undecided"]
    assert 0 < found["worst"] < 1e-5


def _copies_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = Pages.extend
    monkeypatch.setattr(Pages, "extend", lambda self, more: Change(extend(self, more).entries, []))


def _shared_pages_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Pages._plans
    monkeypatch.setattr(Pages, "_plans", lambda self, more: [(s, [(new, []) for new, _ in plan]) for s, plan in plans(self, more)])


def _a_page_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Pages.drop

    def lossy(self: Pages, sequences: Any) -> None:
        drop(self, sequences)
        self._free.pop()

    monkeypatch.setattr(Pages, "drop", lossy)


def _truncating_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    truncate = Pages.truncate
    monkeypatch.setattr(Pages, "truncate", lambda self, s, n: truncate(self, s, max(n - 1, 0)))


def _the_device_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa_gen.PagedKVCache, "truncate", lambda self, s, n: self._pages.truncate(s, n))


def _sequences_are_extended_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = Pages.extend

    def greedy(self: Pages, more: Any) -> Change:
        made = [extend(self, {s: n}) for s, n in more.items()]
        return Change([e for change in made for e in change.entries], [c for change in made for c in change.copies])

    monkeypatch.setattr(Pages, "extend", greedy)


def _a_refusal_writes_into_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    append = nsa_gen.PagedKVCache.append

    def careless(self: nsa_gen.PagedKVCache, *given: Any) -> None:
        try:
            append(self, *given)
        except nsa_gen.NSAError:
            self.tables[0, 0, 0] += 1
            raise

    monkeypatch.setattr(nsa_gen.PagedKVCache, "append", careless)


@runs
@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (_copies_are_skipped, "of stream .*: first differs"),
        (_shared_pages_are_written, "pages_needed says"),
        (_a_page_is_lost, "pages are free"),
        (_truncating_is_off_by_one, "lengths on the host"),
        (_the_device_is_not_told, "lengths on the device"),
        (_sequences_are_extended_one_by_one, "OutOfPages was raised, and something has changed"),
        (_a_refusal_writes_into_a_table, "was raised, and something has changed"),
    ],
)
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
def test_what_is_broken_is_found(kv: str, broken: Callable[[pytest.MonkeyPatch], None], why: str, monkeypatch: pytest.MonkeyPatch):
    sized(monkeypatch, weights=CHEAP)
    broken(monkeypatch)
    with pytest.raises(AssertionError, match=rf"{kv}, float32, seed 1: step \d+, \w+: .*{why}"):
        serving_walk.walk(kv, "float32", 200, 1, DEVICE)


def _misses_the_last_token(q: torch.Tensor, *gates: torch.Tensor, cache: nsa_gen.PagedKVCache, **how: Any) -> torch.Tensor:
    lengths = cache.lengths.clone()
    cache.lengths.copy_((lengths - 1).clamp(min=q.shape[1] if q.dim() == 4 else 1))
    o = nsa_gen.nsa_decode(q, *gates, cache=cache, **how)
    cache.lengths.copy_(lengths)
    return o


def _leaves_a_counter(*given: torch.Tensor, cache: nsa_gen.PagedKVCache, **how: Any) -> torch.Tensor:
    o = nsa_gen.nsa_decode(*given, cache=cache, **how)
    cache.arrived[-1] = 1
    return o


def _swaps_branches(q: torch.Tensor, *gates: torch.Tensor, **how: Any) -> torch.Tensor:
    return nsa_gen.nsa_prefill(q, *reversed(gates), **how)


@runs
@pytest.mark.parametrize(
    ("name", "broken", "why"),
    [
        ("decode", _misses_the_last_token, "new tokens by length: o: max_abs"),
        ("decode", _leaves_a_counter, "arrived is not 0 again"),
        ("prefill", _swaps_branches, "new tokens by length: o: max_abs"),
    ],
)
def test_wrong_attention_is_found(name: str, broken: Any, why: str, monkeypatch: pytest.MonkeyPatch):
    sized(monkeypatch, weights={"create": 1, "prompt": 2, name: 1})
    monkeypatch.setattr(serving_walk, f"nsa_{name}", broken)
    with pytest.raises(AssertionError, match=rf"step \d+, {name}: .*{why}"):
        serving_walk.walk("shared", "float32", 60, 0, DEVICE)
