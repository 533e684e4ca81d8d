"""QLoRA: the pretrained weights quantised by bitsandbytes as they are loaded; only an adapter on them is trained."""

from __future__ import annotations

from typing import Any

from launcher.base.errors import ConfigError
from launcher.config.quantization_rules import DUMPED
from launcher.config.settings import RunConfig


def quantization_arguments(config: RunConfig) -> dict[str, Any]:
    """What `from_pretrained` needs beside the rest. It computes in `model.dtype` unless told otherwise (bitsandbytes'
    own default is float32).

    Raises:
        ConfigError: transformers refuses the settings.
    """
    wanted = {key: value for key, value in config.model.quantization.items() if key not in ("quant_method", *DUMPED)}
    if not wanted:
        return {}
    from transformers import BitsAndBytesConfig

    if "llm_int8_threshold" in wanted:
        wanted["llm_int8_threshold"] = float(wanted["llm_int8_threshold"])
    if wanted.get("load_in_4bit"):
        wanted = {"bnb_4bit_compute_dtype": config.model.dtype, **wanted}
    try:
        return {"quantization_config": BitsAndBytesConfig(**wanted)}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError([f"model.quantization: {error}"]) from error
