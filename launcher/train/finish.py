"""The end of a run: the best (or last) model into output_dir, run.json, the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.base import files, manifest
from launcher.base.errors import EXIT_DONE, EXIT_STOPPED, CheckpointWriteError

if TYPE_CHECKING:
    from launcher.train.loop import Run


def finish(run: Run) -> None:
    """After the last step: waits for the last save, publishes the model, ends. Collective."""
    from launcher.saving.saver import is_name_taken, save_and_wait

    saves = run.config.checkpoint.save_strategy != "no"
    is_hindered = saves and run.processes.on_main(lambda: is_name_taken(run))
    if saves and not is_hindered:
        save_and_wait(run)  # the last step is being saved; a run resumed past its end from another folder was not
    if saves and not is_hindered and run.last_saved_step != run.step:
        raise CheckpointWriteError(
            f"training reached step {run.step} but its checkpoint could not be saved (see above). "
            "The earlier checkpoints are whole: make room and run the same command again to finish"
        )
    source = chosen_checkpoint(run) if saves else None
    if is_hindered and source == run.paths.checkpoint_dir(run.step):
        run.progress.say(f"{source.name} is not of this run and stays: of step {run.step} only the model is kept")
        source = None
    is_temporary = source is None
    source = source or write_model_only(run)
    run.watchdog.pause()
    if run.is_main:  # the others are done: copying and uploading may take longer than a collective waits
        try:
            publish(source, run.paths.root)
        except OSError as error:
            raise CheckpointWriteError(
                f"the model could not be copied to {run.paths.root}: {error}. It is whole in {source}: make room and "
                "run the same command again to finish"
            ) from error
        if is_temporary:
            files.remove_tree(source)
        p = run.state.progress
        run.run_file.update(
            state="finished", exit_code=EXIT_DONE, step=run.step, epoch=p.epoch, best_metric=p.best_metric,
            best_step=p.best_step, hub=run.hub.status(),
        )  # fmt: skip
        say_all(run, run.hub.finish(run.paths.root))
        run.run_file.update(hub=run.hub.status())
        run.progress.say(f"finished {run.step} steps; the model is in {run.paths.root}")


def interrupted(run: Run, reason: str) -> None:
    """After a stop on request. Main process; the others have nothing to do."""
    run.watchdog.pause()
    if run.is_main:
        state = "pruned" if reason == "pruned" else "interrupted"
        run.run_file.update(
            state=state, reason=None if state == "pruned" else reason, exit_code=EXIT_STOPPED, step=run.step,
            epoch=run.state.progress.epoch,
        )  # fmt: skip
        say_all(run, run.hub.finish(None, max_wait_s=0.0))
        run.run_file.update(hub=run.hub.status())
        run.progress.say(f"stopped at step {run.step} of {run.total_steps}; run the same command again to continue")


def say_all(run: Run, lines: list[str]) -> None:
    for line in lines:
        run.progress.say(line)


def chosen_checkpoint(run: Run) -> Path:
    """The best checkpoint with `load_best_model_at_end`, where an evaluated one was saved; else the last."""
    best = run.state.progress.best_step
    last = run.paths.checkpoint_dir(run.step)
    if run.config.checkpoint.load_best_model_at_end:
        if best is not None and run.paths.checkpoint_dir(best).is_dir():
            return run.paths.checkpoint_dir(best)
        if run.config.eval.eval_strategy != "no":
            run.progress.say("no saved checkpoint has been evaluated: the last model is taken instead of the best")
    return last


def write_model_only(run: Run) -> Path:
    """With `save_strategy=no`: the last weights, by the same writers, into a temporary folder. Collective."""
    run.checkpointer.use_plan(run.state.plan(only_model=True))
    target = run.paths.root / ".tmp-checkpoint-final"
    run.checkpointer.save(run.step, {}, target=target)
    result = run.checkpointer.wait(run.watchdog.alive)
    if result is None or result.error is not None:
        raise CheckpointWriteError(f"the final model could not be written: {result.error if result else 'no result'}")
    return target


def publish(source: Path, root: Path) -> None:
    """Copies the model files of a checkpoint to the top of output_dir, each replaced atomically."""
    names = [f.path for f in manifest.read(source).files if not f.path.startswith("state/")]
    names = [n for n in names if n != "trainer_state.json"]
    for stale in root.glob("*.safetensors*"):
        if stale.name not in names:
            stale.unlink()
    for name in names:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source / name, temporary)
        with temporary.open("rb+") as file:
            files.fsync_file(file.fileno(), temporary)
        files.rename(temporary, target)
