"""Under bf16 a weight is cast once in an optimizer step, not once in each micro-batch, and nothing else changes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.train.step import TrainStep
from tests.one_step import FORMS, build_step, own_accelerator_state, train

__all__ = ["own_accelerator_state"]

_BF16 = ("model.dtype=bfloat16", "train.mixed_precision=bf16")


class _Casts(TorchDispatchMode):
    """Counts casts of fp32 matrices of the weights' shapes to bfloat16."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_to_copy" and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.count += args[0].dtype == torch.float32 and tuple(args[0].shape) in self._shapes
        return func(*args, **(kwargs or {}))


def _trained(step: TrainStep, num_steps: int) -> list[torch.Tensor]:
    for number in range(num_steps):
        assert train(step, number).is_applied
    return [parameter.detach().clone() for parameter in step.model.parameters()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_weights_are_the_same_bits_when_casts_are_kept(
    form: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = _trained(build_step(form, attention, *_BF16), 3)
    monkeypatch.setattr(TrainStep, "_casts_kept", lambda *_: contextlib.nullcontext())
    assert all(map(torch.equal, kept, _trained(build_step(form, attention, *_BF16), 3)))


@pytest.mark.parametrize(("num_micro", "overrides"), [(1, ()), (4, ()), (4, ("model.gradient_checkpointing=true",))])
def test_each_weight_is_cast_once_in_a_step(num_micro: int, overrides: tuple[str, ...]) -> None:
    size = f"train.per_device_train_batch_size={8 // num_micro}"
    step = build_step("padded", "sdpa", *_BF16, size, *overrides)
    layers = [p for name, p in step.model.named_parameters() if "_proj" in name or "lm_head" in name]
    assert len(layers) == 15
    train(step, 0)
    with _Casts({tuple(p.shape) for p in layers}) as casts:
        train(step, 1)
    assert casts.count == len(layers) * (num_micro if overrides else 1)
    assert not torch.is_autocast_enabled("cpu")
