"""Which loss is a spike, and what is known of earlier rollbacks; the rest is tests/distributed/test_spikes.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launcher.base.paths import RunPaths
from launcher.checkpoint.resume import ResumePoint
from launcher.checkpoint.retention import expired_steps
from launcher.cli.report.goodput import LOST, work_out
from launcher.config.compose import compose
from launcher.config.rules import contradictions
from launcher.config.settings import TrainConfig
from launcher.saving.save_schedule import SaveSchedule
from launcher.train.spikes import idle_settings, known_rollbacks, limit

_TRAIN = TrainConfig(spike_window=5, spike_threshold=6.0)


def test_nothing_is_a_spike_when_there_are_too_few_losses_to_compare_with() -> None:
    assert limit([2.0] * 4, _TRAIN) == math.inf
    assert limit([2.0] * 5, _TRAIN) < 10


def test_the_limit_follows_the_spread_of_the_losses_when_they_vary() -> None:
    assert limit([1.8, 1.9, 2.0, 2.1, 2.2], _TRAIN) == pytest.approx(2 + 6 * 1.4826 * 0.1)
    assert limit([1.9, 1.9, 2.0, 2.1, 90.0], _TRAIN) < 3, "one loss of the past does not move it"


def test_a_loss_is_no_spike_when_it_differs_by_little_from_losses_that_are_all_the_same() -> None:
    assert limit([2.0] * 5, _TRAIN) == pytest.approx(2.6)
    assert limit([0.0] * 5, _TRAIN) == 0


@pytest.mark.parametrize(
    "setting", ["checkpoint=off", "checkpoint.save_only_model=true"]
)  # fmt: skip
def test_a_rollback_is_refused_when_there_is_nothing_to_go_back_to(setting: str) -> None:
    config = compose(["data=arithmetic", "train.on_spike=skip", setting])
    assert contradictions(config) == []
    config.train.on_spike = "rollback"
    assert any("train.on_spike=rollback" in problem for problem in contradictions(config))


def test_the_checkpoint_to_go_back_to_stays_when_retention_deletes() -> None:
    assert expired_steps([10, 20, 30, 40], 1, 20, [30]) == [10]
    assert expired_steps([10, 20, 30, 40], 1, None) == [10, 20, 30]
    assert expired_steps([10, 20, 30, 40], 3, 40, [10]) == [20]


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (("checkpoint.save_steps=10",), 10), (("checkpoint.save_strategy=epoch",), 4),
        (("checkpoint.save_every_s=60",), 1), (("checkpoint.save_steps=auto",), 1),
    ],
)  # fmt: skip
def test_a_checkpoint_counts_when_an_undisturbed_run_makes_it(settings: tuple[str, ...], first: int) -> None:
    schedule = SaveSchedule(compose(["data=arithmetic", "train.train_batch_size=8", *settings]), num_rows=30)
    assert [schedule.has_regular(step) for step in (first - 1, first, first + 1)] == [False, True, True]


def _point(paths: RunPaths, step: int, left_out: list[list[int]]) -> ResumePoint:
    return ResumePoint(paths.root / f"checkpoint-{step}", step, {"progress": {"left_out": left_out}})


def test_a_start_knows_of_the_rollbacks_of_its_own_past_and_of_what_comes_when_it_goes_on(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    early, late = ({"step": s, "to": s - 4, "left_out": [s - 1, s]} for s in (11, 31))
    nonsense: list[Any] = [
        None,
        {},
        {"to": 1, "left_out": [3]},
        {"to": 1, "left_out": [5, 3]},
        {"to": "a", "left_out": [1, 2]},
    ]
    paths.run_state.write_text(json.dumps({"rollbacks": [early, late, *nonsense]}))
    assert known_rollbacks(paths, _point(paths, 8, [])) == [early, late]
    assert known_rollbacks(paths, _point(paths, 28, [[10, 11]])) == [early, late]
    assert known_rollbacks(paths, _point(paths, 32, [[10, 11]])) == [early]
    assert known_rollbacks(paths, _point(paths, 32, [])) == [], "a checkpoint of a life in which there was none"
    assert known_rollbacks(paths, None) == []
    assert known_rollbacks(paths, _point(RunPaths(tmp_path / "other"), 8, [])) == []
    paths.run_state.write_text('{"rollbacks": 7}')
    assert known_rollbacks(paths, _point(paths, 8, [])) == []


def test_the_time_of_steps_that_a_rollback_undid_is_lost_when_it_is_added_up() -> None:
    lines: list[dict[str, Any]] = [
        {"event": "start", "t": 0, "attempt": "a"}, {"event": "begin", "t": 10, "step": 0},
        *({"event": "progress", "t": 10 + step, "step": step} for step in range(1, 11)),
        {"event": "rollback", "t": 21, "step": 8}, {"event": "undone", "t": 21, "losses": [[9, 2.0], [10, 2.0]]},
        *({"event": "progress", "t": 21 + step - 8, "step": step} for step in range(9, 13)),
        {"event": "end", "t": 25, "state": "finished"},
        {"event": "ended", "t": 26, "attempt": "a", "state": "finished"},
    ]  # fmt: skip
    found = work_out(lines)
    assert found is not None
    assert found.wall_s == 26
    assert sum(segment.end - segment.start for segment in found.segments) == pytest.approx(26)
    assert found.total_s(LOST) == pytest.approx(3)
    assert (found.num_kills, found.num_retrained) == (0, 2)
    assert [mark.kind for mark in found.marks] == ["rollback", "finish"]


def test_settings_of_spikes_are_not_compared_when_neither_start_uses_them() -> None:
    numbers = ["train.spike_threshold", "train.spike_window"]
    off, skip, rollback = ({"train.on_spike": what} for what in ("off", "skip", "rollback"))
    assert idle_settings(off, off) == ["train.spike_rollback_steps", *numbers]
    assert idle_settings({}, off) == ["train.spike_rollback_steps", *numbers], "a checkpoint of before there were any"
    assert idle_settings(skip, skip) == ["train.spike_rollback_steps"]
    assert idle_settings(off, skip) == ["train.spike_rollback_steps"]
    assert idle_settings(rollback, off) == []
