"""The jobs of a sweep: their names, folders, commands, and how each stands. Standard library only."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.errors import EXIT_FAILED, EXIT_STOPPED
from launcher.base.paths import RunPaths
from launcher.base.process import host, is_alive
from launcher.sweep.runs import FAILED, FINISHED, INTERRUPTED, PENDING, PRUNED, RUNNING, Metric, RunStatus, read_run

MAX_NAME_BYTES = 200
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    `swept` holds the values that tell it from its siblings, `overrides` everything that describes it, and `arguments`
    what `launcher train` gets: the same with its own output_dir and run_name.
    """

    name: str
    output_dir: Path
    swept: Mapping[str, str]
    overrides: tuple[str, ...]
    arguments: tuple[str, ...]


def job_command(job: Job) -> list[str]:
    """The process of one job."""
    return [sys.executable, "-m", "launcher.cli", "train", *job.arguments]


def job_name(values: Mapping[str, str]) -> str:
    """`key=value,…` by key, safe as a folder's name and inside an override; cut and hashed over 200 bytes.

    Escaped as in URLs: `/`, `%`, `$` (Hydra would interpolate it) and control characters.
    """
    text = ",".join(f"{key}={value}" for key, value in sorted(values.items()))
    name = re.sub(r"[/%$\x00-\x1f\x7f]", lambda match: f"%{ord(match.group()):02X}", text)
    encoded = name.encode()
    if len(encoded) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return encoded[: MAX_NAME_BYTES - len(digest) - 1].decode(errors="ignore") + "-" + digest


def job_run_name(sweep_run_name: str, name: str) -> str:
    """A run_name of the job's own, valid as a Hub repository's name: jobs must not overwrite each other there."""
    run_name = f"{sweep_run_name}-" + re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")
    if len(run_name) <= 90:
        return run_name
    return run_name[:81] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class SweepPaths:
    """The files of a sweep beside its jobs' folders."""

    root: Path

    @property
    def table(self) -> Path:
        """Every job ever planned here, and what they are compared by."""
        return self.root / "sweep.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def study(self) -> Path:
        """Optuna's SQLite file."""
        return self.root / "optuna.db"


def job_log(output_dir: Path) -> Path:
    """What `launcher train` and its processes print."""
    return RunPaths(output_dir).logs_dir / "launcher.log"


def job_record(output_dir: Path) -> Path:
    """JSON on the job's last start: pid, ticks, host, devices, overrides; once it ended exit_code, was_killed."""
    return RunPaths(output_dir).logs_dir / "job.json"


def job_process(output_dir: Path) -> int | None:
    """The pid of the job's process where one lives on this host, whoever started it."""
    record = files.read_json_or(job_record(output_dir), {})
    if record.get("host") == host() and "exit_code" not in record and is_alive(record["pid"], record["ticks"]):
        return int(record["pid"])
    return None


def read_job(output_dir: Path, metric: Metric | None) -> RunStatus:
    """How a job stands: run.json is the authority, and where a job ended before it wrote one, its exit code."""
    status = read_run(output_dir, metric)
    record = files.read_json_or(job_record(output_dir), {})
    exit_code, of_run = record.get("exit_code"), status.exit_code
    status.exit_code = status.exit_code if exit_code is None else exit_code
    if job_process(output_dir) is not None:
        status.state = RUNNING
    elif status.state in (FINISHED, PRUNED, RUNNING):
        return status
    elif record.get("was_killed"):  # at the user's second Ctrl-C: nothing is wrong with the job
        status.state = INTERRUPTED
    elif exit_code == 0 and status.state == PENDING:
        status.state = FINISHED
    elif status.state == INTERRUPTED and exit_code == of_run == EXIT_FAILED:
        pass  # stopped on request, and its save failed: it goes on from the checkpoint before
    elif exit_code not in (None, 0, EXIT_STOPPED) and exit_code > 0:
        status.state = FAILED
    return status


def needs_run(job: Job, status: RunStatus, *, retry_failed: bool) -> bool:
    """Whether this start of the sweep runs the job: again, if its settings are others than last time."""
    if status.state in (FINISHED, PRUNED, FAILED):
        last = files.read_json_or(job_record(job.output_dir), {}).get("overrides")
        is_changed = last is not None and sorted(last) != sorted(job.overrides)
        return is_changed or (status.state == FAILED and retry_failed)
    return True


class SweepTable:
    """sweep.json. Jobs are only added: earlier ones stay listed when a later command names other values."""

    def __init__(self, paths: SweepPaths) -> None:
        self._paths = paths
        data = _read_table(paths.table)
        self.metric = Metric(**data["metric"]) if "metric" in data else None
        self.info: dict[str, Any] = data.get("info", {})
        self.jobs: dict[str, dict[str, Any]] = data.get("jobs", {})

    def known_name(self, overrides: Iterable[str]) -> str | None:
        """The folder of a job with exactly these settings, under whatever name an earlier command gave it."""
        if not hasattr(self, "_by_overrides"):
            self._by_overrides = {tuple(sorted(job["overrides"])): name for name, job in self.jobs.items()}
        return self._by_overrides.get(tuple(sorted(overrides)))

    def add(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.jobs[job.name] = {"swept": dict(job.swept), "overrides": list(job.overrides)}

    def write(self, metric: Metric, **info: Any) -> None:
        self.metric, self.info = metric, self.info | info
        self._paths.root.mkdir(parents=True, exist_ok=True)
        files.write_json(
            self._paths.table,
            {"format_version": _FORMAT_VERSION, "metric": vars(metric), "info": self.info, "jobs": self.jobs},
        )

    def statuses(self) -> dict[str, RunStatus]:
        """How every job stands, by name."""
        return {name: read_job(self._paths.root / name, self.metric) for name in self.jobs}


def is_sweep(path: Path) -> bool:
    """Whether a folder holds a sweep.json of ours."""
    return bool(_read_table(SweepPaths(path).table))


def _read_table(path: Path) -> dict[str, Any]:
    """What `SweepTable.write` wrote; {} where it is missing, broken or of another tool's."""
    data: dict[str, Any] = files.read_json_or(path, {})
    metric = data.get("metric")
    is_ours = isinstance(metric, dict) and metric.keys() == {"key", "is_greater_better"}
    return data if is_ours and isinstance(data.get("jobs"), dict) else {}
