"""Masks that keep the rows of a pack apart, for architectures of transformers that make theirs without positions."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_MAKERS = ("create_causal_mask", "create_sliding_window_causal_mask")
_MARK = "_launcher_positions"


class _Positions:
    """Those of the forward that runs, for the functions that make its masks."""

    current: Tensor | None = None
    are_missed = False
    """A mask was made without them."""


def give_positions_to_masks(model: Any, base: torch.nn.Module, device: torch.device) -> None:
    """Lets the masks of a model begin anew where a row of a pack begins. Collective.

    transformers' `create_causal_mask` tells the rows of a pack by their positions. Some models take positions and do
    not hand them on (seen in 5.23: gpt_oss, falcon, opt), which is found by a pack of two tokens. Only the names in
    their own modules are changed, and only a mask that is made without an attention mask becomes another.

    Not where ALiBi takes the place of positions (bloom, mpt): its biases grow through the pack, and far from the start
    rounding makes of a row what it is not alone.

    Args:
        model: the prepared one, as training calls it.
        base: transformers' own in it.
    """
    from transformers import PreTrainedModel

    before: list[tuple[Any, str, Any]] = []
    hooks: list[Any] = []
    for part in base.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        code = sys.modules[type(part).__module__]
        if any("alibi" in name for name in vars(code)) and getattr(part.config, "alibi", True):
            continue
        for name in _MAKERS:
            maker = getattr(code, name, None)
            if maker is not None and not hasattr(maker, _MARK):
                before.append((code, name, maker))
                setattr(code, name, _with_positions(maker))
        hooks.append(part.register_forward_pre_hook(_remember, with_kwargs=True))
        hooks.append(part.register_forward_hook(_forget, always_call=True))
    if not _misses_positions(model, device):
        for code, name, maker in before:
            setattr(code, name, maker)
        for hook in hooks:
            hook.remove()


def _misses_positions(model: Any, device: torch.device) -> bool:
    _Positions.are_missed = False
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=ids, position_ids=ids.clone(), use_cache=False)
    except (TypeError, ValueError, NotImplementedError):
        pass  # the check of packs says what it is
    finally:
        model.train(was_training)
    return _Positions.are_missed


def _with_positions(maker: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is None and kwargs.get("attention_mask") is None:
            kwargs["position_ids"] = _Positions.current
            _Positions.are_missed |= _Positions.current is not None
        return maker(*args, **kwargs)

    setattr(make, _MARK, True)
    return make


def _remember(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("position_ids") is not None:
        _Positions.current = kwargs["position_ids"]


def _forget(module: torch.nn.Module, args: Any, output: Any) -> None:
    _Positions.current = None
