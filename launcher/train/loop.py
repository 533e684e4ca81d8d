"""The training loop: step, log, evaluate, save, sync, stop? Read from `fit` down."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from launcher.base.errors import NonFiniteError
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.base.stop_requests import REASONS, StopRequests
from launcher.checkpoint import rng
from launcher.checkpoint.engine import Checkpointer
from launcher.config.settings import RunConfig
from launcher.data import Data, StepSampler, collate, split_step
from launcher.hub import Hub, NoHub
from launcher.model.build import summed_loss
from launcher.model.optim import Schedule
from launcher.saving.save_schedule import SaveSchedule, crosses_epoch, is_better
from launcher.saving.saver import expected_save_s, follow_save, has_room, note_best, save, save_and_wait, wait_for_save
from launcher.saving.training_state import TrainingState
from launcher.train.evaluation import evaluate
from launcher.train.metrics import MetricsFile, NoProgress, Progress, RunFile, Trackers
from launcher.train.watchdog import Watchdog


@dataclass
class Run:
    """All parts of a run, built by `launcher.train.build.build_run`."""

    config: RunConfig
    paths: RunPaths
    processes: Processes
    accelerator: Any
    model: Any
    optimizer: Any
    schedule: Schedule
    tokenizer: Any
    data: Data
    sampler: StepSampler
    state: TrainingState
    checkpointer: Checkpointer
    save_schedule: SaveSchedule
    stop: StopRequests
    total_steps: int
    metrics: MetricsFile
    run_file: RunFile
    trackers: Trackers
    progress: Progress | NoProgress
    hub: Hub | NoHub
    metric: Any
    watchdog: Watchdog
    window: Window = field(default_factory=lambda: Window())
    last_saved_step: int = 0
    last_eval: dict[str, Any] = field(default_factory=dict)
    last_save_s: float | None = None
    last_step_s: float = 0.0
    previous_best: tuple[float | None, int | None] = (None, None)

    def close(self) -> None:
        """Ends the writer (once it has done all it was told), the trackers and the display."""
        self.checkpointer.close()
        self.trackers.close()
        self.progress.close()
        self.watchdog.close()

    @property
    def step(self) -> int:
        return self.state.progress.step

    @property
    def is_main(self) -> bool:
        return self.processes.is_main


@dataclass
class Window:
    """Since the last line of metrics.jsonl, on this process's clock."""

    started: float = field(default_factory=time.monotonic)
    num_tokens: float = 0.0
    num_skipped: int = 0
    grad_norm: float = 0.0


@dataclass
class Agreement:
    """What the processes found after a step, summed over all of them."""

    loss_sum: float
    num_tokens: float
    stop_code: int
    is_save_due: bool
    num_undone: float
    num_failed: float


def fit(run: Run) -> str | None:
    """Trains to the end or to a request to stop. Collective.

    Returns:
        None at the end, else the reason in REASONS for which the run stopped (and saved).
    """
    run.hub.start()
    catch_up(run)
    while run.step < run.total_steps:
        run.watchdog.alive()
        agreed = train_step(run)
        follow_save(run, agreed)
        log(run, agreed)
        if agreed.stop_code and run.step < run.total_steps:
            return stop(run, REASONS[agreed.stop_code - 1])
        improved = maybe_evaluate(run)
        maybe_save(run, agreed, improved)
        run.progress.advance(run.step)
        for notice in run.hub.poll():
            run.progress.say(notice)
    return None


def catch_up(run: Run) -> None:
    """Makes up for the evaluation of the step that a request to stop left out, so that the best stays the same."""
    history = run.state.progress.log_history
    if not run.step or any(line.get("step") == run.step and "eval_loss" in line for line in history[-3:]):
        return
    if maybe_evaluate(run) and run.last_saved_step == run.step:
        note_best(run)


# --------------------------------------------------------------------------- one optimizer step


