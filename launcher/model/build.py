"""The model: pretrained, from scratch or resumed, the same way; LoRA; the files that go beside its weights."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base import _deepspeed
from launcher.base.errors import ConfigError, UserError
from launcher.base.stored import StoredTensor, StoredTensors
from launcher.config.settings import RunConfig, expanded
from launcher.model import _transformers
from launcher.model._bitsandbytes import keep_weights
from launcher.model.blueprint import Blueprint
from launcher.model.fields import refuse_mistyped_fields, unknown_fields_notice
from launcher.model.giants import refuse_giant
from launcher.model.identity import local_folder
from launcher.model.lora import adapter_folder, adapter_key, adapter_notice, with_lora
from launcher.model.positions import forget_lengths
from launcher.model.quantization import check_quantised, quantization_arguments
from launcher.model.vocabulary import NewRows, grow, refuse_small_vocabulary


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
    name, or the folder of a pretrained model or adapter."""
    new_rows: NewRows
    """What of the trained parameters no pretrained model has."""
    attn_implementation: str
    notices: list[str]


def saved_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of forward and of model.safetensors."""
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return dtype


def _built_dtype(config: RunConfig, *, is_initialised: bool) -> torch.dtype:
    """The dtype to build in. DeepSpeed keeps fp32 masters of its own, and LoRA's base has none; elsewhere the
    parameters are the masters. Weights that are initialised are fp32 first, to be the same under every strategy."""
    if config.model.is_adapter or (config.strategy.zero_stage and not is_initialised):
        return saved_dtype(config)
    return torch.float32


def build_model(
    config: RunConfig, tokenizer: Any, *, new_token_ids: Sequence[int] = (), resumed_from: Path | None = None
) -> BuiltModel:
    """Builds the module on the CPU (quantised: on its device; under ZeRO-3: already partitioned). Collective.

    Args:
        new_token_ids: of tokens that `model.add_tokens` added to the tokenizer.
        resumed_from: a checkpoint. It is the model's folder then: config, generation config and vocabulary are its own.
            Its tensors are not read here: `load_state` fills every parameter and persistent buffer. An adapter's base
            is built as at the first start.

    Raises:
        ConfigError: settings are refused. UserError: the pretrained model or the adapter cannot be loaded.
    """
    settings, dtype = config.model, saved_dtype(config)
    is_base = settings.is_adapter
    model = _load(config, tokenizer, None if is_base else resumed_from)
    if not is_base and not _transformers.is_found_by_its_config(model):  # mllama, whose text has a config of its own
        raise UserError(
            f"of {settings.model_name_or_path or 'model.config'} transformers trains {type(model).__name__}, and saves "
            f"it with a config ({model.config.model_type}) that AutoModelForCausalLM does not load: nothing could go "
            "on from a checkpoint. Train an adapter (model/peft=lora), or another model"
        )
    quantised_notices = check_quantised(config, model)
    is_new = is_base or resumed_from is None
    new_rows = grow(model, config, tokenizer, new_token_ids if is_new else ())
    _refuse_layerdrop(config, model.config)
    _refuse_uneven_calls(config, model.config)
    blueprint = Blueprint.of(model, dtype)
    first_weights: Mapping[str, Tensor] | Path | None = None
    if resumed_from is None and config.strategy.zero_stage and dtype != torch.float32:
        first_weights = _first_weights(config, model)
    parameters_are_masters = not config.strategy.zero_stage
    blueprint.apply(model, has_masters=parameters_are_masters and not is_base)
    stored, attn_implementation, notices = blueprint.stored, model.config._attn_implementation, quantised_notices
    if is_new and not settings.model_name_or_path and (notice := unknown_fields_notice(settings.config, model.config)):
        notices.append(notice)
    model.config.use_cache = False
    if is_base:
        model = with_lora(model, config, resumed_from=resumed_from, new_token_ids=new_rows.ids,
                          has_masters=parameters_are_masters)  # fmt: skip
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        stored = {n: (StoredTensor(adapter_key(n), _deepspeed.full_shape(p), 0),) for n, p in trained.items()}
        new_rows = NewRows((), {})  # an adapter's are a copy of the base's
        if resumed_from is None and (notice := adapter_notice(config)):
            notices.append(notice)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if is_base:
            model.enable_input_require_grads()
    forget_lengths(model)
    keep_weights(model)
    if config.strategy.zero_stage == 3:
        _deepspeed.partition_in_model_order(model)
    return BuiltModel(model, stored, blueprint.config, first_weights, new_rows, attn_implementation, notices)


def _first_weights(config: RunConfig, model: nn.Module) -> Mapping[str, Tensor] | Path | None:
    if config.model.is_adapter:
        return adapter_folder(config)  # None: a new one, initialised in the dtype of its base
    name = config.model.model_name_or_path
    return local_folder(name, config.model.revision) if name else _whole(model)


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are now, whatever dtype the model gets later."""
    return {name: param.detach() for name, param in model.named_parameters()}


