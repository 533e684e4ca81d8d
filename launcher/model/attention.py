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
from launcher.model import _transformers, cpu_attention, cuda_attention
from launcher.model.causality import check_causal
from launcher.model.leaks import Shifts, all_agree, evaluating, log_probs, padded, random_rows, rounded_once_more
from launcher.model.packing_check import check_packing
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
    config: RunConfig, model: Any, accelerator: Any, vocab_size: int, name: str, known: dict[str, Any] | None = None,
    *, longest_row: int = 0,
) -> Attention:  # fmt: skip
    """Puts our attention in the place of sdpa or eager where the model allows it, and checks packs. Collective.

    Args:
        model: the prepared one, as training calls it.
        name: the attention that it was built with.
        known: `Attention.setting` of the checkpoint that the run continues: what was found exact then is not
            measured again, since rounding differs with the weights and a continued run must not change.
        longest_row: its tokens; 0: only short packs are looked at.

    Raises:
        ConfigError: the model is not causal, or `data.packing` is set and it does not keep the rows of a pack apart.
    """
    device, data, plain = accelerator.device, config.data, name
    base = unwrapped(accelerator.unwrap_model(model))

    def keeps_rows_apart(kernel: str, *, has_borders: bool) -> None:
        if known == {"name": kernel, "is_flat": has_borders}:
            return
        is_ours = own is not None and kernel == own.NAME  # and no layer asks for what it does not see, such as chunks
        pack_length = 0 if is_ours else data.max_length * (config.train.micro_batch_size if has_borders else 1)
        check_packing(
            model, vocab_size, device, base.config.model_type, has_borders=has_borders, pack_length=pack_length,
            row_length=longest_row,
        )  # fmt: skip

    with accelerator.autocast():  # flash attention takes no fp32
        if known is None:
            check_causal(model, base.config, vocab_size, device, config.model.model_name_or_path)
        own = own_attention(device) if config.model.attn_implementation == "auto" else None
        is_trusted = own is not None and known is not None and known["name"] == own.NAME
        if own is not None and _maybe_use(own, model, base, vocab_size, device, trust=is_trusted):
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


def _maybe_use(own: OwnAttention, model: Any, base: Any, vocab_size: int, device: torch.device, *, trust: bool) -> bool:
    """Switches to our attention where the model can be trained with it and predicts the same. Collective."""
    if not getattr(base, "_supports_flash_attn", False) or not base._can_set_attn_implementation():
        return False
    before, seen, shifts = base.config._attn_implementation, _Seen(own), Shifts()
    rows = random_rows(0, _LENGTHS, vocab_size, device)
    is_used = False
    try:
        with evaluating(model):
            expected = _of_rows(model, rows)
            shifts.add_control(expected, torch.cat([_of_rows(model, [row]) for row in rows]))
            with rounded_once_more(model):
                shifts.add_control(expected, _of_rows(model, rows))
            _register(own.NAME, seen.attend, seen.mask)
            base.set_attn_implementation(own.NAME)
            model.train()  # dropout
            _of_rows(model, rows)
            model.eval()
            if seen.allows(base.config.get_text_config()):
                _register(own.NAME, own.attend)
                found = _of_rows(model, rows)
                is_used = trust or shifts.is_same(found, expected)
    except (NotImplementedError, TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        is_used = False
    is_used = all_agree(is_used, device)
    if not is_used:
        base.set_attn_implementation(before)
    return is_used


def _register(name: str, attend: Any, mask: Any = None) -> None:
    """As an attention of transformers, with the masks of flash attention: two-dimensional or none."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask or _transformers.mask_of_rows)


def _of_rows(model: Any, rows: list[Tensor]) -> Tensor:
    """Log probabilities of their tokens, one row after another."""
    inputs = padded(rows)
    return log_probs(model, inputs)[inputs["attention_mask"].bool()]


class _Seen:
    """Looks at what the layers ask for. It raises nothing: a pass that breaks off leaves ZeRO-3's weights gathered."""

    def __init__(self, own: OwnAttention) -> None:
        self._own, self._reasons, self._num_calls = own, set[str](), 0
        self._windows: set[int | None] = set()
        """Those that layers ask for; None: all tokens before."""
        self._masked: set[int | None] = set()
        """Those that the model's masks let through."""

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self._num_calls += 1
        self._windows.add(kwargs.get("sliding_window") or None)
        reason = self._own.why_not(module, query, **kwargs)
        if attention_mask is not None and attention_mask.ndim != 2:
            reason = "a mask of its own"
        self._reasons |= {reason} if reason else set()
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).to(query.dtype), None

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' mask function of flash attention, which drops the pattern: it is left to the layers."""
        from transformers.masking_utils import causal_mask_function, flash_attention_mask

        try:
            self._masked.add(window_of(kwargs.get("mask_function", causal_mask_function)))
        except (ValueError, IndexError, TypeError, RuntimeError):
            self._reasons.add("a mask of its own")
        return flash_attention_mask(*args, **kwargs)

    def allows(self, text_config: Any) -> bool:
        """Whether every call could be made, and says which window it has: where only the masks have it (phimoe), it
        would be lost."""
        kinds = getattr(text_config, "layer_types", None) or ()
        needs_more = any(kind not in ("full_attention", "sliding_attention") and "attention" in kind for kind in kinds)
        is_lost = ("sliding_attention" in kinds or not kinds) and not self._masked - {None, 0} <= self._windows
        is_new = bool(self._masked) and not self._windows <= self._masked
        needs_window = "sliding_attention" in kinds and self._windows <= {None}
        return bool(self._num_calls) and not (self._reasons or needs_more or is_lost or is_new or needs_window)


_FAR = 1 << 40


def window_of(sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> int | None:
    """How many tokens a mask function of transformers lets each see, itself and those before it; None: all.

    Raises:
        ValueError: it is another pattern.
    """
    zero = torch.tensor(0)

    def sees_back(query: int, distance: int) -> bool:
        return bool(sees(zero, zero, torch.tensor(query), torch.tensor(query - distance)))

    if sees_back(_FAR, -1):
        raise ValueError("not causal")
    if not sees_back(_FAR, 0):
        return 0  # made of a setting that means off (qwen2_moe), and used by no layer
    if sees_back(_FAR, _FAR):
        return None
    seen, hidden = 0, _FAR
    while hidden - seen > 1:
        middle = (seen + hidden) // 2
        seen, hidden = (middle, hidden) if sees_back(_FAR, middle) else (seen, middle)
    for query in (_FAR + 1, _FAR + hidden // 2, _FAR - hidden // 3):  # blocks of tokens end elsewhere for each of them
        if not sees_back(query, seen) or sees_back(query, hidden) or sees_back(query, -1):
            raise ValueError("not a window")
    return hidden
