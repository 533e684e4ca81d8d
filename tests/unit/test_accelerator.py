"""What an accelerator refuses before anything starts."""

from __future__ import annotations

import pytest
import torch

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.train.accelerator import build_accelerator


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_fp16_under_zero_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = compose([f"strategy={strategy}", "model.dtype=float16"])
    with pytest.raises(
        ConfigError, match=rf"model\.dtype=float16 .* strategy={strategy} .* Set model\.dtype=bfloat16, or strategy=ddp"
    ):
        build_accelerator(config)
