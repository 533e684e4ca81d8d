"""The training loop: step, log, evaluate, save, sync, stop? Read from `fit` down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.base.errors import NonFiniteError
from launcher.base.processes import Processes
from launcher.base.stop_requests import REASONS, StopRequests
from launcher.config.settings import RunConfig
from launcher.hub import Hub
from launcher.saving.saver import Saver
from launcher.saving.training_state import TrainingState
from launcher.train.about import memory_bytes
from launcher.train.background import Background
from launcher.train.evaluation import Evaluator
from launcher.train.recorder import Recorder
from launcher.train.spikes import Spikes
from launcher.train.step import StepSums, TrainStep
from launcher.train.watchdog import Watchdog


@dataclass
class Run:
    """The parts of a run, built by `launcher.train.build.build_run`."""

    config: RunConfig
    processes: Processes
    state: TrainingState
    train_step: TrainStep
    evaluator: Evaluator
    saver: Saver
    recorder: Recorder
    hub: Hub
    stop: StopRequests
    watchdog: Watchdog
    spikes: Spikes
    background: Background
    total_steps: int
    window: Window = field(default_factory=lambda: Window())
    last_step_s: float = 0.0
    last_eval_s: float = 0.0

    @property
    def step(self) -> int:
        return self.state.step

    def close(self) -> None:
        """Ends the writer (once it has done all it was told), the evaluator, the trackers and the display."""
        self.background.close()
        self.saver.close()
        self.recorder.close()
        self.watchdog.close()


@dataclass
class Window:
    """Since the last line of metrics.jsonl, on this process's clock."""

    started: float = field(default_factory=time.monotonic)
    num_tokens: float = 0.0
    num_skipped: int = 0
    grad_norm: float = math.nan
    """Of the last step that trained; NaN where none did, or it was not finite."""


@dataclass
class Agreement:
    """What the processes found after a step, summed over all of them."""

    loss_sum: float
    router_loss: float
    num_tokens: float
    stop_code: int
    is_save_due: bool
    is_eval_due: bool
    """By the clock."""
    save: Sequence[float]
    """How the save in flight stands: sums of `checkpointer.status`."""
    num_judged: float
    """Checkpoints that were evaluated in the background since the last step."""
    went_back: bool = False
    """To a checkpoint of before, because the loss spiked."""


def fit(run: Run) -> str | None:
    """Trains to the end or to a request to stop. Collective.

    Returns:
        None at the end, else the reason in REASONS for which the run stopped (and saved, or tried to).
    """
    rehearse(run)
    run.hub.start()
    catch_up(run)
    while run.step < run.total_steps and not is_stopped_early(run):
        run.watchdog.alive()
        agreed = train(run)
        if agreed.went_back:
            if agreed.stop_code:
                return stop(run, REASONS[agreed.stop_code - 1])
            catch_up(run)
            continue
        run.recorder.advance(run.step, run.state.progress.epoch, run.hub.status)
        run.saver.follow(*agreed.save)
        log(run, agreed)
        if agreed.num_judged:
            run.background.take()
        if agreed.stop_code and run.step < run.total_steps:
            return stop(run, REASONS[agreed.stop_code - 1])
        evaluate_and_save(run, agreed)
        for notice in run.hub.poll():
            run.recorder.say(notice)
    return judge_the_rest(run) if run.background.is_on else None


def evaluate_and_save(run: Run, agreed: Agreement) -> None:
    """What is due after a step. Collective."""
    if not run.background.is_on:
        maybe_evaluate(run, by_clock=agreed.is_eval_due)
    elif agreed.is_save_due or run.step >= run.total_steps:
        started = time.monotonic()
        with run.recorder.during("evaluation"):
            run.background.make_room()
        run.window.started += time.monotonic() - started  # tokens_per_second is of training
    is_best = agreed.is_eval_due and run.config.checkpoint.load_best_model_at_end and run.saver.has_improved
    with run.recorder.during("save"):
        run.saver.maybe_save(is_due=agreed.is_save_due or is_best)


def judge_the_rest(run: Run) -> str | None:
    """After the last step: waits for the last save and for all evaluations in the background. Collective.

    Returns:
        The reason of a request to stop, which ends the wait; the next start goes on with it.
    """
    if not run.processes.on_main(run.saver.is_name_taken):
        with run.recorder.during("save"):
            run.saver.save_and_wait()
    with run.recorder.during("evaluation"):
        reason = run.background.finish()
    return None if reason is None else stop(run, reason)


