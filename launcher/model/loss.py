"""The loss that is trained on: summed over the labelled positions, exact however rows are padded, packed and split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launcher.base.targets import targets_of
from launcher.model import _transformers
from launcher.model.fused_head import TARGETS, maybe_fuse_head
from launcher.model.leaks import evaluating

_NUM_TRIED = 8
"""Tokens."""


class Losses(NamedTuple):
    """What a forward pass gives: the summed cross entropy (fp32 scalar, with graph), the number of labelled positions
    here, and the router loss of a mixture of experts whose config asks for it (mean, not scaled)."""

    loss_sum: Tensor
    num_labelled: int
    router_loss: Tensor | None


def summed_loss(model: nn.Module, batch: Mapping[str, Any], *, is_fused: bool = False) -> Losses:
    """Forward pass and the summed cross entropy over the labelled positions.

    Args:
        batch: input_ids_BT, attention_mask_BT, position_ids_BT where packed, and `targets`, as `data.to_device` gives
            them; or labels_BT (-100: no loss) instead of the latter, which are looked for on the device.
        is_fused: the model was taught to give its loss (`fused_head.maybe_fuse_head`).
    """
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "targets", "is_full", "is_packed")}
    targets = targets_of(batch["labels"]) if "labels" in batch else batch["targets"]
    with _transformers.known_masks(batch.get("is_full"), batch.get("is_packed")):
        if is_fused:
            found = model(**inputs, use_cache=False, **{TARGETS: targets})
            loss, router_loss = found["loss"], found["aux_loss"]
        else:
            outputs = model(**inputs, use_cache=False)
            # Only labelled positions are widened to fp32: most of a chat's positions carry no loss.
            chosen = outputs.logits.flatten(0, 1).index_select(0, targets.positions).float()
            loss = nn.functional.cross_entropy(chosen, targets.tokens, reduction="sum")
            router_loss = getattr(outputs, "aux_loss", None)
    return Losses(loss, len(targets.tokens), router_loss if isinstance(router_loss, Tensor) else None)


LossFunction = Callable[[nn.Module, Mapping[str, Any]], Losses]


def build_loss(
    base: Any, device: torch.device, *, is_fused: bool, is_compiled: bool = False
) -> tuple[LossFunction, list[str]]:
    """The loss of a prepared model, and notices. Collective.

    Args:
        base: without its wrappers; under peft its base model.
        is_fused: whether head and loss are to be one operation where that is exact.
        is_compiled: whether its parts without matrix products are compiled.
    """
    has_fused = is_fused and maybe_fuse_head(base, device, is_compiled=is_compiled)
    notices = []
    if is_fused and not has_fused:
        notices.append(
            f"{base.config.model_type}: its forward pass does not end with its head, so all logits of a micro-batch "
            "are held at once (train.fused_loss has no effect)"
        )
    notices += _left_out(base, device)
    return partial(summed_loss, is_fused=has_fused), notices


_ROUTER = ("router_aux_loss_coef", "aux_loss_coef", "router_aux_loss_coefficient", "moe_loss_weight")


def router_coefficient(model: nn.Module) -> float:
    """By how much transformers scales a model's router loss before it adds it (`output_router_logits=true`)."""
    numbers = _numbers(getattr(model, "module", model).config)
    return next((float(numbers[name]) for name in _ROUTER if name in numbers), 0.0)


def _numbers(config: Any) -> dict[str, int | float]:
    """Fields of a model's config that hold a number, also those of the parts that it consists of (DBRX)."""
    parts = [config, config.get_text_config(), getattr(config, "ffn_config", None)]
    found = {name: value for part in reversed(parts) if part is not None for name, value in vars(part).items()}
    return {
        name: value for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


@torch.no_grad()
def _left_out(base: Any, device: torch.device) -> list[str]:
    """A notice of what transformers adds to an architecture's loss beside the cross entropy and the router loss, where
    its config asks for such a thing: Bamba's z-loss. Measured, since a field alone need not have an effect. Collective.
    """
    numbers = {name: value for name, value in _numbers(base.config).items() if name not in _ROUTER}
    fields = [f"{name}={value}" for name, value in numbers.items() if "loss" in name and value]
    if not fields:
        return []
    ids = torch.arange(_NUM_TRIED, device=device)[None] % base.config.get_text_config().vocab_size
    with evaluating(base):
        try:
            outputs = base(input_ids=ids, labels=ids, use_cache=False)
            ours = float(nn.functional.cross_entropy(outputs.logits[0, :-1].float(), ids[0, 1:]))
            theirs = float(outputs.loss)
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError):
            return []  # it has no loss of that kind
    if isinstance(router_loss := getattr(outputs, "aux_loss", None), Tensor):
        ours += router_coefficient(base) * float(router_loss)
    if math.isclose(ours, theirs, rel_tol=1e-5):
        return []
    return [
        f"{base.config.model_type}: transformers has more in the loss than is trained on here, which is the cross "
        f"entropy of the labelled tokens ({theirs:.6g}, not {ours:.6g}). Its config has {', '.join(fields)}"
    ]


def takes_padding(model: nn.Module, device: torch.device) -> bool:
    """Whether a row of padding helps and changes nothing: a router loss is a mean over all tokens."""
    asks_for_it = getattr(getattr(model, "module", model).config, "output_router_logits", False)
    return device.type == "cpu" and not (asks_for_it or router_coefficient(model))
