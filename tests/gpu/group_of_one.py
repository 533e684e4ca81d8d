"""An optimizer that makes a process group of one count as one of several, for DDP on a single device.

Accelerate wraps a model in DDP where there is more than one process; a group of one over nccl is none to it.
`optim.name` brings this module into the rank, and the optimizer is built before the model is wrapped.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

TOLD = "DDP was given a model"
AS_SEVERAL = property(lambda state: state.distributed_type != DistributedType.NO)
"""In the place of PartialState.use_distributed."""


class AdamW(torch.optim.AdamW):
    """AdamW, bit for bit."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        PartialState.use_distributed = AS_SEVERAL
        DistributedDataParallel.__init__ = _make_and_tell


_make = DistributedDataParallel.__init__


def _make_and_tell(self: Any, *args: Any, **kwargs: Any) -> None:
    _make(self, *args, **kwargs)
    print(TOLD, flush=True)