def rehearse(run: Run) -> None:
    """Tries the metric out on a few rows, until something has been evaluated; not what evaluates in the background,
    where it fails without harm. Collective."""
    if not run.evaluator.is_on or run.state.progress.log_history.evaluations or run.background.is_on:
        return
    with run.recorder.during("evaluation"):
        run.evaluator.try_metric()
    say_notices(run)


def catch_up(run: Run) -> None:
    """Makes up for the evaluation of the step that a request to stop left out, so that the best stays the same; in the
    background for all that nobody has evaluated yet."""
    run.background.begin()
    if run.background.is_on:
        return
    evaluations = run.state.progress.log_history.evaluations
    if not run.step or any(line["step"] == run.step for line in evaluations):
        return
    maybe_evaluate(run)
    run.saver.made_up_for()


# --------------------------------------------------------------------------- one step


def train(run: Run) -> Agreement:
    """One optimizer step, and what the processes agree on after it. Collective."""
    started, progress = time.monotonic(), run.state.progress
    if run.spikes.is_left_out(run.step + 1):
        sums = run.train_step.leave_out()
    else:
        sums = run.train_step.run(run.step, run.spikes.limit)
    answer = ask(run, sums, time.monotonic() - started)
    run.train_step.update(sums)
    progress.step += 1
    progress.epoch = run.train_step.epoch_after(run.step)
    run.window.grad_norm = run.window.grad_norm if sums.is_left_out else sums.grad_norm
    run.last_step_s = time.monotonic() - started
    progress.seconds_since_eval += run.last_step_s
    agreed = answer()
    if sums.is_spike and run.spikes.found(sums.mean_loss):
        run.window, agreed.went_back = Window(), True
        return agreed
    is_counted = counts(run, agreed, sums)
    progress.loss_sum += agreed.loss_sum if is_counted else 0.0
    progress.labelled_tokens += sums.num_labelled if is_counted else 0
    progress.router_loss_sum += agreed.router_loss if is_counted else 0.0
    progress.counted_steps += is_counted
    progress.num_tokens += int(agreed.num_tokens)
    run.window.num_tokens += agreed.num_tokens
    return agreed


def ask(run: Run, sums: StepSums, step_s: float) -> Callable[[], Agreement]:
    """The loop's one exchange per step: losses, requests to stop, whether to save, how the save in flight stands. It
    is under way while the weights are updated. Collective.

    Args:
        step_s: how long the step has taken so far.

    Returns:
        Waits for what the processes agree on.
    """
    step = run.step + 1
    by_clock = is_eval_due_by_clock(run, step_s)
    eval_s = run.last_eval_s if run.evaluator.is_due(step) or by_clock else 0.0
    save_s = run.saver.expected_s() if run.stop.knows_end else 0.0
    code, is_asked = run.stop.votes(save_s, max(run.last_step_s, step_s) + eval_s)
    due = run.saver.is_due(step)
    mine = [sums.loss_sum, sums.router_loss, sums.num_tokens, code, is_asked, due, run.processes.is_main and by_clock]
    answer = run.processes.begin_sum([*mine, *run.saver.checkpointer.status(), run.background.num_judged()])

    def agreement() -> Agreement:
        loss, router, tokens, main_code, num_asked, is_due, is_eval_due, *save, num_judged = answer()
        stop_code = int(main_code) or (1 if num_asked else 0)
        return Agreement(loss, router, tokens, stop_code, bool(is_due), bool(is_eval_due), save, num_judged)

    return agreement


def is_eval_due_by_clock(run: Run, step_s: float) -> bool:
    every_s = run.config.eval.eval_every_s
    return every_s is not None and run.evaluator.is_on and run.state.progress.seconds_since_eval + step_s >= every_s


def counts(run: Run, agreed: Agreement, sums: StepSums) -> bool:
    """Whether the step counts in the logged loss.

    Raises:
        NonFiniteError: see `check_finite`.
    """
    is_counted = not (sums.is_spike or sums.is_left_out) and check_finite(run, agreed, sums)
    if is_counted and sums.is_applied:
        run.spikes.applied(sums.mean_loss)
    run.window.num_skipped += not is_counted
    return is_counted


