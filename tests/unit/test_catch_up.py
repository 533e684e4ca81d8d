"""A request to stop leaves an evaluation out; the next start makes up for it, and the best stays the same."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.base.paths import RunPaths
from launcher.config.settings import RunConfig
from launcher.saving.log_history import LogHistory
from launcher.saving.save_schedule import SaveSchedule
from launcher.saving.saver import Saver
from launcher.saving.training_state import ProgressState
from launcher.train import loop
from launcher.train.evaluation import Evaluator
from launcher.train.recorder import NoRecorder
from launcher.train.step import StepSums

EVALUATIONS: list[int] = []


class CountedEvaluator(Evaluator):
    samples: tuple[()] = ()

    def __init__(self, config: RunConfig, state: Any) -> None:
        self._config, self._total_steps, self._state = config, 100, state
        self._data: Any = SimpleNamespace(eval=[1], train=[1] * 64)
        self.notices = []

    def evaluate(self) -> dict[str, float]:
        EVALUATIONS.append(self._state.step)
        return {"eval_loss": 2.0}


def run_at(step: int, history: list[dict[str, Any]]) -> Any:
    EVALUATIONS.clear()
    config = RunConfig()
    config.eval.eval_strategy, config.eval.eval_steps, config.checkpoint.save_steps = "steps", 5, 10
    progress = ProgressState(step=step, best_metric=3.0, best_step=10, log_history=LogHistory(history))
    state: Any = SimpleNamespace(progress=progress, step=step)
    unused: Any = None
    saver = Saver(
        config, RunPaths(unused), unused, state, unused, unused, lock=unused, schedule=SaveSchedule(config, 64),
        outlet=NoRecorder(), hub=unused, alive=unused, is_stopping=unused, is_judged_later=unused, total_steps=100,
        saved_step=step,
    )  # fmt: skip
    return SimpleNamespace(
        config=config, step=step, total_steps=100, state=state, evaluator=CountedEvaluator(config, state), saver=saver,
        window=loop.Window(), recorder=NoRecorder(), last_step_s=0.0, last_eval_s=0.0,
        background=SimpleNamespace(is_on=False, begin=lambda: None, num_judged=lambda: 0),
        train_step=SimpleNamespace(schedule=SimpleNamespace(evaluated=lambda metric: None)),
    )  # fmt: skip


def test_evaluation_is_made_up_for_when_a_stop_left_it_out() -> None:
    run = run_at(20, [{"step": 20, "loss": 1.0}])
    loop.catch_up(run)
    assert EVALUATIONS == [20]
    assert (run.state.progress.best_metric, run.state.progress.best_step) == (2.0, 20)


def test_nothing_is_evaluated_twice_when_the_line_is_there() -> None:
    loop.catch_up(run_at(20, [{"step": 20, "loss": 1.0}, {"step": 20, "eval_loss": 2.0}]))
    assert EVALUATIONS == []


@pytest.mark.parametrize("step", [0, 23])
def test_nothing_is_evaluated_when_none_is_due(step: int) -> None:
    loop.catch_up(run_at(step, []))
    assert EVALUATIONS == []


def test_checkpoint_of_a_stop_is_not_the_best_when_an_undisturbed_run_has_none_there() -> None:
    run = run_at(15, [])
    run.saver.evaluated(1.0)
    run.saver.made_up_for()
    assert run.state.progress.best_step == 10
    run.config.checkpoint.save_every_s = 60.0
    run.saver.made_up_for()
    assert run.state.progress.best_step == 15


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class LiveRun(SimpleNamespace):
    @property
    def step(self) -> int:
        return int(self.state.progress.step)


def trained(clock: Clock, progress: ProgressState, num_steps: int, step_s: float) -> ProgressState:
    """The progress after steps that take so long, with the evaluations that are due by the clock (every minute)."""
    run = LiveRun(**{key: value for key, value in vars(run_at(progress.step, [])).items() if key != "step"})
    run.config.eval.eval_steps, run.config.eval.eval_every_s = 1000, 60.0
    run.state.progress = progress
    sums = StepSums(1.0, 0.0, 8, 8, 1.0, is_applied=True)

    def step(number: int, spike_limit: float | None) -> Any:
        clock.now += step_s
        return sums

    run.train_step = SimpleNamespace(
        run=step,
        update=lambda sums: None,
        epoch_after=lambda step: step / 100,
        schedule=SimpleNamespace(evaluated=lambda metric: None),
    )
    run.spikes = SimpleNamespace(limit=None, is_left_out=lambda step: False, applied=lambda loss: None)
    run.processes = SimpleNamespace(is_main=True, begin_sum=lambda values: lambda: values)
    run.stop = SimpleNamespace(knows_end=False, votes=lambda save_s, step_s: (0, 0))
    run.saver._processes = run.processes
    run.saver.checkpointer = SimpleNamespace(status=lambda: (0, 0))
    loop.catch_up(run)
    for _ in range(num_steps):
        agreed = loop.train(run)
        run.state.step = progress.step
        loop.maybe_evaluate(run, by_clock=agreed.is_eval_due)
    return progress


@pytest.mark.parametrize("num_starts", [1, 2, 3, 6])
def test_evaluation_by_the_clock_comes_at_the_same_step_when_the_run_was_stopped_within_the_interval(
    monkeypatch: pytest.MonkeyPatch, num_starts: int
) -> None:
    """Starts of less than an interval add up; the hours between them do not count."""
    clock, evaluated = Clock(), list[int]()
    monkeypatch.setattr(loop, "time", clock)
    progress = ProgressState(step=1, log_history=LogHistory([{"step": 1, "eval_loss": 3.0}]))
    for _ in range(num_starts):
        history = progress.log_history.written_with({"epoch": 1.0})  # both as a checkpoint holds them
        stored = json.loads(json.dumps({**vars(progress), "log_history": None}))
        stored["log_history"] = LogHistory.read(history)
        progress = trained(clock, ProgressState(**stored), 18 // num_starts, 10.0)
        evaluated += EVALUATIONS
        clock.now += 7200.0
    assert evaluated == [7, 13, 19]
    assert progress.seconds_since_eval == 0.0 and progress.step == 19


def test_evaluation_by_the_clock_comes_after_the_next_step_when_a_stop_left_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    history = LogHistory([{"step": 1, "eval_loss": 3.0}])
    trained(clock, ProgressState(step=7, seconds_since_eval=60.0, log_history=history), 2, 10.0)
    assert EVALUATIONS == [8]
