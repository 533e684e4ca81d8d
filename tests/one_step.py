"""An optimizer step of a tiny model with the real parts of a run, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from launcher.base.processes import Processes
from launcher.config.compose import compose
from launcher.data import StepSampler
from launcher.model.loss import build_loss
from launcher.model.optim import Schedule, build_optimizer
from launcher.train.accelerator import build_accelerator
from launcher.train.step import StepSums, TrainStep

_NUM_ROWS = 40
FORMS = ("padded", "packed", "flat")


class Rows:
    """Rows of different lengths, the second half of each labelled; as `data.TokenRows` gives them."""

    def __init__(self, form: str) -> None:
        self.is_packed, self.is_flat, self.is_rounded = form == "packed", form == "flat", False
        source = np.random.default_rng(0)
        self._rows = [source.integers(3, 200, source.integers(5, 30)) for _ in range(_NUM_ROWS)]

    def __len__(self) -> int:
        return len(self._rows)

    def segments(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = [self._rows[i], self._rows[(i + 1) % len(self)]] if self.is_packed else [self._rows[i]]
        return [(tokens, np.arange(len(tokens)) >= len(tokens) // 2) for tokens in rows]

    def num_labelled_tokens(self, ids: np.ndarray) -> int:
        return sum(int(mask.sum()) for i in ids for _, mask in self.segments(int(i)))

    def num_tokens(self, ids: np.ndarray) -> int:
        return sum(len(tokens) for i in ids for tokens, _ in self.segments(int(i)))


@pytest.fixture(autouse=True)
def own_accelerator_state() -> Iterator[None]:
    """Accelerate has one precision per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(step: TrainStep, number: int) -> StepSums:
    """The step after step `number`, as the loop makes it."""
    sums = step.run(number)
    step.update(sums)
    return sums


def build_step(
    form: str, attention: str, *overrides: str, before_update: Callable[[], None] = lambda: None
) -> TrainStep:
    """A step of 8 samples in 4 micro-batches, with our head and loss.

    Args:
        form: one of FORMS.
        attention: transformers' name of it.
    """
    config = compose([
        "data=arithmetic", "model=tiny_llama", "strategy=single", "train.train_batch_size=8",
        "train.per_device_train_batch_size=2", "tracker=off", *overrides,
    ])  # fmt: skip
    torch.manual_seed(0)
    accelerator = build_accelerator(config)
    module: Any = AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=256),
        attn_implementation=attention,
    )
    optimizer = build_optimizer(config, module)
    schedule = Schedule(config, optimizer, 10)
    model, optimizer = accelerator.prepare(module, optimizer)
    loss, _ = build_loss(accelerator.unwrap_model(model), accelerator.device, is_fused=True)
    rows: Any = Rows(form)
    sampler = StepSampler(len(rows), config.train.train_batch_size, 0)
    return TrainStep(
        config, Processes(), accelerator, model, optimizer, schedule, rows, sampler, 0, loss, before_update
    )
