"""What is used of peft that is not its public interface.

Seen with peft 0.21.2; tests/unit/test_private_names.py fails where an upgrade has moved or changed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from launcher.base import _deepspeed


@contextlib.contextmanager
def token_rows_on_any_device() -> Iterator[None]:
    """Under ZeRO-3 peft collects the rows of `trainable_token_indices` on CUDA alone."""
    from peft.tuners import trainable_tokens

    layer: Any = trainable_tokens.TrainableTokensLayer

    def collect(self: Any, weight: Any, rows: Any, embed_dim: int) -> Tensor:
        with _deepspeed.gathered([weight]):
            collected: Tensor = weight.detach()[rows].clone()
        return collected

    original = layer._collect_token_weights
    layer._collect_token_weights = collect
    try:
        yield
    finally:
        layer._collect_token_weights = original
