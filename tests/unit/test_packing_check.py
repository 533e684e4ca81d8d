"""Packing is exact, or refused by the name of the architecture: promise 7."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.errors import ConfigError
from launcher.model.packing_check import check_packing
from launcher.model.packing_masks import give_positions_to_masks
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
    "mpt": {"vocab_size": 264, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "qwen3_next": {**_LINEAR, **_EXPERTS},
    "qwen3_5_text": _LINEAR,
}  # fmt: skip
_MORE_LEAKING = ("lfm2", "mamba2", "bloom")
_WITHOUT_POSITIONS = ("gpt_oss", "falcon", "opt")
"""transformers makes their masks without the positions that they are given."""


def build(config: dict[str, Any], attention: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in _MORE_LEAKING])
def test_architecture_is_accepted_when_it_keeps_rows_apart(name: str, attention: str) -> None:
    if name == "gpt_oss":
        attention = "eager"  # sinks
    model = build(model_config(name), attention)
    if name in _WITHOUT_POSITIONS:
        with pytest.raises(ConfigError, match="depends on the row before"):  # else the masks need no help any more
            check_packing(model, 200, torch.device("cpu"), name)
    give_positions_to_masks(model, model, torch.device("cpu"))
    assert any(part._forward_pre_hooks for part in model.modules()) == (name in _WITHOUT_POSITIONS)
    check_packing(model, 200, torch.device("cpu"), name)


@pytest.mark.parametrize("name", _WITHOUT_POSITIONS)
def test_loss_and_gradients_are_those_of_the_rows_alone_when_masks_were_given_positions(name: str) -> None:
    """Rows longer than gpt_oss's window; and a padded batch is what it was."""
    model = build(model_config(name), "eager").eval()  # no dropout
    rows = [torch.randint(0, 200, (length,), generator=torch.Generator().manual_seed(length)) for length in (30, 25)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.stack([(torch.arange(30) < len(row)).long() for row in rows])
    before = model(input_ids=padded, attention_mask=mask).logits.detach()
    give_positions_to_masks(model, model, torch.device("cpu"))
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits.detach(), before, rtol=0, atol=0)

    def gradients(batches: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            positions = torch.cat([torch.arange(len(row)) for row in batch]).unsqueeze(0)
            logits = model(input_ids=torch.cat(batch).unsqueeze(0), position_ids=positions, use_cache=False).logits
            (logits.log_softmax(-1) ** 2).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for packed, alone in zip(gradients([rows]), gradients([[row] for row in rows]), strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("name", [*LEAKING, *_MORE_LEAKING])
def test_architecture_is_refused_by_name_when_rows_leak(name: str) -> None:
    config = {"model_type": name, **LEAKING[name]} if name in LEAKING else model_config(name)
    model = build(config, "eager")
    give_positions_to_masks(model, model, torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"data\.packing=true: {name} .*Set data\.packing=false"):
        check_packing(model, 200, torch.device("cpu"), name)
    assert model.training


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *LEAKING])
def test_the_answer_is_the_same_when_forward_rounds_to_bf16(name: str, is_autocast: bool) -> None:
    config = {"model_type": name, **LEAKING[name]} if name in LEAKING else model_config(name)
    model = build(config, "eager")
    model.to(torch.float32 if is_autocast else torch.bfloat16)
    cpu = torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        give_positions_to_masks(model, model, cpu)
        if name in (*LEAKING, *_MORE_LEAKING):
            with pytest.raises(ConfigError, match="does not keep the rows of a pack apart"):
                check_packing(model, 200, cpu, name)
        else:
            check_packing(model, 200, cpu, name)


_COUNTED = {
    "llama4_text": {
        **{k: v for k, v in _LINEAR.items() if "linear" not in k}, "intermediate_size_mlp": 48, "num_local_experts": 4,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 64, "floor_scale": 64,
    },
    "minimax_m3_vl_text": {
        **{k: v for k, v in _LINEAR.items() if "linear" not in k}, "num_local_experts": 4, "num_experts_per_tok": 2,
        "dense_intermediate_size": 48, "index_block_size": 32, "index_topk_blocks": 2, "index_head_dim": 8,
        "index_n_heads": 2, "layer_types": ["full_attention", *["minimax_m3_sparse"] * 3],
    },
}  # fmt: skip
"""Architectures that count tokens from the beginning of a pack, in chunks or blocks, here of a few tokens."""


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("name", _COUNTED)
def test_architecture_is_refused_when_only_long_packs_differ(name: str) -> None:
    """Llama 4's chunks are 8,192 tokens long: what is seen of a few tokens is exact, and of longer packs it is not."""
    model, cpu = build({"model_type": name, **_COUNTED[name]}, "eager"), torch.device("cpu")
    give_positions_to_masks(model, model, cpu)
    check_packing(model, 200, cpu, name)
    check_packing(model, 200, cpu, name, pack_length=30, row_length=30)
    with pytest.raises(
        ConfigError, match=rf"data\.packing=true: {name} .* in a pack of .* tokens .*data\.max_length below 200"
    ):
        check_packing(model, 200, cpu, name, pack_length=200, row_length=80)


