"""The rules of `model.quantization`: names and values of transformers' BitsAndBytesConfig. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config.packages import is_in_container, is_installed
from launcher.config.schema import did_you_mean
from launcher.config.settings import RunConfig

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
