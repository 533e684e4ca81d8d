"""The rules of `model.quantization`: names and values of transformers' BitsAndBytesConfig. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.config.packages import is_in_container, is_installed
from launcher.config.schema import did_you_mean
from launcher.config.settings import RunConfig, is_local_path

_TRUTH = ("true", "false")
_CHOICES: dict[str, tuple[str, ...]] = {
    "load_in_4bit": _TRUTH, "load_in_8bit": _TRUTH, "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_compute_dtype": ("bfloat16", "float16", "float32"), "bnb_4bit_use_double_quant": _TRUTH,
    "bnb_4bit_quant_storage": ("uint8", "int8", "float16", "bfloat16", "float32", "float64"),
    "llm_int8_has_fp16_weight": _TRUTH, "llm_int8_enable_fp32_cpu_offload": _TRUTH, "quant_method": ("bitsandbytes",),
}  # fmt: skip
_DEFAULTS = {
    "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False,
    "llm_int8_enable_fp32_cpu_offload": False,
}  # fmt: skip
"""transformers' own: its `to_dict` writes them all, and who copies that means nothing by them."""
DUMPED = ("_load_in_4bit", "_load_in_8bit")
"""Which `to_dict` writes as well, and which say nothing new."""
QUANTIZATION_FIELDS = (*_CHOICES, "llm_int8_threshold", "llm_int8_skip_modules")
_OFF = "or model.quantization=null"


def quantization_problems(config: RunConfig) -> Iterator[str]:
    wanted = config.model.quantization
    if own := _local_quantization(config):
        yield from quantised_base_problems(config, own)
    if not wanted:
        return
    for name, value in wanted.items():
        if name in DUMPED:
            continue
        if name not in QUANTIZATION_FIELDS:
            hint = did_you_mean(name, QUANTIZATION_FIELDS).replace("mean ", "mean model.quantization.")
            yield f"model.quantization.{name} is no setting.{hint} Valid: {', '.join(QUANTIZATION_FIELDS)}"
        elif problem := _value_problem(name, value):
            yield f"model.quantization.{name} must be {problem} (got {value!r})"
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if wanted.get(name)]
    if len(bits) != 1:
        yield (
            f"model.quantization needs one of load_in_4bit and load_in_8bit (got {' and '.join(bits) or 'neither'}). "
            "Set model.quantization.load_in_4bit=true; for a model that is not quantised: model.quantization=null"
        )
    else:
        yield from _without_effect(wanted, bits[0])
    yield from _contradictions(config)


