"""What a save costs the training: all the time for which steps waited for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.base.paths import RunPaths
from launcher.checkpoint.engine import Phase
from launcher.checkpoint.save_result import SaveResult
from launcher.config.settings import RunConfig
from launcher.saving.save_schedule import SaveSchedule
from launcher.saving.saver import Saver
from launcher.train.metrics import MetricsFile

_CALL_S, _WRITE_S = 0.01, 0.3


class Clock:
    """Of the saver: a machine that is busy with something else takes no part in what is counted."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class SlowDisk:
    """A checkpointer whose call is short and whose writer takes long."""

    def __init__(self, clock: Clock) -> None:
        self.phase, self._clock = Phase.IDLE, clock
        self._step, self.undeleted = 0, None
        self.plan = SimpleNamespace(total_bytes=1000)
        self.stall_s = self.copies_in_wait_s = 0.0

    def save(self, step: int) -> None:
        self.phase, self._step, self.stall_s = Phase.WRITING, step, _CALL_S

    def wait(self, on_wait: Callable[[], None], is_urgent: Callable[[], bool]) -> SaveResult | None:
        if self.phase is Phase.IDLE:
            return None
        self._clock.now += _WRITE_S
        self.phase = Phase.IDLE
        return SaveResult(self._step, _CALL_S + self.copies_in_wait_s, _WRITE_S, 1000)

    def needed_bytes(self) -> int:
        return 1000

    def expire(self, *folders: Any) -> None: ...


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Saver, SaveSchedule, Any, MetricsFile, RunConfig]:
    config, state = RunConfig(), SimpleNamespace(step=0, progress=SimpleNamespace(best_metric=None, best_step=None))
    config.checkpoint.save_steps = "auto"
    config.train.on_spike = "off"
    clock = Clock()
    monkeypatch.setattr("launcher.saving.saver.time", clock)
    disk, schedule, metrics = SlowDisk(clock), SaveSchedule(config, 64), MetricsFile(tmp_path / "metrics.jsonl")
    alone: Any = SimpleNamespace(is_main=True, on_main=lambda action: action())
    unused: Any = SimpleNamespace(
        check=lambda: None, held_names=(), pending_dirs=(), checkpoint_committed=lambda *_: None, saved=metrics.append
    )
    saver = Saver(
        config, RunPaths(tmp_path), alone, state, disk, lambda _: disk.save(state.step), lock=unused,  # type: ignore[arg-type]
        schedule=schedule, outlet=unused, hub=unused, alive=lambda: None, is_stopping=lambda: False,
        is_judged_later=lambda _: False, total_steps=100, saved_step=0,
    )  # fmt: skip
    return saver, schedule, state, metrics, config


def test_stall_holds_the_whole_write_when_it_is_not_in_the_background(parts: Any) -> None:
    saver, schedule, state, metrics, config = parts
    config.checkpoint.async_save = False
    state.step = 1
    saver.save()
    assert metrics.last("save_stall_s") >= _CALL_S + _WRITE_S
    assert schedule.interval_s() >= math.sqrt(2 * config.checkpoint.mtbf_s * _WRITE_S)


def test_stall_holds_the_wait_of_the_save_that_comes_too_early(parts: Any) -> None:
    saver, schedule, state, metrics, config = parts
    for state.step in (1, 2):
        saver.save()
    assert metrics.last("step") == 1 and metrics.last("save_stall_s") >= _CALL_S + _WRITE_S
    assert schedule.interval_s() >= math.sqrt(2 * config.checkpoint.mtbf_s * _WRITE_S)


def test_copies_that_end_in_the_wait_count_once(parts: Any) -> None:
    saver, _, state, metrics, config = parts
    config.checkpoint.async_save, saver.checkpointer.copies_in_wait_s = False, _WRITE_S
    state.step = 1
    saver.save()
    assert _CALL_S + _WRITE_S <= metrics.last("save_stall_s") < _CALL_S + 2 * _WRITE_S


def test_stall_is_without_the_wait_at_the_end_of_the_training(parts: Any) -> None:
    saver, _, state, metrics, _ = parts
    state.step = 100
    saver.save_and_wait()
    assert metrics.last("save_stall_s") == _CALL_S
