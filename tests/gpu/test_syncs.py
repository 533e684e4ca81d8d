"""How often the host waits for the device in an optimizer step, as CUDA itself reports it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from launcher.model import attention, cuda_attention
from launcher.train import step as step_module
from tests.gpu.group_of_one import AS_SEVERAL
from tests.gpu.start import GROUP_OF_ONE
from tests.one_step import build_step, own_accelerator_state, train

__all__ = ["own_accelerator_state"]

_MOST_UNDER_ZERO2 = 12
"""DeepSpeed asks whether there was an overflow, and of norms whether they are finite: six questions, as a CPU shows."""


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Where there is a process group, it is the test's, as are its variables."""
    with mock.patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def sync_is(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # torch says once that it does not see every wait
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("form", "name", "strategy"),
    [
        ("padded", "sdpa", "single"), ("packed", "sdpa", "single"), ("padded", cuda_attention.NAME, "single"),
        ("flat", cuda_attention.NAME, "single"), ("flat", cuda_attention.NAME, "ddp"),
    ],
)  # fmt: skip
def test_host_waits_once_in_a_step(form: str, name: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention._register(cuda_attention.NAME, cuda_attention.attend)
    if strategy == "ddp":
        monkeypatch.setattr(PartialState, "use_distributed", AS_SEVERAL)
        os.environ |= GROUP_OF_ONE
    read_all, reads = step_module._read, []

    def read(values: list[Any]) -> list[float]:
        reads.append(len(values))
        with sync_is("default"):
            return read_all(values)

    step = build_step(form, name, f"strategy={strategy}", "model.dtype=bfloat16")
    assert isinstance(step.model, torch.nn.parallel.DistributedDataParallel) is (strategy == "ddp")
    train(step, 0)  # the optimizer gets its states, kernels are chosen
    monkeypatch.setattr(step_module, "_read", read)
    with sync_is("error"):
        sums = train(step, 1)
    assert reads == [4] and sums.loss_sum > 0 and sums.is_applied


def test_micro_batches_add_no_waits_under_zero2() -> None:
    """DeepSpeed waits more often, but once for all micro-batches."""
    attention._register(cuda_attention.NAME, cuda_attention.attend)
    found = {}
    for size in (8, 2):
        AcceleratorState._reset_state(reset_partial_state=True)
        micro_batch = f"train.per_device_train_batch_size={size}"
        step = build_step("flat", cuda_attention.NAME, "strategy=zero2", "model.dtype=bfloat16", micro_batch)
        train(step, 0)
        with warnings.catch_warnings(record=True) as seen, sync_is("warn"):
            warnings.simplefilter("always")
            sums = train(step, 1)
        found[size] = sum("synchroniz" in str(warning.message) for warning in seen)
        assert sums.is_applied
    print(f"waits in a step by samples of a micro-batch: {found}")
    assert found[2] == found[8] <= _MOST_UNDER_ZERO2, found