def train_step(run: Run) -> Agreement:
    """Forward, backward and update over the samples of one optimizer step, on all processes."""
    started, config = time.monotonic(), run.config
    progress, processes = run.state.progress, run.processes
    rng.seed_step(config.seed, processes.rank, run.step)
    rows = run.sampler.rows_of_step(run.step)
    total_labelled = max(1, run.data.train.num_labelled_tokens(rows))
    micro_batches = split_step(rows, processes.rank, processes.world_size, config.train.per_device_train_batch_size)
    run.model.train()
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.accelerator.device)
    num_tokens = 0
    for i, ids in enumerate(micro_batches):
        batch = collate(run.data.train, ids, run.tokenizer.pad_token_id)
        num_tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        batch = {k: v.to(run.accelerator.device, non_blocking=True) for k, v in batch.items()}
        is_last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else no_sync(run):
            with run.accelerator.autocast():
                loss, _ = summed_loss(run.model, batch)
            # Gradients are averaged over the processes; the mean is over the labelled tokens of the whole step.
            backward(run, loss * (processes.world_size / total_labelled), is_last=is_last)
        loss_sum += loss.detach()
    run.checkpointer.finish_snapshot()  # until here the state that is being copied could not change
    is_finite = update(run)
    progress.step += 1
    progress.epoch = run.sampler.epoch_after(run.step)
    run.last_step_s = time.monotonic() - started
    agreed = agree(run, float(loss_sum), num_tokens)
    check_finite(run, agreed, is_finite)
    progress.loss_sum += agreed.loss_sum
    progress.labelled_tokens += total_labelled
    progress.num_tokens += int(agreed.num_tokens)
    run.window.num_tokens += agreed.num_tokens
    return agreed


def no_sync(run: Run) -> Any:
    """DeepSpeed learns the boundary in `backward`; DDP must not reduce before the last micro-batch."""
    return contextlib.nullcontext() if run.config.strategy.zero_stage else run.accelerator.no_sync(run.model)


def backward(run: Run, loss: torch.Tensor, *, is_last: bool) -> None:
    if run.config.strategy.zero_stage:
        run.model.set_gradient_accumulation_boundary(is_last)
        run.model.backward(loss)
    else:
        run.accelerator.backward(loss)


def update(run: Run) -> bool:
    """Clips and applies the optimizer step; a non-finite gradient norm leaves the weights as they are.

    Returns:
        Whether the step was applied (fp16's loss scaling skips some by design).
    """
    if run.config.strategy.zero_stage:
        run.model.step()
        run.window.grad_norm = float(run.model.get_global_grad_norm() or 0.0)
        applied = not getattr(run.model.optimizer, "overflow", False)
    else:
        limit = run.config.train.max_grad_norm or math.inf
        run.window.grad_norm = float(run.accelerator.clip_grad_norm_(run.model.parameters(), limit))
        applied = math.isfinite(run.window.grad_norm)
        if applied or run.accelerator.scaler is not None:
            run.optimizer.step()
        run.optimizer.zero_grad()
    run.schedule.step()  # counts steps, applied or not, so that the rate follows from the step alone
    return applied


def agree(run: Run, loss_sum: float, num_tokens: int) -> Agreement:
    """The loop's one all-reduce per step: losses, requests to stop, whether to save, how the save in flight stands."""
    undone, failed = run.checkpointer.status()
    eval_s = run.last_eval.get("eval_runtime_s", 0.0) if is_eval_due(run) else 0.0
    save_s = expected_save_s(run) if run.stop.knows_end else 0.0
    code = run.stop.reason_code(save_s, run.last_step_s + eval_s)
    due = False
    if run.is_main:
        due = run.save_schedule.is_due(run.step, improved=False) or (
            run.save_schedule.is_waiting_for_room and has_room(run)
        )
    mine = [loss_sum, num_tokens, code if run.is_main else 0, 1 if code else 0, due, undone, failed]
    loss, tokens, main_code, num_asked, is_due, undone_sum, failed_sum = run.processes.sum(mine)
    stop_code = int(main_code) or (1 if num_asked else 0)
    return Agreement(loss, tokens, stop_code, bool(is_due), undone_sum, failed_sum)


