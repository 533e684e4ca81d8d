"""Evaluation in the background (`eval.in_background`): a process beside the training evaluates committed checkpoints.

Checkpoints at whose step an evaluation is due wait in `Saver.unjudged`, oldest first: the one that waits longest holds
retention up, and so the best is known in the order of the steps. The process (`train.evaluate_checkpoint`) leaves what
it finds in evaluations/, durable, before the main process hears of it; all processes take it over at a step border. So
a kill at any moment loses no result, and what was not evaluated is found and evaluated by the next start.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from launcher.base import evaluations, files
from launcher.base.evaluations import Evaluation
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.base.stop_requests import REASONS, StopRequests
from launcher.config.settings import RunConfig
from launcher.saving.saver import Saver
from launcher.saving.training_state import TrainingState
from launcher.train.evaluator_process import EvaluatorProcess
from launcher.train.recorder import Recorder

_ATTEMPTS = 2
_POLL_S = 0.2
_WORTH_SAYING_S = 5.0


class Background:
    """All methods are collective but `num_judged`. Where it is off, only results of an earlier start are taken over.

    Args:
        is_due: whether an evaluation is due after a step.
        epoch_after: epochs that are done after a step.
        process: starts an evaluator when it gets its first checkpoint; used on the main process.
        alive: called while waiting, for the watchdog.
    """

    def __init__(
        self, config: RunConfig, paths: RunPaths, processes: Processes, state: TrainingState, saver: Saver,
        recorder: Recorder, stop: StopRequests, is_due: Callable[[int], bool],
        epoch_after: Callable[[int], float], process: EvaluatorProcess, alive: Callable[[], None],
    ) -> None:  # fmt: skip
        self._config, self._paths, self._processes, self._state = config, paths, processes, state
        self._saver, self._recorder, self._stop, self._epoch_after = saver, recorder, stop, epoch_after
        self._is_due, self._process, self._alive = is_due, process, alive
        self.is_on = config.eval.in_background
        self.failed: list[int] = []
        """Steps of checkpoints that could not be evaluated in this start."""
        self._attempts: dict[int, int] = {}
        self._found: list[tuple[int, dict[str, Any] | None, str]] = []  # step, Evaluation or None, why not

    # ------------------------------------------------------------------ a start

    def begin(self) -> None:
        """At a start, or when the run went back: what is known of checkpoints up to this step, and what is not."""
        self._process.close()
        self._found = []
        self._saver.judge_again()
        known, unjudged = self._processes.on_main(self._look)
        for raw in known:
            self._take_over(Evaluation(**raw), is_new=False)
        self._saver.unjudged[:] = unjudged
        self._tell_best()

    def _look(self) -> tuple[list[dict[str, Any]], list[int]]:
        step = self._state.step
        if not self.is_on and not self._paths.evaluations_dir.is_dir():
            return [], []
        with contextlib.suppress(OSError):  # then no result can be written, and that is told
            files.make_dirs(self._paths.evaluations_dir, within=self._paths.root)
        evaluations.remove_beyond(self._paths, step if self._saver.saved_step else -1)
        known = {line["step"] for line in self._state.progress.log_history.evaluations}
        found = [
            e for s in evaluations.steps(self._paths) if s not in known and (e := evaluations.read(self._paths, s))
        ]
        known |= {e.step for e in found}
        unjudged = [s for s in self._paths.own_checkpoints() if s <= step and s not in known and self._is_due(s)]
        if not self.is_on:
            if lost := [f"checkpoint-{s}" for s in unjudged if s != step]:
                self._recorder.say(
                    f"not evaluated, so no candidates for the best: {', '.join(lost)}. To have that made up for: "
                    "eval.in_background=true"
                )
            return [asdict(e) for e in found], []
        unjudged = [s for s in unjudged if self._saver.is_candidate(s)]
        return [asdict(e) for e in found], unjudged if self._saver.saved_step else []

    # ------------------------------------------------------------------ beside the steps

    def num_judged(self) -> int:
        """Checkpoints whose evaluation has ended; on the main process, which also has the next one begin."""
        if not self.is_on or not self._processes.is_main:
            return 0
        waiting = [step for step in self._saver.unjudged if step not in {found[0] for found in self._found}]
        if waiting:
            self._follow(waiting[0])
        return len(self._found)

    def _follow(self, step: int) -> None:
        if self._process.step != step:
            self._process.begin(step)
            return
        if not self._process.has_ended():
            return
        error = self._process.error
        found = evaluations.read(self._paths, step) if error is None else None
        if found is not None:
            self._found.append((step, asdict(found), ""))
            return
        error = error or "its result is not there"
        self._attempts[step] = self._attempts.get(step, 0) + 1
        if self._attempts[step] < _ATTEMPTS:
            self._recorder.say(f"checkpoint-{step} could not be evaluated: {error}. It is tried once more")
        else:
            self._found.append((step, None, error))

    def take(self) -> None:
        """Takes over what was found: metrics, the best, retention."""
        found, self._found = self._processes.broadcast(self._found), []
        for step, raw, error in found:
            if raw is not None:
                self._take_over(Evaluation(**raw), is_new=True)
                continue
            self.failed.append(step)
            self._recorder.say(
                f"WARNING checkpoint-{step} could not be evaluated: {error}. It is no candidate for the best; training "
                f"goes on. More in {self._paths.evaluation_log}"
            )
            self._saver.judged(step, None)

    def _take_over(self, found: Evaluation, *, is_new: bool) -> None:
        checkpoint, step = self._config.checkpoint, found.step
        line = {
            "step": step, "epoch": round(self._epoch_after(step), 6), **found.values, "eval_runtime_s": found.runtime_s
        }  # fmt: skip
        self._state.progress.log_history.append(line)
        metric = found.values.get(checkpoint.metric_key)
        if not is_new:
            self._recorder.noted(line)
            self._saver.note_metric(step, metric)
            return
        self._recorder.measured(line)
        self._recorder.sampled(step, found.samples)
        if metric is None and checkpoint.load_best_model_at_end:
            self._recorder.say(
                f"checkpoint.metric_for_best_model={checkpoint.metric_for_best_model} is not among the metrics: "
                f"{', '.join(sorted(found.values))}"
            )
        self._saver.judged(step, metric)
        self._tell_best()

    def _tell_best(self) -> None:
        """A checkpoint knows only of those that were evaluated when it was saved; run.json knows all."""
        p = self._state.progress
        if self.is_on and p.best_step is not None:
            is_finite = p.best_metric is not None and math.isfinite(p.best_metric)
            self._recorder.update_run(best_step=p.best_step, best_metric=p.best_metric if is_finite else None)

    # ------------------------------------------------------------------ waiting

    def make_room(self) -> None:
        """Before a candidate is saved: waits while so many are unjudged that the disk would fill with them. A request
        to stop ends the wait."""
        limit = self._config.checkpoint.max_unjudged
        if not self.is_on or limit is None or not self._saver.is_candidate(self._state.step):
            return
        self._saver.wait()
        self._wait(lambda: len(self._saver.unjudged) < limit, "before this step is saved")

    def finish(self) -> str | None:
        """After the last step: waits until every checkpoint is judged.

        Returns:
            The reason in REASONS for which it did not wait to the end, else None.
        """
        return self._wait(lambda: not self._saver.unjudged, "the training is done") if self.is_on else None

    def _wait(self, is_done: Callable[[], bool], why: str) -> str | None:
        started = told = time.monotonic()
        while not is_done():
            self._alive()
            ready = self.num_judged()
            if self._processes.is_main and not ready:
                time.sleep(_POLL_S)
            code, num_asked, num_ready = self._processes.sum([*self._stop.votes(0.0, 0.0), ready])
            if num_ready:
                self.take()
            if code or num_asked:
                return REASONS[int(code or 1) - 1]
            if time.monotonic() - told > _WORTH_SAYING_S * (1 if told == started else 12):
                told = time.monotonic()
                self._recorder.say(
                    f"step {self._state.step}: waiting for evaluations in the background "
                    f"({len(self._saver.unjudged)} to come, {told - started:.0f} s so far); {why}"
                )
        return None

    def close(self) -> None:
        """Ends the process; what it was evaluating is evaluated by the next start. Not collective."""
        self._process.close()
