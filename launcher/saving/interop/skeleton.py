"""A model without memory, for the names, order and groups of its parameters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from launcher.base import manifest
from launcher.base.errors import ResumeError
from launcher.base.stored import StoredTensor
from launcher.config.settings import RunConfig
from launcher.model._transformers import no_zero_init, stored_tensors
from launcher.model.giants import refuse_giant


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint holds a LoRA adapter instead of a whole model."""
    name = "adapter_config.json"
    if (folder / manifest.NAME).is_file():
        return name in manifest.read(folder).paths
    return (folder / name).is_file()


def build_skeleton(
    folder: Path, *, trust_remote_code: bool = False, base: str | None = None, min_rows: int = 0
) -> nn.Module:
    """The model of a checkpoint folder on the meta device; with an adapter, on its base model.

    Args:
        base: the base model of an adapter instead of the one that it names itself.
        min_rows: what its embeddings need at least.

    Raises:
        ResumeError: the folder, or the base model, has no usable config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = str(folder)
    try:
        if is_adapter(folder):
            from peft import PeftConfig, get_peft_model

            adapter = PeftConfig.from_pretrained(str(folder))
            adapter.inference_mode = False
            source = base or adapter.base_model_name_or_path or ""
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if source == str(folder):
            refuse_giant(config.to_dict(), folder)
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, min_rows)
        with no_zero_init(), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            model.tie_weights()
            if is_adapter(folder):
                # peft reads attributes that transformers 5 deprecates, and warns of tied weights
                with warnings.catch_warnings(action="ignore"):
                    model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    except Exception as error:  # whatever values that nobody meant to write make of transformers
        raise ResumeError(
            f"the model of {folder} cannot be built from the config.json of {source}: {error!r:.1000}"
        ) from error
    return cast(nn.Module, model)


def stored_in_parts(model: nn.Module) -> dict[str, tuple[StoredTensor, ...]]:
    """The parameters of a skeleton that the model file holds otherwise than whole under their own names."""
    stored = stored_tensors(model)
    return {name: parts for name, parts in stored.items() if [part.name for part in parts] != [name]}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once, in the order in which the Trainer passes them to its optimizer."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def trainer_groups(model: nn.Module) -> list[list[str]]:
    """The Trainer's two parameter groups, with weight decay and without; one may be empty."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), cast(Any, model)))  # does not look at its self
    names = list(trained(model))
    return [[n for n in names if n in decayed], [n for n in names if n not in decayed]]


def our_groups(config: RunConfig, model: nn.Module) -> tuple[list[list[str]], torch.optim.Optimizer]:
    """Our own parameter groups, and the optimizer on the skeleton, for its defaults."""
    from launcher.model.optim import build_optimizer

    names = {id(param): name for name, param in model.named_parameters()}
    optimizer = build_optimizer(config, model)
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups], optimizer
