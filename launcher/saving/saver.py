"""A save as the loop lives it: room, hand-over, what became of it, which checkpoint is the best, which may go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from launcher.base.errors import CheckpointWriteError
from launcher.checkpoint.engine import SaveResult, raise_failed
from launcher.checkpoint.retention import expired_steps, our_steps
from launcher.saving.save_schedule import is_better, save_line

if TYPE_CHECKING:
    from launcher.train.loop import Agreement, Run

_ASSUMED_BYTES_PER_S = 200e6
"""Of a slow shared disk: with it a first save that comes only when the job's end is near is begun in time."""


def save(run: Run) -> None:
    """`accelerator.save_state`, after the save before has ended and if there is room. Collective."""
    if run.last_saved_step == run.step:
        return
    run.watchdog.alive()
    waited = wait_for_save(run)
    if waited > 1.0:
        run.progress.say(f"step {run.step}: waited {waited:.1f} s for the save before")
    hindered = run.processes.on_main(lambda: hindrance(run))
    if hindered is not None:
        on_save_ended(run, hindered)
        return
    note_best(run)
    run.last_saved_step = run.step
    run.save_schedule.started()
    run.accelerator.save_state(str(run.paths.checkpoint_dir(run.step)))
    if not run.config.checkpoint.async_save:
        wait_for_save(run)


def save_and_wait(run: Run) -> None:
    """Makes sure that this step's state is on disk, with a second attempt where the first one failed. Collective."""
    for _ in range(2):
        save(run)
        wait_for_save(run)
        if run.last_saved_step == run.step:
            return


def hindrance(run: Run) -> SaveResult | None:
    """Why this step's save cannot even begin, as its result; main process."""
    if is_name_taken(run):
        name = run.paths.checkpoint_dir(run.step).name
        return SaveResult(run.step, 0.0, error=f"{name} is there already and is not of this run")
    if not has_room(run, tell=True):
        return SaveResult(run.step, 0.0, error="not enough disk space", found_no_room=True)
    return None


def is_name_taken(run: Run) -> bool:
    """Whether a folder that is not ours has the name of this step's checkpoint: it is never moved; main process."""
    return run.last_saved_step != run.step and run.paths.checkpoint_dir(run.step).exists()


def expected_save_s(run: Run) -> float:
    """Seconds of the last save, of an earlier start too; before there is any, by size. For the main process."""
    if not run.is_main or run.config.checkpoint.save_strategy == "no":
        return 0.0
    if run.last_save_s is None:
        measured = run.metrics.last("save_write_s")
        run.last_save_s = run.checkpointer.plan.total_bytes / _ASSUMED_BYTES_PER_S if measured is None else measured
    return run.last_save_s


def has_room(run: Run, tell: bool = False) -> bool:
    """Whether the disk has room for one more checkpoint; main process.

    Raises:
        CheckpointWriteError: output_dir is not there any more.
    """
    try:
        needed, free = run.checkpointer.missing_bytes()
    except OSError as error:
        raise CheckpointWriteError(
            f"output_dir={run.paths.root} cannot be reached any more: {error}. Step {run.step} could not be saved; "
            "when it is there again, the same command goes on from its last checkpoint"
        ) from error
    if free < needed and tell:
        run.progress.say(
            f"WARNING step {run.step}: no checkpoint saved: it needs {needed:,} bytes and {run.paths.root} has "
            f"{free:,} free. Training goes on and saves as soon as there is room; the earlier checkpoints are whole"
        )
    return free >= needed


def note_best(run: Run) -> None:
    """Makes this step's checkpoint the best one, if its evaluation says so.

    One that only a request to stop brought about is none that an undisturbed run would choose from.
    """
    p = run.state.progress
    run.previous_best = (p.best_metric, p.best_step)
    metric = run.last_eval.get(run.config.checkpoint.metric_key) if run.last_eval.get("step") == run.step else None
    if run.save_schedule.is_regular(run.step, run.total_steps) and is_better(run.config, metric, p.best_metric):
        p.best_metric, p.best_step = metric, run.step


def wait_for_save(run: Run) -> float:
    """Waits until no save is in flight; seconds. Collective."""
    started = time.monotonic()
    result = run.checkpointer.wait(run.watchdog.alive)
    if result is not None:
        on_save_ended(run, result)
    return time.monotonic() - started


def follow_save(run: Run, agreed: Agreement) -> None:
    """Moves the save in flight on, with what the processes agreed on. Collective."""
    result = run.checkpointer.advance(agreed.num_undone, agreed.num_failed)
    if result is not None:
        on_save_ended(run, result)


def on_save_ended(run: Run, result: SaveResult) -> None:
    """A save was committed (metrics, Hub, retention) or failed (nothing of it remains)."""
    run.save_schedule.ended(result)
    p = run.state.progress
    if result.error is not None:
        if p.best_step == result.step:
            p.best_metric, p.best_step = run.previous_best
        if run.last_saved_step == result.step:
            run.last_saved_step = 0
        if run.config.checkpoint.on_error == "stop":
            raise_failed(result)
        run.progress.say(f"WARNING the save of step {result.step} failed: {result.error}. Training goes on")
        return
    run.last_save_s = result.write_s
    if run.is_main:
        run.metrics.append(save_line(result))
        run.hub.checkpoint_committed(result.step, run.paths.checkpoint_dir(result.step))
        old = expired_steps(our_steps(run.paths), run.config.checkpoint.save_total_limit, p.best_step)
        run.checkpointer.expire([run.paths.checkpoint_dir(step) for step in old])
