from __future__ import annotations

import machine
import optuna
import pytest

from nsa_gen import space
from nsa_gen.config import Config
from nsa_gen.errors import TuneError
from nsa_gen.space import Knob, Space
from nsa_gen.tune.records import Point
from nsa_gen.tune.study import Study, legal

POINT = Point(65536)
WIDE = Space(
    tuple(Knob(f"K{i}", (1, 2, 4, 8)) for i in range(5)),
    {"": lambda p: {f"K{i}": 1 for i in range(5)}},
    lambda p: {f"K{i}": 1 for i in range(5)},
)


def drive(study, time_of, fails=lambda config: False):
    asked = []
    while (config := study.ask()) is not None:
        asked.append(config)
        study.tell(config, None if fails(config) else time_of(config))
    return asked


def milliseconds(config):
    return machine.milliseconds(config, POINT)


def test_a_small_space_is_walked_whole_given_ones_first():
    first = [machine.config(), machine.config(BLOCK_M=128)]
    study = Study(machine.PROBLEM, "x", first=first, trials=100)
    asked = drive(study, milliseconds)
    everything = list(space.candidates(machine.PROBLEM))
    assert asked[:2] == first
    assert len(asked) == len(set(asked)) == len(everything) == study.target
    best = min(everything, key=milliseconds)
    assert study.best == (best, milliseconds(best))
    assert study.top(3) == sorted(everything, key=milliseconds)[:3]


@pytest.mark.parametrize("seed", range(3))
def test_no_config_twice_none_illegal_and_the_best_is_near(seed):
    study = Study(machine.PROBLEM, "x", first=[machine.config()], trials=18, seed=seed)
    asked = drive(study, milliseconds)
    assert len(asked) == len(set(asked)) == 18
    for config in asked:
        space.check(machine.PROBLEM, config)
    assert study.best[1] <= 1.25 * min(map(milliseconds, space.candidates(machine.PROBLEM)))


def test_a_large_space_is_searched_better_than_by_chance(monkeypatch):
    monkeypatch.setitem(space.SPACES, machine.KERNEL, WIDE)

    def time_of(config):
        return 1.0 + sum(abs(value.bit_length() - 3) for _, value in config.values)  # the best is all fours: 1.0

    assert space.size(machine.PROBLEM) == 1024
    bests = []
    for seed in range(3):
        study = Study(machine.PROBLEM, "x", trials=60, seed=seed)
        drive(study, time_of)
        bests.append(study.best[1])
    assert sorted(bests)[1] <= 2.0  # 60 random draws reach that in fewer than one run in three


def test_a_space_of_millions_is_not_listed(monkeypatch):
    knobs = tuple(Knob(f"K{i}", tuple(range(10))) for i in range(9))
    monkeypatch.setitem(
        space.SPACES, machine.KERNEL, Space(knobs, {}, lambda p: {}, lambda p, c: "odd" if sum(c.as_dict().values()) % 2 else None)
    )
    study = Study(machine.PROBLEM, "x", trials=20)
    asked = drive(study, lambda config: 1.0 + config.K0)
    assert len(asked) == len(set(asked)) == 20
    for config in asked:
        space.check(machine.PROBLEM, config)


def test_failures_are_not_the_best_and_the_study_goes_on():
    study = Study(machine.PROBLEM, "x", trials=100)
    asked = drive(study, milliseconds, fails=lambda config: config.loop == "split")
    assert len(asked) == study.target
    assert study.best[0].loop == "flat"
    none = Study(machine.PROBLEM, "y", trials=9)
    assert len(drive(none, milliseconds, fails=lambda config: True)) == 9 and none.best is None and none.top(2) == []


def test_known_results_are_taken_over_and_not_asked_again():
    known = {config: milliseconds(config) for config in list(space.candidates(machine.PROBLEM))[:20]}
    known[next(iter(known))] = None
    known[Config.of(machine.KERNEL, {"loop": "gone"})] = 0.001  # left the space since
    study = Study(machine.PROBLEM, "x", trials=25, known=known.items())
    asked = drive(study, milliseconds)
    assert len(asked) == 5 and not set(asked) & set(known)
    assert study.best[1] > 0.001


def test_several_asked_at_once_are_distinct_and_can_be_given_back():
    study = Study(machine.PROBLEM, "x", trials=12)
    asked = [study.ask() for _ in range(12)]
    assert len(set(asked)) == 12 == study.running and study.ask() is None
    study.abandon()
    assert study.running == 0 and study.ask() is not None


def test_two_tuners_share_a_study_through_optunas_storage(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    one, two = (Study(machine.PROBLEM, "x", trials=20, storage=storage, seed=seed) for seed in (1, 2))
    asked = []
    while (config := (one, two)[len(asked) % 2].ask()) is not None:
        asked.append(config)
        (one, two)[(len(asked) - 1) % 2].tell(config, milliseconds(config))
    assert len(asked) == len(set(asked)) == 20
    one.ask()
    two.ask()
    assert one.best == two.best
    names = optuna.get_all_study_names(storage)
    assert len(names) == 1 and machine.PROBLEM.digest in names[0]


def test_a_storage_that_cannot_be_opened_is_told():
    with pytest.raises(TuneError, match="cannot open the study"):
        Study(machine.PROBLEM, "x", trials=3, storage="sqlite:////nonexistent/folder/study.db")


def test_legal_drops_what_left_the_space():
    assert legal(machine.PROBLEM, [None, machine.config(), Config.of(machine.KERNEL, {"a": 1}), machine.config()]) == [machine.config()]
