"""A request to stop leaves an evaluation out; the next start makes up for it, and the best stays the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.config.settings import RunConfig
from launcher.saving.save_schedule import SaveSchedule
from launcher.saving.saver import note_best
from launcher.saving.training_state import ProgressState
from launcher.train import loop


def run_at(step: int, history: list[dict[str, Any]], *, save_steps: int = 10) -> Any:
    config = RunConfig()
    config.eval.eval_strategy, config.eval.eval_steps, config.checkpoint.save_steps = "steps", 5, save_steps
    progress = ProgressState(step=step, best_metric=3.0, best_step=10, log_history=history)
    return SimpleNamespace(
        config=config, step=step, total_steps=100, state=SimpleNamespace(progress=progress), is_main=False,
        data=SimpleNamespace(eval=[1], train=[1] * 64), window=loop.Window(), last_eval={}, last_saved_step=step,
        previous_best=(None, None), save_schedule=SaveSchedule(config, 64),
        schedule=SimpleNamespace(evaluated=lambda metric: None),
    )  # fmt: skip


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    steps: list[int] = []

    def evaluate(run: Any) -> dict[str, float]:
        steps.append(run.step)
        return {"eval_loss": 2.0}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    return steps


def test_evaluation_is_made_up_for_when_a_stop_left_it_out(evaluations: list[int]) -> None:
    run = run_at(20, [{"step": 20, "loss": 1.0}])
    loop.catch_up(run)
    assert evaluations == [20]
    assert (run.state.progress.best_metric, run.state.progress.best_step) == (2.0, 20)


def test_nothing_is_evaluated_twice_when_the_line_is_there(evaluations: list[int]) -> None:
    loop.catch_up(run_at(20, [{"step": 20, "loss": 1.0}, {"step": 20, "eval_loss": 2.0}]))
    assert evaluations == []


@pytest.mark.parametrize("step", [0, 23])
def test_nothing_is_evaluated_when_none_is_due(step: int, evaluations: list[int]) -> None:
    loop.catch_up(run_at(step, []))
    assert evaluations == []


def test_checkpoint_of_a_stop_is_not_the_best_when_an_undisturbed_run_has_none_there() -> None:
    run = run_at(15, [])
    run.last_eval = {"step": 15, "eval_loss": 1.0}
    note_best(run)
    assert run.state.progress.best_step == 10
    run.config.checkpoint.save_every_s = 60.0
    note_best(run)
    assert run.state.progress.best_step == 15
