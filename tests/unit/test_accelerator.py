"""What an accelerator refuses before anything starts."""

from __future__ import annotations

import pytest
import torch

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.train.accelerator import build_accelerator


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3"])
def test_fp16_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = compose([f"strategy={strategy}", "model.dtype=float16", "launch.num_processes=1"])
    with pytest.raises(
        ConfigError, match=r"model\.dtype=float16 is trained on GPUs only, .* Set model\.dtype=bfloat16"
    ):
        build_accelerator(config)
