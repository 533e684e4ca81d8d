"""The built-in byte tokenizer, and loading of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.base.errors import ConfigError
from launcher.config.settings import ModelConfig, RunConfig
from launcher.data import build_tokenizer


@pytest.mark.parametrize("text", ["abc", " é\n\t漢字 🎉", "", "a  b", "x <think>y</think> z", "\x00\x7f\xa0"])
def test_bytes_come_back_as_they_were(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_ids_are_bytes(tokenizer: Any) -> None:
    every = bytes(range(1, 128)).decode()
    assert tokenizer(every)["input_ids"] == list(range(1, 128))
    assert tokenizer("é漢🎉")["input_ids"] == list("é漢🎉".encode())
    assert len(tokenizer) == 264
    assert tokenizer.bos_token is None
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|end|>"]) == [256, 257]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 257)


def test_tokenizer_comes_back_from_a_checkpoint_folder(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>né <think>x</think><|end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == "né <think>x</think>"
    turns = [{"role": "user", "content": "q"}]
    rendered = again.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>q<|end|><|assistant|>"
    assert again.pad_token_id != again.eos_token_id


def test_transformers_own_masks_are_ours(tokenizer: Any) -> None:
    """TRL's assistant_only_loss goes through this call."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "né"}]
    output = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert output["assistant_masks"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_build_when_nothing_is_named() -> None:
    assert len(build_tokenizer(RunConfig())) == 264


def test_build_when_template_is_a_file_or_text(tmp_path: Path) -> None:
    config = RunConfig()
    config.data.chat_template = "{{ messages[0].content }}"
    assert build_tokenizer(config).chat_template == "{{ messages[0].content }}"
    (tmp_path / "chat.jinja").write_text("{{ 'file' }}")
    config.data.chat_template = str(tmp_path / "chat.jinja")
    assert build_tokenizer(config).chat_template == "{{ 'file' }}"
    config.data.chat_template = str(tmp_path / "missing.jinja")
    with pytest.raises(ConfigError, match=r"data\.chat_template=.*missing\.jinja is neither"):
        build_tokenizer(config)


def test_build_when_tokenizer_is_a_folder(word_tokenizer: Any, tmp_path: Path) -> None:
    word_tokenizer.pad_token = None
    word_tokenizer.save_pretrained(tmp_path)
    config = RunConfig()
    config.model.tokenizer_name_or_path = str(tmp_path)
    tokenizer = build_tokenizer(config)
    assert tokenizer("sky is")["input_ids"] == [0, 7, 6]
    assert tokenizer.pad_token == "</s>"


def test_build_when_there_is_no_tokenizer(tmp_path: Path) -> None:
    config = RunConfig()
    config.model.model_name_or_path = str(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.model_name_or_path=.*model\.tokenizer_name_or_path="):
        build_tokenizer(config)


def test_what_is_no_tokenizer_is_named_when_its_files_are_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.tokenizer_name_or_path=.* no tokenizer can be loaded"):
        build_tokenizer(RunConfig(model=ModelConfig(tokenizer_name_or_path=str(tmp_path))))
