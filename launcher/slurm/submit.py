"""Writes what a job needs into its folder, hands it to Slurm, and says what Slurm answered. Imports no torch.

What lies in a run's folder afterwards: `slurm/` (the script, the composed config, job_id), `code/` (what the job runs)
and `logs/`. A job that is queued is not changed by anything that the user edits later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from launcher.base import files, lock, lock_file
from launcher.base.errors import RunLockedError, SlurmError, UserError
from launcher.base.paths import RunPaths
from launcher.base.timeline import Timeline
from launcher.config.launch_rules import leaves
from launcher.config.sbatch import meant_option
from launcher.config.settings import LaunchConfig, RunConfig, to_dict
from launcher.slurm.queue import ask_slurm, live_jobs
from launcher.slurm.render import render, sbatch_lines, with_slurm_defaults
from launcher.slurm.snapshot import Snapshot, take_snapshot

_NEVER = ("PartitionTimeLimit", "PartitionNodeLimit", "PartitionConfig", "BadConstraints")
"""Slurm's reasons for which a job waits until its options or the partition change."""
_FILES_OF_A_JOB = ("config.yaml", "job.sbatch", "job_id", "proof", "restarts", "unsaved.json", "verdict")


@dataclass(frozen=True)
class ArrayJob:
    """One task of an array: its folder and its whole config."""

    run_dir: Path
    config: RunConfig


@dataclass(frozen=True)
class Submission:
    """What Slurm accepted. `log` is the path, with %a for the task where it is an array."""

    job_id: str
    log: str
    script: Path
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """A script that is not written yet."""

    jobs: Sequence[ArrayJob]
    script: Path
    code_dir: Path
    log: str
    text: str


# --------------------------------------------------------------------------- one run


def render_run(config: RunConfig) -> str:
    """The script of a run, as `--dry-run` prints it. Writes nothing and needs no Slurm.

    Raises:
        ConfigError: settings of launch contradict each other.
    """
    return _plan_run(config).text


def submit_run(config: RunConfig) -> Submission:
    """Writes and submits a run.

    Raises:
        ConfigError: settings of launch contradict each other. RunLockedError: output_dir is in use, by a process or by
            a job in the queue. SlurmError: Slurm refused. SlurmUnavailableError: it does not answer.
    """
    plan = _plan_run(config)
    _check_free(plan.jobs[0].run_dir)
    snapshot = _snapshot_of([config])
    _write(plan, snapshot)
    job_id = _sbatch(plan.script)
    _note_queued(plan.jobs[0].run_dir, job_id)
    return Submission(job_id, plan.log.replace("%j", job_id), plan.script, snapshot.notices)


def _note_queued(run_dir: Path, job_id: str) -> None:
    paths = RunPaths(run_dir)
    files.replace_file(paths.slurm_dir / "job_id", f"{job_id}\n".encode(), within=run_dir)
    Timeline(paths).append("queued", job_id=job_id)


def _plan_run(config: RunConfig) -> _Plan:
    run_dir = Path(config.output_dir).expanduser().resolve()
    config = with_slurm_defaults(config, run_dir)
    paths = RunPaths(run_dir)
    template = "multi_node.sbatch" if config.launch.num_machines > 1 else "single_node.sbatch"
    script, log = paths.slurm_dir / "job.sbatch", _log_pattern(paths.logs_dir, config, "slurm-%j.log")
    text = render(
        template, config, run_dirs=[run_dir], code_dir=paths.code_dir, script=script, log=_escaped(log, config)
    )
    return _Plan([ArrayJob(run_dir, config)], script, paths.code_dir, log, text)


def _log_pattern(folder: Path, config: RunConfig, name: str) -> str:
    """The user's own launch.sbatch.output, else one in the run's folder."""
    return str(config.launch.sbatch.get("output", folder / name))


def _escaped(log: str, config: RunConfig) -> str:
    """sbatch reads % in its patterns; a % of the folder's name is doubled."""
    if "output" in config.launch.sbatch:
        return log
    path = Path(log)
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"


# --------------------------------------------------------------------------- an array


def render_arrays(jobs: Sequence[ArrayJob], sweep_dir: Path, max_parallel: int | None = None) -> list[str]:
    """The scripts that `submit_array` would submit. Writes nothing and needs no Slurm."""
    return [
        plan.text for plan in _plan_arrays(jobs, sweep_dir, max_parallel, _snapshot_of([job.config for job in jobs]))
    ]


