"""What DeepSpeed is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.config.rules import notices
from launcher.config.settings import RunConfig
from launcher.config.strategy_rules import DEEPSPEED_KEYS
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


@pytest.mark.parametrize(
    ("strategy", "theirs", "mend"),
    [
        ("zero2", "train_batch_size=3", "train.train_batch_size=3"),
        ("zero2", "train_micro_batch_size_per_gpu=3", "train.per_device_train_batch_size=3"),
        ("zero2", "gradient_accumulation_steps=2", "train.train_batch_size=128 (32 * 2 * 2)"),
        ("zero2", "zero_optimization.stage=3", "strategy=zero3"),
        ("zero1", "zero_optimization.stage=0", "strategy=ddp"),
        ("auto", "zero_optimization.stage=2", "strategy=zero2"),
        ("zero2", "zero_optimization.stage=4", "strategy=zero1, zero2 or zero3"),
        ("zero2", "zero_optimization=3", "strategy.deepspeed.zero_optimization.NAME=VALUE"),
        ("zero2", "bf16.enabled=true", "model.dtype=bfloat16"),
        ("zero2", "fp16.enabled=true", "model.dtype=float16"),
        ("zero2 model.dtype=bfloat16", "bf16.enabled=false", "model.dtype=float32"),
        ("zero2", "optimizer.type=Adam", "optim.name=NAME"),
        ("zero2", "zero_optimizatoin.overlap_comm=true", "Did you mean strategy.deepspeed.zero_optimization?"),
    ],
)
def test_deepspeed_settings_are_refused_when_others_decide(strategy: str, theirs: str, mend: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*f"strategy={strategy}".split(), f"strategy.deepspeed.{theirs}"])
    (problem,) = caught.value.problems
    assert problem.startswith(f"strategy.deepspeed.{re.split('[=.]', theirs)[0]}")
    assert mend in problem


def test_deepspeed_settings_that_repeat_ours_are_taken() -> None:
    """Also as the Trainer's files have them; DeepSpeed is told what counts."""
    theirs = (
        "{train_batch_size: %s, train_micro_batch_size_per_gpu: %s, gradient_accumulation_steps: %s, bf16: %s, "
        "zero_optimization: {stage: %s, overlap_comm: false}, of_my_own: 1}"
    )
    for values in (("auto", "auto", "auto", "{enabled: auto}", "auto"), (32, 16, 1, "{enabled: true}", 2)):
        config = compose(["strategy=zero2", "model.dtype=bfloat16", "train.train_batch_size=32",
                          "train.per_device_train_batch_size=16", f"strategy.deepspeed={theirs % values}"])  # fmt: skip
        assert notices(config) == []
        told = deepspeed_config(config, has_cuda=True)
        assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (16, 1)
        assert told["bf16"]["enabled"] is True and told["zero_optimization"]["stage"] == 2
        assert told["zero_optimization"]["overlap_comm"] is False and "train_batch_size" not in told


def test_deepspeed_settings_without_deepspeed_are_noticed() -> None:
    config = compose(["strategy=ddp", "strategy.deepspeed.zero_optimization.overlap_comm=true"])
    assert notices(config) == [
        "strategy.deepspeed (zero_optimization) has no effect under strategy=ddp. To use it: strategy=zero2"
    ]
    assert notices(compose(["strategy=auto", "strategy.deepspeed.steps_per_print=5"])) == []


def test_keys_of_deepspeed_are_those_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()

    class Settings(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def keys(self) -> Any:
            return self

        def __copy__(self) -> Settings:
            return self

    DeepSpeedConfig(Settings(train_batch_size=1))
    assert sorted(asked) == list(DEEPSPEED_KEYS)


@pytest.mark.parametrize(
    ("strategy", "world_size", "has_cuda", "expected"),
    [
        ("zero1", 1, True, False), ("zero2", 1, True, False), ("zero2", 2, True, True), ("zero3", 1, True, True),
        ("zero2", 2, False, False), ("zero3", 2, False, False),
    ],
)  # fmt: skip
def test_communication_is_overlapped_where_there_is_some(
    monkeypatch: pytest.MonkeyPatch, strategy: str, world_size: int, has_cuda: bool, expected: bool
) -> None:
    """ZeRO-1 and 2 wait for the device in every micro-batch for it; ZeRO-3 fetches weights ahead."""
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config = compose([f"strategy={strategy}"])
    assert deepspeed_config(config, has_cuda=has_cuda)["zero_optimization"]["overlap_comm"] is expected
