"""What the folder of a run says about it: state, progress, best metric. Standard library only."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.base import files, lock
from launcher.base.paths import RunPaths
from launcher.base.text import printable
from launcher.config.settings import CheckpointConfig
from launcher.hub import as_of_now

PENDING, RUNNING, INTERRUPTED = "pending", "running", "interrupted"
FINISHED, FAILED, PRUNED = "finished", "failed", "pruned"


@dataclass(frozen=True)
class Metric:
    """What runs are compared by."""

    key: str
    is_greater_better: bool

    @classmethod
    def of(cls, checkpoint: CheckpointConfig, eval_strategy: str) -> Metric:
        """The metric of the evaluation; the training loss where the run never evaluates."""
        if eval_strategy == "no":
            return cls("loss", is_greater_better=False)
        return cls(checkpoint.metric_key, checkpoint.is_greater_better)

    def is_better(self, value: float, than: float | None) -> bool:
        """NaN is never better."""
        if math.isnan(value):
            return False
        return than is None or (value > than if self.is_greater_better else value < than)

    def rank(self, value: float | None) -> tuple[bool, float]:
        """Sort key: the best first, unknown ones last."""
        if value is None:
            return (True, 0.0)
        return (False, -value if self.is_greater_better else value)


@dataclass
class RunStatus:
    """Where a run stands. `best_metric` is the best of its evaluations, or the last training loss."""

    dir: str
    state: str = PENDING
    reason: str | None = None
    exit_code: int | None = None
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    metric: str | None = None
    best_metric: float | None = None
    best_step: int | None = None
    checkpoints: list[int] = field(default_factory=list)
    hub: dict[str, Any] | None = None
    host: str | None = None
    job_id: str | None = None
    updated_at: float | None = None
    slurm: str | None = None
    """State and reason of its job, as squeue says."""


_MAX_NUMBER = 2.0**53
_FROM_RUN_JSON: dict[str, tuple[type, ...]] = {
    "state": (str,), "reason": (str,), "exit_code": (int,), "step": (int,), "total_steps": (int,),
    "epoch": (int, float), "hub": (dict,), "host": (str,), "job_id": (str,), "updated_at": (int, float),
}  # fmt: skip
"""A value of another type is left out: run.json may be of another tool's, and status shows many folders at once."""


def is_run(path: Path) -> bool:
    """Whether a folder is the output_dir of a run that has started."""
    paths = RunPaths(path)
    return paths.run_state.is_file() or paths.metrics.is_file() or next(paths.checkpoint_dirs(), None) is not None


def read_run(root: Path, metric: Metric | None) -> RunStatus:
    """Reads a run's folder. A run.json that says running without a living process becomes interrupted by a crash."""
    paths = RunPaths(root)
    info = files.read_json_or(paths.run_state, {})
    status = RunStatus(dir=str(root), metric=metric.key if metric else None)
    for name, types in _FROM_RUN_JSON.items():
        value = info.get(name)
        if isinstance(value, types) and is_plain(value):
            setattr(status, name, printable(value) if isinstance(value, str) else value)
    status.hub = as_of_now(status.hub, paths)
    holder = lock.holder(paths.lock)
    if holder is not None:
        status.state, status.host = RUNNING, holder.host
    elif status.state == RUNNING:
        status.state, status.reason = INTERRUPTED, "crash"
    status.checkpoints = [step for step, _ in paths.checkpoint_dirs()]
    _read_metrics(paths.metrics, metric, status)
    return status


def _read_metrics(path: Path, metric: Metric | None, status: RunStatus) -> None:
    last_train: dict[str, Any] = {}
    for line in read_lines(path):
        if "loss" in line:
            last_train = line
        value = line.get(metric.key) if metric else None
        if metric is None or not isinstance(value, (int, float)) or not is_plain(value):
            continue
        if metric.key == "loss" or metric.is_better(value, status.best_metric):
            status.best_metric, status.best_step = float(value), _number(line, "step")
    status.loss, status.tokens_per_second = _number(last_train, "loss"), _number(last_train, "tokens_per_second")
    if status.state != FINISHED:  # the lines are newer than run.json
        status.step = max(status.step, _number(last_train, "step") or 0)
        status.epoch = _number(last_train, "epoch") or status.epoch


def _number(line: dict[str, Any], key: str) -> Any:
    value = line.get(key)
    return value if is_plain(value) and isinstance(value, (int, float)) else None


def is_plain(value: Any) -> bool:
    """Whether a value can be shown and compared: no number that JSON cannot hold exactly."""
    return not isinstance(value, (int, float)) or (not isinstance(value, bool) and abs(value) <= _MAX_NUMBER)


def read_lines(path: Path, max_training: int = 0) -> Iterator[dict[str, Any]]:
    """The evaluations and saves in metrics.jsonl, its last training line, and others up to about `max_training`.

    Most lines of a long run are not parsed, so that millions of them take seconds.
    """
    try:
        with files.open_read(path) as file:
            num_lines, last_training = 0, -1
            for raw in file:
                if b'"loss"' in raw and raw.rstrip().endswith(b"}"):  # else cut off by a crash
                    last_training = num_lines
                num_lines += 1
            every = max(1, num_lines // max_training) if max_training else num_lines + 1
            file.seek(0)
            for i, raw in enumerate(file):
                is_event = b'"eval_' in raw or b'"checkpoint"' in raw
                if not is_event and i != last_training and (i + 1) % every:
                    continue
                try:
                    line = files.parse_json(raw)
                except ValueError:
                    continue
                if isinstance(line, dict):
                    yield line
    except OSError:
        return


class MetricsTail:
    """Follows the metrics.jsonl of a run that is being written, and shortened when the run resumes."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._inode = path, 0, 0

    def new_lines(self) -> list[dict[str, Any]]:
        """The whole lines since the last call; all of them again where the file was replaced."""
        try:
            with files.open_read(self._path) as file:
                info = os.fstat(file.fileno())
                if info.st_ino != self._inode or info.st_size < self._offset:
                    self._inode, self._offset = info.st_ino, 0
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = []
        for raw in whole.splitlines():
            try:
                line = files.parse_json(raw)
            except ValueError:
                continue
            if isinstance(line, dict):
                lines.append(line)
        return lines
