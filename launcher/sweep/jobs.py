"""The jobs of a sweep: their names, folders, commands, and how each stands. Standard library only."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.errors import EXIT_FAILED, EXIT_STOPPED, UserError
from launcher.base.paths import RunPaths
from launcher.base.process import boot_id, is_alive, pid_namespace
from launcher.sweep.runs import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    PENDING,
    PRUNED,
    RUNNING,
    Metric,
    RunStatus,
    is_plain,
    read_run,
)

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
    """JSON on the job's last start, see `JobRecord`; also host, devices, started_at."""
    return RunPaths(output_dir).logs_dir / "job.json"


@dataclass(frozen=True)
class JobRecord:
    """What job.json says. Values of a wrong type are left out: a sweep may have been received, and pids are signalled.

    A pid means something in one PID namespace of one boot of one machine: see `lock_file.Holder`.
    """

    pid: int | None = None
    ticks: int | None = None
    boot_id: str | None = None
    pid_namespace: str | None = None
    exit_code: int | None = None
    was_killed: bool = False
    overrides: tuple[str, ...] | None = None

    @classmethod
    def read(cls, output_dir: Path) -> JobRecord:
        raw = files.read_json_or(job_record(output_dir), {})
        types: dict[str, type] = {
            "pid": int, "ticks": int, "boot_id": str, "pid_namespace": str, "exit_code": int, "was_killed": bool
        }  # fmt: skip
        found = {k: raw[k] for k, kind in types.items() if type(raw.get(k)) is kind}
        found = {k: value for k, value in found.items() if isinstance(value, bool) or is_plain(value)}
        overrides = raw.get("overrides")
        return cls(**found, overrides=tuple(overrides) if _is_texts(overrides) else None)

    @property
    def living_pid(self) -> int | None:
        """Its process, where one lives here that is certainly the job's."""
        is_here = None not in (self.boot_id, self.pid_namespace)
        is_here = is_here and (self.boot_id, self.pid_namespace) == (boot_id(), pid_namespace())
        if not is_here or self.exit_code is not None or self.pid is None or self.pid <= 1 or self.ticks is None:
            return None
        return self.pid if is_alive(self.pid, self.ticks) else None


def make_folders(output_dir: Path) -> None:
    """The folders that a job's files go to before it starts; what is there must be folders and no links.

    Raises:
        UserError: see `refuse_links`. OSError: they cannot be made.
    """
    refuse_links(output_dir)
    files.make_dirs(output_dir, within=output_dir.parent)
    files.make_dirs(job_log(output_dir).parent, within=output_dir, mode=0o700)


def refuse_links(output_dir: Path) -> None:
    """A job's folder has its name from the sweep: unlike an output_dir that somebody typed, it may not be a link.

    Raises:
        UserError: it, or a folder that its run makes for itself, is one.
    """
    if output_dir.is_symlink():
        raise UserError(
            f"{output_dir} is a link to {output_dir.readlink()}: what a sweep writes stays inside of its output_dir. "
            "Put the job's folder itself there, or set another output_dir=…"
        )
    RunPaths(output_dir).refuse_links()


def job_process(output_dir: Path) -> int | None:
    """The pid of the job's process where one lives on this machine, whoever started it."""
    return JobRecord.read(output_dir).living_pid


def read_job(output_dir: Path, metric: Metric | None) -> RunStatus:
    """How a job stands: run.json is the authority, and where a job ended before it wrote one, its exit code."""
    status = read_run(output_dir, metric)
    record = JobRecord.read(output_dir)
    exit_code, of_run = record.exit_code, status.exit_code
    status.exit_code = status.exit_code if exit_code is None else exit_code
    if record.living_pid is not None:
        status.state = RUNNING
    elif status.state in (FINISHED, PRUNED, RUNNING):
        return status
    elif record.was_killed:  # at the user's second Ctrl-C: nothing is wrong with the job
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
        last = JobRecord.read(job.output_dir).overrides
        is_changed = last is not None and sorted(last) != sorted(job.overrides)
        return is_changed or (status.state == FAILED and retry_failed)
    return True


class SweepTable:
    """sweep.json. Jobs are only added: earlier ones stay listed when a later command names other values.

    Raises:
        UserError: there is a file or folder of that name which is none of ours; it is not overwritten.
    """

    def __init__(self, paths: SweepPaths) -> None:
        self._paths = paths
        data = _read_table(paths.table)
        if not data and files.is_taken(paths.table):
            raise UserError(
                f"{paths.table} cannot be read as the list of a sweep's jobs. Nothing was changed. To start with "
                f"the jobs' own folders, which are kept: mv {paths.table} {paths.table}.old. Else set output_dir"
            )
        self.metric = Metric(**data["metric"]) if "metric" in data else None
        info = data.get("info")
        self.info: dict[str, Any] = info if isinstance(info, dict) else {}
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
        self.metric = metric
        # Chat templates that print the date print this one in every job.
        self.info = {"first_day": date.today().isoformat()} | self.info | info
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
    metric, jobs = data.get("metric"), data.get("jobs")
    if not isinstance(metric, dict) or metric.keys() != {"key", "is_greater_better"} or not isinstance(jobs, dict):
        return {}
    if not _is_texts([metric["key"]]) or not isinstance(metric["is_greater_better"], bool):
        return {}
    return data if all(_is_job(name, job) for name, job in jobs.items()) else {}


def _is_job(name: str, job: Any) -> bool:
    """Whether an entry of `jobs` is one that `SweepTable.add` made: its name is that of a folder inside the sweep's."""
    is_name = name not in ("", ".", "..") and not re.search(r"[/\x00]", name)
    swept = job.get("swept") if isinstance(job, dict) else None
    return is_name and isinstance(swept, dict) and _is_texts([*swept.values()]) and _is_texts(job.get("overrides"))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