def check_finite(run: Run, agreed: Agreement, sums: StepSums) -> bool:
    """Stops or skips on NaN and infinities, as `train.on_nonfinite` says. fp16's overflows are part of its method.

    Returns:
        Whether the step counts in the logged loss.

    Raises:
        NonFiniteError: on every process; the weights are still those of the step before.
    """
    if math.isfinite(agreed.loss_sum) and (sums.is_applied or run.config.mixed_precision == "fp16"):
        return True
    if run.config.train.on_nonfinite == "stop":
        run.saver.wait(is_urgent=True)  # every process is here, and what is being written is of before
        raise NonFiniteError(
            f"step {run.step}: loss sum {agreed.loss_sum}, gradient norm {sums.grad_norm}. The weights of the "
            "step before are unharmed, and what was saved before is whole. A lower optim.learning_rate or "
            "train.max_grad_norm may help; to leave such steps out: train.on_nonfinite=skip"
        )
    return False


def log(run: Run, agreed: Agreement) -> None:
    """Every `train.logging_steps` steps: a line in metrics.jsonl, the trackers, log_history and the progress line."""
    p, window = run.state.progress, run.window
    if run.step % run.config.train.logging_steps and run.step < run.total_steps and not agreed.stop_code:
        return
    line: dict[str, Any] = {
        "step": run.step, "epoch": round(p.epoch, 6),
        "loss": p.loss_sum / p.labelled_tokens if p.labelled_tokens else None,  # every step may have been skipped
        "learning_rate": run.train_step.schedule.learning_rate,
        "grad_norm": window.grad_norm if math.isfinite(window.grad_norm) else None,  # NaN is no JSON
        "tokens_per_second": round(window.num_tokens / max(1e-9, time.monotonic() - window.started), 1),
        "num_tokens": p.num_tokens, "memory_bytes": memory_bytes(run.train_step.accelerator.device),
    }  # fmt: skip
    if p.router_loss_sum and p.counted_steps:
        line["router_loss"] = p.router_loss_sum / p.counted_steps
    if window.num_skipped:
        line["skipped_steps"] = window.num_skipped
    p.loss_sum, p.labelled_tokens, p.router_loss_sum, p.counted_steps, run.window = 0.0, 0, 0.0, 0, Window()
    record(run, line)


def record(run: Run, line: dict[str, Any]) -> None:
    """Puts a line of measurements everywhere it belongs."""
    run.state.progress.log_history.append(line)
    run.recorder.measured(line)


def maybe_evaluate(run: Run, *, by_clock: bool = False) -> None:
    """Evaluates where it is due, and tells the schedule and the saver."""
    if not (by_clock or run.evaluator.is_due(run.step)):
        return
    run.state.progress.seconds_since_eval = 0.0
    started = time.monotonic()
    with run.recorder.during("evaluation"):
        values = run.evaluator.evaluate()
        run.recorder.sampled(run.step, run.evaluator.samples)
    say_notices(run)
    run.last_eval_s = round(time.monotonic() - started, 3)
    run.window.started += run.last_eval_s  # tokens_per_second is of training
    epoch = round(run.state.progress.epoch, 6)
    record(run, {"step": run.step, "epoch": epoch, **values, "eval_runtime_s": run.last_eval_s})
    checkpoint = run.config.checkpoint
    metric = values.get(checkpoint.metric_key)
    if metric is not None:
        run.train_step.schedule.evaluated(metric)
        note_gain(run, metric)
    elif checkpoint.load_best_model_at_end:
        run.recorder.say(
            f"checkpoint.metric_for_best_model={checkpoint.metric_for_best_model} is not among the metrics: "
            f"{', '.join(sorted(values))}"
        )
    run.saver.evaluated(metric)


def say_notices(run: Run) -> None:
    """What the evaluation has to say."""
    for notice in run.evaluator.notices:
        run.recorder.say(notice)
    run.evaluator.notices.clear()


def note_gain(run: Run, metric: float) -> None:
    """For early stopping: whether the metric improved by more than the threshold, as transformers' callback counts."""
    p, threshold = run.state.progress, run.config.train.early_stopping_threshold
    is_greater = run.config.checkpoint.is_greater_better
    gain = math.inf if p.stopping_best is None else (metric - p.stopping_best) * (1 if is_greater else -1)
    if math.isfinite(metric) and gain > threshold:
        p.stopping_best, p.evals_without_gain = metric, 0
    else:
        p.evals_without_gain += 1


def is_stopped_early(run: Run) -> bool:
    """Whether `train.early_stopping_patience` is used up; it is part of a checkpoint."""
    patience = run.config.train.early_stopping_patience
    return patience is not None and run.state.progress.evals_without_gain >= patience


def stop(run: Run, reason: str) -> str:
    """Saves and ends, because somebody asked. Collective."""
    run.recorder.say(f"step {run.step}: stopping ({reason})")
    if run.saver.is_on:
        with run.recorder.during("save"):
            run.saver.save_and_wait()
    run.stop.clear()
    return reason
