"""Evaluation: loss per labelled token over all processes, and metrics by generation."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from launcher.base.errors import ConfigError
from launcher.base.processes import Processes
from launcher.config.settings import RunConfig
from launcher.data import Data, EvalContext, collate, to_device
from launcher.model.compile import uncompiled
from launcher.model.loss import LossFunction
from launcher.saving.save_schedule import crosses_epoch
from launcher.train.watchdog import Watchdog

Metric = Callable[[EvalContext], dict[str, float]]
"""What `eval.metric._target_` makes."""
_TAKEN = {"eval_loss", "eval_runtime_s"}
_MUST = 'must give numbers by name, such as {"accuracy": 0.5}, and gave'


class Evaluator:
    """Evaluates the model as it stands.

    Args:
        model: the prepared one.

    Raises:
        ConfigError: see `build_metric`.
    """

    def __init__(
        self, config: RunConfig, processes: Processes, accelerator: Any, model: Any, tokenizer: Any, data: Data,
        loss: LossFunction, watchdog: Watchdog, *, total_steps: int,
    ) -> None:  # fmt: skip
        self._config, self._processes, self._accelerator = config, processes, accelerator
        self._model, self._tokenizer, self._data = model, tokenizer, data
        self._loss, self._watchdog, self._total_steps = loss, watchdog, total_steps
        self._metric = build_metric(config)
        self.notices: list[str] = []
        """What is to be said; whoever says it clears them."""
        self._is_told = False
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
            values |= self._measure(self._metric)
        self._model.train()
        return values

    def try_metric(self) -> None:
        """The metric on the first rows, `eval.num_sanity_rows` of each process, so that what fails does so before the
        first step. Another instance, since the one that evaluates must not have seen anything. Collective.

        Raises:
            ConfigError: see `_named`, or it does not give the one that `checkpoint.metric_for_best_model` names.
            Exception: whatever the metric raises.
        """
        metric, num_rows = build_metric(self._config), self._config.eval.num_sanity_rows
        if metric is None or not num_rows:
            return
        checkpoint = self._config.checkpoint
        try:
            values = self._measure(metric, num_rows=num_rows)
        except Exception as error:
            if not isinstance(error, ConfigError):
                error.add_note(
                    f"The metric was tried on the first {num_rows} rows of each process. Where it takes more: "
                    f"eval.num_sanity_rows={num_rows * 16}, or 0 to leave that out"
                )
            raise
        self.samples = []
        if checkpoint.load_best_model_at_end and checkpoint.metric_key not in {"eval_loss", *values}:
            raise ConfigError([
                f"checkpoint.metric_for_best_model={checkpoint.metric_for_best_model} is not among what "
                f"{self._name_of_metric} gave for {num_rows} rows of each process "
                f"({', '.join(sorted(values)) or 'nothing'}), nor is it loss. Name one of them in "
                "checkpoint.metric_for_best_model; or where it takes more rows, set eval.num_sanity_rows=0"
            ])  # fmt: skip

    def _measure(self, metric: Metric, *, num_rows: int | None = None) -> dict[str, float]:
        """What a metric gives, by name with the prefix eval_, for all rows or the first `num_rows` of each process."""
        self.samples = []
        self._watchdog.pause()
        self._model.eval()
        with torch.no_grad(), uncompiled(self._config):
            found = metric(self._context(num_rows))
        self._model.train()
        for parameter in self._model.parameters():
            parameter.grad = None  # of a metric that looks at gradients: they are not the next step's
        self._watchdog.alive()
        return self._agreed(self._named(found))

    def _named(self, found: Any) -> dict[str, float]:
        """What this process's metric gave, as it stands in eval lines.

        Raises:
            ConfigError: it is no numbers by name, or has a name that is taken.
        """
        target = self._name_of_metric
        if found is None and not self._processes.is_main:
            return {}
        if not isinstance(found, Mapping):
            raise ConfigError([f"{target} {_MUST} {found!r:.200}"])
        values = {}
        for name, value in found.items():
            key = str(name) if str(name).startswith("eval_") else f"eval_{name}"
            if key in _TAKEN:
                raise ConfigError(
                    [f"{target} gave {name}, which is what the evaluation itself gives. Name it otherwise"]
                )
            try:
                values[key] = float(value.item() if hasattr(value, "item") else value)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise ConfigError([f"{target} {_MUST} {name}={value!r:.200}"]) from error
        return values

    def _agreed(self, mine: dict[str, float]) -> dict[str, float]:
        """The main process's values, on all: a schedule and early stopping follow from them."""
        each: list[dict[str, float]] = self._processes.gather(mine)
        for rank, other in enumerate(each[1:], start=1):
            odd = [k for k in other if k not in each[0] or not _are_close(other[k], each[0][k])]
            if odd and not self._is_told:
                self._is_told, name = True, odd[0]
                self.notices.append(
                    f"WARNING {self._name_of_metric} gave {name}="
                    f"{each[0].get(name, 'nothing')} on process 0 and {other[name]} on process {rank}; process 0's is "
                    "taken. What each finds of its share of the rows is to be added up: context.sum_over_processes"
                )
        return each[0]

    @property
    def _name_of_metric(self) -> str:
        return f"eval.metric._target_={self._config.eval.metric['_target_']}"

    def _context(self, num_rows: int | None) -> EvalContext:
        rows = self._data.eval_rows
        if num_rows is not None:
            rows = rows[: num_rows * self._processes.world_size]
        return EvalContext(
            model=self._accelerator.unwrap_model(self._model), tokenizer=self._tokenizer, rows=rows,
            rank=self._processes.rank, world_size=self._processes.world_size, device=self._accelerator.device,
            sum_over_processes=self._processes.sum, batch_size=self._config.eval.per_device_eval_batch_size,
            show=lambda **sample: self.samples.append(sample),
        )  # fmt: skip


def _are_close(a: float, b: float) -> bool:
    """Kernels of several devices may round otherwise."""
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))


def build_metric(config: RunConfig) -> Metric | None:
    """The evaluation by generation that `eval.metric._target_` names, or None.

    Raises:
        ConfigError: it cannot be imported or refuses its arguments.
    """
    fields = dict(config.eval.metric)
    target = fields.pop("_target_", None)
    if target is None:
        return None
    module, _, name = str(target).rpartition(".")
    try:
        metric: Metric = getattr(importlib.import_module(module), name)(**fields)
        return metric
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError([f"eval.metric._target_={target}: {error}"]) from error
