"""A model that also takes images keeps the files without which nothing serves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.cli import main
from launcher.config.compose import compose
from launcher.config.settings import RunConfig
from launcher.data.tokenizer import byte_tokenizer
from launcher.model.build import build_model
from launcher.model.processor import processor_files
from tests.architectures import model_config
from tests.interop.test_merging import LORA, write_adapter

_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 with eyes, and the files of its processor."""
    folder = tmp_path_factory.mktemp("gemma3")
    config = AutoConfig.for_model(
        "gemma3", text_config=model_config("gemma3_text"), vision_config=_VISION, mm_tokens_per_image=4,
        image_token_index=259, boi_token_index=260, eoi_token_index=261,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    (folder / "processor_config.json").write_text('{"processor_class": "Gemma3Processor", "image_seq_length": 4}')
    return folder


def config_of(base: Path, *more: str) -> RunConfig:
    return compose(
        ["model=pretrained", f"model.model_name_or_path={base}", "data=arithmetic", "strategy=single", *more]
    )


def test_files_are_the_bases_at_the_first_start_and_the_checkpoints_afterwards(base: Path, tmp_path: Path) -> None:
    config = config_of(base)
    built = build_model(config, byte_tokenizer())
    first = processor_files(config, built.config, None)
    assert first == {p.name: p.read_bytes() for p in base.glob("*processor_config.json")} and len(first) == 2
    assert processor_files(config, built.config, tmp_path) == first  # a checkpoint from before they were kept
    (tmp_path / "processor_config.json").write_bytes(b"{}")
    assert processor_files(config, built.config, tmp_path) == {"processor_config.json": b"{}"}


def test_there_are_none_of_a_text_model_or_an_adapter(base: Path) -> None:
    text = AutoConfig.for_model(**model_config("gemma3_text"))
    assert processor_files(config_of(base), text, None) == {}
    whole = AutoConfig.from_pretrained(base)
    assert processor_files(config_of(base, *LORA), whole, None) == {}


def test_merged_adapter_has_those_of_its_base(base: Path, tmp_path: Path) -> None:
    checkpoint = write_adapter(tmp_path / "checkpoint-10", base, "model.peft.target_modules=[q_proj]")
    target = tmp_path / "merged"
    assert main(["export", str(checkpoint), str(target), "--format", "safetensors", "--merge"]) == 0
    assert json.loads((target / "config.json").read_text())["model_type"] == "gemma3"
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (target / name).read_bytes() == (base / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(target).config.vision_config.image_size == 28
