"""The host waits for the device once in an optimizer step; here counted by what would make it wait on CUDA."""

from __future__ import annotations

import itertools
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from launcher.checkpoint.segments import collect, read_scalars
from launcher.model import attention, cuda_attention
from launcher.train import step as step_module
from tests.one_step import FORMS, build_step, train

_ASKING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal")


class _Waits(TorchDispatchMode):
    """Notes every operation whose result the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        has_mask = any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:]))
        if name in _ASKING or (name.startswith("aten::index") and has_mask):
            frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "_dispatch" not in f.filename]
            self.found.append(f"{name} at {frames[-2]}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("form", "name"), [*itertools.product(FORMS, ("sdpa", "eager")), ("padded", cuda_attention.NAME)]
)
def test_host_reads_the_device_once_in_a_step(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    to_device, reads = step_module.to_device, []
    if name == cuda_attention.NAME:
        attention._register(name, cuda_attention.attend)
        monkeypatch.setattr(cuda_attention, "why_not", lambda *_, **__: None)  # it is not for a CPU, and runs there

    def on_the_host(*args: Any) -> Any:  # what it asks, it asks before anything is on the device
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            return to_device(*args)

    def read(values: list[Any]) -> list[float]:
        reads.append(len(values))
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            return read_all(values)

    read_all = step_module._read
    step = build_step(form, name)
    train(step, 0)
    monkeypatch.setattr(step_module, "to_device", on_the_host)
    monkeypatch.setattr(step_module, "_read", read)
    with _Waits() as waits:
        sums = train(step, 1)
    assert waits.found == [] and reads == [4]
    assert sums.loss_sum > 0 and sums.grad_norm > 0 and sums.is_applied


class _OnOneDevice(TorchDispatchMode):
    """Stacks as a device does, of its own tensors alone ("meta" stands for it); all are 7."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name != "aten::stack":
            return func(*args, **(kwargs or {}))
        assert {tensor.device.type for tensor in args[0]} == {"meta"}
        return torch.full((len(args[0]),), 7.0)


def test_step_reads_a_norm_of_the_host_beside_sums_of_the_device() -> None:
    """With offloaded states DeepSpeed keeps the norm on the CPU."""
    sums = torch.zeros((), device="meta", dtype=torch.float64)
    with _OnOneDevice():
        assert step_module._read([sums, sums, torch.tensor(2.5)]) == [7.0, 7.0, 2.5]
        assert step_module._read([sums, None, 3]) == [7.0, 0.0, 3.0]
        assert step_module._read([torch.tensor(1.5), 2.0]) == [1.5, 2.0]


def test_optimizer_scalars_are_read_together() -> None:
    step = build_step("padded", "sdpa")
    train(step, 0)
    state = collect(step.model, step.optimizer, rank=0, world_size=1)
    with _Waits() as waits:
        found = read_scalars(state.segments)
        assert all(not segment.odd() for segment in state.segments)
    assert waits.found == [] and len(found) > 10 and all(scalars == {"step": 1.0} for scalars in found)