def submit_array(
    jobs: Sequence[ArrayJob], sweep_dir: Path, max_parallel: int | None = None
) -> list[Submission]:  # fmt: skip
    """Submits jobs as one array. Task N writes `slurm/job_id` = ARRAY_N in its folder, see `live_jobs`.

    Jobs that ask Slurm or Accelerate for different things (a sweep over nodes or GPUs) cannot share an array: each kind
    gets its own.

    Args:
        jobs: their folders and whole configs; those that are queued or running must not be among them (`live_jobs`).
        sweep_dir: where script and code are kept; all nodes see it.
        max_parallel: tasks that run at once, of each array; None: as many as Slurm lets.

    Raises:
        ConfigError, SlurmError, SlurmUnavailableError: as `submit_run`; arrays before the refused one stay submitted.
    """
    snapshot = _snapshot_of([job.config for job in jobs])
    submissions: list[Submission] = []
    for plan in _plan_arrays(jobs, sweep_dir, max_parallel, snapshot):
        _write(plan, snapshot)
        array_id = _sbatch(plan.script)
        for task, job in enumerate(plan.jobs):
            _note_queued(job.run_dir, f"{array_id}_{task}")
        notices = () if submissions else snapshot.notices
        submissions.append(Submission(array_id, plan.log.replace("%A", array_id), plan.script, notices))
    return submissions


def _plan_arrays(
    jobs: Sequence[ArrayJob], sweep_dir: Path, max_parallel: int | None, snapshot: Snapshot
) -> list[_Plan]:  # fmt: skip
    root = sweep_dir.expanduser().resolve()
    kinds: dict[tuple[str, ...], list[ArrayJob]] = {}
    for job in jobs:
        run_dir = job.run_dir.expanduser().resolve()
        config = with_slurm_defaults(job.config, run_dir)
        kinds.setdefault(_kind(config), []).append(ArrayJob(run_dir, config))
    return [_plan_array(same, root, max_parallel, snapshot) for same in kinds.values()]


def _kind(config: RunConfig) -> tuple[str, ...]:
    """All that the script of an array says for each of its tasks."""
    shared = replace(config, run_name="")
    return (*sbatch_lines(shared, ""), repr(_without_resources(config.launch)))


def _without_resources(launch: LaunchConfig) -> LaunchConfig:
    return replace(launch, sbatch={}, num_processes=None)


def _plan_array(jobs: list[ArrayJob], root: Path, max_parallel: int | None, snapshot: Snapshot) -> _Plan:
    """Script and code are named by their content: arrays of the same sweep that are still queued keep theirs."""
    first = jobs[0].config
    code_dir = RunPaths(root).code_dir / snapshot.digest[:12]
    array = f"0-{len(jobs) - 1}" + (f"%{max_parallel}" if max_parallel else "")
    number = 1 + max((int(p.stem.split("-")[1]) for p in RunPaths(root).slurm_dir.glob("array-*.sbatch")), default=0)
    script = RunPaths(root).slurm_dir / f"array-{number}.sbatch"
    config = replace(first, run_name=root.name or "sweep")
    log = _log_pattern(RunPaths(root).logs_dir, config, "slurm-%A_%a.log")
    text = render(
        "array.sbatch", config, run_dirs=[job.run_dir for job in jobs], code_dir=code_dir, script=script,
        log=_escaped(log, config), array=array,
    )  # fmt: skip
    return _Plan(jobs, script, code_dir, log, text)


# --------------------------------------------------------------------------- files and Slurm


def _snapshot_of(configs: Sequence[RunConfig]) -> Snapshot:
    """The code with what any of the configs names."""
    targets = {
        str(value)
        for config in configs
        for key, value in leaves(to_dict(config))
        if key.rpartition(".")[2] == "_target_" or key == "optim.name"
    }
    return take_snapshot(targets, [name for config in configs[:1] for name in config.launch.code_files])


def _write(plan: _Plan, snapshot: Snapshot) -> None:
    try:
        _write_files(plan, snapshot)
    except OSError as error:
        raise UserError(
            f"output_dir={plan.script.parent.parent} cannot be written: {error}. Set output_dir to a folder on a file "
            "system that all nodes share"
        ) from error


