"""hydra/sweeper=optuna with stub jobs: proposals, resuming, pruning."""

from __future__ import annotations

import json
import signal
import time
import types
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from launcher.sweep.jobs import SweepPaths
from launcher.sweep.runs import RunStatus
from launcher.sweep.search import Search
from tests.sweep.runner import ROOT, SweepRunner, wait_until

OPTUNA = ["hydra/sweeper=optuna", "hydra/sweeper/pruner=none", "sweep.num_slots=2", "hydra.sweeper.sampler.seed=0"]
LOG = "optim.learning_rate=tag(log,interval(1e-5,1e-1))"


def trials(sweep: SweepRunner) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{SweepPaths(sweep.root).study}")
    try:
        (name,) = optuna.get_all_study_names(storage)
        return optuna.load_study(study_name=name, storage=storage).get_trials()
    finally:
        storage.engine.dispose()


def test_intervals_choices_and_ranges_are_proposed(sweep: SweepRunner) -> None:
    code, output = sweep.run(
        *OPTUNA, "hydra.sweeper.n_trials=6", LOG, "seed=range(1,4)",
        "scheduler.lr_scheduler_type=choice(linear,cosine)",
        "strategy=ddp,zero1", "hydra/sweeper/sampler=random",
    )  # fmt: skip
    assert code == 0, output
    found = trials(sweep)
    assert [t.state for t in found] == [TrialState.COMPLETE] * 6
    for trial in found:
        assert 1e-5 <= trial.params["optim.learning_rate"] <= 1e-1
        assert trial.params["seed"] in (1, 2, 3)
        assert trial.params["strategy"] in ("ddp", "zero1")
        assert trial.value == pytest.approx(trial.params["optim.learning_rate"] + 1 / 4)
        assert list(trial.intermediate_values) == [1, 2, 3, 4]
    assert len(sweep.ended()) == 6
    best = min(found, key=lambda t: t.value or 1.0)
    assert f"optim.learning_rate={best.params['optim.learning_rate']}" in output.split("rank")[1].splitlines()[1]


def test_values_tried_before_are_not_run_twice(sweep: SweepRunner) -> None:
    code, output = sweep.run(*OPTUNA, "hydra.sweeper.n_trials=8", "seed=choice(1,2)", "hydra/sweeper/sampler=random")
    assert code == 0, output
    assert [t.state for t in trials(sweep)] == [TrialState.COMPLETE] * 8
    assert {name: len(times) for name, times in sweep.ended().items()} == {"seed=1": 1, "seed=2": 1}


def test_killed_study_goes_on_without_duplicates_or_zombies(sweep: SweepRunner) -> None:
    args = [*OPTUNA, "hydra.sweeper.n_trials=6", LOG]
    for delay_s in (0.4, 0.9):
        process = sweep.start(*args, STUB_STEPS="30", STUB_STEP_S="0.02")
        wait_until(lambda: any("exit_code" not in record for record in sweep.records().values()))
        time.sleep(delay_s)
        process.kill()
        process.wait()
    assert any(t.state == TrialState.RUNNING for t in trials(sweep))
    code, output = sweep.run(*args, STUB_STEPS="30", STUB_STEP_S="0.005")
    assert code == 0, output
    found = trials(sweep)
    assert [t.state for t in found] == [TrialState.COMPLETE] * 6
    assert len({t.params["optim.learning_rate"] for t in found}) == 6
    assert [len(times) for times in sweep.ended().values()] == [1] * 6
    assert "0 to run" not in output
    assert sweep.run(*args)[0] == 0
    assert len(trials(sweep)) == 6


