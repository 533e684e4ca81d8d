"""One optimizer step: forward, backward and update over its samples, on all processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.base.processes import Processes
from launcher.checkpoint import rng
from launcher.config.settings import RunConfig
from launcher.data import StepSampler, TokenRows, collate, split_step, to_device
from launcher.model.fused_head import head_cast_kept
from launcher.model.loss import LossFunction, router_coefficient
from launcher.model.optim import Schedule

_CLIP_EPSILON = 1e-6
"""By which torch takes a norm to be larger than it is: above the limit then, gradients are scaled down."""


@dataclass
class StepSums:
    """What this process found in a step. `num_labelled` is of all processes, the sums are its own."""

    loss_sum: float
    router_loss: float
    """This process's part of the mean over all tokens of the step; 0 without a router loss."""
    num_labelled: int
    num_tokens: int
    grad_norm: float
    is_applied: bool
    """Whether the update is applied: not where the gradient norm is not finite (fp16's loss scaling skips some)."""
    mean_loss: float = 0.0
    """Over all processes; only where a limit was given."""
    is_spike: bool = False
    is_left_out: bool = False


class TrainStep:
    """Trains the model on the samples of one step after another: `run` or `leave_out`, and then `update`.

    Args:
        before_update: called when the gradients are there and the state has not changed yet.
    """

    def __init__(
        self, config: RunConfig, processes: Processes, accelerator: Any, model: Any, optimizer: Any, schedule: Schedule,
        rows: TokenRows, sampler: StepSampler, pad_token_id: int, loss: LossFunction, before_update: Callable[[], None],
    ) -> None:  # fmt: skip
        self._config, self._processes, self.accelerator = config, processes, accelerator
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self._rows, self._sampler, self._pad_token_id = rows, sampler, pad_token_id
        self._loss, self._before_update = loss, before_update
        self._router_coefficient = router_coefficient(model)
        self._base = getattr(model, "module", model)
        model.train()
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def epoch_after(self, step: int) -> float:
        return self._sampler.epoch_after(step)

    def leave_out(self) -> StepSums:
        """A step that trains on nothing; the schedule counts it."""
        self._before_update()
        return StepSums(0.0, 0.0, 0, 0, 0.0, is_applied=False, is_left_out=True)

    def run(self, step: int, spike_limit: float | None = None) -> StepSums:
        """The clipped gradients of the step that follows `step`. Under ZeRO they are applied as
        well: DeepSpeed clips and applies in one call. Collective.

        Args:
            spike_limit: where the mean loss is above, the update is not applied.
        """
        config, world_size, device = self._config, self._processes.world_size, self.accelerator.device
        rng.seed_step(config.seed, self._processes.rank, step)
        is_mixed = config.mixed_precision != "no"
        rows = self._sampler.rows_of_step(step)
        num_labelled = max(1, self._rows.num_labelled_tokens(rows))
        micro_batches = split_step(rows, self._processes.rank, world_size, config.train.micro_batch_size)
        if not self._base.training:  # `train` goes through all modules
            self.model.train()
        loss_sum, num_tokens = torch.zeros((), dtype=torch.float64, device=device), 0
        router_loss, mean_loss = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
        with self._casts_kept(len(micro_batches)):
            for i, ids in enumerate(micro_batches):
                batch = to_device(collate(self._rows, ids, self._pad_token_id), device)
                num_tokens += self._rows.num_tokens(ids)
                is_last = i == len(micro_batches) - 1
                with contextlib.nullcontext() if is_last else self._no_sync():
                    with self.accelerator.autocast() if is_mixed else contextlib.nullcontext():
                        loss, _, router = self._loss(self.model, batch)
                    # Gradients are averaged over the processes; the mean is over the labelled tokens of the whole step.
                    total = loss * (world_size / num_labelled)
                    if router is not None:  # a mean over the micro-batch: by its share of the step's tokens
                        share = self._rows.num_tokens(ids) / max(1, self._rows.num_tokens(rows))
                        total = total + router * (world_size * share * self._router_coefficient)
                        router_loss += router.detach() * share
                    loss_sum += loss.detach()
                    if is_last and spike_limit is not None:
                        mean_loss = self._mean(loss_sum, num_labelled)
                        # Gradients of NaN are never applied, under any strategy, and the host need not wait to know.
                        total = total * torch.where(mean_loss > spike_limit, math.nan, 1.0).to(total.dtype)
                    self._backward(total, is_last=is_last)
        self._before_update()
        sums, is_applied = self._clip([loss_sum, router_loss, mean_loss])
        is_spike = spike_limit is not None and sums[2] > spike_limit
        return StepSums(sums[0], sums[1], num_labelled, num_tokens, sums[3], is_applied, sums[2], is_spike)

    def update(self, sums: StepSums) -> None:
        """Applies the gradients, where they are finite, and counts the step in the schedule: applied or not, so that
        the rate follows from the step alone. Collective.

        Args:
            sums: of this step.
        """
        if not (self._config.strategy.zero_stage or sums.is_left_out):
            if sums.is_applied or self.accelerator.scaler is not None:
                self.optimizer.step()
            self.optimizer.zero_grad()
        self.schedule.step()

    def _casts_kept(self, num_micro_batches: int) -> Any:
        """Autocast keeps its copies of the weights from micro-batch to micro-batch: none of them changes before the
        update. It clears them where the outermost block ends, so an outer one is kept open, without autocast itself.

        Not with recomputed layers: their first pass may make the copies without a graph (torch's checkpoint.py).
        """
        config = self._config
        if num_micro_batches < 2 or config.mixed_precision == "no" or config.strategy.zero_stage:
            return contextlib.nullcontext()
        if config.model.gradient_checkpointing or config.train.torch_compile:
            return contextlib.nullcontext()
        kept = contextlib.ExitStack()
        kept.enter_context(torch.autocast(self.accelerator.device.type, enabled=False))
        kept.enter_context(head_cast_kept())
        return kept

    def _mean(self, loss_sum: torch.Tensor, num_labelled: int) -> torch.Tensor:
        """The loss of the step over all processes, the same bits on each."""
        total = loss_sum.clone()
        if self._processes.world_size > 1:
            torch.distributed.all_reduce(total)
        return total / num_labelled

    def _no_sync(self) -> Any:
        """DeepSpeed learns the boundary in `_backward`; DDP must not reduce before the last micro-batch."""
        is_zero = self._config.strategy.zero_stage
        return contextlib.nullcontext() if is_zero else self.accelerator.no_sync(self.model)

    def _backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        if self._config.strategy.zero_stage:
            self.model.set_gradient_accumulation_boundary(is_last)
            self.model.backward(loss)
        else:
            self.accelerator.backward(loss)

    def _clip(self, sums: list[torch.Tensor]) -> tuple[list[float], bool]:
        """Clips, and under ZeRO applies; a non-finite gradient norm leaves the weights as they are.

        A norm within the limit costs no pass over the gradients: they are not multiplied by 1.

        Args:
            sums: scalars of the device (fp64) that are to be known as well: the host waits once in a step, here.

        Returns:
            Their values and the norm before clipping, and whether the step is applied.
        """
        if self._config.strategy.zero_stage:
            self.model.step()
            found = _read([*sums, self.model.get_global_grad_norm()])
            return found, not getattr(self.model.optimizer, "overflow", False)
        self.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm(p.grad for p in self._trained if p.grad is not None)
        found = _read([*sums, norm])
        limit = self._config.train.max_grad_norm or math.inf
        if limit < found[-1] + _CLIP_EPSILON:
            nn.utils.clip_grads_with_norm_(self._trained, limit, norm)
        return found, math.isfinite(found[-1])


def _read(values: list[Any]) -> list[float]:
    """Scalars of a device in one transfer; what is on the host already (offloaded norms, numbers, None for 0) stays."""
    is_far = [isinstance(value, torch.Tensor) and value.device.type != "cpu" for value in values]
    far = [value.detach().double().view(()) for value, is_one in zip(values, is_far, strict=True) if is_one]
    read = iter(torch.stack(far).tolist() if far else [])
    return [next(read) if is_one else float(value or 0.0) for value, is_one in zip(values, is_far, strict=True)]
