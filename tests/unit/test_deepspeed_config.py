"""What DeepSpeed is told."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config.settings import RunConfig
from launcher.train.accelerator import deepspeed_config


@pytest.mark.parametrize(
    ("name", "kwargs", "is_replaced"),
    [
        ("torch.optim.AdamW", {}, True), ("torch.optim.AdamW", {"betas": [0.9, 0.95]}, True),
        ("torch.optim.AdamW", {"amsgrad": True}, False), ("torch.optim.AdamW", {"maximize": True}, False),
        ("torch.optim.Adam", {}, False), ("torch.optim.SGD", {"momentum": 0.9}, False),
        ("mine.Lion", {}, False),
    ],
)  # fmt: skip
def test_offload_replaces_no_optimizer_by_another(name: str, kwargs: dict[str, Any], is_replaced: bool) -> None:
    config = RunConfig()
    config.strategy.name, config.optim.name, config.optim.kwargs = "zero3_offload", name, kwargs
    assert deepspeed_config(config, has_cuda=True)["zero_force_ds_cpu_optimizer"] is is_replaced
    assert deepspeed_config(config, has_cuda=False)["zero_force_ds_cpu_optimizer"] is False
    config.strategy.name = "zero2"
    assert "zero_force_ds_cpu_optimizer" not in deepspeed_config(config, has_cuda=True)
    config.strategy.deepspeed = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert deepspeed_config(config, has_cuda=True)["zero_force_ds_cpu_optimizer"] is is_replaced
