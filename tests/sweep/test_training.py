"""Sweeps of real training on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.base.manifest import verify
from tests.sweep.runner import ROOT, wait_until

pytestmark = pytest.mark.slow

TINY = [
    "model=tiny_llama", "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "data=arithmetic",
    "experiment=none", "launch.num_processes=1", "train.train_batch_size=8", "train.logging_steps=1",
    "checkpoint.save_steps=5", "tracker=off",
]  # fmt: skip
PRUNED = [
    "strategy=ddp", "train.max_steps=2000", "eval.eval_strategy=steps", "eval.eval_steps=5",
    "checkpoint.metric_for_best_model=loss",
]  # fmt: skip
QUIET = ["eval.eval_strategy=no", "checkpoint.load_best_model_at_end=false"]


def launcher_train(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher.cli", "train", *TINY, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output
    return output


def test_jobs_equal_plain_runs_when_the_sweep_is_killed_and_run_again(tmp_path: Path) -> None:
    """Promise 1: the weights of a job that was killed are bit-identical to those of the same run on its own."""
    sweep = tmp_path / "sweep"
    args = ["-m", "seed=1,2", "sweep.num_slots=1", "train.max_steps=400", *QUIET, f"output_dir={sweep}"]
    process = launcher_train(*args)
    checkpoints = "seed=1/checkpoint-*/manifest.json"
    wait_until(lambda: process.poll() is not None or list(sweep.glob(checkpoints)), timeout_s=300)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    wait_until(lambda: json.loads((sweep / "seed=1/run.json").read_text())["state"] == "interrupted", timeout_s=60)
    stopped_at = json.loads((sweep / "seed=1/run.json").read_text())["step"]
    assert 0 < stopped_at < 400
    output = finish(launcher_train(*args))
    assert "2 finished" in output
    finish(launcher_train("seed=1", "train.max_steps=400", *QUIET, f"output_dir={tmp_path}/alone"))
    weights = [folder / "model.safetensors" for folder in (sweep / "seed=1", tmp_path / "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_hopeless_run_is_pruned_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    output = finish(
        launcher_train(
            "-m",
            "hydra/sweeper=optuna",
            "hydra/sweeper/pruner=threshold",
            "hydra.sweeper.pruner.upper=0.001",
            "hydra.sweeper.n_trials=1",
            "optim.learning_rate=interval(1e-4,1e-3)",
            "train.max_steps=2000",
            "eval.eval_strategy=steps",
            "eval.eval_steps=5",
            "checkpoint.metric_for_best_model=loss",
            f"output_dir={sweep}",
        )
    )
    assert "1 pruned" in output
    (run,) = sweep.glob("optim*")
    state = json.loads((run / "run.json").read_text())
    assert state["state"] == "pruned"
    assert 0 < state["step"] < 2000
    assert (run / f"checkpoint-{state['step']}" / "manifest.json").is_file()


def test_run_is_pruned_with_any_number_of_ranks_and_goes_on_alone(tmp_path: Path) -> None:
    """All ranks agree on the step at which they stop, save it together, and the checkpoint is one to go on from."""
    sweep = tmp_path / "sweep"
    asked = [
        "-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=brute_force", "hydra/sweeper/pruner=threshold",
        "hydra.sweeper.pruner.upper=0.001", "hydra.sweeper.n_trials=4", "launch.num_processes=choice(1,2,3,4)",
        "sweep.num_slots=1", *PRUNED, f"output_dir={sweep}",
    ]  # fmt: skip
    assert "4 pruned" in finish(launcher_train(*asked))
    for count in (1, 2, 3, 4):
        run = sweep / f"launch.num_processes={count}"
        state = json.loads((run / "run.json").read_text())
        assert (state["state"], state["reason"], state["world_size"]) == ("pruned", None, count)
        assert 0 < state["step"] < 2000
        assert verify(run / f"checkpoint-{state['step']}") == []
        assert not (run / "STOP").exists() and not list(run.glob(".tmp-*"))
    run = sweep / "launch.num_processes=4"
    before = (run / "run.json").read_bytes()
    finish(launcher_train(*asked))
    assert (run / "run.json").read_bytes() == before, "run again, it has nothing to do"
    steps = json.loads((run / "run.json").read_text())["step"] + 5
    alone = ["launch.num_processes=4", *PRUNED, f"train.max_steps={steps}", f"output_dir='{run}'"]
    finish(launcher_train(*alone, "checkpoint.accept_changes=true"))
    assert json.loads((run / "run.json").read_text())["step"] == steps
