"""A bare Accelerate loop, as its documentation writes it: what the product is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common import NUM_TOKENS


def rows() -> list[dict[str, Any]]:
    """Rows of NUM_TOKENS tokens, labels as in language modelling."""
    import torch

    row = torch.arange(NUM_TOKENS)
    one = torch.ones_like(row)
    return [{"input_ids": (row + i) % 256, "labels": (row + i) % 256, "attention_mask": one} for i in range(512)]


def batches(accelerator: Any) -> Iterator[dict[str, Any]]:
    """One row per process and step, without end."""
    from torch.utils.data import DataLoader

    loader = accelerator.prepare_data_loader(DataLoader(rows(), batch_size=1, shuffle=True))
    while True:
        yield from loader


def step(accelerator: Any, model: Any, optimizer: Any, batch: dict[str, Any]) -> None:
    """One optimizer step; under DeepSpeed `backward` applies it."""
    model.train()
    loss = model(**batch).loss
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
