"""When to save, which checkpoints stay, which one is the best. Decisions only; the writing is checkpoint/'s."""

from __future__ import annotations

import math
import time
from typing import Any

from launcher.checkpoint.save_result import SaveResult
from launcher.config.settings import RunConfig

_FIRST_AUTO_SAVE_S = 60.0
_RETRY_S = 30.0


def is_better(config: RunConfig, metric: float | None, best: float | None) -> bool:
    """Whether a metric beats the best so far; NaN and infinities never do."""
    if metric is None or not math.isfinite(metric):
        return False
    if best is None:
        return True
    return metric > best if config.checkpoint.is_greater_better else metric < best


def crosses_epoch(step: int, batch_size: int, num_rows: int) -> bool:
    """Whether the end of an epoch lies in this step (counted from 1)."""
    return step * batch_size // num_rows > (step - 1) * batch_size // num_rows


class SaveSchedule:
    """Decides on the main process whether a save is due after a step; the others are told."""

    def __init__(self, config: RunConfig, num_rows: int) -> None:
        self._checkpoint, self._batch, self._num_rows = config.checkpoint, config.train.train_batch_size, num_rows
        self._last_save = time.monotonic()
        self._cost_s: float | None = None
        self._num_failures = 0  # in a row
        self._retry_at = math.inf
        self.is_waiting_for_room = False

    def interval_s(self) -> float:
        """Young and Daly's interval sqrt(2 · mtbf · cost), no shorter than what max_overhead allows."""
        if self._cost_s is None:
            return _FIRST_AUTO_SAVE_S
        shortest = self._cost_s / self._checkpoint.max_overhead if self._checkpoint.max_overhead else math.inf
        return max(math.sqrt(2 * self._checkpoint.mtbf_s * self._cost_s), shortest)

    def is_due(self, step: int, *, improved: bool) -> bool:
        """Whether the strategy, the clock or a failed save asks for one now."""
        ck, now = self._checkpoint, time.monotonic()
        if ck.save_strategy == "no":
            return False
        if now >= self._retry_at:
            return True
        if ck.save_every_s is not None and now - self._last_save >= ck.save_every_s:
            return True
        if ck.save_strategy == "best":
            return improved
        if ck.save_strategy == "epoch":
            return crosses_epoch(step, self._batch, self._num_rows)
        if isinstance(ck.save_steps, int):
            return step % ck.save_steps == 0
        return now - self._last_save >= self.interval_s()

    def is_regular(self, step: int, total_steps: int) -> bool:
        """Whether an undisturbed run saves this step too; by the clock it may save any."""
        ck = self._checkpoint
        if step >= total_steps or ck.save_strategy == "best" or ck.save_every_s is not None:
            return True
        if ck.save_strategy == "epoch":
            return crosses_epoch(step, self._batch, self._num_rows)
        return not isinstance(ck.save_steps, int) or step % ck.save_steps == 0

    def has_regular(self, step: int) -> bool:
        """Whether an undisturbed run has saved by this step; by the clock and on improvement it may have."""
        ck = self._checkpoint
        if ck.save_every_s is None and ck.save_strategy == "steps" and isinstance(ck.save_steps, int):
            return step >= ck.save_steps
        if ck.save_every_s is None and ck.save_strategy == "epoch":
            return step * self._batch >= self._num_rows
        return ck.save_strategy != "no" and step >= 1

    def started(self) -> None:
        """A save is under way, a repeated one included: the next steps do not ask for another."""
        self._last_save, self._retry_at = time.monotonic(), math.inf

    def ended(self, result: SaveResult) -> None:
        """Notes what a save cost, or that it has to be made up for.

        A failed save is repeated at the next step (a writer that was killed is a new one then), after that every half
        minute. One that found no room is due as soon as there is.
        """
        if result.error is None:
            self._cost_s = max(result.stall_s, 1e-3)
            self._num_failures, self._retry_at, self.is_waiting_for_room = 0, math.inf, False
        else:
            self._num_failures += 1
            is_first = self._num_failures == 1 and not result.found_no_room
            self._retry_at = time.monotonic() + (0.0 if is_first else _RETRY_S)
            self.is_waiting_for_room = result.found_no_room


def save_line(result: SaveResult) -> dict[str, Any]:
    """The line of metrics.jsonl for a committed save."""
    return {
        "step": result.step, "checkpoint": f"checkpoint-{result.step}", "save_stall_s": round(result.stall_s, 4),
        "save_write_s": round(result.write_s, 4), "bytes": result.num_bytes,
    }  # fmt: skip
