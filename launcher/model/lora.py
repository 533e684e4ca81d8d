"""LoRA by peft: a new adapter, or one that goes on; which rows of new tokens it trains; its parameters' names."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.base.errors import ConfigError, UserError
from launcher.config.model_rules import contradictions_of_adapter
from launcher.config.settings import RunConfig, is_local_path
from launcher.model._peft import token_rows_on_any_device
from launcher.model.identity import local_folder


def adapter_key(name: str) -> str:
    """A LoRA parameter's name in adapter_model.safetensors: peft leaves its adapter's name out."""
    name = re.sub(r"\.lora_magnitude_vector\.default\.weight$", ".lora_magnitude_vector", name)
    return re.sub(r"\.(modules_to_save\.)?default(?=\.|$)", "", name)


def adapter_folder(config: RunConfig) -> Path | None:
    """Of the adapter that is continued; one on the Hub is downloaded first. None where it cannot be had."""
    name = config.model.adapter_name_or_path
    if not name:
        return None
    if not is_local_path(name):
        from transformers.utils.hub import cached_file

        for file in ("adapter_config.json", "adapter_model.safetensors"):
            with contextlib.suppress(OSError, ValueError):  # named where it is loaded
                cached_file(name, file)
    return local_folder(name, None, "adapter_config.json")


def with_lora(
    model: Any, config: RunConfig, *, resumed_from: Path | None, new_token_ids: Sequence[int], has_masters: bool
) -> Any:
    """The model with an adapter: that of `model.peft`, or the one that is continued, with its weights.

    Args:
        resumed_from: a checkpoint, whose adapter's config counts then; `load_state` fills its weights.
        new_token_ids: rows of the embeddings that the base does not have.
        has_masters: trained parameters are fp32.

    Raises:
        ConfigError: settings are refused. UserError: the adapter cannot be loaded, or does not fit the model.
    """
    name = config.model.adapter_name_or_path
    lora = _own_config(config, resumed_from) if name else _new_config(model, config, new_token_ids)
    lora.base_model_name_or_path = config.model.model_name_or_path
    lora.revision = config.model.revision
    adapted = _wrapped(model, lora, name)
    if has_masters:
        for param in adapted.parameters():
            if param.requires_grad:
                param.data = param.data.float()
    if name and resumed_from is None:
        _refuse_untrained_tokens(lora, config, new_token_ids)
        _load(adapted, name, adapter_folder(config))
    return adapted


def _new_config(model: Any, config: RunConfig, new_token_ids: Sequence[int]) -> Any:
    from peft import LoraConfig

    try:
        lora = LoraConfig(**{"task_type": "CAUSAL_LM", **config.model.peft})
    except (TypeError, ValueError) as error:
        raise ConfigError([f"model.peft: {error}"]) from error
    if lora.target_modules == "all-linear" and not lora.exclude_modules:
        lora.exclude_modules = _not_linear(model) or None
    if new_token_ids and lora.trainable_token_indices is None:
        _train_rows(model, lora, list(new_token_ids))
    return lora


def _not_linear(model: Any) -> list[str]:
    """Layers that peft takes for linear ones, since they are made from them, and that compute something else: routers
    (phimoe, Llama 4), products in groups (DeepSeek-V4). A quantized layer is none of them."""
    layers = [(name, type(layer)) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    others = {kind for _, kind in layers if kind.__module__.startswith("transformers.models.") and not _is_linear(kind)}
    return [name for name, kind in layers if kind in others]


def _is_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class computes what nn.Linear does, as Falcon's does: tried on a small one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        layer, rows = kind.__new__(kind), torch.ones(1, 2, 3)
        nn.Linear.__init__(layer, 3, 4)
        try:
            found = layer(rows)
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):  # it has more parts, or other inputs
            return False
        expected = nn.functional.linear(rows, layer.weight, layer.bias)
        return isinstance(found, torch.Tensor) and found.shape == expected.shape and found.allclose(expected)


def _train_rows(model: Any, lora: Any, ids: list[int]) -> None:
    """Has the adapter train the rows of new tokens, in the embedding and in a head that is not tied to it.

    `trainable_token_indices` keeps the rows alone, where `modules_to_save` would train and store whole matrices (1 GB
    for each of Llama 3's in bf16, and three times that in fp32 for masters and moments).
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding]
    if head is not None and head.weight is not embedding.weight:
        modules.append(head)
    rows = {}
    for module in modules:
        name = names[id(module)]
        if _is_targeted(name, lora.modules_to_save) or _is_targeted(name, lora.target_modules):
            continue
        if getattr(module, "bias", None) is not None:  # peft's rows of a head leave its bias out
            lora.modules_to_save = [*(lora.modules_to_save or ()), name]
        else:
            rows[name] = ids
    lora.trainable_token_indices = rows or None


