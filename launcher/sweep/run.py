"""`launcher train -m`: plan, run what is not finished, show the table, give the exit code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from launcher.base.end_report import write_end_report
from launcher.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ConfigError, UserError
from launcher.sweep.controller import Listed, LocalController, Source, StopRequests, sweep_lock, wait_for_old_jobs
from launcher.sweep.devices import make_slots
from launcher.sweep.jobs import Job, SweepTable, needs_run, read_job, refuse_links
from launcher.sweep.plan import SweepPlan, make_plan
from launcher.sweep.runs import FAILED, FINISHED, INTERRUPTED, PRUNED, RunStatus
from launcher.sweep.table import count_states, show_table

_AGENT_VARIABLES = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


def say(text: str) -> None:
    print(text, flush=True)


def refuse_inside_agent() -> None:
    """Every rank would run the whole sweep.

    Raises:
        UserError: this process was started by accelerate launch or torchrun.
    """
    if any(name in os.environ for name in _AGENT_VARIABLES):
        raise UserError(
            "-m cannot be used under accelerate launch: every process would run the whole sweep. "
            "Use: launcher train -m OVERRIDES…, which starts an accelerate launch for every job"
        )


def run_sweep(arguments: Sequence[str], config_dir: str | None, *, is_dry_run: bool) -> int:
    """Runs a sweep to its end, or to a stop.

    Raises:
        UserError: nothing was started.
    """
    refuse_inside_agent()
    plan = make_plan(arguments, config_dir)
    if plan.launcher == "slurm":
        return _run_on_slurm(plan, is_dry_run=is_dry_run)
    if is_dry_run:
        raise UserError("--dry-run prints Slurm scripts: it needs hydra/launcher=slurm")
    return _run_locally(plan)


def _run_on_slurm(plan: SweepPlan, *, is_dry_run: bool) -> int:
    from launcher.sweep import array

    array.check_array(plan)
    if is_dry_run:
        print("\n".join(array.render(plan, plan.grid(SweepTable(plan.paths)))))
        return EXIT_DONE
    with sweep_lock(plan.paths), StopRequests().installed() as stop:
        planned = _write_grid(plan, SweepTable(plan.paths))
        code = array.run_array(plan, planned, stop, say)
        return _show_end(plan, planned, stop) if code is None else code


def _run_locally(plan: SweepPlan) -> int:
    if plan.config.launch.num_machines > 1:
        raise ConfigError(
            [
                f"launch.num_machines={plan.config.launch.num_machines} needs a scheduler for a sweep. "
                "Set hydra/launcher=slurm, or launch.num_machines=1"
            ]
        )
    slots = make_slots(plan.config.sweep.num_slots, plan.num_processes)
    if plan.sweeper == "optuna":
        slots = slots[: plan.sweeper_config["n_jobs"]]
    with sweep_lock(plan.paths), StopRequests().installed() as stop:
        table = SweepTable(plan.paths)
        wait_for_old_jobs([plan.paths.root / name for name in table.jobs], stop, say)
        source, planned = _source(plan, table, len(slots))
        LocalController(slots, plan.metric, stop, say).run(source)
        return _show_end(plan, planned, stop)


def _show_end(plan: SweepPlan, planned: Mapping[str, Job], stop: StopRequests) -> int:
    statuses = {name: read_job(job.output_dir, plan.metric) for name, job in planned.items()}
    show_table(plan.paths.root, statuses, plan.metric)
    if stop.count < 2:
        write_end_report(plan.paths.root)
    return exit_code(plan, statuses, stop.count)


def _write_grid(plan: SweepPlan, table: SweepTable) -> dict[str, Job]:
    """The jobs, in sweep.json before any of them starts."""
    planned = {job.name: job for job in plan.grid(table)}
    table.add(planned.values())
    table.write(plan.metric, **_info(plan))
    return planned


def _info(plan: SweepPlan) -> dict[str, str]:
    return {"launcher": plan.launcher, "sweeper": plan.sweeper, "run_name": plan.config.run_name}


def _source(plan: SweepPlan, table: SweepTable, num_slots: int) -> tuple[Source, dict[str, Job]]:
    """Where the jobs come from, and the jobs; Optuna's appear as they are proposed."""
    if plan.sweeper == "optuna":
        from launcher.sweep.search import Search

        search = Search(plan, table, retry_failed=plan.config.sweep.retry_failed)
        table.write(plan.metric, **_info(plan))
        say(f"{plan.sweeper_config['n_trials']} trials on {num_slots} slots, compared by {plan.metric.key}")
        return search, search.jobs
    planned = _write_grid(plan, table)
    return Listed(_pending(plan, planned, num_slots)), planned


def _pending(plan: SweepPlan, planned: Mapping[str, Job], num_slots: int) -> list[Job]:
    statuses = {name: read_job(job.output_dir, plan.metric) for name, job in planned.items()}
    retry = plan.config.sweep.retry_failed
    pending = [job for name, job in planned.items() if needs_run(job, statuses[name], retry_failed=retry)]
    for job in pending:
        refuse_links(job.output_dir)
    say(f"{len(planned)} jobs: {count_states(statuses)}; {len(pending)} to run on {num_slots} slots")
    num_failed = sum(s.state == FAILED and planned[n] not in pending for n, s in statuses.items())
    if num_failed:
        say(f"{num_failed} failed earlier and stay so; to run them again: sweep.retry_failed=true")
    return pending


def exit_code(plan: SweepPlan, statuses: Mapping[str, RunStatus], num_stops: int) -> int:
    """1 if a job failed, was killed or could not save at its stop; 75 if all that is left stopped with a save; 0 if all
    are done."""
    unfinished = [status for status in statuses.values() if status.state not in (FINISHED, PRUNED)]
    if num_stops > 1 or any(s.state == INTERRUPTED and s.exit_code == EXIT_FAILED for s in unfinished):
        return EXIT_FAILED
    if num_stops and (unfinished or plan.sweeper == "optuna"):
        return EXIT_STOPPED
    if any(status.state == FAILED or status.exit_code != EXIT_STOPPED for status in unfinished):
        return EXIT_FAILED
    return EXIT_STOPPED if unfinished else EXIT_DONE
