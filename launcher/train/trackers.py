"""The Accelerate tracker that `tracker=` names. Main process only.

A run that goes on goes on in its tracker as well: which run that is, is kept in `logs/tracker.json`.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from typing import Any

from launcher.base import files
from launcher.base.paths import RunPaths
from launcher.base.process import RESTARTED
from launcher.base.secrets import redacted
from launcher.config.settings import RunConfig, to_dict

_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT", "comet_ml": "COMET_PROJECT_NAME", "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "trackio": "TRACKIO_PROJECT", "swanlab": "SWANLAB_PROJECT", "clearml": "CLEARML_PROJECT",
}  # fmt: skip
_PROJECT_KEYS = ("project", "project_name", "experiment_name")


class Trackers:
    """One that fails is reported once and left out: a tracker of somebody else's must never end a training.

    Attributes:
        notice: why nothing is tracked, else None.
    """

    def __init__(self, accelerator: Any, config: RunConfig, paths: RunPaths, step: int) -> None:
        self._accelerator = accelerator
        self.notice: str | None = None
        self._is_on = bool(accelerator.log_with) and config.tracker.name is not None
        if not self._is_on:
            return
        try:
            self._start(str(config.tracker.name), config, paths, step)
        except Exception as error:
            self._is_on = False
            self.notice = f"tracker={config.tracker.name} could not start and is left out: {redacted(str(error))}"

    def _start(self, name: str, config: RunConfig, paths: RunPaths, step: int) -> None:
        record = paths.logs_dir / "tracker.json"
        is_anew = config.checkpoint.resume_from_checkpoint == "never" and not os.environ.get(RESTARTED)
        before = {} if is_anew else files.read_json_or(record, {})
        known = before.get("id") if before.get("name") == name else None
        identity = str(known) if known else uuid.uuid4().hex[:21]  # SwanLab takes exactly 21 characters
        project, settings = tracker_arguments(name, config, paths, identity, is_continued=bool(known), step=step)
        values = {k: v for k, v in _flat(to_dict(config)) if isinstance(v, (int, float, str, bool))}
        needs_values = not known and name != "tensorboard"  # MLflow refuses other values for a known run
        self._accelerator.init_trackers(project, config=values if needs_values else None, init_kwargs={name: settings})
        tracker = self._accelerator.get_tracker(name)
        if name == "tensorboard" and not known:
            _add_hparams(tracker.writer, values)
        chosen = _chosen_id(name, tracker) or identity
        files.write_json(record, {"name": name, "id": chosen, "project": project}, mode=0o600)

    def log(self, line: dict[str, Any]) -> None:
        if self._is_on:
            values = {metric_name(k): v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
            with contextlib.suppress(Exception):
                self._accelerator.log(values, step=line["step"])

    def close(self) -> None:
        if self._is_on:
            with contextlib.suppress(Exception):
                self._accelerator.end_training()


def metric_name(key: str) -> str:
    """As transformers' Trainer names them in trackers: train/loss, eval/loss."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def tracker_arguments(
    name: str, config: RunConfig, paths: RunPaths, identity: str, *, is_continued: bool, step: int
) -> tuple[str, dict[str, Any]]:
    """The project and the arguments of the tracker's own start. What the user set in tracker.init_kwargs wins.

    Jobs of a sweep share a project (and a group where the tracker has them), each as a run of its own name.
    """
    given = config.tracker.init_kwargs
    given = given[name] if isinstance(given.get(name), Mapping) else given  # both shapes are found in the wild
    sweep = paths.root.parent.name if paths.sweep_table.is_file() else None
    run = paths.root.name if sweep else config.run_name
    settings = {**_own_arguments(name, run, sweep, paths, identity, is_continued=is_continued, step=step), **given}
    project = os.environ.get(_PROJECT_VARIABLES.get(name, ""), sweep or config.run_name)
    if name in _PROJECT_VARIABLES:
        project = next((str(settings.pop(key)) for key in _PROJECT_KEYS if key in given and key in settings), project)
    if name == "tensorboard":
        project = config.run_name  # its folder below logs/
    return project, settings


def _own_arguments(
    name: str, run: str, sweep: str | None, paths: RunPaths, identity: str, *, is_continued: bool, step: int
) -> dict[str, Any]:
    group = {"group": sweep} if sweep else {}
    match name:
        case "wandb":
            return {"name": run, "id": identity, "resume": "allow", "dir": str(paths.logs_dir), **group}
        case "trackio":
            return {"name": run, "resume": "allow", **group}
        case "swanlab":
            return {
                "experiment_name": run,
                "id": identity,
                "resume": "allow",
                "logdir": str(paths.logs_dir / "swanlab"),
                **group,
            }
        case "comet_ml":
            return {"experiment_key": f"{identity:0<32}", "mode": "get_or_create"}
        case "mlflow":
            return {"run_name": run, **({"run_id": identity} if is_continued else {})}
        case "clearml":
            return {"task_name": run, "continue_last_task": identity if is_continued else False}
        case "aim":
            return {"run_hash": identity} if is_continued else {}
        case "dvclive":
            return {"dir": str(paths.logs_dir / "dvclive"), "resume": True}
        case "tensorboard":
            return {"purge_step": step + 1} if is_continued else {}  # what was logged beyond the step is trained again
    return {}


def _chosen_id(name: str, tracker: Any) -> str | None:
    """The run's id where the tracker chooses it."""
    match name:
        case "mlflow":
            return str(tracker.active_run.info.run_id)
        case "clearml":
            return str(tracker.task.id)
        case "aim":
            return str(tracker.writer.hash)
    return None


def _add_hparams(writer: Any, values: dict[str, Any]) -> None:
    """Into the run itself: `SummaryWriter.add_hparams`, which Accelerate uses, makes a run of its own at each start."""
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(values, {}):
        writer.file_writer.add_summary(summary)
    writer.flush()


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in config.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found
