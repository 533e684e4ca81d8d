"""Whether a model keeps the rows of a pack apart: measured on the model itself; no list of architectures stays true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from launcher.base.errors import ConfigError

_LENGTHS = (13, 11)
_MAX_LEAK = 1e-5
"""In log probabilities. Seen in fp32: 0 where rows are apart, 4e-5 and more where they are not (untrained). In bf16 on
a CPU: 0 in all of 27 architectures, mixtures among them, 1e-3 and more where they are not (LFM2, bloom; untrained)."""
_MAX_SHIFT = 2e-5
"""In fp32, by the largest log probability (41 in a trained model, 6 in an untrained one). Seen where a row is the same:
2.3e-6 (SmolLM2, whose log probabilities move by 9e-5) and 1e-7."""
_MAX_LEAK_OF_GROUPS = 1e-2
"""In bf16 on CUDA, of mixtures: how many tokens an expert has decides how its product is computed."""
_MAX_ROUNDED_SHIFT = 0.05
"""Where forward rounds to bf16 or fp16: of all log probabilities, by their norm. Seen: 0.009 (SmolLM2)."""


def is_same(found: Tensor, expected: Tensor, *, is_exact: bool) -> bool:
    """Whether log probabilities are equal up to rounding, whatever the size of the weights."""
    found, expected = found.float(), expected.float()
    if is_exact:
        return bool((found - expected).abs().max() <= _MAX_SHIFT * expected.abs().max())
    return bool((found - expected).norm() <= _MAX_ROUNDED_SHIFT * expected.norm())


def check_packing(
    model: Any, vocab_size: int, device: torch.device, model_type: str, *, has_borders: bool = False,
    is_exact: bool = True,
) -> None:  # fmt: skip
    """Runs one pack of two rows, and the second row alone; its log probabilities must be the same. Collective.

    Attention is not the only way from one row to the next: states of Mamba and of linear attention, convolutions, and
    positions that are counted through are others.

    Args:
        model: the prepared one, as training calls it.
        has_borders: the borders of the rows are given, as flash attention takes them.
        is_exact: forward rounds nothing to bf16 or fp16.

    Raises:
        ConfigError: they differ, or the model takes no positions.
    """
    problem = _problem(model, vocab_size, device, has_borders, is_exact)
    if problem is not None:
        raise ConfigError(
            [
                f"data.packing=true: {model_type} does not keep the rows of a pack apart: {problem}. "
                "Set data.packing=false; rows of similar length waste little padding"
            ]
        )


def _problem(model: Any, vocab_size: int, device: torch.device, has_borders: bool, is_exact: bool) -> str | None:
    """How rows of a pack are not what they are alone; None where they are."""
    first, other, second = _rows(vocab_size, device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed, dtype = _log_probs(model, [first, second], has_borders)
            changed, _ = _log_probs(model, [other, second], has_borders)
            alone, _ = _log_probs(model, [second], has_borders)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"it cannot run a pack: {str(error).splitlines()[0]}"
    finally:
        model.train(was_training)
    is_exact = is_exact and dtype == torch.float32
    is_grouped = any(name.endswith("experts") for name, _ in model.named_modules())
    max_leak = _MAX_LEAK_OF_GROUPS if is_grouped and device.type != "cpu" and not is_exact else _MAX_LEAK
    leak = float((packed - changed).abs().max())
    if not leak <= max_leak:
        return f"what a row predicts depends on the row before (by {leak:.2g} in log probability)"
    if is_same(packed, alone, is_exact=is_exact):
        return None
    shift = float((packed - alone).abs().max())
    return f"a row in a pack is not what it is alone (by {shift:.2g} in log probability)"


def _rows(vocab_size: int, device: torch.device) -> list[Tensor]:
    """Two different first rows of one length, and a second row; the same on every process."""
    generator = torch.Generator().manual_seed(0)
    lengths = (_LENGTHS[0], _LENGTHS[0], _LENGTHS[1])
    return [torch.randint(0, vocab_size, (length,), generator=generator).to(device) for length in lengths]


def _log_probs(model: Any, rows: list[Tensor], has_borders: bool) -> tuple[Tensor, torch.dtype]:
    """Of the last row's tokens, as `data.rows.collate` gives packs to the model; in fp32, and what it computed in.

    In bf16 a step of a log probability is as large as some leaks.
    """
    ids = torch.cat(rows).unsqueeze(0)
    positions = torch.cat([torch.arange(len(row), device=ids.device) for row in rows]).unsqueeze(0)
    borders: dict[str, Any] = borders_of([len(row) for row in rows], ids.device) if has_borders else {}
    outputs = model(input_ids=ids, position_ids=positions, use_cache=False, **borders)
    logits: Tensor = outputs.logits[0, -len(rows[-1]) :]
    return logits.float().log_softmax(-1), logits.dtype


def borders_of(lengths: Sequence[int], device: torch.device | None = None) -> dict[str, Any]:
    """Where the rows of one long row end, in the form and under the names that flash attention has for it.

    The longest length is a number, not a tensor: transformers would ask the device for it in every layer.
    """
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    borders[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    longest = max(lengths)
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
