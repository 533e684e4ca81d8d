"""What a model's class says of it, found out on a copy without memory: the same however the run started."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.base import _deepspeed
from launcher.base.stored import StoredTensors
from launcher.model import _transformers


@dataclass(frozen=True)
class Blueprint:
    """How a model is kept in memory and stored; all by names in memory."""

    config: Any
    """As `save_pretrained` would write it."""
    stored: StoredTensors
    dtypes: Mapping[str, torch.dtype]
    """Of forward and of the stored weights."""
    frozen: frozenset[str]
    """Parameters that the class itself does not train. `from_pretrained` makes every parameter trainable
    (transformers/core_model_loading.py, set_param_for_module), which is no wish of anybody's."""

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> Blueprint:
        """Of a model before it is wrapped; `dtype` is that of forward and of the stored weights."""
        plain = copy.deepcopy(model.config)
        plain.__dict__.pop("quantization_config", None)  # of what is stored nothing is quantised
        empty = _transformers.build_without_memory(type(model), plain, dtype)
        empty.config.architectures = [type(model).__name__]
        dtypes = _transformers.stored_dtypes(empty, dtype)
        stored = {}
        for name, parts in _transformers.stored_tensors(empty).items():
            other = None if dtypes[name] == dtype else _SAFETENSORS[dtypes[name]]
            stored[name] = tuple(dataclasses.replace(part, dtype=other) for part in parts)
        frozen = frozenset(name for name, param in empty.named_parameters() if not param.requires_grad)
        return cls(empty.config, stored, dtypes, frozen)

    def apply(self, model: nn.Module, *, has_masters: bool) -> None:
        """Freezes what the class freezes, and gives parameters and persistent buffers their dtypes.

        What is not trained must have its stored dtype in memory as well: a resume could not bring back what storing it
        rounds away.

        Args:
            has_masters: trained parameters are fp32 masters themselves; the optimizer has no others.
        """
        for name, param in model.named_parameters():
            is_trained = name not in self.frozen and param.is_floating_point()
            param.requires_grad_(is_trained)
            if not _deepspeed.is_partitioned(param) and param.is_floating_point():
                param.data = param.data.to(torch.float32 if is_trained and has_masters else self.dtypes[name])
        for name, buffer in model.named_buffers():
            if name in self.dtypes:
                buffer.data = buffer.data.to(self.dtypes[name])


_SAFETENSORS = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL", torch.int8: "I8", torch.int16: "I16",
}  # fmt: skip
