"""What is in memory: fp32 masters of what is trained, everything else as it is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.errors import ConfigError, UserError
from launcher.config.compose import compose
from launcher.data.tokenizer import byte_tokenizer
from launcher.model.build import BuiltModel, build_model, static_files
from launcher.model.vocabulary import num_rows
from tests.architectures import model_config

_LORA = ("model/peft=lora", "model.peft.r=4", "model.peft.target_modules=all-linear")


def make_base(folder: Path, name: str) -> Path:
    config = AutoConfig.for_model(**model_config(name))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "ernie4_5_moe")


def build(base: Path, *more: str, resumed_from: Path | None = None) -> BuiltModel:
    config = compose(
        ["model=pretrained", f"model.model_name_or_path={base}", "model.dtype=bfloat16", "data=arithmetic", *more]
    )
    return build_model(config, byte_tokenizer(), resumed_from=resumed_from)


def dtypes(built: BuiltModel, *, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in built.module.parameters() if p.requires_grad == trained}


def frozen(built: BuiltModel) -> list[str]:
    return [name for name, param in built.module.named_parameters() if not param.requires_grad]


def test_trained_parameters_are_fp32_masters_without_zero(base: Path) -> None:
    assert dtypes(build(base, "strategy=ddp"), trained=True) == {torch.float32}
    assert dtypes(build(base, "strategy=zero2"), trained=True) == {torch.bfloat16, torch.float32}  # routers stay fp32


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero2"])
def test_loras_base_keeps_the_models_dtype(tmp_path: Path, strategy: str) -> None:
    built = build(make_base(tmp_path, "llama"), f"strategy={strategy}", *_LORA)
    assert dtypes(built, trained=False) == {torch.bfloat16}
    assert dtypes(built, trained=True) == {torch.float32 if strategy != "zero2" else torch.bfloat16}
    assert len(built.stored) == sum(p.requires_grad for p in built.module.parameters())


def test_frozen_parameters_are_those_of_the_class_at_the_first_start_and_after_a_resume(base: Path) -> None:
    """`from_pretrained` alone would make them trainable."""
    assert frozen(build(base)) == ["model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"]
    assert frozen(build(base, resumed_from=base)) == frozen(build(base))


def test_files_beside_the_weights_are_the_same_after_a_resume(base: Path, tmp_path: Path) -> None:
    """Also a generation config that transformers loads with a warning and refuses to save."""
    text = '{"temperature": 0.6, "do_sample": false, "eos_token_id": [257, 256], "pad_token_id": 256}'
    (base / "generation_config.json").write_text(text)
    first = static_files(build(base), byte_tokenizer())
    for name, data in first.items():
        (tmp_path / name).write_bytes(data)
    again = static_files(build(base, resumed_from=tmp_path), byte_tokenizer())
    assert again == first
    assert b'"temperature": 0.6' in first["generation_config.json"]
    assert b'"dtype": "bfloat16"' in first["config.json"]


def test_layers_left_out_at_random_are_refused_under_zero() -> None:
    """DeepSpeed adds up the gradients of different parameters there, or hangs."""
    fields = (
        "{model_type: opt, hidden_size: 32, ffn_dim: 48, num_hidden_layers: 2, num_attention_heads: 4, layerdrop: 0.5}"
    )
    config = compose([f"model.config={fields}", "data=arithmetic", "strategy=zero2"])
    with pytest.raises(ConfigError, match=r"layerdrop=0\.5.*strategy=ddp"):
        build_model(config, byte_tokenizer())


@pytest.mark.parametrize(("name", "implementation"), [("mamba2", "eager"), ("gpt_oss", "eager"), ("llama", "sdpa")])
def test_attention_is_what_the_architecture_takes_by_default(tmp_path: Path, name: str, implementation: str) -> None:
    built = build(make_base(tmp_path, name))
    assert built.attn_implementation == built.module.config._attn_implementation == implementation
    assert build(tmp_path, "model.attn_implementation=eager").attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("mamba2", "sdpa", r"=sdpa is not taken by mamba2\. It takes eager\. .*=auto, which means eager there"),
        ("llama", "spda", r"It takes eager, sdpa, flash_attention_2, .*=auto, which means sdpa there"),
    ],
)
def test_attention_that_an_architecture_does_not_take_is_refused_with_what_it_takes(
    tmp_path: Path, name: str, wanted: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(make_base(tmp_path, name), f"model.attn_implementation={wanted}")


def test_attention_that_is_not_installed_names_the_default(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Set model\.attn_implementation=auto"):
        build(make_base(tmp_path, "llama"), "model.attn_implementation=flash_attention_2")


def test_a_model_is_refused_when_no_checkpoint_of_it_could_be_resumed(tmp_path: Path) -> None:
    """Llama 3.2's with images: its text is saved with a config that AutoModelForCausalLM does not know."""
    text = {
        "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "cross_attention_layers": [1], "pad_token_id": 256,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mllama", text_config=text)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(tmp_path)  # else it can be trained
    AutoConfig.for_model("mllama", text_config=text).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"MllamaForCausalLM, .* \(mllama_text_model\) .*model/peft=lora"):
        build(tmp_path)
    assert build(tmp_path, *_LORA).stored


def test_a_model_that_is_not_causal_is_refused_by_its_type() -> None:
    config = compose(["model.config={model_type: t5, d_model: 16}", "data=arithmetic"])
    with pytest.raises(UserError, match=r"t5 is no causal language model"):
        build_model(config, byte_tokenizer())


def test_experts_that_are_called_one_by_one_are_refused_under_zero3() -> None:
    """Their processes would wait for each other for ever."""
    fields = (
        "model.config={model_type: dbrx, d_model: 16, n_heads: 2, n_layers: 1, "
        "attn_config: {kv_n_heads: 1, rope_theta: 10000.0}, ffn_config: {ffn_hidden_size: 8}}"
    )
    with pytest.raises(ConfigError, match=r"strategy=zero3 cannot train dbrx.* Set strategy=zero2"):
        build_model(compose([fields, "data=arithmetic", "strategy=zero3"]), byte_tokenizer())
    build_model(compose([fields, "data=arithmetic", "strategy=zero2"]), byte_tokenizer())


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_flex_attention_is_refused_when_there_is_no_cuda(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trains on CUDA only\. Set model\.attn_implementation=auto"):
        build(make_base(tmp_path, "llama"), "model.attn_implementation=flex_attention")


def test_vocabulary_that_is_too_small_is_refused_and_one_that_is_left_out_is_set() -> None:
    needed = num_rows(byte_tokenizer())
    for size in (10, needed - 1):
        config = compose(["data=arithmetic", f"model.config.vocab_size={size}"])
        with pytest.raises(ConfigError, match=rf"vocab_size must be at least {needed}.* \(got {size}\)"):
            build_model(config, byte_tokenizer())
    mended = compose(["data=arithmetic", f"model.config.vocab_size={needed}"])
    assert build_model(mended, byte_tokenizer()).config.vocab_size == needed
    assert build_model(compose(["data=arithmetic"]), byte_tokenizer()).config.vocab_size >= needed
