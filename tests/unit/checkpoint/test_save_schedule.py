"""When a save is due, and what is the best."""

from __future__ import annotations

import math
from typing import Any

import pytest

from launcher.checkpoint.save_result import SaveResult
from launcher.config.parse import parse_config
from launcher.config.settings import RunConfig
from launcher.saving import save_schedule
from launcher.saving.save_schedule import SaveSchedule, crosses_epoch, is_better


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(save_schedule, "time", made)
    return made


def config(**checkpoint: Any) -> RunConfig:
    model = {"config": {"model_type": "llama"}}
    generator = {"_target_": "launcher.data.arithmetic.ArithmeticData"}
    metric = {"_target_": "launcher.data.arithmetic.ExactMatch"}
    evaluation = {"eval_strategy": "steps", "metric": metric}
    return parse_config(
        {"model": model, "data": {"generator": generator}, "eval": evaluation, "checkpoint": checkpoint}
    )


def due(schedule: SaveSchedule, steps: range) -> list[int]:
    return [step for step in steps if schedule.is_due(step, improved=False)]


def test_steps_and_epochs(clock: Clock) -> None:
    assert due(SaveSchedule(config(save_steps=4), 100), range(1, 13)) == [4, 8, 12]
    # 100 rows, 32 in a step: the ends of the epochs lie in steps 4 (row 100), 7 (200), 10 (300).
    assert due(SaveSchedule(config(save_strategy="epoch"), 100), range(1, 11)) == [4, 7, 10]
    assert due(SaveSchedule(config(save_strategy="no"), 100), range(1, 11)) == []
    best = SaveSchedule(config(save_strategy="best"), 100)
    assert due(best, range(1, 11)) == [] and best.is_due(3, improved=True)


def test_an_epoch_that_ends_with_a_step_is_crossed_once() -> None:
    assert [s for s in range(1, 9) if crosses_epoch(s, 10, 20)] == [2, 4, 6, 8]
    assert all(crosses_epoch(s, 10, 5) for s in range(1, 5))


def test_the_wall_clock_saves_beside_the_steps(clock: Clock) -> None:
    schedule = SaveSchedule(config(save_steps=1000, save_every_s=60.0), 100)
    assert not schedule.is_due(1, improved=False)
    clock.now += 60
    assert schedule.is_due(2, improved=False)
    schedule.started()
    assert not schedule.is_due(3, improved=False)


def test_auto_follows_young_and_daly_within_the_overhead(clock: Clock) -> None:
    schedule = SaveSchedule(config(save_steps="auto", mtbf_s=20000.0, max_overhead=0.01), 100)
    schedule.ended(SaveResult(1, stall_s=1.0))
    assert schedule.interval_s() == pytest.approx(math.sqrt(2 * 20000.0 * 1.0))  # 200 s; 1 % would allow 100 s
    schedule.ended(SaveResult(2, stall_s=16.0))
    assert schedule.interval_s() == pytest.approx(1600.0)  # 800 s would cost 2 %
    schedule.started()
    clock.now += 1599
    assert not schedule.is_due(3, improved=False)
    clock.now += 1
    assert schedule.is_due(4, improved=False)


def test_a_failed_save_is_repeated_at_once_and_then_every_half_minute(clock: Clock) -> None:
    schedule = SaveSchedule(config(save_steps=1000), 100)
    schedule.ended(SaveResult(5, 0.1, error="killed"))
    assert schedule.is_due(6, improved=False)
    schedule.started()
    assert not schedule.is_due(7, improved=False), "the repeated save is under way"
    schedule.ended(SaveResult(6, 0.1, error="killed"))
    assert not schedule.is_due(7, improved=False)
    clock.now += 30
    assert schedule.is_due(8, improved=False)
    schedule.ended(SaveResult(8, 0.1))
    assert not schedule.is_due(9, improved=False)


def test_a_save_without_room_is_due_as_soon_as_there_is(clock: Clock) -> None:
    schedule = SaveSchedule(config(save_steps=1000), 100)
    schedule.ended(SaveResult(5, 0.0, error="no room", found_no_room=True))
    assert schedule.is_waiting_for_room and not schedule.is_due(6, improved=False)
    schedule.ended(SaveResult(7, 0.1))
    assert not schedule.is_waiting_for_room


@pytest.mark.parametrize(
    ("metric", "greater", "values", "expected"),
    [
        ("loss", None, [2.0, 1.0, math.nan, 1.0, -math.inf, 0.5], [2.0, 1.0, 0.5]),
        ("exact_match", None, [0.1, 0.4, math.nan, math.inf, 0.4, 0.5], [0.1, 0.4, 0.5]),
        ("loss", True, [1.0, 2.0], [1.0, 2.0]),
    ],
)
def test_the_best_metric_in_either_direction(
    metric: str, greater: bool | None, values: list[float], expected: list[float]
) -> None:
    settings, best, found = config(metric_for_best_model=metric, greater_is_better=greater), None, []
    for value in values:
        if is_better(settings, value, best):
            best = value
            found.append(value)
    assert found == expected
