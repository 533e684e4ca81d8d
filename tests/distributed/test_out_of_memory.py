"""Memory that is too small is no end: half the micro-batch, the same samples per step, remembered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.agent import attempt, supervise
from launcher.base import files
from launcher.base.paths import RunPaths
from launcher.config.compose import compose
from tests.distributed.runs import Lab, log_text, losses
from tests.distributed.zygote import environment
from tests.faults.launches import launched

_MORE = (
    "model.config.attention_dropout=0.0", "train.max_steps=8", "checkpoint.save_steps=3",
    "train.per_device_train_batch_size=4", "train.max_grad_norm=0",
)  # fmt: skip


def shortage(step: int, above: int, **more: Any) -> dict[str, str]:
    return {"FAULTS": json.dumps([{"kind": "out_of_memory", "step": step, "above": above, **more}])}


def limits(run: RunPaths) -> dict[str, Any]:
    found: dict[str, Any] = files.read_json(run.run_state)["out_of_memory"]
    return found


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run of one process with one sample in each micro-batch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return losses(lab.run(folder / "run", "single", 1, *_MORE, "train.per_device_train_batch_size=1"))


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [
        ("ddp", 2), *(pytest.param(*case, marks=pytest.mark.slow)
        for case in (("single", 1), ("zero2", 2), ("ddp", 3), ("zero2", 3), ("zero3", 2))),
    ],
)  # fmt: skip
def test_next_start_goes_on_with_half_the_micro_batch_when_a_rank_ran_out_of_memory(
    lab: Lab, tmp_path: Path, undisturbed: dict[int, float], strategy: str, num_processes: int
) -> None:
    """Nobody watches the ranks here, as under one's own accelerate launch: the next start finds out by itself."""
    run, env = RunPaths(tmp_path / "run"), shortage(5, 1, rank=min(1, num_processes - 1))
    sizes = []
    for _ in range(4):
        codes = lab.run_codes(run.root, strategy, num_processes, *_MORE, env=env)
        sizes.append(files.read_json(run.run_state)["batch_sizes"]["train"])
        if not any(codes):
            break
    assert sizes == ([4, 2, 1] if num_processes < 3 else [3, 2, 1]), log_text(run.root)
    assert limits(run)["train"] == 1 and limits(run)["count"] == 2
    assert losses(run) == pytest.approx(undisturbed, rel=1e-5)
    told = log_text(run.root)
    assert told.count("this run once ran out of memory: 1 instead of 4 samples per forward and backward") == 1


@pytest.mark.slow
def test_agent_restarts_with_smaller_batches_when_training_and_evaluation_run_out_of_memory(
    lab: Lab, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    overrides = lab.overrides(
        tmp_path / "run", "ddp", *_MORE, "train.per_device_train_batch_size=2", "eval.per_device_eval_batch_size=4",
        "eval.eval_strategy=steps", "eval.eval_steps=4", "data.eval_split=0.2",
        "launch.num_processes=2", "launch.max_restarts=0",
    )  # fmt: skip
    env = {"FAULTS": json.dumps([
        {"kind": "out_of_memory", "rank": 1, "step": 4, "above": 1},
        {"kind": "out_of_memory", "rank": 0, "step": 5, "above": 2, "in_evaluation": True},
    ])}  # fmt: skip
    with launched([*overrides, "model.gradient_checkpointing=false"], tmp_path / "run", env) as run:
        assert run.wait() == 0, run.text()
        told = run.text()
    assert (
        "out of memory: rank 1 on" in told
        and " with 1 instead of 2 samples per forward and backward;" in told
        and "with 2 instead of 4 samples per evaluation batch;" in told
    )
    found = limits(run.paths)
    assert (found["train"], found["eval"], found["gradient_checkpointing"]) == (1, 2, False)


@pytest.mark.slow
def test_agent_restarts_with_smaller_batches_when_the_kernel_killed_a_rank(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[int, float]
) -> None:
    """The kernel's counter alone is made up. In the end only gradient checkpointing is left."""
    counts = iter(range(100))
    monkeypatch.setattr(attempt, "oom_kills", lambda: next(counts))
    for name, value in {**environment(), **shortage(5, 1, rank=1, signal=True)}.items():
        monkeypatch.setenv(name, value)
    overrides = lab.overrides(
        tmp_path / "run", "zero2", *_MORE, "train.per_device_train_batch_size=2", "launch.num_processes=2",
        "launch.max_restarts=0",
    )  # fmt: skip
    assert supervise.run(compose(overrides), overrides) == 0
    run = RunPaths(tmp_path / "run")
    assert limits(run)["train"] == 1 and not limits(run)["gradient_checkpointing"]
    assert losses(run) == pytest.approx(undisturbed, rel=1e-5)


@pytest.mark.slow
def test_agent_ends_when_nothing_smaller_is_left(lab: Lab, tmp_path: Path) -> None:
    overrides = lab.overrides(
        tmp_path / "run", "single", *_MORE, "train.per_device_train_batch_size=1", "launch.num_processes=1"
    )
    with launched(overrides, tmp_path / "run", shortage(2, 0)) as run:
        assert run.wait() == 1
        told = run.text()
    assert told.count("with gradient checkpointing; the samples") == 1
    assert limits(run.paths)["gradient_checkpointing"] is True
    assert "strategy=zero3, a smaller data.max_length" in told and "OutOfMemoryError" in told
