"""How a parameter in memory is cut into the tensors that a model file holds. Standard library alone."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a model file that is part of a parameter (or buffer) in memory, or all of it.

    Elements [start, start + numel) of the parameter in C order are the stored tensor in C order. So an expert of a
    mixture, which `save_pretrained` stores for itself, is a range of the parameter that holds all experts.
    """

    name: str
    shape: tuple[int, ...]
    start: int = 0
    dtype: str | None = None
    """safetensors' name of it where it is not that of the model's weights."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)