def _write_files(plan: _Plan, snapshot: Snapshot) -> None:
    for job in plan.jobs:
        paths = RunPaths(job.run_dir)
        paths.refuse_links()
        paths.slurm_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths.logs_dir.mkdir(mode=0o700, exist_ok=True)
        for path in paths.slurm_dir.iterdir():  # the script reads and writes there: no links, and no pipes to wait at
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                path.unlink()
            elif path.is_dir() and path.name in _FILES_OF_A_JOB:
                raise UserError(f"{path} is a folder, and the job keeps a file there: move it away, and submit again")
        text = yaml.safe_dump(to_dict(job.config), sort_keys=False, allow_unicode=True)
        files.replace_file(paths.slurm_dir / "config.yaml", text.encode(), mode=0o600)
    root = plan.script.parent.parent
    for folder in (plan.script.parent, RunPaths(root).logs_dir, Path(plan.log).parent, plan.code_dir.parent):
        is_private = folder != root and root in folder.parents
        folder.mkdir(mode=0o700 if is_private else 0o777, parents=True, exist_ok=True)
    snapshot.write(plan.code_dir)
    files.replace_file(plan.script, plan.text.encode(), mode=0o600)


def _check_free(run_dir: Path) -> None:
    other = lock.holder(RunPaths(run_dir).lock)
    if other is not None:
        raise RunLockedError(lock_file.describe(other))
    job_id = live_jobs([run_dir]).get(run_dir)
    if job_id is not None:
        raise RunLockedError(
            f"output_dir={run_dir} belongs to job {job_id}, which is queued or running. Wait for it, "
            f"`scancel {job_id}`, or set another output_dir=…"
        )


def _sbatch(script: Path) -> str:
    """The id of the accepted job."""
    done = ask_slurm("sbatch", "--parsable", str(script))
    if done.returncode != 0:
        raise SlurmError(
            f"Slurm refused the job:\n{done.stderr.strip()}\n{_mend(done.stderr)}"
            "Options are set as launch.sbatch.OPTION=VALUE "
            f"(launch.sbatch.partition=…, launch.sbatch.time=\"'12:00:00'\"). The script is {script}"
        )
    job_id = done.stdout.strip().split(";")[0]
    if not job_id.isdecimal():  # test-only, help, version
        raise SlurmError(
            f"sbatch accepted the script but gave no job id: {(done.stdout + done.stderr).strip()}\n"
            "Leave options that submit nothing out of launch.sbatch"
        )
    _check_can_start(job_id)
    return job_id


def _mend(refusal: str) -> str:
    """A line on what is to be set otherwise, where Slurm's words allow a guess, else ''."""
    if unknown := re.search(r"(?:unrecognized|ambiguous) option '--([\w-]+)", refusal):
        meant = meant_option(unknown[1])
        return f"Did you mean launch.sbatch.{meant}?\n" if meant else ""
    if "generic resource" in refusal:
        return "No node has what was asked for. No GPUs: launch.gpus_per_node=0; elsewhere: launch.sbatch.partition=…\n"
    return ""


def _check_can_start(job_id: str) -> None:
    """Withdraws a job that Slurm took but would never start, as it does where EnforcePartLimits is off."""
    job = ask_slurm("scontrol", "-o", "show", "job", job_id).stdout
    reason = _field("Reason", job)
    if reason not in _NEVER and not re.fullmatch(r"(QOS|Assoc)Max\w*PerJob\w*", reason):
        return
    ask_slurm("scancel", job_id)
    partition = ask_slurm("scontrol", "-o", "show", "partition", _field("Partition", job)).stdout
    names = ("PartitionName", "MaxTime", "MaxNodes", "TotalNodes", "TotalCPUs", "MaxMemPerNode", "TRES")
    limits = " ".join(f"{name}={_field(name, partition)}" for name in names)
    asked = " ".join(f"{name}={_field(name, job)}" for name in ("TimeLimit", "NumNodes", "NumCPUs", "TRES"))
    raise SlurmError(
        f"Slurm would never start the job: {reason}\nasked for: {asked}\nit has: {limits}\nThe job was withdrawn. "
        "Options are set as launch.sbatch.OPTION=VALUE, nodes as launch.num_machines. A run that needs longer than the "
        "limit finishes over several jobs"
    )


def _field(name: str, text: str) -> str:
    """The value of NAME=VALUE in scontrol's one-line output."""
    found = re.search(rf"(?:^|\s){name}=(\S*)", text)
    return found.group(1) if found else ""
