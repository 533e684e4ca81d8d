"""How a parameter in memory is cut into the tensors that a model file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model file: elements [start, start + numel) of an in-memory parameter (C order).

    Most parameters are one stored tensor of the same name. Experts that are held as one parameter are many: elements of
    `experts.gate_up_proj` [E, 2I, H] are stored as `experts.0.gate_proj.weight` [I, H] and so on.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    dtype: str | None = None
    """safetensors' name of its dtype where that is not the dtype of the model's weights: some stay fp32."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


StoredTensors = Mapping[str, tuple[StoredTensor, ...]]
"""By in-memory name of a parameter or persistent buffer: the tensors that cover it. What is not in it is stored whole
under its own name."""
