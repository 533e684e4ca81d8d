"""QLoRA: the pretrained weights quantised by bitsandbytes as they are loaded; only an adapter on them is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from launcher.base.errors import ConfigError
from launcher.config.quantization_rules import DUMPED, differing_from_base, quantised_base_problems
from launcher.config.settings import RunConfig
from launcher.model import _transformers
from launcher.model._bitsandbytes import is_quantised
from launcher.model.leaks import padded, random_rows

_KEY = "model.quantization"
_LENGTHS = (13, 7)
_MAX_NAMES = 12
_LARGE = 0.25
"""A share of the weights of the layers that is worth a word where it stays as it was."""


def quantization_arguments(config: RunConfig, model_config: Any = None) -> dict[str, Any]:
    """What `from_pretrained` needs beside the rest. It computes in `model.dtype` unless told otherwise (bitsandbytes'
    own default is float32).

    Args:
        model_config: transformers' config of the model, whose weights may come quantised.

    Raises:
        ConfigError: transformers refuses the settings, or the weights come quantised otherwise.
    """
    if own := own_quantization(model_config):
        if problems := list(differing_from_base(config, own)):
            raise ConfigError(problems)
        return {}
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
        raise ConfigError([f"{_KEY}: {error}"]) from error


def check_quantised(config: RunConfig, model: Any) -> list[str]:
    """What the user should know of what was quantised, and of what was not.

    Args:
        model: as it was loaded, without an adapter.

    Raises:
        ConfigError: nothing was, a name to be left out is none of the model's, or a tied head was quantised without
            the embedding that it is tied to; or the weights came quantised, and that cannot be trained as it is asked.
    """
    if not is_quantised_model(model):  # some are turned back into plain weights as they are loaded
        return []
    if model.hf_quantizer.pre_quantized:
        _check_base(config, model)
        return []
    layers = {name: part for name, part in model.named_modules() if _transformers.is_linear(part)}
    if problems := [*_unknown_names(config, list(layers)), *_lone_heads(config, model, layers)]:
        raise ConfigError(problems)
    kept = _unquantised(model)
    num_kept = sum(kept.values())
    num_quantised = sum(_numel(part) for part in layers.values() if is_quantised(part))
    if not num_quantised:
        raise ConfigError([
            f"{_KEY}: nothing of {model.config.model_type} is quantised: bitsandbytes takes linear layers alone, and "
            f"it has {'none that are not left out' if layers else 'none'}. Set {_KEY}=null"
        ])  # fmt: skip
    share = num_kept / (num_kept + num_quantised)
    if share < _LARGE:
        return []
    largest = max(kept, key=lambda name: kept[name])
    return [
        f"{_KEY}: {share:.0%} of the weights of the layers stay {config.model.dtype}, such as {largest}: bitsandbytes "
        "takes linear layers alone, and these are none, or left out"
    ]


def is_quantised_model(model: Any) -> bool:
    """Whether a model's weights are quantised, by us or as they came."""
    return bool(getattr(model, "is_quantized", False))


def own_quantization(model_config: Any) -> dict[str, Any]:
    """The quantization_config that a model comes with; empty: its weights are plain. transformers keeps it as one of
    two things."""
    own = getattr(model_config, "quantization_config", None)
    return dict(own if isinstance(own, dict) else own.to_dict()) if own else {}


def _check_base(config: RunConfig, model: Any) -> None:
    problems = list(quantised_base_problems(config, own_quantization(model.config)))
    if not model.hf_quantizer.is_trainable:
        problems.append(
            f"model.model_name_or_path={config.model.model_name_or_path} is quantised in a way that transformers does "
            f"not train ({type(model.hf_quantizer).__name__}). Name the model that it was made of"
        )
    if problems:
        raise ConfigError(problems)


def _unknown_names(config: RunConfig, layers: list[str]) -> Iterator[str]:
    """Names that keep nothing from being quantised."""
    for name in config.model.quantization.get("llm_int8_skip_modules") or []:
        if not any(_transformers.is_left_out(layer, name) for layer in layers):
            valid = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            more = ", …" if len(valid) > _MAX_NAMES else ""
            yield (
                f"{_KEY}.llm_int8_skip_modules: {name!r} is the name of no linear layer, so nothing is left out by it. "
                f"Valid: {', '.join(valid[:_MAX_NAMES])}{more}, or longer names such as {layers[0]}"
            )


def _lone_heads(config: RunConfig, model: Any, layers: dict[str, nn.Module]) -> Iterator[str]:
    """A head that was quantised because a list without it stands for transformers' own, although it is tied."""
    head = model.get_output_embeddings()
    if (
        head is None
        or not is_quantised(head)
        or not getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ):
        return
    name = next(name for name, part in layers.items() if part is head)
    names = [name, *(config.model.quantization.get("llm_int8_skip_modules") or [])]
    yield (
        f"{_KEY}.llm_int8_skip_modules leaves {name} out of the list, but it is tied to the embedding, which cannot be "
        f"quantised. Set {_KEY}.llm_int8_skip_modules=[{','.join(names)}]"
    )


def _unquantised(model: Any) -> dict[str, int]:
    """Sizes of the matrices that were not quantised, by name, without embeddings and heads."""
    vocabulary = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    found = {}
    for name, part in model.named_modules():
        if id(part) in vocabulary or is_quantised(part) or isinstance(part, nn.Embedding):
            continue
        for own, param in part.named_parameters(recurse=False):
            if param.ndim > 1:
                found[f"{name}.{own}"] = param.numel()
    return found


def _numel(layer: Any) -> int:
    return int(layer.in_features * layer.out_features)


def try_quantised(config: RunConfig, model: Any, accelerator: Any, vocab_size: int) -> None:
    """Makes a small forward and backward pass: what bitsandbytes cannot do on this device, in this dtype, it says only
    then, and in words of its own. It leaves no gradient and no random number behind.

    Args:
        model: the prepared one, as training calls it.

    Raises:
        ConfigError: the pass fails.
    """
    device, module = accelerator.device, accelerator.unwrap_model(model)
    if not is_quantised_model(module):
        return
    trained = [param for param in module.parameters() if param.requires_grad]
    devices = [device] if device.type == "cuda" else []
    was_training = module.training
    try:
        with torch.random.fork_rng(devices), accelerator.autocast():
            module.train()
            inputs = padded(random_rows(0, _LENGTHS, vocab_size, device))
            logits = module(**inputs, use_cache=False).logits
            torch.autograd.grad(logits.float().square().mean(), trained, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # bitsandbytes' kernels raise whatever torch does
        says = f"{type(error).__name__}{f': {error!s:.300}' if str(error) else ''}"
        what, cure = _named(config)
        raise ConfigError([
            f"{what} cannot be trained with model.dtype={config.model.dtype} on {device.type}: it ends with {says}. "
            f"{cure}"
        ]) from error  # fmt: skip
    finally:
        module.train(was_training)


def _named(config: RunConfig) -> tuple[str, str]:
    """(what is quantised, what to do where that cannot be trained)."""
    wanted = config.model.quantization
    if not wanted:
        what = f"model.model_name_or_path={config.model.model_name_or_path}, which is quantised already,"
        return what, "Name the model that it was made of"
    what = f"{_KEY} ({', '.join(f'{name}={value}' for name, value in wanted.items())})"
    if wanted.get("bnb_4bit_quant_storage") not in (None, "uint8"):
        return what, f"Leave out {_KEY}.bnb_4bit_quant_storage"
    return what, f"Set {_KEY}=null, or another kind of it"
