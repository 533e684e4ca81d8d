"""The model: pretrained, from scratch, or empty for a resume; LoRA; the files that go beside its weights."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base.errors import ConfigError, UserError
from launcher.config.settings import RunConfig


def trained_dtype(config: RunConfig) -> torch.dtype:
    """The dtype to build in: DeepSpeed keeps fp32 masters of its own, elsewhere the parameters are the masters."""
    return saved_dtype(config) if config.strategy.zero_stage else torch.float32


def saved_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of forward and of model.safetensors."""
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return dtype


def build_model(config: RunConfig, tokenizer: Any, *, is_resume: bool) -> nn.Module:
    """Builds the module on the CPU (under ZeRO-3: already partitioned).

    Args:
        is_resume: every trainable weight comes from a checkpoint, so none is loaded or initialised here.

    Raises:
        ConfigError: `model.config` is refused. UserError: the pretrained model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    settings = config.model
    model_config = _build_config(config, tokenizer)
    arguments: dict[str, Any] = {
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": trained_dtype(config),
    }
    torch.manual_seed(config.seed)
    try:
        if settings.model_name_or_path and not (is_resume and not settings.peft):
            model = AutoModelForCausalLM.from_pretrained(
                settings.model_name_or_path, revision=settings.revision, config=model_config, **arguments
            )
        else:
            # From scratch each process initialises the whole model and DeepSpeed partitions it afterwards, so that the
            # first weights are the same under every strategy.
            with _filled_later(config) if is_resume and not settings.peft else no_zero_init():
                model = AutoModelForCausalLM.from_config(model_config, **arguments)
            model.tie_weights()  # left out where initialisation is
    except (OSError, ValueError, ImportError, KeyError) as error:
        name = settings.model_name_or_path or "model.config"
        raise UserError(f"the model {name} cannot be built: {error}") from error
    vocab_size = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            [
                f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {vocab_size}. "
                "Set model.tokenizer_name_or_path or model.config.vocab_size"
            ]
        )
    model.config.use_cache = False
    if settings.peft:
        model = _with_lora(model, settings.peft)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.peft:
            model.enable_input_require_grads()
    module: nn.Module = model
    return module


@contextlib.contextmanager
def _filled_later(config: RunConfig) -> Iterator[None]:
    """For parameters that a checkpoint will fill: no initialisation, and under ZeRO-3, which partitions each of them as
    soon as it is made, no broadcast of it before."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        if config.strategy.zero_stage != 3:
            yield
            return
        from deepspeed.runtime.zero.partition_parameters import Init

        def partition_only(self: Any, param: nn.Parameter) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()  # type: ignore[attr-defined]

        broadcast_and_partition = Init._zero_init_param
        Init._zero_init_param = partition_only
        try:
            yield
        finally:
            Init._zero_init_param = broadcast_and_partition


@contextlib.contextmanager
def no_zero_init() -> Iterator[None]:
    """Whole parameters although ZeRO-3 is on."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def _build_config(config: RunConfig, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    settings = config.model
    try:
        if settings.model_name_or_path:
            return AutoConfig.from_pretrained(
                settings.model_name_or_path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
            )
        fields = dict(settings.config)
        fields.setdefault("vocab_size", -(-len(tokenizer) // 8) * 8)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))
        return AutoConfig.for_model(**fields)
    except Exception as error:  # whatever a config class raises about its fields; strict ones have classes of their own
        where = (
            f"model.model_name_or_path={settings.model_name_or_path}" if settings.model_name_or_path else "model.config"
        )
        raise UserError(f"{where}: {error}") from error


def _with_lora(model: Any, peft_settings: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    try:
        lora = LoraConfig(**{"task_type": "CAUSAL_LM", **peft_settings})
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"model.peft: {error}"]) from error


def weights_stem(config: RunConfig) -> str:
    """The model file's name without ending, as from_pretrained expects it."""
    return "adapter_model" if config.model.peft else "model"


def stored_name(config: RunConfig) -> Callable[[str], str]:
    """From a parameter's name to the one in the model file."""
    return adapter_key if config.model.peft else lambda name: name


def adapter_key(name: str) -> str:
    """A LoRA parameter's name in adapter_model.safetensors: peft leaves its adapter's name out."""
    return re.sub(r"\.(modules_to_save\.)?default(?=\.|$)", "", name)


def static_files(config: RunConfig, model: Any, tokenizer: Any) -> dict[str, bytes]:
    """What lies beside the weights in every checkpoint: model config, generation config, tokenizer, chat template."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if config.model.peft:
            for adapter in model.peft_config.values():
                adapter.save_pretrained(name)
        else:
            saved = type(model.config).from_dict(model.config.to_dict())
            saved.use_cache, saved.dtype = True, config.model.dtype
            saved.architectures = [type(model).__name__]
            saved.save_pretrained(name)
            if getattr(model, "generation_config", None) is not None:
                with contextlib.suppress(ValueError):
                    model.generation_config.save_pretrained(name)
        tokenizer.save_pretrained(name)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Forward pass and the summed cross entropy over the labelled positions.

    Args:
        batch: input_ids_BT, attention_mask_BT, labels_BT (-100: no loss), position_ids_BT where packed.

    Returns:
        The sum (fp32 scalar, with graph) and the number of labelled positions (int64 scalar).
    """
    labels = batch["labels"][:, 1:]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    is_labelled = labels != -100
    # Only labelled positions are widened to fp32: most of a chat's positions carry no loss.
    chosen = logits[is_labelled].float()
    loss = nn.functional.cross_entropy(chosen, labels[is_labelled], reduction="sum")
    return loss, is_labelled.sum()
