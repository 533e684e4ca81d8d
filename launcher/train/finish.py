"""The end of a run: the best (or last) model into output_dir, run.json, the Hub."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from pathlib import Path

from launcher.base import files, manifest, words
from launcher.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, CheckpointWriteError
from launcher.base.paths import RunPaths
from launcher.checkpoint.layout import MAX_SHARD_BYTES
from launcher.checkpoint.resume import own_checkpoints, put_aside_if_damaged
from launcher.checkpoint.retention import kept_words, sweep_leftovers
from launcher.saving.interop.target import Exported
from launcher.train import planned
from launcher.train.loop import Run, is_stopped_early


def finish(run: Run, paths: RunPaths) -> None:
    """After the last step: waits for the last save, publishes the model, ends. Collective."""
    if is_stopped_early(run):
        run.recorder.say(
            f"step {run.step}: stopped early, {run.config.checkpoint.metric_key} has not improved for "
            f"{run.state.progress.evals_without_gain} evaluations (train.early_stopping_patience)"
        )
    with run.recorder.during("save"):
        source, is_temporary = final_model(run, paths)
    run.watchdog.pause()
    run.processes.on_main(run.saver.check_lock)
    if run.config.model.merge_at_end:
        source, is_temporary = run.processes.on_main(lambda: merged(run, source, is_temporary, paths)), True
    run.processes.on_main(lambda: publish(source, paths.root, is_temporary=is_temporary, alive=run.watchdog.alive))
    run.watchdog.pause()
    p = run.state.progress
    run.recorder.update_run(
        state="finished", exit_code=EXIT_DONE, step=run.step, epoch=p.epoch, best_metric=p.best_metric,
        best_step=p.best_step, hub=run.hub.status(), stopped_early=is_stopped_early(run),
    )  # fmt: skip
    # The others end here: uploading may take longer than a collective waits. Who asks for a stop now has the model.
    say_all(run, run.hub.finish(paths.root, is_stopping=lambda: run.stop.reason_code(0.0, 0.0) > 0))
    if run.processes.is_main:
        with contextlib.suppress(OSError):
            sweep_leftovers(paths)  # of a failed save that the disk would not let go: no next start would
    run.saver.retain()  # what was held while it was copied
    run.stop.clear()
    run.recorder.update_run(hub=run.hub.status())
    run.recorder.say(f"finished {run.step} step{'s' * (run.step != 1)}; the model is in {paths.root}")
    say_all(run, own_error(run, paths))
    say_all(run, what_next(run, paths))


def interrupted(run: Run, reason: str) -> int:
    """After a stop on request. Collective.

    Returns:
        The exit code: EXIT_STOPPED says that it was saved, so one whose step could not be saved ends with EXIT_FAILED.
        A pruned run is not to go on: nothing of it is lost.
    """
    run.watchdog.pause()
    run.processes.on_main(run.saver.check_lock)
    is_pruned = reason == "pruned"
    lost = None if is_pruned else run.saver.lost()
    error = {} if lost is None else {"error": f"stopped on request ({reason}), but {lost}"}
    code = EXIT_STOPPED if lost is None else EXIT_FAILED
    run.recorder.update_run(
        state="pruned" if is_pruned else "interrupted", reason=None if is_pruned else reason, exit_code=code,
        step=run.step, epoch=run.state.progress.epoch, **error,
    )  # fmt: skip
    say_all(run, run.hub.finish(None, max_wait_s=0.0))
    run.recorder.update_run(hub=run.hub.status())
    if lost is not None:
        run.recorder.say(f"WARNING {lost}")
    else:
        run.recorder.say(f"stopped at step {run.step} of {run.total_steps}; run the same command again to continue")
    return code


def own_error(run: Run, paths: RunPaths) -> list[str]:
    """How far `launcher plan` was from the truth, also in run.json."""
    if not run.processes.is_main:
        return []
    told = planned.compare(run.config, paths, run.train_step.accelerator.device, run.processes.world_size)
    if told:
        run.recorder.update_run(planned_and_measured=told)
    return planned.in_words(told)


def what_next(run: Run, paths: RunPaths) -> list[str]:
    """Which step was the best by what, and the commands that usually follow."""
    p, checkpoint = run.state.progress, run.config.checkpoint
    best = []
    if p.best_step is not None and p.best_metric is not None:
        what = "the model in that folder" if checkpoint.load_best_model_at_end else "the folder has the last one"
        best = [f"best: step {p.best_step} by {checkpoint.metric_key} {words.metric(p.best_metric)}; {what}"]
    root = shlex.quote(str(paths.root))
    return [
        *best, "next:", f"  launcher checkpoints {root}", f"  launcher report {root}",
        f"  launcher push {root} --repo-id ORG/NAME        or in Python: from_pretrained({str(paths.root)!r})",
    ]  # fmt: skip


def say_all(run: Run, lines: list[str]) -> None:
    for line in lines:
        run.recorder.say(line)


def final_model(run: Run, paths: RunPaths) -> tuple[Path, bool]:
    """The folder whose model is the run's, and whether it is a temporary one made for that. Collective.

    Raises:
        CheckpointWriteError: neither the last checkpoint nor the model alone could be written.
    """
    temporary = paths.root / ".tmp-checkpoint-final"
    if not run.saver.is_on:
        run.saver.save_model_only(temporary)
        return temporary, True
    is_name_taken = run.processes.on_main(run.saver.is_name_taken)
    if not is_name_taken:
        run.saver.save_and_wait()  # a run that was resumed past its end from another folder has no save in flight
    if is_name_taken:
        run.recorder.say(
            f"checkpoint-{run.step} is not of this run and stays: of step {run.step} only the model is kept"
        )
    elif not run.saver.is_whole:
        run.recorder.say(
            f"WARNING training reached step {run.step} but its checkpoint could not be saved: only a model is kept. "
            f"Training beyond this step needs a checkpoint: {kept_words(paths)}"
        )
    if (best := chosen_best(run, paths)) is not None:
        return best, False
    if run.saver.is_whole:
        return paths.checkpoint_dir(run.step), False
    run.saver.save_model_only(temporary)
    return temporary, True


def chosen_best(run: Run, paths: RunPaths) -> Path | None:
    """The best checkpoint with `load_best_model_at_end`, where an evaluated one was saved."""
    if not run.config.checkpoint.load_best_model_at_end:
        return None
    if (best := whole_best_dir(run, paths)) is not None:
        return best
    if run.config.eval.eval_strategy != "no":
        key = run.config.checkpoint.metric_key
        run.recorder.say(f"no saved checkpoint has a finite {key}: the last model is taken instead of the best")
    return None


def whole_best_dir(run: Run, paths: RunPaths) -> Path | None:
    """The folder of the best checkpoint, every byte of its model verified: it may have been saved days ago. A damaged
    one is renamed, and the next best takes its place; None where there is none. Collective."""
    while (step := run.state.progress.best_step) is not None:
        folder = paths.checkpoint_dir(step)
        run.watchdog.alive()
        if step in run.processes.on_main(lambda: own_checkpoints(paths)):
            notice = put_aside_if_damaged(folder, run.processes)
            if notice is None:
                return folder
            run.recorder.say(f"WARNING {notice}")
        if step == run.step and run.saver.is_whole:
            run.saver.save_again()
        run.saver.judge_again()
    return None


def publish(source: Path, root: Path, *, is_temporary: bool, alive: Callable[[], None] = lambda: None) -> None:
    """Puts the model files of a checkpoint to the top of output_dir, each replaced atomically; main process.

    A temporary source is used up and removed.

    Args:
        alive: called while it goes on: a file system may stand still.

    Raises:
        CheckpointWriteError: a file could not be written; what was there before is whole.
    """
    names = model_files(source)
    try:
        for stale in [*root.glob("*.safetensors*"), root / "config.json", root / "adapter_config.json"]:
            if stale.name not in names:
                files.remove_file(stale)
        for name in names:
            alive()
            files.make_dirs((root / name).parent, within=root)
            for half in (root / name).parent.glob(f".{Path(name).name}.tmp-*"):  # of a publication that was killed
                files.remove_file(half)
            if is_temporary:
                files.rename(source / name, root / name)
            else:
                files.copy_file(source / name, root / name, within=root, alive=alive)
        if is_temporary:
            files.remove_tree(source)
    except OSError as error:
        raise CheckpointWriteError(
            f"the model could not be put into {root}: {error}. It is whole in {source}: make room and "
            "run the same command again to finish"
        ) from error


def model_files(source: Path) -> list[str]:
    """Of a checkpoint what its manifest says; of a merged model everything."""
    if not (source / manifest.NAME).is_file():
        return sorted(files.list_files(source))
    return [entry.path for entry in manifest.read(source).files if entry.role != "state"]


def merged(run: Run, source: Path, is_temporary: bool, paths: RunPaths) -> Path:
    """The adapter of a checkpoint merged into its base, in a temporary folder (`model.merge_at_end`); main process.

    Raises:
        UserError: the base is gone. CheckpointWriteError: no room; the checkpoint is whole.
    """
    from launcher.saving.interop.merging import write_merged  # imports peft

    target = paths.root / ".tmp-checkpoint-merged"
    entries = [entry.path for entry in manifest.read(source).files if entry.role in ("model", "card")]
    try:
        files.remove_tree(target)
        target.mkdir()
        write_merged(
            Exported(source, tuple(entries), is_resumable=False), target, max_shard_bytes=MAX_SHARD_BYTES,
            trust_remote_code=run.config.model.trust_remote_code, alive=run.watchdog.alive,
        )  # fmt: skip
        if is_temporary:
            files.remove_tree(source)
    except OSError as error:
        files.remove_tree(target)
        raise CheckpointWriteError(
            f"the merged model could not be put into {paths.root}: {error}. The adapter is whole in {source}: make "
            "room and run the same command again to finish"
        ) from error
    return target
