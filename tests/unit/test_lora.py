"""LoRA: names as peft's, rows of new tokens, and adapters that go on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.errors import ConfigError, LauncherError, UserError
from launcher.config.compose import compose
from launcher.config.settings import RunConfig
from launcher.data.tokenizer import build_vocabulary, byte_tokenizer
from launcher.model.build import BuiltModel, build_model, static_files
from tests.unit.test_build_model import make_base
from tests.unit.test_vocabulary import TOKENS

LORA = ("model/peft=lora", "model.peft.r=4")
DORA = (*LORA, "model.peft.use_dora=true")


def config_of(base: Path, *more: str) -> RunConfig:
    return compose(
        ["model=pretrained", f"model.model_name_or_path={base}", "data=arithmetic", "strategy=single", *more]
    )


def built(base: Path, *more: str, resumed_from: Path | None = None) -> BuiltModel:
    config = config_of(base, *more)
    vocabulary = build_vocabulary(config)
    return build_model(config, vocabulary.tokenizer, new_token_ids=vocabulary.new_token_ids, resumed_from=resumed_from)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base(folder / name, name) for name in ("llama", "llama_tied", "gpt2", "qwen3_moe")}


def adapter(folder: Path, base: Path, **fields: Any) -> Path:
    """One that somebody else trained with peft."""
    torch.manual_seed(3)
    lora = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "down_proj"], **fields})
    with warnings.catch_warnings(action="ignore"):  # attributes that transformers renamed
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    for param in model.parameters():
        if param.requires_grad:
            param.data.normal_()
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", LORA),
        ("llama", DORA),
        ("llama", (*LORA, "model.peft.use_rslora=true", "model.peft.modules_to_save=[lm_head]")),
        ("llama", (*LORA, TOKENS)),
        ("llama_tied", (*LORA, TOKENS)),
        ("gpt2", (*LORA, TOKENS)),
        ("gpt2", (*LORA, "model.peft.bias=all")),
        ("gpt2", (*LORA, "model.peft.bias=lora_only")),
        ("qwen3_moe", LORA),
        ("llama", (*LORA, "model.peft.target_modules=[embed_tokens,q_proj]")),
    ],
)
def test_an_adapter_is_stored_under_the_names_that_peft_gives(
    bases: dict[str, Path], name: str, more: tuple[str, ...]
) -> None:
    found = built(bases[name], *more)
    with warnings.catch_warnings(action="ignore"):
        theirs = get_peft_model_state_dict(found.module, save_embedding_layers=False)
    ours = {part.name: part.shape for parts in found.stored.values() for part in parts}
    assert ours == {key: tuple(tensor.shape) for key, tensor in theirs.items()}


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_rows_of_new_tokens_are_trained_and_no_others(bases: dict[str, Path], name: str) -> None:
    found = built(bases[name], *LORA, TOKENS)
    rows = [n for n, p in found.module.named_parameters() if p.requires_grad and "trainable_tokens_delta" in n]
    assert len(rows) == (2 if name == "llama" else 1)
    module: Any = found.module
    ids = torch.tensor([[5, 264, 265, 6]])
    module(input_ids=ids, labels=ids).loss.backward()
    for row in rows:
        param = dict(module.named_parameters())[row]
        assert param.shape[0] == 2 and param.grad.abs().sum(1).gt(0).all()
    assert module.peft_config["default"].trainable_token_indices is not None


def test_rows_are_left_alone_where_their_matrices_are_trained_anyway(bases: dict[str, Path]) -> None:
    whole = built(bases["llama"], *LORA, TOKENS, "model.peft.modules_to_save=[embed_tokens,lm_head]")
    assert not [n for n, _ in whole.module.named_parameters() if "trainable_tokens" in n]


def test_an_adapter_goes_on_with_its_own_config_and_weights(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", bases["llama"], use_rslora=True, lora_alpha=8)
    found = built(bases["llama"], f"model.adapter_name_or_path={folder}", "model.dtype=bfloat16")
    module: Any = found.module
    own = module.peft_config["default"]
    assert (own.r, own.use_rslora, own.target_modules) == (2, True, {"q_proj", "down_proj"})
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    params = {p.name: n for n, parts in found.stored.items() for p in parts}
    assert set(params) == set(stored)
    trained = dict(module.named_parameters())
    for key, name in params.items():
        assert trained[name].requires_grad and trained[name].dtype == torch.float32 and trained[name].equal(stored[key])
    assert found.notices == []
    files = static_files(found, build_vocabulary(config_of(bases["llama"])).tokenizer)
    written = json.loads(files["adapter_config.json"])
    assert (written["r"], written["base_model_name_or_path"]) == (2, str(bases["llama"]))


def test_a_resumed_run_takes_the_adapter_from_its_checkpoint(bases: dict[str, Path], tmp_path: Path) -> None:
    """The folder that it began with may be gone."""
    folder = adapter(tmp_path / "adapter", bases["llama"])
    key = f"model.adapter_name_or_path={folder}"
    first = static_files(built(bases["llama"], key), build_vocabulary(config_of(bases["llama"])).tokenizer)
    for name, data in first.items():
        (tmp_path / name).write_bytes(data)
    again = built(bases["llama"], key, resumed_from=tmp_path)
    assert static_files(again, build_vocabulary(config_of(bases["llama"])).tokenizer) == first


@pytest.mark.parametrize(
    ("fields", "more", "message"),
    [
        ({}, ("model.peft.r=16",), r"model\.peft contradicts .*r=16 \(the adapter has 2\).*model/peft=none"),
        ({}, ("model/peft=lora",), r"r=16 \(the adapter has 2\), lora_alpha=32"),
        ({}, (TOKENS,), r"trains no rows for the new tokens \[264, 265\].*--merge"),
        ({"base": "gpt2"}, (), r"does not fit the model: Target modules"),
        ({"base": "llama_tied", "modules_to_save": ["lm_head"]}, ("model.add_tokens=[]",), "fine"),
        ({"base": "qwen3"}, (), r"is of another model: it .* Set model\.model_name_or_path to the model"),
    ],
)
def test_what_an_adapter_contradicts_is_named(
    bases: dict[str, Path], tmp_path: Path, fields: dict[str, Any], more: tuple[str, ...], message: str
) -> None:
    own = dict(fields)
    other = own.pop("base", "llama")
    on = bases[other] if other in bases else make_base(tmp_path / "other", other)
    if other == "gpt2":
        own["target_modules"] = ["c_attn"]
    folder = adapter(tmp_path / "adapter", on, **own)
    if other == "qwen3":  # more layers than this model has
        weights = folder / "adapter_model.safetensors"
        from safetensors.torch import load_file, save_file

        save_file({k.replace("layers.1", "layers.7"): v for k, v in load_file(weights).items()}, weights)
    if message == "fine":
        assert "was trained on" in built(bases["llama"], f"model.adapter_name_or_path={folder}", *more).notices[0]
        return
    with pytest.raises(LauncherError, match=message) as caught:
        built(bases["llama"], f"model.adapter_name_or_path={folder}", *more)
    assert isinstance(caught.value, (ConfigError, UserError))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.adapter_name_or_path={adapter}"], r"Set model=pretrained model\.model_name_or_path=.*/llama"),
        (["model.adapter_name_or_path=./nowhere"], r"model\.adapter_name_or_path=\./nowhere does not exist"),
        (["model.merge_at_end=true"], r"model\.merge_at_end=true but no LoRA adapter .*Set model/peft=lora"),
        (
            ["model/peft=lora", "model.peft.init_lora_weights=eva"],
            r"init_lora_weights=eva is computed in a pass over the data",
        ),
        (
            ["model/peft=lora", "model.peft.init_lora_weights=pissa_niter_4"],
            r"the trained adapter would not fit .*Set model\.peft\.init_lora_weights=pissa$",
        ),
        (
            ["model/peft=lora", "model.peft.init_lora_weights=pissa", "model.merge_at_end=true"],
            r"changed the base before the training\. Set model\.merge_at_end=false",
        ),
        (
            ["model/peft=lora", "model.peft.layer_replication=[[0,2],[1,2]]", "model.merge_at_end=true"],
            r"makes other layers of the base's\. Set model\.merge_at_end=false",
        ),
    ],
)
def test_contradictions_are_named_before_torch_is_imported(
    bases: dict[str, Path], tmp_path: Path, overrides: list[str], message: str
) -> None:
    folder = adapter(tmp_path / "adapter", bases["llama"])
    with pytest.raises(ConfigError, match=message):
        compose([o.format(adapter=folder) for o in overrides])


_SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
_KINDS: dict[str, dict[str, Any]] = {
    "phimoe": {"num_key_value_heads": 2, "intermediate_size": 48},
    "deepseek_v4": {"num_key_value_heads": 1, "intermediate_size": 48},
    "falcon": {},
}


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("name", _KINDS)
def test_all_linear_leaves_out_what_only_looks_linear(name: str, tmp_path: Path) -> None:
    """phimoe's router and DeepSeek-V4's products in groups are made from nn.Linear; so are Falcon's linear layers."""
    config = AutoConfig.for_model(name, **_SIZES, **_KINDS[name])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(3)
    module: Any = built(tmp_path, "model.peft={target_modules: all-linear}").module
    assert module(input_ids=torch.arange(8)[None]).logits.shape == (1, 8, 264)
    adapted = {key for key, _ in module.named_modules() if key.endswith("lora_A")}
    assert len(adapted) >= 4 and not any("router" in key or "o_a_proj" in key for key in adapted)
