"""What is used of DeepSpeed's partitioning of parameters (ZeRO-3) that is not its public interface.

Seen with deepspeed 0.19.8; tests/unit/test_private_names.py fails where an upgrade has moved or changed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def partition_without_broadcast() -> Iterator[None]:
    """Parameters made inside are partitioned as soon as they are made, without a broadcast of what they hold."""
    from deepspeed.runtime.zero.partition_parameters import Init

    def partition_only(self: Any, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()  # type: ignore[attr-defined]

    broadcast_and_partition = Init._zero_init_param
    Init._zero_init_param = partition_only
    try:
        yield
    finally:
        Init._zero_init_param = broadcast_and_partition


def is_partitioned(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id")


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Of a parameter, also where this process holds a part of it."""
    return tuple(getattr(param, "ds_shape", param.shape))
