"""The rules of the group `model`: what is trained, its tokens and adapters. Imports no torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.errors import not_allowed
from launcher.base.manifest import model_files
from launcher.config.quantization_rules import quantization_problems
from launcher.config.schema import did_you_mean
from launcher.config.settings import ModelConfig, RunConfig, is_local_path

TOKEN_FIELDS = ("content", "special", "lstrip", "rstrip", "single_word", "normalized")
"""Of tokenizers.AddedToken."""
_STARTS_FROM_DATA = ("eva", "corda", "lora_ga")
"""Ways to initialise LoRA for which peft's get_peft_model alone leaves the weights as they come."""


def model_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    if not model.model_name_or_path and not model.config and not model.adapter_name_or_path:
        yield (
            "model.model_name_or_path is not set and model.config is empty: nothing to train. "
            "Set model.model_name_or_path=FOLDER_OR_HUB_ID, or model=tiny_llama to train from scratch"
        )
    elif model.model_name_or_path and model.config:
        yield (
            f"model.model_name_or_path ({model.model_name_or_path!r}) and model.config ({', '.join(model.config)}) are "
            "both set. A pretrained model brings its config with it: to start from it leave model.config out "
            "(model.config=null); from scratch: model.model_name_or_path=null"
        )
    elif model.config and "model_type" not in model.config:
        yield "model.config needs a model_type. Set model.config.model_type=llama, or another of transformers'"
    yield from _missing_model("model.model_name_or_path", model.model_name_or_path, "config.json")
    yield from _missing_model("model.tokenizer_name_or_path", model.tokenizer_name_or_path, "tokenizer_config.json")
    yield from _missing_model("model.adapter_name_or_path", model.adapter_name_or_path, "adapter_config.json")
    yield from _token_problems(model)
    yield from _adapter_problems(model)
    yield from quantization_problems(config)
    yield from _compile_problems(config)


def _missing_model(key: str, name: str | None, file: str) -> Iterator[str]:
    try:
        if not name or not is_local_path(name):
            return
        folder = Path(name).expanduser()
        if not (folder / file).is_file():
            what = f"has no {file}" if folder.is_dir() else "does not exist"
            yield (
                f"{key}={name} {what} (looked in {Path.cwd()}). It must be a folder that holds one, or a Hub id "
                "ORG/NAME"
            )
            return
        for path in (folder / found for found in model_files(folder)):
            if path.exists() and not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except PermissionError as error:
        yield f"{key}: {not_allowed(error.filename)}"


def _token_problems(model: ModelConfig) -> Iterator[str]:
    for i, token in enumerate(model.add_tokens):
        key = f"model.add_tokens[{i}]"
        fields = token if isinstance(token, dict) else {"content": token}
        for name, value in fields.items():
            if name not in TOKEN_FIELDS:
                hint = did_you_mean(str(name), TOKEN_FIELDS)
                yield f"{key}.{name} is no field of a token.{hint} Valid: {', '.join(TOKEN_FIELDS)}"
            elif name != "content" and not isinstance(value, bool):
                yield f"{key}.{name} must be true or false (got {value!r})"
        content = fields.get("content")
        if not isinstance(content, str) or not content:
            yield (
                f"{key} must be a text that is not empty, or {{content: TEXT, special: true}} (got {token!r}). "
                "Example: 'model.add_tokens=[\"<tool>\"]'"
            )


def _adapter_problems(model: ModelConfig) -> Iterator[str]:
    if model.merge_at_end and not model.is_adapter:
        yield (
            "model.merge_at_end=true but no LoRA adapter is trained: there is nothing to merge. "
            "Set model/peft=lora, or model.merge_at_end=false"
        )
    start = model.peft.get("init_lora_weights")
    if start in _STARTS_FROM_DATA:
        yield (
            f"model.peft.init_lora_weights={start} is computed in a pass over the data, which is not made here. "
            "Set model.peft.init_lora_weights=true, or make the adapter with peft and name it: "
            "model.adapter_name_or_path=FOLDER"
        )
    elif str(start).startswith("pissa_niter"):
        yield (
            f"model.peft.init_lora_weights={start} takes a part out of the base that is found with random numbers, and "
            "no checkpoint holds either: the trained adapter would not fit the base that it is loaded on. "
            "Set model.peft.init_lora_weights=pissa"
        )
    if model.merge_at_end and (reason := why_not_merged(model.peft)):
        yield f"model.merge_at_end=true: model.peft has {reason}. Set model.merge_at_end=false"
    name = model.adapter_name_or_path
    if not name:
        return
    own = _adapter_config(name)
    if not model.model_name_or_path:
        base = own.get("base_model_name_or_path") or "FOLDER_OR_HUB_ID"
        but = "model.config trains one from scratch" if model.config else "model.model_name_or_path is not set"
        choice = "model=pretrained " if model.config else ""
        yield (
            f"model.adapter_name_or_path={name} needs the pretrained model that it belongs to, but {but}. "
            f"Set {choice}model.model_name_or_path={base}"
        )
    yield from contradictions_of_adapter(name, own, model.peft)


def why_not_merged(lora: Mapping[str, Any]) -> str | None:
    """What of a LoRA config cannot be merged into the base as it is.

    Args:
        lora: its fields; what is left out is as peft has it.
    """
    if (start := lora.get("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal"):
        return f"init_lora_weights={start}, which changed the base before the training"
    if layers := lora.get("layer_replication"):
        return f"layer_replication={layers}, which makes other layers of the base's"
    return None


def _adapter_config(name: str) -> dict[str, Any]:
    """adapter_config.json of a folder; empty for one on the Hub."""
    if not is_local_path(name):
        return {}
    found = files.read_json_or(Path(name).expanduser() / "adapter_config.json", {})
    return found if isinstance(found, dict) else {}


def contradictions_of_adapter(name: str, own: Mapping[str, Any], peft: Mapping[str, Any]) -> list[str]:
    """What is asked for otherwise than the adapter is; and an adapter that is not LoRA.

    Args:
        own: its adapter_config.json.
        peft: `model.peft`.
    """
    kind = own.get("peft_type", "LORA")
    if kind != "LORA":
        return [f"model.adapter_name_or_path={name} is a {kind} adapter; only LORA adapters can be continued"]
    different = [
        f"{key}={value!r} (the adapter has {own[key]!r})"
        for key, value in peft.items()
        if key in own and value != "all-linear" and _plain(value) != _plain(own[key])
    ]
    if not different:
        return []
    return [
        f"model.peft contradicts the adapter that model.adapter_name_or_path={name} continues: {', '.join(different)}. "
        "Its own config counts: leave model.peft out (model/peft=none)"
    ]


def _plain(value: Any) -> Any:
    """target_modules is a set."""
    return sorted(map(str, value)) if isinstance(value, (list, tuple, set)) else value


def _compile_problems(config: RunConfig) -> Iterator[str]:
    if not config.train.torch_compile:
        return
    if config.strategy.zero_stage == 3:
        yield (
            f"train.torch_compile=true cannot be combined with strategy={config.strategy.name}, which gathers weights "
            "inside of every layer. Set strategy=zero2, or train.torch_compile=false"
        )
    if config.model.quantization:
        yield (
            "train.torch_compile=true cannot be combined with model.quantization, whose layers are no operations that "
            "are compiled. Set train.torch_compile=false"
        )
