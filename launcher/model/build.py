"""The model: pretrained, from scratch or resumed, the same way; LoRA; the files that go beside its weights."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base import _deepspeed
from launcher.base.errors import ConfigError, UserError
from launcher.base.stored import StoredTensor, StoredTensors
from launcher.config.settings import RunConfig
from launcher.model import _transformers
from launcher.model.blueprint import Blueprint
from launcher.model.identity import local_folder


@dataclass(frozen=True)
class BuiltModel:
    """A module to train and what its checkpoints are to be like."""

    module: nn.Module
    stored: StoredTensors
    """Of what its checkpoints hold: every parameter and persistent buffer, or an adapter's parameters alone."""
    config: Any
    """As `save_pretrained` would write it."""
    first_weights: Mapping[str, Tensor] | Path | None
    """What DeepSpeed's masters are to be made of, since it has got them rounded to `model.dtype`: fp32 parameters by
    name, or the folder of a pretrained model."""


def saved_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of forward and of model.safetensors."""
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return dtype


def _built_dtype(config: RunConfig, *, is_initialised: bool) -> torch.dtype:
    """The dtype to build in. DeepSpeed keeps fp32 masters of its own, and LoRA's base has none; elsewhere the
    parameters are the masters. Weights that are initialised are fp32 first, to be the same under every strategy."""
    if config.model.peft or (config.strategy.zero_stage and not is_initialised):
        return saved_dtype(config)
    return torch.float32


def build_model(config: RunConfig, tokenizer: Any, *, resumed_from: Path | None = None) -> BuiltModel:
    """Builds the module on the CPU (under ZeRO-3: already partitioned).

    Args:
        resumed_from: a checkpoint. It is the model's folder then: config, generation config and vocabulary are its own.
            Its tensors are not read here: `load_state` fills every parameter and persistent buffer. An adapter's base
            is built as at the first start.

    Raises:
        ConfigError: `model.config` is refused. UserError: the pretrained model cannot be loaded.
    """
    settings, dtype = config.model, saved_dtype(config)
    model = _load(config, tokenizer, resumed_from if not settings.peft else None)
    vocab_size = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        mend = "Leave model.tokenizer_name_or_path out: the model's own tokenizer is used then"
        if settings.config:
            mend = f"Set model.config.vocab_size={len(tokenizer)}, or leave it out"
        raise ConfigError(
            [f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {vocab_size}. {mend}"]
        )
    _refuse_layerdrop(config, model.config)
    blueprint = Blueprint.of(model, dtype)
    first_weights: Mapping[str, Tensor] | Path | None = None
    if resumed_from is None and config.strategy.zero_stage and dtype != torch.float32 and not settings.peft:
        name = settings.model_name_or_path
        first_weights = local_folder(name, settings.revision) if name else _whole(model)
    parameters_are_masters = not config.strategy.zero_stage
    blueprint.apply(model, has_masters=parameters_are_masters and not settings.peft)
    stored = blueprint.stored
    model.config.use_cache = False
    if settings.peft:
        model = _with_lora(model, settings.peft)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if parameters_are_masters:
            for param in trained.values():
                param.data = param.data.float()
        stored = {n: (StoredTensor(adapter_key(n), _deepspeed.full_shape(p), 0),) for n, p in trained.items()}
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.peft:
            model.enable_input_require_grads()
    return BuiltModel(model, stored, blueprint.config, first_weights)


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are now, whatever dtype the model gets later."""
    return {name: param.detach() for name, param in model.named_parameters()}


def _load(config: RunConfig, tokenizer: Any, checkpoint: Path | None) -> Any:
    """The model as transformers builds it: from a checkpoint's config, pretrained, or initialised."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    settings = config.model
    name = str(checkpoint or settings.model_name_or_path or "model.config")
    model_config = _build_config(config, tokenizer, checkpoint)
    arguments: dict[str, Any] = {
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": _built_dtype(config, is_initialised=checkpoint is None and not settings.model_name_or_path),
    }
    torch.manual_seed(config.seed)
    try:
        if checkpoint is None and settings.model_name_or_path:
            return AutoModelForCausalLM.from_pretrained(
                name, revision=settings.revision, config=model_config, **arguments
            )
        # From scratch each process initialises the whole model and DeepSpeed partitions it afterwards, so that the
        # first weights are the same under every strategy.
        with _filled_later(config) if checkpoint is not None else _transformers.no_zero_init():
            model = AutoModelForCausalLM.from_config(model_config, **arguments)
        model.tie_weights()  # left out where initialisation is
        if checkpoint is not None and (checkpoint / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint)
        return model
    except (OSError, ValueError, ImportError, KeyError) as error:
        mend = ". Set model.attn_implementation=eager" if "attn_implementation" in str(error) else ""
        raise UserError(f"the model {name} cannot be built: {error}{mend}") from error


def _refuse_layerdrop(config: RunConfig, model_config: Any) -> None:
    """Each process leaves other layers out. DDP knows which gradients are missing where; DeepSpeed 0.19 does not, and
    adds up gradients of different parameters, or hangs."""
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        share = getattr(model_config, name, 0.0)
        if config.strategy.zero_stage and share:
            raise ConfigError(
                [
                    f"strategy={config.strategy.name} cannot train a model with {name}={share}: its processes would "
                    "leave out different layers. Set strategy=ddp, or 0 for it in the model's config"
                ]
            )


@contextlib.contextmanager
def _filled_later(config: RunConfig) -> Iterator[None]:
    """For parameters that a checkpoint will fill: no initialisation, and under ZeRO-3, which partitions each of them as
    soon as it is made, no broadcast of it before."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_transformers.no_init_weights())
        if config.strategy.zero_stage == 3:
            stack.enter_context(_deepspeed.partition_without_broadcast())
        yield


def _build_config(config: RunConfig, tokenizer: Any, checkpoint: Path | None) -> Any:
    from transformers import AutoConfig

    settings = config.model
    is_remote_code = settings.trust_remote_code and settings.model_name_or_path  # a checkpoint holds no code
    try:
        if checkpoint is not None and not is_remote_code:
            return AutoConfig.from_pretrained(checkpoint)
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
        where = str(checkpoint) if checkpoint is not None else "model.config"
        if checkpoint is None and settings.model_name_or_path:
            where = f"model.model_name_or_path={settings.model_name_or_path}"
        raise UserError(f"{where}: {error}") from error


def _with_lora(model: Any, peft_settings: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    try:
        lora = LoraConfig(**{"task_type": "CAUSAL_LM", **peft_settings})
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # an attribute that transformers renamed
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


def static_files(built: BuiltModel, tokenizer: Any) -> dict[str, bytes]:
    """What lies beside the weights in every checkpoint: model config, generation config, tokenizer, chat template."""
    model: Any = built.module
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = getattr(model, "peft_config", {})
        for adapter in adapters.values():
            adapter.save_pretrained(name)
        if not adapters:
            built.config.save_pretrained(name)
            if model.can_generate():
                _save_generation_config(model.generation_config, folder)
        tokenizer.save_pretrained(name)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _save_generation_config(generation_config: Any, folder: Path) -> None:
    try:
        generation_config.save_pretrained(folder)
    except ValueError:  # settings that contradict each other, which transformers loads with a warning but does not save
        (folder / "generation_config.json").write_text(generation_config.to_json_string(use_diff=True))
