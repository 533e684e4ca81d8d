"""Trackers: what is refused before a run, and that a run that goes on is one run there too."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from launcher.base.paths import RunPaths
from launcher.config import trackers as packages
from launcher.config.settings import CheckpointConfig, LaunchConfig, RunConfig, TrackerConfig
from launcher.train.trackers import Trackers, metric_name, tracker_arguments


def problem(**tracker: Any) -> str:
    return "\n".join(packages.tracker_problems(RunConfig(tracker=TrackerConfig(**tracker))))


def test_every_tracker_of_accelerate_is_known() -> None:
    assert set(packages.PACKAGES) == set(LOGGER_TYPE_TO_CLASS)


def test_unknown_tracker_is_refused_with_the_one_that_was_meant() -> None:
    assert "Did you mean tracker=wandb?" in problem(name="wandbb") and "tensorboard" in problem(name="nothing")


def test_missing_package_is_refused_with_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as a wandb of earlier left one: no package
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "pip install wandb" in problem(name="wandb")
    (tmp_path / "wandb/__init__.py").write_text("raise RuntimeError('it is not imported')")
    importlib.invalidate_caches()
    assert problem(name="wandb") == ""
    assert problem(name="tensorboard") == problem(name=None) == ""


def test_package_of_a_container_is_not_looked_for_here() -> None:
    launch = LaunchConfig(name="slurm", container="/images/torch.sqsh")
    assert list(packages.tracker_problems(RunConfig(tracker=TrackerConfig(name="aim"), launch=launch))) == []


def test_refusal_takes_no_time() -> None:
    began = time.process_time()
    problem(name="wandbb"), problem(name="aim")
    assert time.process_time() - began < 0.5


# --------------------------------------------------------------------------- one run, however often it is started


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunPaths]:
    paths = RunPaths(tmp_path / "run")
    paths.logs_dir.mkdir(parents=True)
    yield paths
    AcceleratorState._reset_state(reset_partial_state=True)


def start(paths: RunPaths, step: int, **checkpoint: Any) -> None:
    config = RunConfig(run_name="mine", checkpoint=CheckpointConfig(**checkpoint))
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(paths.logs_dir), cpu=True)
    trackers = Trackers(accelerator, config, paths, step)
    assert trackers.notice is None
    for number in range(step + 1, step + 4):
        trackers.log({"step": number, "loss": 1.0 / number, "eval_loss": 2.0 / number, "note": "text"})
    trackers.close()


def test_tensorboard_shows_one_run_when_it_was_continued(run: RunPaths) -> None:
    start(run, 0)
    start(run, 1)  # killed after step 3, goes on from step 1
    shown = EventMultiplexer().AddRunsFromDirectory(str(run.logs_dir)).Reload()
    assert list(shown.Runs()) == ["mine"]
    assert sorted(shown.Runs()["mine"]["scalars"]) == ["eval/loss", "train/loss"]
    assert [event.step for event in shown.Scalars("mine", "train/loss")] == [1, 2, 3, 4]
    assert [path.name for path in run.logs_dir.glob("*")] in (["mine", "tracker.json"], ["tracker.json", "mine"])


def test_metrics_are_named_as_transformers_names_them() -> None:
    names = [metric_name(key) for key in ("loss", "eval_loss", "eval_exact_match", "learning_rate")]
    assert names == ["train/loss", "eval/loss", "eval/exact_match", "train/learning_rate"]


@pytest.mark.parametrize("name", [name for name in packages.PACKAGES if name != "tensorboard"])
def test_continued_run_names_its_own_run_to_the_tracker(name: str, tmp_path: Path) -> None:
    """By the arguments that each tracker's own start documents."""
    config, paths = RunConfig(run_name="mine", tracker=TrackerConfig(name=name)), RunPaths(tmp_path / "run")
    first = tracker_arguments(name, config, paths, "i" * 21, is_continued=False, step=0)
    again = tracker_arguments(name, config, paths, "i" * 21, is_continued=True, step=5)
    assert first[0] == again[0] == "mine"
    expected = {
        "wandb": {"id": "i" * 21, "resume": "allow"}, "swanlab": {"id": "i" * 21, "resume": "allow"},
        "trackio": {"name": "mine", "resume": "allow"}, "mlflow": {"run_id": "i" * 21}, "dvclive": {"resume": True},
        "comet_ml": {"experiment_key": "i" * 21 + "0" * 11, "mode": "get_or_create"}, "aim": {"run_hash": "i" * 21},
        "clearml": {"continue_last_task": "i" * 21},
    }  # fmt: skip
    assert expected[name].items() <= again[1].items()
    if name in ("mlflow", "aim"):  # they choose the id
        assert not expected[name].keys() & first[1].keys()


def test_jobs_of_a_sweep_share_project_and_group(tmp_path: Path) -> None:
    (tmp_path / "lr-sweep").mkdir()
    (tmp_path / "lr-sweep/sweep.json").write_text("{}")
    for name in ("wandb", "trackio"):
        config = RunConfig(run_name="run-seed-1", tracker=TrackerConfig(name=name))
        paths = RunPaths(tmp_path / "lr-sweep/seed=1")
        project, settings = tracker_arguments(name, config, paths, "i", is_continued=False, step=0)
        assert (project, settings["group"], settings["name"]) == ("lr-sweep", "lr-sweep", "seed=1")


def test_settings_of_the_user_win_in_both_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ({"project": "p", "entity": "me", "id": "x"}, {"wandb": {"project": "p", "entity": "me", "id": "x"}}):
        config = RunConfig(tracker=TrackerConfig(name="wandb", init_kwargs=given))
        project, settings = tracker_arguments("wandb", config, RunPaths(tmp_path), "i", is_continued=False, step=0)
        assert (project, settings["entity"], settings["id"]) == ("p", "me", "x")
        assert "project" not in settings  # Accelerate passes it itself: a second one is an error
    monkeypatch.setenv("WANDB_PROJECT", "from-environment")
    config = RunConfig(tracker=TrackerConfig(name="wandb"))
    assert (
        tracker_arguments("wandb", config, RunPaths(tmp_path), "i", is_continued=False, step=0)[0] == "from-environment"
    )
