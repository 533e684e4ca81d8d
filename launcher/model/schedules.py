"""The schedules that most runs use, by transformers' formulas and without its trainer.

`transformers.optimization` imports `trainer_utils`, and that peft, and with it bitsandbytes and torch's compiler: 1 to
2 s of every start for four short functions. They are compared with transformers' own by a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _constant(step: int) -> float:
    return 1


def _constant_with_warmup(step: int, *, num_warmup_steps: int) -> float:
    if step < num_warmup_steps:
        return float(step) / float(max(1.0, num_warmup_steps))
    return 1.0


def _linear(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    if step < num_warmup_steps:
        return float(step) / float(max(1, num_warmup_steps))
    return max(0.0, float(num_training_steps - step) / float(max(1, num_training_steps - num_warmup_steps)))


def _cosine(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    if step < num_warmup_steps:
        return float(step) / float(max(1, num_warmup_steps))
    progress = float(step - num_warmup_steps) / float(max(1, num_training_steps - num_warmup_steps))
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


_SCHEDULES: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
    "constant": (_constant, ()),
    "constant_with_warmup": (_constant_with_warmup, ("num_warmup_steps",)),
    "linear": (_linear, ("num_warmup_steps", "num_training_steps")),
    "cosine": (_cosine, ("num_warmup_steps", "num_training_steps")),
}


def build_scheduler(
    name: str, optimizer: Optimizer, *, num_warmup_steps: int, num_training_steps: int, kwargs: dict[str, Any]
) -> Any:
    """transformers' scheduler of that name.

    Raises:
        TypeError, ValueError: there is none, or it refuses its arguments.
    """
    if name in _SCHEDULES and not kwargs:
        function, names = _SCHEDULES[name]
        steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
        return LambdaLR(optimizer, partial(function, **{key: steps[key] for key in names}))
    from transformers import get_scheduler

    return get_scheduler(
        name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps,
        scheduler_specific_kwargs=kwargs,
    )  # fmt: skip
