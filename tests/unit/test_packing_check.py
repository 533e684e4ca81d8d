"""Packing is exact, or refused by the name of the architecture: promise 7."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.errors import ConfigError
from launcher.model.packing_check import check_packing
from tests.architectures import ARCHITECTURES, model_config

_LINEAR = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LEAKING: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "qwen3_next": {**_LINEAR, **_EXPERTS},
    "qwen3_5_text": _LINEAR,
}  # fmt: skip
_MORE_LEAKING = ("lfm2", "mamba2", "bloom", "opt", "falcon", "gpt_oss")


def build(config: dict[str, Any], attention: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in _MORE_LEAKING])
def test_architecture_is_accepted_when_it_keeps_rows_apart(name: str, attention: str) -> None:
    check_packing(build(model_config(name), attention), 200, torch.device("cpu"), name)


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("name", [*LEAKING, *_MORE_LEAKING])
def test_architecture_is_refused_by_name_when_rows_leak(name: str) -> None:
    config = {"model_type": name, **LEAKING[name]} if name in LEAKING else model_config(name)
    model = build(config, "eager")
    with pytest.raises(ConfigError, match=rf"data\.packing=true: {name} .*Set data\.packing=false"):
        check_packing(model, 200, torch.device("cpu"), name)
    assert model.training
