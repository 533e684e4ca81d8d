"""What is used of transformers that is not its public interface.

Seen with transformers 5.23.0; tests/unit/test_private_names.py fails where an upgrade has moved or changed it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from launcher.base.stored import StoredTensor, StoredTensors


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


def no_init_weights() -> contextlib.AbstractContextManager[None]:
    """Parameters stay as memory came: something else fills them."""
    from transformers import initialization

    context: contextlib.AbstractContextManager[None] = initialization.no_init_weights()
    return context


def build_without_memory(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of a class on the meta device, built of a copy of the config as `from_pretrained(dtype=…)` would."""
    with no_zero_init(), torch.device("meta"):
        model = cls._from_config(copy.deepcopy(config), dtype=dtype)
        model.tie_weights()
    return model


_masks: tuple[bool | None, bool | None] = (None, None)


@contextlib.contextmanager
def known_masks(is_full: bool | None, is_packed: bool | None) -> Iterator[None]:
    """Inside, transformers does not ask the device what is known of a micro-batch: whether its 2D mask has no padding,
    and whether positions restart in a row. Each such question stops the host until the device has done everything
    before it. None: it asks.
    """
    global _masks
    _teach_masks()
    before, _masks = _masks, (is_full, is_packed)
    try:
        yield
    finally:
        _masks = before


@functools.cache
def _teach_masks() -> None:
    from transformers import masking_utils

    asks_all, asks_packed = masking_utils.fast_all, masking_utils.find_packed_sequence_indices

    def fast_all(tensor: Any) -> Any:
        if _masks[0] is None or torch.compiler.is_compiling():
            return asks_all(tensor)
        return _masks[0] or not tensor.numel()

    def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
        if _masks[1] is None or torch.compiler.is_compiling():
            found: Tensor | None = asks_packed(position_ids)
            return found
        if not _masks[1]:
            return None
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    masking_utils.fast_all = fast_all
    masking_utils.find_packed_sequence_indices = find_packed_sequence_indices


def mask_of_rows(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask function of flash attention: two-dimensional, or none where there is no padding, for which it
    asks the device unless that is known."""
    from transformers.masking_utils import flash_attention_mask

    given: Tensor | None = kwargs.get("attention_mask")
    if given is None or _masks[0] is None or torch.compiler.is_compiling():
        found: Tensor | None = flash_attention_mask(*args, **kwargs)
        return found
    return None if _masks[0] else given[:, -kwargs["kv_length"] :]


@contextlib.contextmanager
def plain_experts() -> Iterator[None]:
    """Experts run as one product after the other: without values torch knows the grouped kernel in bfloat16 alone."""
    from transformers.integrations import moe

    before = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = before


def stored_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every parameter and persistent buffer after `from_pretrained(dtype=…)`, by its name in memory.

    Some stay fp32 whatever is asked for: `_keep_in_fp32_modules_strict` (routers, their biases, Mamba's A_log), or
    because the class makes them so. Same rule as transformers/core_model_loading.py.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(plan))[0] if plan else None
    found = {}
    for name, tensor in model.state_dict().items():
        is_kept = pattern is not None and pattern.search(name) is not None and tensor.is_floating_point()
        found[name] = torch.float32 if is_kept else tensor.dtype
    return found


def stored_tensors(model: Any) -> StoredTensors:
    """How `save_pretrained` stores a model's parameters and persistent buffers, by their names in memory.

    transformers holds the experts of a layer as one parameter and stores each for itself. Its own conversion is run
    here on tensors without memory whose `contiguous()` does nothing, so that every result is still a view of the
    parameter that it comes from, and says where in it its elements lie. Tied parameters are stored once.

    Two architectures of transformers 5.23 (hrm_text, inkling2_text) weave several parameters into one stored tensor or
    reorder inside. Those keep their names in memory, which `from_pretrained` reads as well.

    Args:
        model: on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    whole: dict[int, str] = {}
    for name, tensor in model.named_parameters():
        whole[_storage(tensor)] = name
    state = model.state_dict()
    for name, tensor in state.items():
        whole.setdefault(_storage(tensor), name)
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    kept = remove_tied_weights_from_state_dict(state, model)
    tensors = {whole[_storage(tensor)]: tensor for tensor in kept.values()}
    own = {whole[_storage(tensor)]: (_stored(name, tensor),) for name, tensor in kept.items()}
    with _NoCopies(), torch.no_grad():
        reverted = revert_weight_conversion(model, dict(kept))
    parts: dict[str, list[StoredTensor]] = {}
    for name, tensor in reverted.items():
        of = whole.get(_storage(tensor))
        if of is not None and tensor.is_contiguous():
            parts.setdefault(of, []).append(_stored(name, tensor))
    found = {}
    for name, tensor in tensors.items():
        ordered = sorted(parts.get(name, ()), key=lambda part: part.start)
        found[name] = tuple(ordered) if _covers(ordered, tensor.numel()) else own[name]
    return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _stored(name: str, tensor: Tensor) -> StoredTensor:
    return StoredTensor(name, tuple(tensor.shape), int(tensor.storage_offset()))


def _covers(parts: list[StoredTensor], numel: int) -> bool:
    end = 0
    for part in parts:
        if part.start != end:
            return False
        end += part.numel
    return end == numel


class _NoCopies(TorchFunctionMode):
    """`contiguous()` gives the view itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return func(*args, **(kwargs or {}))


def attention_implementations(config: Any) -> list[str] | None:
    """What the architecture of a config takes as `attn_implementation`; None for code that comes with a model."""
    from transformers import AutoModelForCausalLM

    cls: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if cls is None:
        return None
    cls = cls[0] if isinstance(cls, (list, tuple)) else cls
    found = ["eager"]
    found += ["sdpa"] if cls._supports_sdpa else []
    found += ["flash_attention_2", "flash_attention_3"] if cls._supports_flash_attn else []
    return found + (["flex_attention"] if cls._supports_flex_attn else [])


def is_found_by_its_config(model: Any) -> bool:
    """Whether AutoModelForCausalLM makes the class of a model from the config that the model is saved with. Of code
    that comes with a model it is not known here."""
    from transformers import AutoModelForCausalLM

    is_own = type(model).__module__.startswith("transformers.")
    return not is_own or type(model.config) in AutoModelForCausalLM._model_mapping


def is_linear(part: Any) -> bool:
    """Whether quantisation replaces such a layer, or has replaced it."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(part, (torch.nn.Linear, Conv1D))


def is_left_out(layer: str, name: str) -> bool:
    """Whether `llm_int8_skip_modules=[name]` keeps a layer from being quantised."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(layer, [name])
