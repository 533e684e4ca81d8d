"""What an accelerator refuses before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.train import accelerator
from launcher.train.accelerator import build_accelerator


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3"])
def test_fp16_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = compose([f"strategy={strategy}", "model.dtype=float16", "launch.num_processes=1"])
    with pytest.raises(
        ConfigError, match=r"model\.dtype=float16 is trained on GPUs only, .* Set model\.dtype=bfloat16"
    ):
        build_accelerator(config)


@pytest.mark.parametrize(("rank", "world_size", "is_set"), [(None, "1", False), ("0", "1", True), ("0", "2", True)])
def test_ddp_is_set_alike_for_every_process_group(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world_size: str, is_set: bool
) -> None:
    """torchrun gives a single process a rank, too; without one, Accelerate opens no process group."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(accelerator, "LauncherAccelerator", lambda **arguments: made.append(arguments))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    build_accelerator(compose(["strategy=ddp", "launch.num_processes=1"]))
    kinds = [type(handler).__name__ for handler in made[0]["kwargs_handlers"]]
    assert kinds == (["InitProcessGroupKwargs", "DistributedDataParallelKwargs"] if is_set else [])


@pytest.mark.parametrize("is_asked", [True, False])
def test_kernels_are_deterministic_for_whoever_computes_when_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, is_asked: bool
) -> None:
    """The process that evaluates in the background has an accelerator, too, and nothing else of a training."""
    monkeypatch.setattr(accelerator, "LauncherAccelerator", lambda **arguments: None)
    try:
        build_accelerator(compose(["strategy=ddp", f"train.full_determinism={str(is_asked).lower()}"]))
        assert torch.are_deterministic_algorithms_enabled() is is_asked
    finally:
        torch.use_deterministic_algorithms(False)
