"""What an evaluation by generation gets: `eval.metric._target_` names a class whose instance is called with this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvalContext:
    """One process's view of an evaluation. Collective: the metric is called on every process.

    Args:
        model: has `generate`; in eval mode; on `device`. Under ZeRO-3 every process must call it equally often.
        tokenizer: a PreTrainedTokenizerBase.
        rows: every held-out row as it was read; the metric takes its own share by rank.
        rank: of this process, from 0.
        world_size: processes.
        device: torch.device of the model.
        sum_over_processes: the element-wise sums of a list of numbers over all processes; exact for whole numbers
            below 2^53. A collective.
        batch_size: samples per process and generate call (`eval.per_device_eval_batch_size`).
        show: takes `prompt`, `answer` and, where they are known, `expected` and `is_right`: a few of them, the same
            prompts every time, stand in the report. The first process's are kept.
    """

    model: Any
    tokenizer: Any
    rows: Sequence[dict[str, Any]]
    rank: int
    world_size: int
    device: Any
    sum_over_processes: Callable[[list[float]], list[float]]
    batch_size: int = 64
    show: Callable[..., None] = lambda **sample: None
