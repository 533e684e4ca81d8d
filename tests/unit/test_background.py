"""`eval.in_background`: what is refused with it, which checkpoint is the best, and what is read of its results."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.base import evaluations, manifest
from launcher.base.devices import spare_device_problems
from launcher.base.evaluations import Evaluation
from launcher.base.paths import RunPaths
from launcher.cli.checkpoints import list_checkpoints
from launcher.config.rules import contradictions
from launcher.config.settings import RunConfig
from launcher.saving.save_schedule import SaveSchedule
from launcher.saving.saver import Saver
from launcher.saving.training_state import ProgressState
from launcher.train.recorder import NoRecorder

ON = {
    "eval.in_background": True, "eval.eval_strategy": "steps", "eval.eval_steps": 10, "checkpoint.save_steps": 5,
    "data.eval_split": 0.1, "data.generator": {"_target_": "x.Y"},
}  # fmt: skip
GROUPS = {
    "checkpoint=recommended": ("checkpoint.save_strategy", "steps"),
    "scheduler=cosine": ("scheduler.lr_scheduler_type", "cosine"),
}


def problems(settings: dict[str, Any]) -> str:
    config = RunConfig()
    config.model.config = {"model_type": "llama"}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        setattr(getattr(config, group), name, value)
    return "\n".join(contradictions(config))


@pytest.mark.parametrize(
    ("key", "value", "named", "cure"),
    [
        ("eval.eval_strategy", "no", "eval.eval_strategy=no", "eval.eval_strategy=steps"),
        ("checkpoint.save_strategy", "no", "checkpoint.save_strategy=no", "checkpoint=recommended"),
        ("checkpoint.save_strategy", "best", "checkpoint.save_strategy=best", "checkpoint.save_strategy=steps"),
        ("checkpoint.save_steps", 7, "multiple of checkpoint.save_steps (got 7)", "checkpoint.save_steps=10"),
        ("checkpoint.save_steps", "auto", "(got auto)", "checkpoint.save_steps=10"),
        ("checkpoint.save_strategy", "epoch", "save_strategy=epoch", "checkpoint.save_strategy=steps"),
        ("eval.eval_strategy", "epoch", "eval_strategy=epoch", "checkpoint.save_strategy=epoch"),
        ("eval.eval_every_s", 60.0, "eval.eval_every_s=60", "eval.eval_every_s=null"),
        ("train.early_stopping_patience", 3, "early_stopping_patience=3", "train.early_stopping_patience=null"),
        ("scheduler.lr_scheduler_type", "reduce_lr_on_plateau", "reduce_lr_on_plateau", "scheduler=cosine"),
        ("hub.save_total_limit", 2, "hub.save_total_limit=2", "hub.save_total_limit=null"),
    ],
)
def test_contradiction_is_named_with_a_cure_that_works(key: str, value: Any, named: str, cure: str) -> None:
    settings = {**ON, "hub.push_to_hub": True}
    assert problems(settings) == ""
    told = problems({**settings, key: value})
    assert named in told and cure in told and "eval.in_background" in told
    name, _, text = cure.partition("=")
    name, new = GROUPS.get(cure, (name, {"null": None, "10": 10}.get(text, text)))
    assert "in_background" not in problems({**settings, key: value, name: new})
    assert "in_background" not in problems({**settings, key: value, "eval.in_background": False})


def test_device_without_the_mode_is_named() -> None:
    told = problems({**ON, "eval.in_background": False, "eval.background_device": 1})
    assert "eval.background_device=1 is for" in told and "eval.in_background=true" in told


@pytest.mark.parametrize(
    ("gpus", "device", "num_local", "text"),
    [
        ("", None, 2, None), ("", 0, 1, "no GPU is visible. Set eval.background_device=null"),
        ("0,1,2,3", 3, 3, None), ("0,1,2,3", 2, 3, "Set eval.background_device=3"),
        ("0,1,2,3", None, 2, "of 2, 3 (visible: 4"), ("0,1,2,3", 4, 2, "Set eval.background_device=2"),
        ("0,1", None, 2, "Set launch.num_processes=1 on this machine, and eval.background_device=1"),
        ("0", 0, 1, "Set eval.in_background=false"),
    ],
)  # fmt: skip
def test_device_that_trains_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: str, device: int | None, num_local: int, text: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    problems = spare_device_problems(device, num_local)
    assert (problems == []) if text is None else text in problems[0]


def saver_of(folder: Path) -> Saver:
    config = RunConfig()
    config.eval.in_background, config.checkpoint.save_steps = True, 10
    state: Any = SimpleNamespace(progress=ProgressState(), step=40)
    other: Any = SimpleNamespace(is_main=False)
    return Saver(
        config, RunPaths(folder), other, state, other, other, lock=other, schedule=SaveSchedule(config, 64),
        outlet=NoRecorder(), hub=other, alive=other, is_stopping=other, total_steps=100, saved_step=0,
        is_judged_later=lambda step: step % 20 == 0,
    )  # fmt: skip


def test_best_is_the_same_in_whatever_order_checkpoints_are_judged(tmp_path: Path) -> None:
    metrics: dict[int, float | None] = {20: 3.0, 40: 2.0, 60: float("nan"), 80: 2.0, 100: None}
    for order in itertools.permutations(metrics):
        saver = saver_of(tmp_path)
        saver.unjudged[:] = sorted(metrics)
        for step in order:
            saver.judged(step, metrics[step])
        progress = saver._state.progress
        assert (progress.best_step, progress.best_metric, saver.unjudged) == (40, 2.0, []), order


def test_only_what_an_undisturbed_run_saves_and_evaluates_is_a_candidate(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    assert [step for step in range(1, 50) if saver.is_candidate(step)] == [20, 40]


def found(step: int = 20, checkpoint: str = "x") -> Evaluation:
    return Evaluation(step, checkpoint, {"eval_loss": 1.5}, 0.5, [{"prompt": "?"}])


def test_result_is_read_as_it_was_written_unless_the_checkpoint_is_another_one(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert evaluations.steps(paths) == [] and evaluations.read(paths, 20) is None
    evaluations.write(paths, found())
    assert evaluations.read(paths, 20) == found()  # retention has deleted the checkpoint
    paths.checkpoint_dir(20).mkdir()
    (paths.checkpoint_dir(20) / "manifest.json").write_text("{}")
    assert evaluations.read(paths, 20) is None
    identity = evaluations.checkpoint_id(paths.checkpoint_dir(20))
    assert identity is not None
    evaluations.write(paths, found(checkpoint=identity))
    assert evaluations.read(paths, 20) == found(checkpoint=identity)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"step": 20}', "\x00", '{"step": 20, "checkpoint": "x", "values": {"eval_loss": "1"}, '
     '"runtime_s": 1, "samples": []}', '{"step": 30, "checkpoint": "x", "values": {}, "runtime_s": 1, "samples": []}',
     '{"step": 20, "checkpoint": "x", "values": {}, "runtime_s": 1, "samples": [1]}'],
)  # fmt: skip
def test_nonsense_is_no_result(tmp_path: Path, text: str) -> None:
    paths = RunPaths(tmp_path)
    paths.evaluations_dir.mkdir()
    paths.evaluation(20).write_text(text)
    assert evaluations.read(paths, 20) is None


def test_results_of_steps_that_are_trained_again_go(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (10, 20, 30):
        evaluations.write(paths, found(step))
    (paths.evaluations_dir / ".checkpoint-20.json.tmp-1f").touch()
    (paths.evaluations_dir / "notes.txt").touch()
    evaluations.remove_beyond(paths, 20)
    assert sorted(p.name for p in paths.evaluations_dir.iterdir()) == [
        "checkpoint-10.json", "checkpoint-20.json", "notes.txt",
    ]  # fmt: skip


def test_checkpoints_are_listed_with_what_was_found_later(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (20, 30):
        folder = paths.checkpoint_dir(step)
        folder.mkdir()
        state = {"epoch": 1.0, "best_global_step": None, "log_history": [{"step": step, "loss": 2.0}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        made = manifest.build(folder, step=step, world_size=1, zero_stage=0)
        (folder / manifest.NAME).write_bytes(made.to_json())
    identity = evaluations.checkpoint_id(paths.checkpoint_dir(20))
    assert identity is not None
    evaluations.write(paths, found(checkpoint=identity))
    paths.run_state.write_text('{"best_step": 20}')
    first, second = list_checkpoints(tmp_path)
    assert first["metrics"] == {"loss": 2.0, "eval_loss": 1.5} and first["is_best"]
    assert second["metrics"] == {"loss": 2.0} and not second["is_best"]
