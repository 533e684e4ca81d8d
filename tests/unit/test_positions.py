"""Rows longer than the model's own positions are named before the start."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.errors import ConfigError
from launcher.model.positions import check_positions


def found(model_type: str, longest: int, **more: Any) -> list[str]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **more}
    config = AutoConfig.for_model(model_type, **sizes)
    return check_positions(AutoModelForCausalLM.from_config(config), config, longest, lambda: "rows.jsonl:7")


@pytest.mark.parametrize(
    ("model_type", "more"), [("gpt2", {}), ("opt", {"ffn_dim": 16, "word_embed_proj_dim": 16})]
)  # fmt: skip
def test_a_row_is_refused_when_positions_are_a_table(model_type: str, more: dict[str, Any]) -> None:
    assert found(model_type, 24, max_position_embeddings=24, **more) == []
    with pytest.raises(
        ConfigError, match=f"rows.jsonl:7 has 25 tokens but {model_type} has only 24.*data.max_length=24"
    ):
        found(model_type, 25, max_position_embeddings=24, **more)


def test_a_row_is_said_when_positions_are_rotary() -> None:
    more = {"intermediate_size": 16, "max_position_embeddings": 24}
    assert found("llama", 24, **more) == []
    (notice,) = found("llama", 25, **more)
    assert (
        notice.startswith("rows.jsonl:7 has 25 tokens, more than the 24 positions") and "data.max_length=24" in notice
    )


def test_any_row_fits_when_there_are_no_positions() -> None:
    assert found("bloom", 10**6) == []
