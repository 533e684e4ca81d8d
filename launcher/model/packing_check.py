"""Whether a model keeps the rows of a pack apart: measured on the model itself; no list of architectures stays true."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launcher.base.errors import ConfigError

_LENGTHS = (13, 11)
_MAX_LEAK, _MAX_SHIFT = 1e-5, 1e-4
"""In log probabilities. Seen in fp32: 0 and 5e-7 where rows are apart, 4e-5 and more where they are not (untrained)."""
_MAX_ROUNDED_LEAK, _MAX_ROUNDED_SHIFT = 1e-2, 0.1
"""Where forward rounds to bf16 or fp16."""


def check_packing(model: Any, vocab_size: int, device: torch.device, model_type: str, *, is_exact: bool = True) -> None:
    """Runs one pack of two rows, and the second row alone; its log probabilities must be the same. Collective.

    Attention is not the only way from one row to the next: states of Mamba and of linear attention, convolutions, and
    positions that are counted through are others.

    Args:
        model: the prepared one, as training calls it.

    Raises:
        ConfigError: they differ, or the model takes no positions.
    """
    first, other, second = _rows(vocab_size, device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = _log_probs(model, [first, second])
            changed = _log_probs(model, [other, second])
            alone = _log_probs(model, [second])
    except (TypeError, ValueError, NotImplementedError) as error:
        raise _refusal(model_type, f"it cannot run a pack: {str(error).splitlines()[0]}") from error
    finally:
        model.train(was_training)
    is_exact = is_exact and packed.dtype == torch.float32
    max_leak, max_shift = (_MAX_LEAK, _MAX_SHIFT) if is_exact else (_MAX_ROUNDED_LEAK, _MAX_ROUNDED_SHIFT)
    leak = float((packed.float() - changed.float()).abs().max())
    if not leak <= max_leak:
        raise _refusal(model_type, f"what a row predicts depends on the row before (by {leak:.2g} in log probability)")
    shift = float((packed.float() - alone.float()).abs().max())
    if not shift <= max_shift:
        raise _refusal(model_type, f"a row in a pack is not what it is alone (by {shift:.2g} in log probability)")


def _rows(vocab_size: int, device: torch.device) -> list[Tensor]:
    """Two different first rows of one length, and a second row; the same on every process."""
    generator = torch.Generator().manual_seed(0)
    lengths = (_LENGTHS[0], _LENGTHS[0], _LENGTHS[1])
    return [torch.randint(0, vocab_size, (length,), generator=generator).to(device) for length in lengths]


def _log_probs(model: Any, rows: list[Tensor]) -> Tensor:
    """Of the last row's tokens, as `data.rows.collate` gives packs to the model."""
    ids = torch.cat(rows).unsqueeze(0)
    positions = torch.cat([torch.arange(len(row), device=ids.device) for row in rows]).unsqueeze(0)
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -len(rows[-1]) :]
    return logits.log_softmax(-1)


def _refusal(model_type: str, why: str) -> ConfigError:
    return ConfigError(
        [
            f"data.packing=true: {model_type} does not keep the rows of a pack apart: {why}. "
            "Set data.packing=false; rows of similar length waste little padding"
        ]
    )
