"""What is quantised of a model, what is not, and whether it can be trained so: said before the first step."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.data.tokenizer import byte_tokenizer
from launcher.model.build import build_model
from launcher.model.memory.empty import build_empty
from launcher.model.quantization import try_quantised

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="an optional package")
Q = "model.quantization."
NF4 = (f"{Q}load_in_4bit=true", f"{Q}bnb_4bit_quant_type=nf4")
_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 272,
}  # fmt: skip
_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "tied": {"model_type": "llama", "tie_word_embeddings": True, **_SIZES},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 272},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **_SIZES},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, fields in _MODELS.items():
        found[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(found[name])
    return found


def build(folder: Path, *more: str) -> tuple[Any, Any]:
    config = compose([
        f"model.model_name_or_path={folder}", "data=arithmetic", "model/peft=lora", "strategy=single", *more,
    ])  # fmt: skip
    return config, build_model(config, byte_tokenizer())


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        ("llama", "nope", r"'nope' is the name of no linear layer.*Valid: q_proj, k_proj, .*lm_head, or longer names"),
        ("llama", "lm_head,norm", r"'norm' is the name of no linear layer"),
        ("llama", "model.layers.1", r"'model\.layers\.1' is the name of no linear layer"),
        ("gpt2", "q_proj", r"'q_proj' is the name of no linear layer.*Valid: c_attn, c_proj, c_fc, lm_head"),
        ("tied", "o_proj", r"tied to the embedding.*Set model\.quantization\.llm_int8_skip_modules=\[lm_head,o_proj\]"),
        ("llama", "model,lm_head", r"nothing of llama is quantised.*Set model\.quantization=null"),
    ],
)
def test_names_that_keep_nothing_or_too_much_are_refused(
    folders: dict[str, Path], model: str, names: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(folders[model], *NF4, f"{Q}llm_int8_skip_modules=[{names}]")


@pytest.mark.parametrize("names", ["lm_head", "lm_head,model.layers.0.self_attn", 'lm_head,".*o_proj"', "head,up_proj"])
def test_names_that_keep_something_are_taken(folders: dict[str, Path], names: str) -> None:
    build(folders["llama"], *NF4, f"{Q}llm_int8_skip_modules=[{names}]")


def test_a_name_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match="a list of modules' names, or of regular expressions"):
        compose(["model.model_name_or_path=org/name", "data=arithmetic", "model/peft=lora", *NF4,
                 f'{Q}llm_int8_skip_modules=["["]'])  # fmt: skip


def test_experts_that_stay_as_they_are_are_said(folders: dict[str, Path]) -> None:
    _, built = build(folders["mixtral"], *NF4)
    assert "of the weights of the layers stay float32, such as model.layers.0.mlp.experts." in "".join(built.notices)
    _, built = build(folders["llama"], *NF4)
    assert built.notices == []


@pytest.mark.parametrize(
    "more",
    [
        (f"{Q}bnb_4bit_quant_storage=float32", "model.dtype=bfloat16"),
        (f"{Q}bnb_4bit_quant_storage=bfloat16",),
    ],
)
def test_what_bitsandbytes_cannot_train_is_named_before_the_first_step(
    folders: dict[str, Path], more: tuple[str, ...]
) -> None:
    config, built = build(folders["llama"], *NF4, *more)
    with pytest.raises(ConfigError, match=r"bnb_4bit_quant_storage=.*on cpu.*RuntimeError.*Leave out model\.quant"):
        try_quantised(config, built.module, Accelerator(cpu=True), 260)


@pytest.mark.parametrize("more", [NF4, (f"{Q}load_in_8bit=true",)])
@pytest.mark.parametrize("model", ["llama", "tied", "gpt2", "mixtral"])
def test_the_trial_leaves_nothing_behind(folders: dict[str, Path], model: str, more: tuple[str, ...]) -> None:
    dropout = 0.0 if model == "mixtral" else 0.5  # peft: none on experts
    config, built = build(folders[model], *more, f"model.peft.lora_dropout={dropout}")
    before, random_state = {k: v.clone() for k, v in built.module.state_dict().items()}, torch.get_rng_state()
    built.module.eval()
    try_quantised(config, built.module, Accelerator(cpu=True), 260)
    assert torch.equal(torch.get_rng_state(), random_state) and not built.module.training
    assert all(param.grad is None for param in built.module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in built.module.state_dict().items() if k in before)


@pytest.fixture(scope="module")
def quantised(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are stored in 4 bits, as many on the Hub are."""
    folder = tmp_path_factory.mktemp("quantised")
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=own).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model/peft=none",), r"is quantised already: .*only an adapter is trained\. Set model/peft=lora"),
        (("strategy=zero2",), r"is quantised already, and strategy=zero2 cannot spread.*Set strategy=ddp"),
        (("strategy=zero3",), r"strategy=zero3 cannot spread"),
        (("train.torch_compile=true",), r"Set train\.torch_compile=false"),
        (("model.merge_at_end=true",), r"would be rounded away\. Set model\.merge_at_end=false.*--base MODEL"),
        ((f"{Q}load_in_8bit=true",), r"load_in_8bit=True \(it has False\).*its own settings count"),
        ((f"{Q}load_in_4bit=true", f"{Q}bnb_4bit_quant_type=fp4"), r"bnb_4bit_quant_type=fp4 \(it has nf4\)"),
    ],
)
def test_what_a_base_that_is_quantised_already_cannot_do_is_refused(
    quantised: Path, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = () if "model/peft=none" in overrides else ("model/peft=lora",)
    arguments = [f"model.model_name_or_path={quantised}", "data=arithmetic", *lora, *overrides]
    with pytest.raises(ConfigError, match=message):
        compose(arguments)
    if "strategy=zero3" in overrides:
        return
    monkeypatch.setattr("launcher.config.quantization_rules._local_quantization", lambda config: {})  # as on the Hub
    with pytest.raises(ConfigError, match=message):
        build_model(compose(arguments), byte_tokenizer())


def test_an_adapter_is_trained_on_a_base_that_is_quantised_already(quantised: Path) -> None:
    for more in ((), NF4):
        config, built = build(quantised, *more)
        try_quantised(config, built.module, Accelerator(cpu=True), 260)
        assert built.module.get_base_model().is_quantized and built.notices == []


def test_memory_of_a_base_that_is_quantised_already_is_that_of_one_that_is_being(
    quantised: Path, folders: dict[str, Path]
) -> None:
    def num_bytes(folder: Path, *more: str) -> float:
        config = compose([f"model.model_name_or_path={folder}", "data=arithmetic", "model/peft=lora", *more])
        return sum(param.num_bytes for param in build_empty(config, byte_tokenizer()).params)

    assert num_bytes(quantised) == num_bytes(folders["llama"], *NF4) < num_bytes(folders["llama"])
