"""Evaluation: loss per labelled token over all processes, and metrics by generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from launcher.base.processes import Processes
from launcher.config.settings import RunConfig
from launcher.data import Data, EvalContext, collate, to_device
from launcher.model.compile import uncompiled
from launcher.model.loss import LossFunction
from launcher.saving.save_schedule import crosses_epoch
from launcher.train.watchdog import Watchdog

Metric = Callable[[EvalContext], dict[str, float]]
"""What `eval.metric._target_` makes."""


class Evaluator:
    """Evaluates the model as it stands.

    Args:
        model: the prepared one.
        metric: measures by generation, or None.
    """

    def __init__(
        self, config: RunConfig, processes: Processes, accelerator: Any, model: Any, tokenizer: Any, data: Data,
        loss: LossFunction, metric: Metric | None, watchdog: Watchdog, *, total_steps: int,
    ) -> None:  # fmt: skip
        self._config, self._processes, self._accelerator = config, processes, accelerator
        self._model, self._tokenizer, self._data = model, tokenizer, data
        self._loss, self._metric, self._watchdog, self._total_steps = loss, metric, watchdog, total_steps
        self.samples: list[dict[str, Any]] = []
        """What the metric showed of the last evaluation, on this process."""

    @property
    def is_on(self) -> bool:
        """Whether there is something to evaluate, and it is asked for."""
        return self._config.eval.eval_strategy != "no" and self._data.eval is not None

    def is_due(self, step: int) -> bool:
        """Whether `eval.eval_strategy` asks for an evaluation after a step; the last step always has one."""
        settings = self._config.eval
        if not self.is_on:
            return False
        if step >= self._total_steps:
            return True
        if settings.eval_strategy == "epoch":
            return crosses_epoch(step, self._config.train.train_batch_size, len(self._data.train))
        return step % settings.eval_steps == 0

    def evaluate(self) -> dict[str, float]:
        """The values of one evaluation, by name with the prefix eval_. Collective; the same on every process.

        Every row counts once, however the last batches fall: each process makes the same number of forward passes
        (ZeRO-3 gathers weights in each), padded with batches of zero weight.
        """
        rows = self._data.eval
        assert rows is not None
        self.samples = []
        size, world = self._config.eval.per_device_eval_batch_size, self._processes.world_size
        self._model.eval()
        loss_sum, labelled = torch.zeros((), dtype=torch.float64, device=self._accelerator.device), 0
        with torch.no_grad(), uncompiled(self._config):
            for start in range(0, len(rows), size * world):
                low = start + self._processes.rank * size
                ids = np.arange(low, max(low, min(low + size, len(rows))))
                batch = collate(rows, ids, self._tokenizer.pad_token_id)
                batch = to_device(batch, self._accelerator.device)
                with self._accelerator.autocast():
                    loss, count, _ = self._loss(self._model, batch)
                loss_sum, labelled = loss_sum + loss, labelled + count
                self._watchdog.alive()
            loss_total, count_total = self._processes.sum([float(loss_sum), labelled])
            values = {"eval_loss": loss_total / max(1.0, count_total)}
            if self._metric is not None:
                self._watchdog.pause()
                values |= {f"eval_{k}": v for k, v in self._metric(self._context()).items()}
                self._watchdog.alive()
        self._model.train()
        return values

    def _context(self) -> EvalContext:
        return EvalContext(
            model=self._accelerator.unwrap_model(self._model), tokenizer=self._tokenizer, rows=self._data.eval_rows,
            rank=self._processes.rank, world_size=self._processes.world_size, device=self._accelerator.device,
            sum_over_processes=self._processes.sum, batch_size=self._config.eval.per_device_eval_batch_size,
            show=lambda **sample: self.samples.append(sample),
        )  # fmt: skip