def test_packs_are_refused_when_they_are_longer_than_the_masks_of_an_architecture() -> None:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    fields = {"vocab_size": 264, "max_position_embeddings": 64, "window_size": 16, "attention_dropout": 0.0}
    model, cpu = build({"model_type": "gpt_neo", **sizes, **fields}, "eager"), torch.device("cpu")
    give_positions_to_masks(model, model, cpu)
    check_packing(model, 200, cpu, "gpt_neo", pack_length=64, row_length=60)
    with pytest.raises(ConfigError, match=r"gpt_neo .* it cannot run a pack of .*data\.max_length below 200"):
        check_packing(model, 200, cpu, "gpt_neo", pack_length=200, row_length=60)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in _MORE_LEAKING])
def test_long_packs_are_accepted_when_their_rows_are_kept_apart(name: str, dtype: torch.dtype) -> None:
    model, cpu = build({**model_config(name), "max_position_embeddings": 300}, "eager").to(dtype), torch.device("cpu")
    give_positions_to_masks(model, model, cpu)
    check_packing(model, 200, cpu, name, pack_length=600, row_length=250)


def _round_by_group(model: Any) -> None:
    """As kernels do on CUDA in bf16: a product is rounded otherwise where an expert has another number of tokens."""
    for name, part in model.named_modules():
        if not name.endswith("experts"):
            continue

        def rounded(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            chosen = args[1].flatten(0, -2) if args[1].ndim > 2 else args[1]
            sizes = chosen.flatten().bincount(minlength=module.num_experts)
            seed = int((sizes * torch.tensor([7**i for i in range(module.num_experts)])).sum())
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
            return (output.float() * (1 + noise * 2**-8)).to(output.dtype)

        part.register_forward_hook(rounded)


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("scale", [1.0, 20.0])  # untrained and trained: log probabilities of 6 and of 40
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_next"])
def test_mixture_is_told_from_a_leak_when_its_products_are_rounded_by_group(name: str, scale: float) -> None:
    config = {"model_type": name, **LEAKING[name]} if name in LEAKING else model_config(name)
    model = build(config, "eager").to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight *= scale
    _round_by_group(model)
    if name in LEAKING:
        with pytest.raises(ConfigError, match="depends on the row before"):
            check_packing(model, 200, torch.device("cpu"), name)
    else:
        check_packing(model, 200, torch.device("cpu"), name)


def _attend_otherwise_in_packs(model: Any, num_tokens: int) -> None:
    """As a kernel does whose blocks begin with a pack and not with its rows (flash attention on a CPU with AMX)."""

    def rounded(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = kwargs["hidden_states"]
        if len(given) > 1 or given.shape[1] != num_tokens:
            return output
        noise = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(int(given.sum()) & 0xFFFF))
        return ((output[0].float() * (1 + noise * 2**-9)).to(output[0].dtype), *output[1:])

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(rounded, with_kwargs=True)


@pytest.mark.parametrize("num_layers", [4, 126])  # the largest Llama's
@pytest.mark.parametrize("scale", [1.0, 20.0])  # of queries and keys: untrained, and as sharp as when trained
def test_packing_is_accepted_when_only_packs_are_rounded_otherwise(num_layers: int, scale: float) -> None:
    """The shape of a padded batch may change nothing at all, and depth multiplies what one layer rounds."""
    model = build({**model_config("llama"), "num_hidden_layers": num_layers}, "eager").to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= scale
            layer.self_attn.k_proj.weight *= scale
    _attend_otherwise_in_packs(model, 24)
    check_packing(model, 200, torch.device("cpu"), "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_packing_is_refused_when_positions_do_not_begin_at_0(dtype: torch.dtype) -> None:
    """RoBERTa's begin after that of padding; trained so, a pack would be learnt at other positions than it is used."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = build({"model_type": "roberta", "is_decoder": True, "vocab_size": 264, **sizes}, "sdpa").to(dtype)
    give_positions_to_masks(model, model, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"roberta does not .*: a row in a pack is not what it is alone"):
        check_packing(model, 200, torch.device("cpu"), "roberta")
