"""The one owner of a save: when, whether there is room, which checkpoint is the best, which may go, what the Hub gets.

The loop asks and tells (`is_due`, `evaluated`, `save`, `follow`); the writing is `checkpoint.engine`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from launcher.base import files, manifest
from launcher.base.errors import CheckpointWriteError
from launcher.base.files import free_bytes
from launcher.base.lock import RunLock
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.checkpoint.engine import Checkpointer, Phase
from launcher.checkpoint.resume import own_checkpoints
from launcher.checkpoint.retention import expired_steps, kept_words, our_steps
from launcher.checkpoint.save_result import SaveResult, raise_failed
from launcher.config.settings import RunConfig
from launcher.hub import Hub
from launcher.saving.checkpoint_size import short_of_room
from launcher.saving.save_schedule import SaveSchedule, is_better, save_line
from launcher.saving.training_state import TrainingState

_ASSUMED_BYTES_PER_S = 200e6
"""Of a slow shared disk: with it a first save that comes only when the job's end is near is begun in time."""
_WORTH_SAYING_S = 5.0


class Outlet(Protocol):
    """Where a save is told of: the main process's metrics.jsonl and progress display; nowhere on the others."""

    def say(self, text: str) -> None: ...

    def saved(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl for a committed save."""

    def last(self, key: str) -> Any:
        """The newest value of a key of metrics.jsonl, also of an earlier start."""


class Saver:
    """All methods except `is_due`, `evaluated` and `expected_s` are collective.

    Args:
        save_state: `accelerator.save_state`.
        lock: held by the main process. Without it nothing is begun any more; the writer asks again before a commit.
        alive: called while waiting for a save, for the watchdog.
        is_stopping: whether somebody has asked for a stop, so that no wait may last.
        is_judged_later: whether the checkpoint of a step will be evaluated in the background (`judged`).
        saved_step: the step of the checkpoint that this start continues from, 0 if it is not of this run.
    """

    def __init__(
        self, config: RunConfig, paths: RunPaths, processes: Processes, state: TrainingState,
        checkpointer: Checkpointer, save_state: Callable[[str], Any], *, lock: RunLock, schedule: SaveSchedule,
        outlet: Outlet, hub: Hub, alive: Callable[[], None], is_stopping: Callable[[], bool],
        is_judged_later: Callable[[int], bool], total_steps: int, saved_step: int,
    ) -> None:  # fmt: skip
        self._config, self._paths, self._processes = config, paths, processes
        self._state, self.checkpointer, self._save_state, self._lock = state, checkpointer, save_state, lock
        self._schedule, self._outlet, self._hub = schedule, outlet, hub
        self._alive, self._is_stopping, self._is_judged_later = alive, is_stopping, is_judged_later
        self._total_steps = total_steps
        self.saved_step = saved_step
        """The newest step that is saved or being saved; 0: none."""
        self.unjudged: list[int] = []
        """Rising steps of checkpoints that an evaluation in the background has to judge yet; none of them is deleted.
        The same on every process."""
        self._evaluated: tuple[int, float | None] = (-1, None)
        self._previous_best: tuple[float | None, int | None] = (None, None)
        self._last_write_s: float | None = None
        self._last_error: str | None = None
        self._told_undeleted: str | None = None
        self._is_reserved = False

    @property
    def is_on(self) -> bool:
        """Whether this run saves at all."""
        return self._config.checkpoint.save_strategy != "no"

    @property
    def is_whole(self) -> bool:
        """Whether the current step is saved (or being saved)."""
        return self.saved_step == self._state.step

    # ------------------------------------------------------------------ when

    def is_due(self, step: int) -> bool:
        """Whether a save is due after a step, by the strategy, the clock, or since one failed: on the main process,
        whose clock and disk decide."""
        if not self._processes.is_main:
            return False
        is_wanted = self._schedule.is_due(step, improved=False)
        return is_wanted or (self._schedule.is_waiting_for_room and self._lack_of_room() is None)

    def expected_s(self) -> float:
        """Seconds of the last save, of an earlier start too; before there is any, by size."""
        if not self.is_on:
            return 0.0
        if self._last_write_s is None:
            measured = self._outlet.last("save_write_s")
            by_size = self.checkpointer.plan.total_bytes / _ASSUMED_BYTES_PER_S
            self._last_write_s = by_size if measured is None else float(measured)
        return self._last_write_s

    def evaluated(self, metric: float | None) -> None:
        """Notes the metric of the current step's weights."""
        self._evaluated = (self._state.step, metric)

    @property
    def has_improved(self) -> bool:
        """Whether the current step was evaluated and beats the best."""
        step, metric = self._evaluated
        return step == self._state.step and is_better(self._config, metric, self._state.progress.best_metric)

    def is_candidate(self, step: int) -> bool:
        """Whether an evaluation in the background decides if the checkpoint of this step is the best."""
        return self.is_on and self._is_judged_later(step) and self._schedule.is_regular(step, self._total_steps)

    def judged(self, step: int, metric: float | None) -> None:
        """The metric of an unjudged checkpoint, None where there will be none. Of equal ones the first is the best, in
        whatever order they are judged."""
        self.unjudged.remove(step)
        self.note_metric(step, metric)
        self.retain()

    def note_metric(self, step: int, metric: float | None) -> None:
        """Makes the checkpoint of a candidate's step the best one, if it is."""
        p = self._state.progress
        is_first = metric == p.best_metric and p.best_step is not None and step < p.best_step
        if is_first or is_better(self._config, metric, p.best_metric):
            p.best_metric, p.best_step = metric, step

    def judge_again(self) -> None:
        """At a start: with another metric than before, or where the best is not here, the best is found anew among the
        checkpoints that are kept. Collective."""
        p, key = self._state.progress, self._config.checkpoint.metric_key
        before, kept = (p.best_step, p.best_metric), self._processes.on_main(lambda: own_checkpoints(self._paths))
        measured = {line["step"]: line.get(key) for line in p.log_history.evaluations}
        is_other_metric = p.best_step in measured and measured[p.best_step] != p.best_metric
        is_gone = p.best_step is not None and p.best_step not in kept
        if is_other_metric or is_gone:
            p.best_metric = p.best_step = None
        for step, metric in measured.items():
            if step in kept and self._schedule.is_regular(step, self._total_steps):
                self.note_metric(step, metric)
        if before[0] is None or before == (p.best_step, p.best_metric):
            return
        best = "none is known yet" if p.best_step is None else f"the best so far is step {p.best_step}"
        if is_gone and not is_other_metric:
            self._outlet.say(f"checkpoint-{before[0]}, which was the best, is not here. Of those that are here {best}")
            return
        self._state.judge_anew()
        self._outlet.say(f"another metric than before, {key}, decides which checkpoint is the best: {best}")

    def save_again(self) -> None:
        """Saves this step anew, whose checkpoint is gone: its state is still in memory."""
        self.saved_step = 0
        self.save_and_wait()

    def maybe_save(self, *, is_due: bool) -> None:
        """Saves where the strategy asks for it, on improvement, and after the last step."""
        is_best = self._config.checkpoint.save_strategy == "best" and self.has_improved
        if self.is_on and (is_due or is_best or self._state.step >= self._total_steps):
            self.save()

    # ------------------------------------------------------------------ a save

    def save(self) -> None:
        """`accelerator.save_state` into `checkpoint-N`, once the save before has ended and if there is room."""
        step = self._state.step
        if self.saved_step == step:
            return
        self._alive()
        self.wait(is_stall=True)
        hindered = self._stuck() or self._processes.on_main(self._hindrance)
        if hindered is not None:
            self._ended(hindered)
            return
        self._note_best()
        self.saved_step = step
        self._schedule.started()
        self._save_state(str(self._paths.checkpoint_dir(step)))
        if not self._config.checkpoint.async_save:
            self.wait(is_stall=True)

    def save_and_wait(self) -> None:
        """Makes sure that this step's state is on disk, with a second attempt where the first one failed.

        Somebody waits for the end of this process, so a writer that stands still is replaced at once.
        """
        for _ in range(2):
            self.wait(is_urgent=True)
            self.save()
            self.wait(is_urgent=True)
            if self.is_whole:
                return
            self._processes.on_main(self.checkpointer.settle)

    def lost(self) -> str | None:
        """What is lost where this step was to be saved and is not, and from where the run goes on. Collective."""
        if not self.is_on or self.is_whole:
            return None
        step, newest = self._state.step, self._processes.on_main(lambda: max(our_steps(self._paths), default=None))
        lost = "no checkpoint is here, so all steps of this start are lost: the same command begins where this one did"
        if newest is not None:
            lost = f"the steps after {newest} are lost: the same command goes on from checkpoint-{newest}"
        return f"step {step} could not be saved: {self._last_error}. {lost[0].upper()}{lost[1:]}"

    def wait(self, *, is_urgent: bool = False, is_stall: bool = False) -> None:
        """Waits until no save is in flight, or until its writer turns out to stand still (`checkpointer.phase`).

        Args:
            is_stall: steps wait for this save, which is part of what it costs.
        """
        started = told = time.monotonic()
        before_s = self.checkpointer.stall_s  # it grows in the wait, by a part of the wait

        def waiting() -> None:
            nonlocal told
            self._alive()
            if time.monotonic() - told > _WORTH_SAYING_S * (1 if told == started else 12):
                told = time.monotonic()
                waited = told - started
                self._outlet.say(f"step {self._state.step}: waiting for the save before, {waited:.0f} s so far")

        result = self.checkpointer.wait(waiting, lambda: is_urgent or self._is_stopping())
        if result is not None:
            if is_stall:
                result.stall_s = before_s + time.monotonic() - started
            self._ended(result)

    def follow(self, num_undone: float, num_failed: float, num_committed: float) -> None:
        """Moves the save in flight on, with what the processes agreed on (sums of `checkpointer.status`)."""
        if not self._is_reserved and self.is_on:  # the optimizer has its state now
            self.checkpointer.reserve()
            self._is_reserved = True
            if self._processes.is_main and (notice := self._short_of_room()):
                self._outlet.say(notice)
            for notice in self.checkpointer.notices:
                self._outlet.say(notice)
        result = self.checkpointer.advance(num_undone, num_failed, num_committed)
        if result is not None:
            self._ended(result)

    def save_model_only(self, target: Path) -> None:
        """Writes the weights alone, as `save_pretrained` would, into `target`.

        Raises:
            CheckpointWriteError: they could not be written.
        """
        self.checkpointer.use_plan(self._state.plan(only_model=True))
        error = self._processes.on_main(self._lack_of_room)
        self._processes.on_main(self._lock.check)
        if error is None:
            self.checkpointer.save(self._state.step, {}, target)
            result = self.checkpointer.wait(self._alive, lambda: True)
            error = result.error if result is not None else "its writer stands still"
        if error is not None:
            raise CheckpointWriteError(
                f"training reached step {self._state.step} but its model could not be written: {error}. Make room and "
                f"run the same command again to finish; {kept_words(self._paths)}"
            )

    def has_regular(self, step: int) -> bool:
        """Whether an undisturbed run has a checkpoint of this step or an earlier one."""
        return self._schedule.has_regular(step)

    def went_back(self) -> None:
        """The state is that of an earlier checkpoint again; nothing is in flight."""
        self.saved_step = self._state.step
        self._evaluated, self._previous_best = (-1, None), (None, None)

    def check_lock(self) -> None:
        """Main process. Raises: RunLockLostError, where output_dir is another run's now."""
        self._lock.check()

    def close(self) -> None:
        """Ends the writer, once it has done all it was told."""
        self.checkpointer.close()

    # ------------------------------------------------------------------ what may hinder one

    def _stuck(self) -> SaveResult | None:
        if self.checkpointer.phase is Phase.IDLE:
            return None
        return SaveResult(
            self._state.step, 0.0, error="the writer of the save before stands still (stopped, or its disk hangs)"
        )

    def _hindrance(self) -> SaveResult | None:
        """Why this step's save cannot even begin, as its result; main process.

        Raises:
            RunLockLostError: output_dir is another run's now.
        """
        self._lock.check()
        if self.is_name_taken():
            name = self._paths.checkpoint_dir(self._state.step).name
            return SaveResult(self._state.step, 0.0, error=f"{name} is there already and is not of this run")
        lack = self._lack_of_room()
        return SaveResult(self._state.step, 0.0, error=lack, found_no_room=True) if lack is not None else None

    def is_name_taken(self) -> bool:
        """Whether a folder that is not ours has the name of this step's checkpoint: it is never moved; main process."""
        return not self.is_whole and files.is_taken(self._paths.checkpoint_dir(self._state.step))

    def _lack_of_room(self) -> str | None:
        """Why the disk has no room for a save, or None; main process.

        Raises:
            CheckpointWriteError: output_dir is not there any more.
        """
        needed = self.checkpointer.needed_bytes()
        try:
            free = free_bytes(self._paths.root)
        except OSError as error:
            raise CheckpointWriteError(
                f"output_dir={self._paths.root} cannot be reached any more: {error}. Step {self._state.step} could not "
                "be saved; when it is there again, the same command goes on from its last checkpoint"
            ) from error
        if free >= needed:
            return None
        return f"not enough disk space: it needs {needed:,} bytes and {self._paths.root} has {free:,} free"

    def _short_of_room(self) -> str | None:
        plan = self.checkpointer.plan
        model = sum(file.num_bytes for file in plan.files if manifest.role_of(file.path) != "state")
        return short_of_room(self._config, self._paths, self.checkpointer.needed_bytes(), model, self._total_steps)

    # ------------------------------------------------------------------ what became of one

    def made_up_for(self) -> None:
        """An evaluation that a stop had left out was made up for: the checkpoint of this step may be the best."""
        if self.is_whole:
            self._note_best()

    def _note_best(self) -> None:
        """Makes this step's checkpoint the best one, if its evaluation says so.

        A save requested only by a stop is never a candidate: an undisturbed run would not have made it.
        """
        p = self._state.progress
        self._previous_best = (p.best_metric, p.best_step)
        if self.has_improved and self._schedule.is_regular(self._state.step, self._total_steps):
            p.best_metric, p.best_step = self._evaluated[1], self._state.step

    def _ended(self, result: SaveResult) -> None:
        """A save was committed (metrics, Hub, retention) or failed (nothing of it remains)."""
        self._schedule.ended(result)
        p = self._state.progress
        if result.error is not None:
            self._processes.on_main(self._lock.check)
            self._last_error = result.error
            if p.best_step == result.step:
                p.best_metric, p.best_step = self._previous_best
            if self.saved_step == result.step:
                self.saved_step = 0
            if self._config.checkpoint.on_error == "stop":
                raise_failed(result, kept_words(self._paths))
            what, then = f"the save of step {result.step} failed", ""
            if result.found_no_room:
                what, then = f"step {result.step}: no checkpoint saved", " and saves as soon as there is room"
            self._outlet.say(f"WARNING {what}: {result.error}. Training goes on{then}; {kept_words(self._paths)}")
            return
        self._last_write_s = result.write_s
        if self.is_candidate(result.step):
            self.unjudged.append(result.step)
        self._outlet.saved(save_line(result))
        self._hub.checkpoint_committed(result.step, self._paths.checkpoint_dir(result.step))
        self.retain()

    def retain(self) -> None:
        """Tells the writer which checkpoints may go; what the Hub still copies stays until the next time. Not
        collective: only the main process does something."""
        if not self._processes.is_main or not self.is_on:
            return
        if (why := self.checkpointer.undeleted) not in (None, self._told_undeleted):
            self._told_undeleted = why
            self._outlet.say(f"WARNING an old checkpoint could not be deleted: {why}. Make that possible, or delete it")
        best = self._state.progress.best_step
        steps = our_steps(self._paths)
        needed = [*self._rollback_target(steps), *self.unjudged]
        old = expired_steps(steps, self._config.checkpoint.save_total_limit, best, needed)
        folders = [self._paths.checkpoint_dir(step) for step in old]
        held = self._hub.held_names
        self.checkpointer.expire([f for f in folders if f.name not in held], self._hub.pending_dirs)

    def _rollback_target(self, steps: list[int]) -> list[int]:
        """Where a spike in the next step would take the run back to; empty where nowhere."""
        train = self._config.train
        if train.on_spike != "rollback":
            return []
        return [s for s in steps if s <= self._state.step + 1 - train.spike_rollback_steps][-1:]
