"""An optimizer whose rank may take so many bytes of its device: $MEMORY_BYTES. More is CUDA's own OutOfMemoryError."""

from __future__ import annotations

import os
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """AdamW, bit for bit; built before the model is on the device."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(int(os.environ["MEMORY_BYTES"]) / total)
