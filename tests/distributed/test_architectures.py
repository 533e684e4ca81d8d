"""Architectures that transformers cannot build under every strategy."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from launcher.data.tokenizer import byte_tokenizer
from tests.distributed.runs import Lab, log_text


def test_the_strategy_is_named_when_a_model_cannot_be_built_partitioned(lab: Lab, tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = AutoConfig.for_model("rwkv", hidden_size=32, num_hidden_layers=2, vocab_size=264)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    more = ("model=pretrained", f"model.model_name_or_path={base}", "train.max_steps=1", "data.max_length=64")
    assert lab.run_codes(tmp_path / "run", "zero3", 1, *more) == [2]
    assert "(rwkv) cannot be built under strategy=zero3: IndexError" in log_text(tmp_path / "run")
    assert "Set strategy=zero2" in log_text(tmp_path / "run")
