"""Rows longer than the model's own positions are named before the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.errors import ConfigError
from launcher.model.positions import check_positions, forget_lengths


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


@pytest.mark.parametrize(
    ("model_type", "more", "limit"),
    [
        ("openai-gpt", {"n_positions": 24}, 24),
        ("gptj", {"n_positions": 24, "rotary_dim": 4, "n_inner": 16}, 24),
        ("codegen", {"n_positions": 24, "rotary_dim": 4, "num_attention_heads": 4}, 24),
        ("ctrl", {"n_positions": 24, "dff": 16}, 24),
        ("roberta", {"is_decoder": True, "max_position_embeddings": 24, "pad_token_id": 1, "intermediate_size": 16},
         22),
        ("reformer", {"is_decoder": True, "axial_pos_embds": False, "max_position_embeddings": 24,
                      "attn_layers": ["local"], "feed_forward_size": 16, "attention_head_size": 8}, 24),
    ],
)  # fmt: skip
def test_a_row_is_refused_whatever_the_table_is_called(model_type: str, more: dict[str, Any], limit: int) -> None:
    """A row that is longer ends a run with an IndexError, wherever it comes; one of that length does not."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **more}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    assert check_positions(model, model.config, limit, lambda: "rows.jsonl:7") == []
    with pytest.raises(ConfigError, match=f"has only {limit} positions"):
        check_positions(model, model.config, limit + 1, lambda: "rows.jsonl:7")
    model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(torch.full((1, limit + 1), 5))


_TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
         "num_key_value_heads": 1, "intermediate_size": 16}  # fmt: skip
_IMAGES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
           "image_size": 28, "patch_size": 14}  # fmt: skip


def test_the_positions_of_images_are_no_limit_of_a_text() -> None:
    """Gemma 3's images have 4096 patches, and a table of that many positions."""
    config = AutoConfig.for_model("gemma3", text_config={**_TEXT, "max_position_embeddings": 64}, vision_config=_IMAGES)
    model = AutoModelForCausalLM.from_config(config)
    assert any("position_embedding" in name for name, _ in model.named_modules())
    assert check_positions(model, config, 64, lambda: "rows.jsonl:7") == []
    assert "than the 64 positions" in check_positions(model, config, 65, lambda: "rows.jsonl:7")[0]


def test_a_row_is_said_when_positions_are_rotary() -> None:
    more = {"intermediate_size": 16, "max_position_embeddings": 24}
    assert found("llama", 24, **more) == []
    (notice,) = found("llama", 25, **more)
    assert (
        notice.startswith("rows.jsonl:7 has 25 tokens, more than the 24 positions") and "data.max_length=24" in notice
    )


def test_any_row_fits_when_there_are_no_positions() -> None:
    assert found("bloom", 10**6) == []


_SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24, "factor": 4.0,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
}  # fmt: skip
_SWITCHING = {
    "dynamic": AutoConfig.for_model("llama", **_SMALL, max_position_embeddings=24, rope_parameters=_DYNAMIC),
    "longrope": AutoConfig.for_model("llama", **_SMALL, max_position_embeddings=96, rope_parameters=_LONG),
}


@pytest.mark.parametrize("kind", _SWITCHING)
def test_a_pack_is_refused_when_one_row_changes_the_positions_of_the_others(kind: str) -> None:
    model, config = AutoModelForCausalLM.from_config(_SWITCHING[kind]), _SWITCHING[kind]

    def check(longest: int, **more: Any) -> list[str]:
        return check_positions(model, config, longest, lambda: "rows.jsonl:7", **more)

    assert check(24, is_packed=True, micro_batch_size=8) == []
    with pytest.raises(ConfigError, match=rf"data.packing=true: rows.jsonl:7 has 25 .*rope_type={kind}.*max_length=24"):
        check(25, is_packed=True)
    assert "train.per_device_train_batch_size=1" in check(25, micro_batch_size=8)[0]
    assert not any("rope_type" in notice for notice in check(25))


def test_a_row_is_what_it_is_whatever_came_before_when_its_positions_depend_on_lengths() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(_SWITCHING["dynamic"]).eval()
    row, longer = (torch.arange(length)[None] % 32 for length in (40, 60))

    def differs() -> bool:
        with torch.no_grad():
            alone = model(row, use_cache=False).logits
            model(longer, use_cache=False)
            return not torch.equal(alone, model(row, use_cache=False).logits)

    assert differs()  # else transformers keeps nothing any more, and nothing needs to be forgotten
    model = AutoModelForCausalLM.from_config(_SWITCHING["dynamic"]).eval()
    forget_lengths(model)
    assert not differs()