def _local_quantization(config: RunConfig) -> dict[str, Any]:
    """What the config.json of a folder says of weights that bitsandbytes has quantised; others may be turned back into
    plain ones as they are loaded (FP8, MXFP4)."""
    name = config.model.model_name_or_path
    if not name or not is_local_path(name):
        return {}
    found = files.read_json_or(Path(name).expanduser() / "config.json", {})
    own = found.get("quantization_config") if isinstance(found, dict) else None
    is_ours = isinstance(own, dict) and any(own.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    return own if isinstance(own, dict) and is_ours else {}


def quantised_base_problems(config: RunConfig, own: Mapping[str, Any]) -> Iterator[str]:
    """Of a model whose weights come quantised.

    Args:
        own: its quantization_config.
    """
    model, wanted = config.model, config.model.quantization
    what = f"model.model_name_or_path={model.model_name_or_path} is quantised already"
    if not wanted and not model.is_adapter:
        yield (
            f"{what}: its weights stay as they are, only an adapter is trained. Set model/peft=lora, or name the model "
            "that it was made of"
        )
    if not wanted and config.strategy.zero_stage:
        yield f"{what}, and strategy={config.strategy.name} cannot spread such weights. Set strategy=ddp"
    if not wanted and config.train.torch_compile:
        yield f"{what}, and such layers are no operations that are compiled. Set train.torch_compile=false"
    if model.merge_at_end:
        yield (
            f"{what}: what model.merge_at_end=true adds to it would be rounded away. Set model.merge_at_end=false, "
            "and merge into the model that it was made of: "
            "launcher export RUN DIR --format safetensors --merge --base MODEL"
        )
    yield from differing_from_base(config, own)


def differing_from_base(config: RunConfig, own: Mapping[str, Any]) -> Iterator[str]:
    """What is asked for otherwise than the weights come; transformers passes over it in silence."""
    different = [
        f"{key}={value} (it has {own.get(key, _DEFAULTS.get(key))})" for key, value in config.model.quantization.items()
        if key not in DUMPED and value is not None and value != own.get(key, _DEFAULTS.get(key))
    ]  # fmt: skip
    if different:
        yield (
            f"model.quantization: {', '.join(different)}, but model.model_name_or_path="
            f"{config.model.model_name_or_path} is quantised already: its own settings count. "
            "Set model.quantization=null"
        )


def _value_problem(name: str, value: Any) -> str | None:
    """What a value must be, where it is not."""
    if value is None and name in ("llm_int8_skip_modules", "bnb_4bit_quant_storage", "load_in_4bit", "load_in_8bit"):
        return None
    if name == "llm_int8_threshold":
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if is_number and value >= 0 else "a number that is not negative"
    if name == "llm_int8_skip_modules":
        is_names = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        if not is_names:
            return "a list of modules' names, as in [lm_head]"
        return None if all(map(_is_pattern, value)) else "a list of modules' names, or of regular expressions"
    valid = _CHOICES[name]
    if valid is _TRUTH:
        return None if isinstance(value, bool) else "true or false"
    return None if value in valid else valid[0] if len(valid) == 1 else f"one of {', '.join(valid)}"


def _is_pattern(name: str) -> bool:
    """transformers takes a module's name for a regular expression."""
    try:
        re.compile(name)
    except re.error:
        return False
    return True


def _without_effect(wanted: Mapping[str, Any], bits: str) -> Iterator[str]:
    """bitsandbytes leaves out in silence what belongs to the other width."""
    other = "load_in_8bit" if bits == "load_in_4bit" else "load_in_4bit"
    prefix = "llm_int8_" if bits == "load_in_4bit" else "bnb_4bit_"
    idle = [name for name in wanted if name.startswith(prefix) and wanted[name] != _DEFAULTS.get(name)]
    idle = [name for name in idle if name != "llm_int8_skip_modules"]
    if idle:
        names = ", ".join(f"model.quantization.{name}" for name in idle)
        yield (
            f"{names} {'has' if len(idle) == 1 else 'have'} no effect with {bits}. Leave "
            f"{'it' if len(idle) == 1 else 'them'} out, or set model.quantization.{other}=true instead of {bits}"
        )
    elif wanted.get("llm_int8_enable_fp32_cpu_offload"):
        yield (
            "model.quantization.llm_int8_enable_fp32_cpu_offload=true has no effect: every device holds the whole "
            "model. Leave it out"
        )


def _contradictions(config: RunConfig) -> Iterator[str]:
    """With other settings, and with what is installed."""
    model = config.model
    if not model.is_adapter:
        yield f"model.quantization keeps the weights fixed: only an adapter is trained. Set model/peft=lora, {_OFF}"
    if model.config and not model.model_name_or_path:
        yield f"model.quantization is of a pretrained model, model.config trains one from scratch: leave it out, {_OFF}"
    if config.strategy.zero_stage:
        yield (
            f"strategy={config.strategy.name} cannot spread quantised weights over processes (model.quantization). "
            f"Set strategy=ddp, {_OFF}"
        )
    if not is_in_container(config) and not is_installed("bitsandbytes"):
        yield (
            "model.quantization needs a package that is not installed: pip install bitsandbytes. "
            "Without it: model.quantization=null"
        )
