"""Which attention a run uses, and whether it takes the rows of a micro-batch one after another, without padding.

Both are tried on the model itself at the start, so that no list of architectures has to stay true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.base.errors import ConfigError
from launcher.config.settings import RunConfig
from launcher.model import cpu_attention, cuda_attention
from launcher.model.packing_check import check_packing, is_same
from launcher.model.packing_masks import give_positions_to_masks

_LENGTHS = (13, 7)


@dataclass(frozen=True)
class Attention:
    """What was settled; part of a checkpoint's settings."""

    name: str
    """transformers' name of it."""
    is_flat: bool
    """A micro-batch is one long row without padding; it comes with `cu_seq_lens_q/k` and `max_length_q/k`."""

    def setting(self) -> dict[str, Any]:
        return asdict(self)


class OwnAttention(Protocol):
    """A module with an attention of ours, for one kind of device."""

    NAME: str
    """As transformers knows it."""

    @property
    def attend(self) -> Callable[..., tuple[Tensor, None]]:
        """transformers' attention function. It takes 2D masks and, as flash attention does, `cu_seq_lens_q`."""

    @property
    def why_not(self) -> Callable[..., str | None]:
        """(module, query, **keywords of `attend`) -> what of such a call it cannot do."""


def own_attention(device: torch.device) -> OwnAttention | None:
    """Ours for a kind of device."""
    return {"cpu": cpu_attention, "cuda": cuda_attention}.get(device.type)


def settle_attention(
    config: RunConfig, model: Any, accelerator: Any, vocab_size: int, name: str, known: dict[str, Any] | None = None
) -> Attention:
    """Puts our attention in the place of sdpa or eager where the model allows it, and checks packs. Collective.

    Args:
        model: the prepared one, as training calls it.
        name: the attention that it was built with.
        known: `Attention.setting` of the checkpoint that the run continues: what was found exact then is not
            measured again, since rounding differs with the weights and a continued run must not change.

    Raises:
        ConfigError: `data.packing` is set and the model does not keep the rows of a pack apart.
    """
    device, data, plain = accelerator.device, config.data, name
    base = unwrapped(accelerator.unwrap_model(model))
    is_exact = config.mixed_precision == "no"

    def keeps_rows_apart(kernel: str, *, has_borders: bool) -> None:
        if known == {"name": kernel, "is_flat": has_borders}:
            return
        kind = base.config.model_type
        check_packing(model, vocab_size, device, kind, has_borders=has_borders, is_exact=is_exact)

    with accelerator.autocast():  # flash attention takes no fp32
        own = own_attention(device) if config.model.attn_implementation == "auto" else None
        is_trusted = own is not None and known is not None and known["name"] == own.NAME
        if own is not None and _maybe_use(own, model, base, vocab_size, device, is_exact=is_exact, trust=is_trusted):
            name = own.NAME
        else:
            own = None
        if (own is not None or "flash" in name) and (data.padding_free or data.packing):
            try:
                keeps_rows_apart(name, has_borders=True)
                return Attention(name, is_flat=True)
            except ConfigError:
                if own is not None and data.packing:  # without borders it would take a pack for one row
                    name = plain
                    base.set_attn_implementation(name)
        if data.packing:
            give_positions_to_masks(model, base, device)
            keeps_rows_apart(name, has_borders=False)
    return Attention(name, is_flat=False)


def unwrapped(model: Any) -> Any:
    """transformers' own model, also below an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _maybe_use(
    own: OwnAttention, model: Any, base: Any, vocab_size: int, device: torch.device, *, is_exact: bool, trust: bool
) -> bool:
    """Switches to our attention where the model can be trained with it and predicts the same. Collective."""
    if not getattr(base, "_supports_flash_attn", False) or not base._can_set_attn_implementation():
        return False
    before, was_training = base.config._attn_implementation, model.training
    seen = _Seen(own)
    is_used = False
    try:
        with torch.no_grad():
            model.eval()
            expected = _log_probs(model, vocab_size, device)
            _register(own.NAME, seen.attend)
            base.set_attn_implementation(own.NAME)
            model.train()
            _log_probs(model, vocab_size, device)
            if seen.allows(base.config.get_text_config()):
                _register(own.NAME, own.attend)
                model.eval()
                is_used = trust or is_same(_log_probs(model, vocab_size, device), expected, is_exact=is_exact)
    except (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        is_used = False
    model.train(was_training)
    if not is_used:
        base.set_attn_implementation(before)
    return is_used


def _register(name: str, attend: Any) -> None:
    """As an attention of transformers, with the masks of flash attention: two-dimensional or none."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, flash_attention_mask)


class _Seen:
    """Looks at what the layers ask for. It raises nothing: a pass that breaks off leaves ZeRO-3's weights gathered."""

    def __init__(self, own: OwnAttention) -> None:
        self._own, self._reasons, self._num_calls, self._has_window = own, set[str](), 0, False

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self._num_calls += 1
        self._has_window |= kwargs.get("sliding_window") is not None
        reason = self._own.why_not(module, query, **kwargs)
        self._reasons |= {reason} if reason else set()
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).to(query.dtype), None

    def allows(self, text_config: Any) -> bool:
        """Whether every call could be made, and a window that the config has reached the calls (masks have it else)."""
        kinds = getattr(text_config, "layer_types", None) or ()
        needs_window = "sliding_attention" in kinds
        needs_more = any(kind not in ("full_attention", "sliding_attention") and "attention" in kind for kind in kinds)
        return bool(self._num_calls and not self._reasons and not needs_more and (self._has_window or not needs_window))


def _log_probs(model: Any, vocab_size: int, device: torch.device) -> Tensor:
    """Of the tokens of two padded rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (len(_LENGTHS), max(_LENGTHS)), generator=generator)
    mask = torch.arange(max(_LENGTHS))[None] < torch.tensor(_LENGTHS)[:, None]
    outputs = model(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
    found: Tensor = outputs.logits.float().log_softmax(-1)[mask.to(device)]
    return found