def _is_targeted(name: str, targets: Any) -> bool:
    if not targets or targets == "all-linear":
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _own_config(config: RunConfig, resumed_from: Path | None) -> Any:
    """Of the adapter that is continued: a checkpoint's stands for it afterwards."""
    from peft import PeftConfig

    name = config.model.adapter_name_or_path
    assert name is not None
    try:
        lora = PeftConfig.from_pretrained(str(resumed_from or adapter_folder(config) or name))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.adapter_name_or_path={name}: no adapter can be loaded ({reason})") from error
    own = {key: getattr(value, "value", value) for key, value in lora.to_dict().items()}
    if problems := contradictions_of_adapter(name, own, config.model.peft):
        raise ConfigError(problems)
    lora.inference_mode = False
    return lora


def adapter_notice(config: RunConfig) -> str | None:
    """What to say where an adapter goes on, on a base that has another name than the one it was trained on."""
    folder, name = adapter_folder(config), config.model.model_name_or_path
    if folder is None or name is None:
        return None
    from peft import PeftConfig

    trained_on = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not trained_on or Path(trained_on).name == Path(name).name:
        return None
    return (
        f"model.adapter_name_or_path={config.model.adapter_name_or_path} was trained on {trained_on}, not on {name}. "
        "If that is not the same model, what it has learned does not fit"
    )


def _refuse_untrained_tokens(lora: Any, config: RunConfig, new_token_ids: Sequence[int]) -> None:
    rows = lora.trainable_token_indices or []
    known = {i for ids in (rows.values() if isinstance(rows, dict) else [rows]) for i in ids}
    is_saved = any("embed" in name or "wte" in name for name in lora.modules_to_save or ())
    if not is_saved and (missing := sorted(set(new_token_ids) - known)):
        raise ConfigError([
            f"model.adapter_name_or_path={config.model.adapter_name_or_path} trains no rows for the new tokens "
            f"{missing[:5]} (model.add_tokens, model.resize_embeddings). Merge it first (launcher export … --merge), "
            "and train a new adapter on the merged model"
        ])  # fmt: skip


def _wrapped(model: Any, lora: Any, name: str | None) -> Any:
    from peft import get_peft_model

    try:
        with warnings.catch_warnings(action="ignore"), token_rows_on_any_device():
            return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except (TypeError, ValueError) as error:
        if name:
            raise UserError(f"model.adapter_name_or_path={name} does not fit the model: {error}") from error
        raise ConfigError([f"model.peft: {error}"]) from error


def _load(model: Any, name: str, folder: Path | None) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    trained = {n for n, param in model.named_parameters() if param.requires_grad}
    try:
        with warnings.catch_warnings(action="ignore"):
            weights = load_peft_weights(str(folder or name), device="cpu")
            result: Any = set_peft_model_state_dict(model, weights)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"model.adapter_name_or_path={name} does not fit this model: {error!s:.500}") from error
    missing = sorted(trained & set(result.missing_keys))
    if missing or result.unexpected_keys:
        what = f"has no weights for {missing[0]}" if missing else f"holds {result.unexpected_keys[0]}"
        raise UserError(
            f"model.adapter_name_or_path={name} is of another model: it {what}; {len(missing)} weights are missing, "
            f"{len(result.unexpected_keys)} too many. Set model.model_name_or_path to the model it was trained on"
        )