def _load(config: RunConfig, tokenizer: Any, checkpoint: Path | None) -> Any:
    """The model as transformers builds it: from a checkpoint's config, pretrained, or initialised."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    settings = config.model
    name = str(checkpoint or expanded(settings.model_name_or_path or "model.config"))
    model_config = build_model_config(config, tokenizer, checkpoint)
    arguments: dict[str, Any] = {
        "attn_implementation": _attention(config, model_config),
        "trust_remote_code": settings.trust_remote_code,
        "dtype": _built_dtype(config, is_initialised=checkpoint is None and not settings.model_name_or_path),
    }
    torch.manual_seed(config.seed)
    try:
        if checkpoint is not None:
            refuse_giant(model_config.to_dict(), checkpoint)
        if checkpoint is None and settings.model_name_or_path:
            return AutoModelForCausalLM.from_pretrained(
                name,
                revision=settings.revision,
                config=model_config,
                **arguments,
                **quantization_arguments(config, model_config),
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
        if "Unrecognized configuration class" in str(error):
            raise UserError(f"{name}: {model_config.model_type} is no causal language model of transformers") from error
        is_attention = settings.attn_implementation != "auto" and re.search("attention|attn", str(error), re.I)
        mend = ". Set model.attn_implementation=auto" if is_attention else ""
        raise UserError(f"the model {name} cannot be built: {error}{mend}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever values that nobody meant to write make of transformers
        if checkpoint is not None:
            raise UserError(f"the model {name} cannot be built from its config.json: {error!r:.1000}") from error
        if config.strategy.zero_stage == 3:  # some initialise parameters that are partitioned already (rwkv)
            raise UserError(
                f"the model {name} ({model_config.model_type}) cannot be built under strategy={config.strategy.name}: "
                f"{error!r:.1000}. Set strategy=zero2"
            ) from error
        raise


def _attention(config: RunConfig, model_config: Any) -> str | None:
    """What to ask transformers for; None: sdpa where the architecture takes it, else eager.

    Raises:
        ConfigError: the architecture or the machine does not take it.
    """
    wanted = config.model.attn_implementation
    if wanted == "auto":
        return None
    takes = _transformers.attention_implementations(model_config)
    if takes is not None and wanted not in takes and "/" not in wanted:  # a kernel from the Hub
        auto = "sdpa" if "sdpa" in takes else "eager"
        raise ConfigError(
            [
                f"model.attn_implementation={wanted} is not taken by {model_config.model_type}. It takes "
                f"{', '.join(takes)}. Set model.attn_implementation=auto, which means {auto} there"
            ]
        )
    if wanted == "flex_attention" and not torch.cuda.is_available():  # torch 2.13: no gradients; what it compiles fails
        raise ConfigError(
            ["model.attn_implementation=flex_attention trains on CUDA only. Set model.attn_implementation=auto"]
        )
    return wanted


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


def _refuse_uneven_calls(config: RunConfig, model_config: Any) -> None:
    """DBRX calls the module that holds its experts once for each of them that was chosen, which is another number on
    every process: gathered at each call, as under ZeRO-3, they would wait for each other for ever. All other
    architectures of transformers 5.23 call every module with parameters equally often."""
    if config.strategy.zero_stage == 3 and model_config.model_type == "dbrx":
        raise ConfigError(
            [
                f"strategy={config.strategy.name} cannot train dbrx: its processes would gather different numbers of "
                "experts, and hang. Set strategy=zero2"
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


def build_model_config(config: RunConfig, tokenizer: Any, checkpoint: Path | None) -> Any:
    """transformers' config of the model: a checkpoint's, the pretrained model's, or that of `model.config`.

    Raises:
        UserError: it cannot be read, or its fields are refused. ConfigError: its vocabulary is too small, or fields of
            `model.config` are mistyped.
    """
    from transformers import AutoConfig

    settings = config.model
    if checkpoint is None and not settings.model_name_or_path:
        refuse_small_vocabulary(settings.config, tokenizer)
    is_remote_code = settings.trust_remote_code and settings.model_name_or_path  # a checkpoint holds no code
    try:
        if checkpoint is not None and not is_remote_code:
            return AutoConfig.from_pretrained(checkpoint)
        if settings.model_name_or_path:
            return AutoConfig.from_pretrained(
                expanded(settings.model_name_or_path),
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
            )
        fields = dict(settings.config)
        fields.setdefault("vocab_size", -(-len(tokenizer) // 8) * 8)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))
        model_config = AutoConfig.for_model(**fields)
    except Exception as error:  # whatever a config class raises about its fields; strict ones have classes of their own
        where = str(checkpoint) if checkpoint is not None else "model.config"
        if checkpoint is None and settings.model_name_or_path:
            where = f"model.model_name_or_path={settings.model_name_or_path}"
        raise UserError(f"{where}: {error}") from error
    refuse_mistyped_fields(settings.config, model_config)
    return model_config


def weights_stem(config: RunConfig) -> str:
    """The model file's name without ending, as from_pretrained expects it."""
    return "adapter_model" if config.model.is_adapter else "model"


def stored_name(config: RunConfig) -> Callable[[str], str]:
    """From a parameter's name to the one in the model file."""
    return adapter_key if config.model.is_adapter else lambda name: name


def static_files(built: BuiltModel, tokenizer: Any) -> dict[str, bytes]:
    """What lies beside the weights in every checkpoint: model or adapter config, generation config, tokenizer, chat
    template."""
    model: Any = built.module
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = getattr(model, "peft_config", {})
        for adapter in adapters.values():
            adapter.save_pretrained(name)
        if not adapters:
            built.config.save_pretrained(name)
        if model.can_generate():  # an adapter's too: for the model that it is merged into
            _save_generation_config(model.generation_config, folder)
        tokenizer.save_pretrained(name)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _save_generation_config(generation_config: Any, folder: Path) -> None:
    try:
        generation_config.save_pretrained(folder)
    except ValueError:  # settings that contradict each other, which transformers loads with a warning but does not save
        (folder / "generation_config.json").write_text(generation_config.to_json_string(use_diff=True))
