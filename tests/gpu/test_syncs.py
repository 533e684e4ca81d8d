"""The host waits for the device once in an optimizer step, as CUDA itself reports it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from launcher.model import attention, cuda_attention
from launcher.train import step as step_module
from tests.one_step import build_step, train


@contextmanager
def sync_is(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("form", "name"), [("padded", "sdpa"), ("packed", "sdpa"), ("padded", cuda_attention.NAME),
                       ("flat", cuda_attention.NAME)],
)  # fmt: skip
def test_host_waits_once_in_a_step(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == cuda_attention.NAME:
        attention._register(name, cuda_attention.attend)
    read_all, reads = step_module._read, []

    def read(values: list[Any]) -> list[float]:
        reads.append(len(values))
        with sync_is("default"):
            return read_all(values)

    step = build_step(form, name, "model.dtype=bfloat16")
    train(step, 0)  # the optimizer gets its states, kernels are chosen
    monkeypatch.setattr(step_module, "_read", read)
    with sync_is("error"):
        sums = train(step, 1)
    assert reads == [4] and sums.loss_sum > 0 and sums.is_applied