def test_stopped_study_goes_on(sweep: SweepRunner) -> None:
    args = [*OPTUNA, "hydra.sweeper.n_trials=4", LOG]
    process = sweep.start(*args, STUB_STEPS="100", STUB_STEP_S="0.1")
    wait_until(lambda: len(list(sweep.root.glob("*/run.json"))) == 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    code, output = sweep.run(*args, STUB_STEPS="100", STUB_STEP_S="0.001")
    assert code == 0, output
    assert [t.state for t in trials(sweep)] == [TrialState.COMPLETE] * 4


def test_hopeless_trials_are_pruned_with_their_checkpoint(sweep: SweepRunner) -> None:
    """The bad job is asked to stop by STOP=pruned, keeps what it saved, and is not started again."""
    args = [
        "hydra/sweeper=optuna", "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1",
        "hydra/sweeper/sampler=brute_force", "hydra.sweeper.sampler.seed=3", "sweep.num_slots=1",
        "hydra.sweeper.n_trials=3", "optim.learning_rate=choice(0.1,0.5,0.9)",
    ]  # fmt: skip
    code, output = sweep.run(*args, STUB_STEPS="40", STUB_STEP_S="0.1")
    assert code == 0, output
    states = {t.params["optim.learning_rate"]: t.state for t in trials(sweep)}
    first = trials(sweep)[0].params["optim.learning_rate"]
    pruned = [rate for rate, state in states.items() if state == TrialState.PRUNED]
    assert pruned == [rate for rate in states if rate > first]
    assert pruned, "seed 3 proposes the worst value first: take another"
    for rate in pruned:
        folder = sweep.job(f"optim.learning_rate={rate}")
        run = json.loads((folder / "run.json").read_text())
        assert (run["state"], run["exit_code"]) == ("pruned", 75)
        assert run["step"] < 40
        assert (folder / "progress.json").exists()
        assert not (folder / "STOP").exists()
    assert sweep.run(*args)[0] == 0
    assert len(trials(sweep)) == 3


def test_failed_trials_do_not_stop_the_study_and_are_retried_on_demand(sweep: SweepRunner) -> None:
    args = [*OPTUNA, "hydra.sweeper.n_trials=3", "hydra/sweeper/sampler=brute_force", "seed=choice(1,2,3)"]
    code, output = sweep.run(*args, STUB_FAIL="seed=2")
    assert code == 1, output
    assert sorted(t.state for t in trials(sweep)) == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    code, output = sweep.run(*args, "sweep.retry_failed=true")
    assert code == 0, output
    assert sweep.ended().keys() == {"seed=1", "seed=2", "seed=3"}
    assert [t.state for t in trials(sweep) if t.params["seed"] == 2] == [TrialState.FAIL, TrialState.COMPLETE]


def test_journal_storage_holds_the_study(sweep: SweepRunner, tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    code, output = sweep.run(*OPTUNA, "hydra.sweeper.n_trials=2", LOG, f"hydra.sweeper.storage={journal}")
    assert code == 0, output
    assert journal.stat().st_size > 0
    assert not SweepPaths(sweep.root).study.exists()


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsgaii"])
def test_every_sampler_that_needs_nothing_more_works(sweep: SweepRunner, sampler: str) -> None:
    code, output = sweep.run(
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", f"hydra/sweeper/sampler={sampler}", LOG, "sweep.num_slots=2"
    )
    assert code == 0, output


def test_a_contradicting_direction_and_a_bad_setting_are_refused(sweep: SweepRunner) -> None:
    code, output = sweep.run(*OPTUNA, LOG, "hydra.sweeper.direction=maximize")
    assert code == 2
    assert "checkpoint.greater_is_better=true" in output
    code, output = sweep.run(*OPTUNA, LOG, "hydra.sweeper.sampler.n_startup_trials=many")
    assert code == 2 or "n_startup_trials" in output


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers_and_pruners_can_be_made_from_their_files() -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    needs_more = {"cmaes", "qmc", "gp", "threshold"}  # packages, or a bound
    files = [*ROOT.glob("conf/hydra/sweeper/*/*.yaml")]
    assert len(files) >= 12
    for path in files:
        if path.stem not in needs_more:
            assert instantiate(OmegaConf.load(path)) is not None


@pytest.mark.parametrize(("asked", "is_left"), [("pruned", False), ("stop_file", True)])
def test_no_request_to_prune_outlives_its_job(tmp_path: Path, asked: str, is_left: bool) -> None:
    """The last evaluation of a job is looked at when it may already have stopped."""
    (tmp_path / "STOP").write_text(f"{asked}\n")
    job = types.SimpleNamespace(name="seed=1", output_dir=tmp_path)
    search = types.SimpleNamespace(_trials={"seed=1": []}, _tails={})
    Search.ended(search, job, RunStatus(state="pruned", dir=str(tmp_path)))  # type: ignore[arg-type]
    assert (tmp_path / "STOP").exists() == is_left
