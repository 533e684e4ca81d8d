"""Evaluation: loss per labelled token over all processes, and metrics by generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launcher.data import EvalContext, collate
from launcher.model.build import summed_loss

if TYPE_CHECKING:
    from launcher.train.loop import Run


def evaluate(run: Run) -> dict[str, float]:
    """The values of one evaluation, by name with the prefix eval_. Collective; the same on every process.

    Every row counts once, however the last batches fall: each process makes the same number of forward passes (ZeRO-3
    gathers weights in each), padded with batches of zero weight.
    """
    rows, config = run.data.eval, run.config
    assert rows is not None
    size, world = config.eval.per_device_eval_batch_size, run.processes.world_size
    run.model.eval()
    loss_sum, labelled = 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(rows), size * world):
            low = start + run.processes.rank * size
            ids = np.arange(low, max(low, min(low + size, len(rows))))
            batch = collate(rows, ids, run.tokenizer.pad_token_id)
            batch = {k: v.to(run.accelerator.device) for k, v in batch.items()}
            with run.accelerator.autocast():
                loss, count = summed_loss(run.model, batch)
            loss_sum, labelled = loss_sum + float(loss), labelled + float(count)
            run.watchdog.alive()
        loss_total, count_total = run.processes.sum([loss_sum, labelled])
        values = {"eval_loss": loss_total / max(1.0, count_total)}
        if run.metric is not None:
            run.watchdog.pause()
            values |= {f"eval_{k}": v for k, v in measure(run, run.metric).items()}
            run.watchdog.alive()
    run.model.train()
    return values


def measure(run: Run, metric: Any) -> dict[str, float]:
    """Runs the metric that `eval.metric._target_` names."""
    context = EvalContext(
        model=run.accelerator.unwrap_model(run.model), tokenizer=run.tokenizer, rows=run.data.eval_rows,
        rank=run.processes.rank, world_size=run.processes.world_size, device=run.accelerator.device,
        sum_over_processes=run.processes.sum, batch_size=run.config.eval.per_device_eval_batch_size,
    )  # fmt: skip
    result: dict[str, float] = metric(context)
    return result
