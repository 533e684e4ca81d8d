"""A config's model without memory: its parameters as every process keeps them, its optimizer's states."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base.errors import UserError
from launcher.base.stored import StoredTensor, StoredTensors
from launcher.config.settings import RunConfig
from launcher.model import _transformers
from launcher.model.build import build_model_config, saved_dtype
from launcher.model.lora import adapter_folder, adapter_key, with_lora
from launcher.model.optim import fused_arguments, is_decayed, norm_names
from launcher.model.quantization import own_quantization

_PROBE = (2, 3, 5, 7, 11)
"""Sides of the tensors that an optimizer is tried on: different, so that a state's sides tell what they are of."""
_QUANTISED_BLOCK = 64
"""bitsandbytes: one scale per so many weights."""


@dataclass(frozen=True)
class EmptyParam:
    """A parameter: `dtype` is that of forward and of the stored weights, `num_bytes` what its stored weights take in
    memory (less than its dtype says where it is quantised)."""

    name: str
    shape: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    is_trained: bool
    is_decayed: bool
    num_bytes: float


@dataclass(frozen=True)
class EmptyModel:
    """Built on the meta device."""

    module: Any
    params: tuple[EmptyParam, ...]
    buffer_bytes: int
    stored: StoredTensors
    """What the model file of a checkpoint holds, by names in memory; dtypes as in `dtypes`."""
    dtypes: Mapping[str, torch.dtype]
    persistent: Mapping[str, tuple[int, ...]]
    """Shapes of the persistent buffers that a checkpoint holds."""
    config: Any = field(repr=False, default=None)

    @property
    def trained(self) -> list[EmptyParam]:
        return [param for param in self.params if param.is_trained]

    @property
    def frozen(self) -> list[EmptyParam]:
        return [param for param in self.params if not param.is_trained]


def _built(model_config: Any, dtype: torch.dtype, arguments: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    kind = model_config.model_type
    try:
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **arguments)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if "Unrecognized configuration class" in str(error):
            raise UserError(f"{kind} is no causal language model of transformers") from error
        raise UserError(f"no {kind} can be made of this model.config: {type(error).__name__}: {error}") from error
    model.tie_weights()
    return model


def build_empty(config: RunConfig, tokenizer: Any) -> EmptyModel:
    """The model of a config, from its config.json alone.

    Args:
        tokenizer: only used for a model from scratch whose `model.config` names no vocabulary.

    Raises:
        UserError: the model's config cannot be read, or no model can be made of it. ConfigError: settings are refused.
    """
    model_config, dtype = build_model_config(config, tokenizer, None), saved_dtype(config)
    attention = config.model.attn_implementation
    wanted = {} if "flash" in attention or attention == "auto" else {"attn_implementation": attention}
    brought = own_quantization(model_config)
    if not (brought.get("load_in_4bit") or brought.get("load_in_8bit")):
        brought = {}  # others are turned back into plain weights as they are loaded, or refused
    quantised = _quantised_bytes(config.model.quantization or brought)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    with _transformers.no_zero_init(), _transformers.no_init_weights(), torch.device("meta"):
        model = _built(copy.deepcopy(model_config), dtype, wanted)
    dtypes = dict(_transformers.stored_dtypes(model, dtype))
    stored: StoredTensors = _transformers.stored_tensors(model)
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    linear = _quantised_names(model) if quantised else set()
    persistent = _persistent_buffers(model)
    if config.model.is_adapter:
        model = with_lora(model, config, resumed_from=adapter_folder(config), new_token_ids=(), has_masters=False)
        stored = {
            n: (StoredTensor(adapter_key(n), tuple(p.shape), 0),)
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
        persistent = {}
        dtypes |= {name: param.dtype for name, param in model.named_parameters() if name not in dtypes}
    norms = norm_names(model)
    params = []
    for name, param in model.named_parameters():
        own = dtypes.get(name, param.dtype)
        is_quantised = name.removeprefix("base_model.model.").replace(".base_layer", "") in linear
        num_bytes = param.numel() * (quantised if is_quantised and quantised else own.itemsize)
        params.append(
            EmptyParam(
                name, tuple(param.shape), param.numel(), own, name not in frozen and param.is_floating_point(),
                is_decayed(name, norms), num_bytes,
            )
        )  # fmt: skip
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return EmptyModel(model, tuple(params), buffers, stored, dtypes, persistent, model_config)


def _persistent_buffers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in names}


def _quantised_bytes(quantization: Mapping[str, Any]) -> float:
    """Bytes for each weight of a quantised layer, its scales included; 0: not quantised."""
    if quantization.get("load_in_4bit"):
        scale = 1 / _QUANTISED_BLOCK + 4 / (_QUANTISED_BLOCK * 256)  # the scales are quantised too
        return 0.5 + (scale if quantization.get("bnb_4bit_use_double_quant") else 4 / _QUANTISED_BLOCK)
    return 1.0 if quantization else 0.0


def _quantised_names(model: Any) -> set[str]:
    """bitsandbytes leaves the head in its dtype, and with it what is tied to it."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


class OptimizerStates:
    """What an optimizer keeps for a parameter, found out by letting it make a step with a small one."""

    def __init__(self, config: RunConfig) -> None:
        module, _, name = config.optim.name.rpartition(".")
        self._class: Any = getattr(importlib.import_module(module), name)
        fused = fused_arguments(self._class, config.optim.kwargs)
        self._arguments = {"lr": 1e-3, **fused, **config.optim.kwargs}
        self._known: dict[int, list[tuple[tuple[int | str, ...], torch.dtype, str]]] = {}
        self.makes_copies = not self._arguments.get("fused")
        """Of what it steps, while it steps."""

    def slots(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name, shape, dtype) of every state tensor of more than one value."""
        if len(shape) not in self._known:
            self._known[len(shape)] = self._probed(len(shape))
        return [
            (name, tuple(shape[side] if isinstance(side, int) else 1 for side in sides), dtype)
            for sides, dtype, name in self._known[len(shape)]
        ]

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        return sum(_numel(sides) * dtype.itemsize for _, sides, dtype in self.slots(shape))

    def _probed(self, dim: int) -> list[tuple[tuple[int | str, ...], torch.dtype, str]]:
        probe = nn.Parameter(torch.ones(_PROBE[:dim]))
        probe.grad = torch.ones(_PROBE[:dim])
        try:
            optimizer = self._class([probe], **self._arguments)
            optimizer.step()
            state = dict(optimizer.state[probe])
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
            state = {"exp_avg": torch.zeros(_PROBE[:dim]), "exp_avg_sq": torch.zeros(_PROBE[:dim])}
        found = []
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                of = {side: i for i, side in enumerate(_PROBE[:dim])}
                found.append((tuple(of.get(side, "one") for side in value.shape), value.dtype, name))
        return found


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
