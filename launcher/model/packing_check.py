"""Whether a model keeps the rows of a pack apart: measured on the model itself; no list of architectures stays true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from launcher.base.errors import ConfigError
from launcher.model.leaks import (
    NUM_DRAWS,
    Leaks,
    Shifts,
    all_agree,
    evaluating,
    log_probs,
    padded,
    random_rows,
    rounded_once_more,
)  # fmt: skip

_LENGTHS = (13, 11)
_NUM_LAST = 8
"""Positions of a row of a long pack that are compared, its last: the logits of all may not fit."""


def check_packing(
    model: Any, vocab_size: int, device: torch.device, model_type: str, *, has_borders: bool = False,
    pack_length: int = 0, row_length: int = 0,
) -> None:  # fmt: skip
    """Runs a pack of two rows, and the second row alone; its log probabilities must be the same. Collective.

    Attention is not the only way from one row to the next: states of Mamba and of linear attention, convolutions, and
    positions that are counted through are others. Alone, a row is what transformers makes of it without positions:
    some models do not count them from 0 (RoBERTa).

    Some count tokens from the beginning of a pack, and only what comes after many shows it: Llama 4 attends in chunks
    of 8,192 and scales its queries from there on, MiniMax-M3 chooses among blocks of 128 keys. So a pack as long as
    those of the run is looked at as well.

    Args:
        model: the prepared one, as training calls it.
        has_borders: the borders of the rows are given, as flash attention takes them.
        pack_length: tokens of the longest pack; 0: it is known that its length makes no difference.
        row_length: of the longest row.

    Raises:
        ConfigError: they differ, or the model takes no positions.
    """
    mend = "Set data.packing=false; rows of similar length waste little padding"
    with evaluating(model):
        problem = _problem(model, vocab_size, device, has_borders)
        length = min(row_length, 3 * pack_length // 8) * 15 // 16 | 1  # odd: no chunks of the model end with its rows
        if problem is None and length > _NUM_LAST:
            num_rows = pack_length // length
            problem = _long_problem(model, vocab_size, device, num_rows, length, has_borders)
            mend = f"Set data.packing=false. Shorter packs may be exact: data.max_length below {pack_length}"
    if problem is not None:
        raise ConfigError(
            [f"data.packing=true: {model_type} does not keep the rows of a pack apart: {problem}. {mend}"]
        )


def _problem(model: Any, vocab_size: int, device: torch.device, has_borders: bool) -> str | None:
    """How rows of a pack are not what they are alone; None where they are."""
    leaks, shifts, num_shifted = Leaks(), Shifts(), 0
    try:
        for draw in range(NUM_DRAWS):
            first, other, second = random_rows(draw, (_LENGTHS[0], _LENGTHS[0], _LENGTHS[1]), vocab_size, device)
            packed, changed = (_log_probs(model, [row, second], has_borders)[len(first) :] for row in (first, other))
            leaks.add(packed, changed)
            alone = log_probs(model, padded([second]))[0]
            shifts.add_control(alone, log_probs(model, padded([first, second]))[1, : len(second)])
            with rounded_once_more(model):
                shifts.add_control(alone, log_probs(model, padded([second]))[0])
            num_shifted += not shifts.is_same(packed, alone)
            if all_agree(leaks.are_none and num_shifted <= draw, device):
                return None
            # What a row says cannot leak to one that stands before it.
            leaks.add_control(*(_log_probs(model, [second, row], has_borders)[: len(second)] for row in (first, other)))
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"it cannot run a pack: {str(error).splitlines()[0]}"
    if not all_agree(leaks.are_rounding, device):
        return f"what a row predicts depends on the row before (by {leaks.smallest:.2g} in log probability)"
    if not all_agree(num_shifted < NUM_DRAWS, device):
        return f"a row in a pack is not what it is alone (by {shifts.smallest:.2g} in log probability)"
    return None


def _long_problem(
    model: Any, vocab_size: int, device: torch.device, num_rows: int, length: int, has_borders: bool
) -> str | None:
    """The same of a pack of many tokens, whose rows have one length: each at its end, beside a batch of them."""
    where = f"a pack of {num_rows * length:,} tokens"
    own = range(length - _NUM_LAST, length)
    ends = [start + i for start in range(0, num_rows * length, length) for i in own]
    shifts, num_shifted = [Shifts() for _ in range(num_rows)], [0] * num_rows
    try:
        for draw in range(NUM_DRAWS):
            rows = random_rows(draw, [length] * num_rows, vocab_size, device)
            packed = _log_probs(model, rows, has_borders, ends).split(_NUM_LAST)
            alone = log_probs(model, padded(rows), own)
            controls = [log_probs(model, padded([row]), own)[0] for row in rows[:2]]
            with rounded_once_more(model):
                rounded = log_probs(model, padded(rows[:1]), own)[0]
            for i, shift in enumerate(shifts):
                shift.add_control(controls[0], rounded)
                for control, beside in zip(controls, alone, strict=False):
                    shift.add_control(control, beside)
                num_shifted[i] += not shift.is_same(packed[i], alone[i])
            if all_agree(max(num_shifted) <= draw, device):
                return None
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # GPT-Neo's masks end with its positions
        return f"it cannot run {where}: {str(error).splitlines()[0]}"
    shift = max(zip(num_shifted, shifts, strict=True), key=lambda pair: (pair[0], pair[1].smallest))[1]
    return f"a row in {where} is not what it is alone (by {shift.smallest:.2g} in log probability)"


def _log_probs(model: Any, rows: list[Tensor], has_borders: bool, positions: Sequence[int] | None = None) -> Tensor:
    """Of rows as `data.rows.collate` gives packs to the model."""
    device = rows[0].device
    restarting = torch.cat([torch.arange(len(row), device=device) for row in rows])
    borders: dict[str, Any] = borders_of([len(row) for row in rows], device) if has_borders else {}
    inputs = {"input_ids": torch.cat(rows)[None], "position_ids": restarting[None], **borders}
    return log_probs(model, inputs, positions)[0]


def borders_of(lengths: Sequence[int], device: torch.device | None = None) -> dict[str, Any]:
    """Where the rows of one long row end, in the form and under the names that flash attention has for it.

    The longest length is a number, not a tensor: transformers would ask the device for it in every layer.
    """
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    borders[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    longest = max(lengths)
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
