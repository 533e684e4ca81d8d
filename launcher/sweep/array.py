"""`hydra/launcher=slurm`: the jobs of a sweep as the tasks of a Slurm array."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.base import files
from launcher.base.errors import EXIT_DONE, ConfigError, SlurmUnavailableError
from launcher.base.paths import RunPaths
from launcher.slurm import ArrayJob, cancel, live_jobs, render_arrays, submit_array
from launcher.sweep.controller import StopRequests
from launcher.sweep.jobs import Job, job_record, make_folders, needs_run, read_job, refuse_links
from launcher.sweep.plan import SweepPlan
from launcher.sweep.runs import FINISHED, PRUNED, RunStatus

_POLL_S = 10.0
_STOP_POLL_S = 0.2


def check_array(plan: SweepPlan) -> None:
    """Refuses what an array cannot do.

    Raises:
        ConfigError: Optuna needs the results of earlier jobs before it proposes the next ones.
    """
    if plan.sweeper == "optuna":
        raise ConfigError(
            [
                "hydra/sweeper=optuna proposes jobs one by one, an array holds all of them: they cannot be combined. "
                "Set hydra/launcher=local inside an allocation (srun, salloc), or hydra/sweeper=basic"
            ]
        )


def array_jobs(plan: SweepPlan, jobs: list[Job]) -> list[ArrayJob]:
    """The jobs with their whole settings, which are what a task gets: later edits of conf/ do not change it."""
    result = []
    for job in jobs:
        values = {**job.swept, **plan.own_texts(job.name, job.swept)}
        result.append(ArrayJob(job.output_dir, plan.configs.of(values, is_exact=True)))
    return result


def render(plan: SweepPlan, jobs: list[Job]) -> list[str]:
    """The scripts, for --dry-run; nothing is written."""
    return render_arrays(array_jobs(plan, jobs), plan.paths.root, _max_parallel(plan))


def _max_parallel(plan: SweepPlan) -> int | None:
    value = plan.launcher_config.get("array_parallelism") or plan.config.sweep.num_slots
    return int(value) if value else None


def run_array(
    plan: SweepPlan, planned: Mapping[str, Job], stop: StopRequests, say: Callable[[str], None]
) -> int | None:
    """Submits what is not finished or queued already, and waits for the end unless `sweep.wait=false`.

    Returns:
        An exit code where it does not wait, else None.
    """
    retry = plan.config.sweep.retry_failed
    wanted = [job for job in planned.values() if needs_run(job, _status(plan, job), retry_failed=retry)]
    queued = live_jobs([job.output_dir for job in wanted])
    pending = [job for job in wanted if job.output_dir not in queued]
    num_done = len(planned) - len(wanted)
    say(f"{len(planned)} jobs: {num_done} done, {len(queued)} queued or running, {len(pending)} to submit")
    if pending:
        for job in pending:
            refuse_links(job.output_dir)
        for job in pending:
            make_folders(job.output_dir)
            files.write_json(job_record(job.output_dir), {"overrides": list(job.overrides)}, within=job.output_dir)
        for submission in submit_array(array_jobs(plan, pending), plan.paths.root, _max_parallel(plan)):
            for text in (*submission.notices, f"submitted Slurm array {submission.job_id}, logs in {submission.log}"):
                say(text)
    if not plan.config.sweep.wait:
        say(f"to see how it goes: launcher status {plan.paths.root}")
        return EXIT_DONE
    _wait(plan, {job.output_dir: job for job in wanted}, stop, say)
    return None


def _status(plan: SweepPlan, job: Job) -> RunStatus:
    return read_job(job.output_dir, plan.metric)


def _wait(plan: SweepPlan, jobs: dict[Path, Job], stop: StopRequests, say: Callable[[str], None]) -> None:
    """Until no job is queued or running. A stop reaches the jobs through their STOP files; a second cancels them."""
    num_obeyed = 0
    next_poll = 0.0
    while True:
        if stop.count > num_obeyed:
            num_obeyed = stop.count
            next_poll = 0.0
            say(
                "stopping: running jobs save, the others leave the queue; once more kills"
                if num_obeyed == 1
                else "killing"
            )
        if time.monotonic() >= next_poll:
            next_poll = time.monotonic() + _POLL_S
            try:
                live = live_jobs(jobs)
                if num_obeyed:
                    _pass_on_stop(live, is_kill=num_obeyed > 1)
            except SlurmUnavailableError as error:  # it comes back; the jobs go on meanwhile
                say(str(error))
                continue
            for folder in [folder for folder in jobs if folder not in live]:
                job = jobs.pop(folder)
                say(f"{_status(plan, job).state:<9} {job.name}")
            if not jobs:
                return
        time.sleep(_STOP_POLL_S)


def _pass_on_stop(live: Mapping[Path, str], *, is_kill: bool) -> None:
    """Once per poll: a job that was just starting removed the STOP file of a moment ago.

    Its text says stop_file: after a `signal` the job would queue itself again.
    """
    cancel(live.values(), only_pending=not is_kill)
    for folder in live:
        if not is_kill and read_job(folder, None).state not in (FINISHED, PRUNED):
            files.replace_file(RunPaths(folder).stop_file, b"stop_file")