def check_finite(run: Run, agreed: Agreement, is_applied: bool) -> None:
    """Stops or skips on NaN and infinities, as `train.on_nonfinite` says. fp16's overflows are part of its method.

    Raises:
        NonFiniteError: on every process; the weights are still those of the step before.
    """
    if math.isfinite(agreed.loss_sum) and (is_applied or run.config.mixed_precision == "fp16"):
        return
    if run.config.train.on_nonfinite == "stop":
        wait_for_save(run)  # every process is here, and what is being written is of before
        raise NonFiniteError(
            f"step {run.step}: loss sum {agreed.loss_sum}, gradient norm {run.window.grad_norm}. The weights of the "
            "step before are unharmed and the last checkpoint is whole. A lower optim.learning_rate or "
            "train.max_grad_norm may help; to leave such steps out: train.on_nonfinite=skip"
        )
    agreed.loss_sum = 0.0
    run.window.num_skipped += 1


def log(run: Run, agreed: Agreement) -> None:
    """Every `train.logging_steps` steps: a line in metrics.jsonl, the trackers, log_history and the progress line."""
    p, window = run.state.progress, run.window
    if run.step % run.config.train.logging_steps and run.step < run.total_steps and not agreed.stop_code:
        return
    line: dict[str, Any] = {
        "step": run.step, "epoch": round(p.epoch, 6), "loss": p.loss_sum / max(1, p.labelled_tokens),
        "learning_rate": run.schedule.learning_rate, "grad_norm": window.grad_norm,
        "tokens_per_second": round(window.num_tokens / max(1e-9, time.monotonic() - window.started), 1),
        "num_tokens": p.num_tokens,
    }  # fmt: skip
    if window.num_skipped:
        line["skipped_steps"] = window.num_skipped
    p.loss_sum, p.labelled_tokens, run.window = 0.0, 0, Window()
    record(run, line)
    if run.is_main and run.run_file.is_due():
        run.run_file.update(step=run.step, epoch=p.epoch, hub=run.hub.status())


def record(run: Run, line: dict[str, Any]) -> None:
    """Puts a line of measurements everywhere it belongs."""
    run.state.progress.log_history.append(line)
    if run.is_main:
        run.metrics.append(line)
        run.trackers.log(line)
        run.progress.log(line)


def is_eval_due(run: Run) -> bool:
    """Whether `eval.eval_strategy` asks for an evaluation after this step; the last step always has one."""
    settings = run.config.eval
    if settings.eval_strategy == "no" or run.data.eval is None:
        return False
    if run.step >= run.total_steps:
        return True
    if settings.eval_strategy == "epoch":
        return crosses_epoch(run.step, run.config.train.train_batch_size, len(run.data.train))
    return run.step % settings.eval_steps == 0


def maybe_evaluate(run: Run) -> bool:
    """Evaluates where it is due; says whether the metric improved."""
    config = run.config
    if not is_eval_due(run):
        return False
    started = time.monotonic()
    values = evaluate(run)
    line = {"step": run.step, "epoch": round(run.state.progress.epoch, 6), **values}
    line["eval_runtime_s"] = round(time.monotonic() - started, 3)
    run.window.started += time.monotonic() - started  # tokens_per_second is of training
    record(run, line)
    run.last_eval = line
    metric = values.get(config.checkpoint.metric_key)
    if metric is None and config.checkpoint.load_best_model_at_end:
        run.progress.say(
            f"checkpoint.metric_for_best_model={config.checkpoint.metric_for_best_model} is not among the metrics: "
            f"{', '.join(sorted(values))}"
        )
    if metric is not None:
        run.schedule.evaluated(metric)
    return is_better(config, metric, run.state.progress.best_metric)


# --------------------------------------------------------------------------- saving


def maybe_save(run: Run, agreed: Agreement, improved: bool) -> None:
    """Saves where the strategy asks for it, on improvement, and after the last step."""
    strategy = run.config.checkpoint.save_strategy
    is_last = run.step >= run.total_steps
    if strategy != "no" and (agreed.is_save_due or (strategy == "best" and improved) or is_last):
        save(run)


def stop(run: Run, reason: str) -> str:
    """Saves and ends, because somebody asked. Collective."""
    run.progress.say(f"step {run.step}: stopping ({reason})")
    if run.config.checkpoint.save_strategy != "no":
        save_and_wait(run)
        if run.last_saved_step != run.step:
            run.progress.say(f"WARNING step {run.step} could not be saved: the next start goes on from the one before")
    run.stop.clear()
    return reason
