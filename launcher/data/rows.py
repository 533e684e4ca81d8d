"""Token rows as samples: one row each, or several packed into one, and their batches as tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.data.cache import TokenStore
from launcher.data.packing import PackPlan, Packs

if TYPE_CHECKING:
    import torch

NO_LOSS = -100
_STEPS = (256, 128, 64, 32, 16, 8)
_SMALLEST_ROUNDED = 256
_ROUNDING = 32
_EMPTY_LENGTH = 2  # tokens in a zero-weight slot: a query of one token would look like a decoding step


class TokenRows:
    """Samples over the rows of several stores. Nothing is kept for each row but what is given.

    Args:
        stores: their rows are numbered through, store after store.
        order: those numbers, repeats are allowed; None: every row once, as they are.
        packs: which places of that order each sample holds; None: a sample is one row.
        is_flat: batches are one long sequence without padding, for attention kernels that take packed input only so.

    `is_rounded`: flat batches get a row of padding at their end, to have one of a few lengths (`rounded`).
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        order: np.ndarray | None = None,
        *,
        packs: Packs | PackPlan | None = None,
        is_flat: bool = False,
    ) -> None:
        self._stores = list(stores)
        self._starts = np.cumsum([0, *(len(store) for store in stores)])
        self._order = order
        self._packs = packs
        self.is_flat, self.is_rounded = is_flat, False

    @property
    def is_packed(self) -> bool:
        return self._packs is not None

    def __len__(self) -> int:
        return self.num_rows if self._packs is None else len(self._packs)

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1]) if self._order is None else len(self._order)

    def sample_lengths(self) -> np.ndarray:
        """Tokens of every sample."""
        numbers, counts = self._numbers(np.arange(len(self)))
        return np.add.reduceat(self._lengths(numbers), np.cumsum(counts) - counts)

    def num_tokens(self, ids: np.ndarray) -> int:
        """Tokens of these samples."""
        return int(self._lengths(self._numbers(ids)[0]).sum())

    def num_labelled_tokens(self, ids: np.ndarray) -> int:
        """Tokens of these samples that bear loss."""
        return int(self._of_rows(self._numbers(ids)[0], lambda store, own: store.labelled[own]).sum())

    def segments(self, sample: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, mask) of every row in a sample."""
        return [self._row(number) for number in self._numbers(np.array([sample]))[0].tolist()]

    def _numbers(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of rows, how many of them each sample has), sample after sample."""
        if self._packs is None:
            places, counts = ids, np.ones(len(ids), dtype=np.int64)
        else:
            places, counts = self._packs.rows_of(ids)
        return places if self._order is None else self._order[places], counts

    def _lengths(self, numbers: np.ndarray) -> np.ndarray:
        return self._of_rows(numbers, lambda store, own: store.offsets[own + 1] - store.offsets[own])

    def _of_rows(self, numbers: np.ndarray, take: Callable[[TokenStore, np.ndarray], np.ndarray]) -> np.ndarray:
        if len(self._stores) == 1:
            return np.asarray(take(self._stores[0], numbers))
        parts = np.searchsorted(self._starts, numbers, side="right") - 1
        found = np.empty(len(numbers), dtype=np.int64)
        for part in np.unique(parts).tolist():
            found[parts == part] = take(self._stores[part], numbers[parts == part] - self._starts[part])
        return found

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        store, i = self._stores[part], number - int(self._starts[part])
        span = slice(store.offsets[i], store.offsets[i + 1])
        return store.tokens[span], store.mask[span]


class RowLengths:
    """Tokens of every row of an order, a piece at a time.

    Args:
        order: numbers of rows, store after store; None: every row once, as they are.
    """

    def __init__(self, stores: Sequence[TokenStore], order: np.ndarray | None) -> None:
        self._rows, self._offsets, self._order = TokenRows(stores), [store.offsets for store in stores], order

    def __len__(self) -> int:
        return len(self._rows) if self._order is None else len(self._order)

    def piece(self, start: int, end: int) -> np.ndarray:
        """Of rows [start, end)."""
        if self._order is not None:
            return self._rows._lengths(self._order[start:end])
        found, first = [], 0
        for offsets in self._offsets:
            low, high = max(0, start - first), min(len(offsets) - 1, end - first)
            if low < high:
                found.append(np.diff(offsets[low : high + 1]))
            first += len(offsets) - 1
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def rounded(num_tokens: int, longest: int) -> int:
    """The length of a flat batch of so many tokens: the next multiple of 256, or of the largest smaller power of two,
    that is longer by a 32nd at most. Short ones stay as they are.

    A library that makes code for every shape it meets keeps all of it, and products of whole blocks are faster.

    Args:
        longest: tokens of its longest row. A row of padding may not be longer: the model may have no such position.
    """
    if num_tokens < _SMALLEST_ROUNDED:
        return num_tokens
    most = min(num_tokens // _ROUNDING, longest)
    lengths = (-(-num_tokens // step) * step for step in _STEPS)
    return next((length for length in lengths if length - num_tokens <= most), num_tokens)


def collate(rows: TokenRows, ids: np.ndarray, pad_token_id: int) -> dict[str, Any]:
    """A micro-batch, padded on the right: input_ids_BT, labels_BT and

    - attention_mask_BT, where a sample is one row;
    - cu_seq_lens_q and _k, max_length_q and _k: where the rows end, if batches are flat (B = 1; where they are rounded,
      the last is padding);
    - position_ids_BT restarting at 0 with every row, where rows are packed or batches flat. There is no attention mask
      then, and the model must be called with use_cache=False: transformers reads the borders from position_ids only
      without an attention mask and without a cache (masking_utils.py, _preprocess_mask_arguments).

    Labels are not shifted; the first token of a row never has one. No ids give a row that bears no loss.
    """
    import torch

    samples = [rows.segments(int(i)) for i in ids]
    if rows.is_flat and samples:
        samples = [[segment for sample in samples for segment in sample]]
    length = max((sum(len(tokens) for tokens, _ in sample) for sample in samples), default=_EMPTY_LENGTH)
    if rows.is_flat:
        lengths = [len(tokens) for sample in samples for tokens, _ in sample] or [_EMPTY_LENGTH]
        if rows.is_rounded and (padding := rounded(length, max(lengths)) - length):
            lengths.append(padding)
        length = sum(lengths)
    shape = (max(1, len(samples)), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, NO_LOSS, dtype=np.int64)
    has_positions = rows.is_packed or rows.is_flat
    if has_positions:
        positions = np.tile(np.arange(length), (shape[0], 1))
    else:
        attention_mask = np.zeros(shape, dtype=np.int64) if samples else np.ones(shape, dtype=np.int64)
    for i, sample in enumerate(samples):
        end = 0
        for tokens, mask in sample:
            start, end = end, end + len(tokens)
            input_ids[i, start:end] = tokens
            np.copyto(labels[i, start:end], tokens, where=mask)
            if has_positions:
                positions[i, start:end] = np.arange(end - start)
        if has_positions:
            positions[i, end:] = np.arange(length - end)  # padding is a row of its own
        else:
            attention_mask[i, :end] = 1
    batch = {"input_ids": input_ids, "labels": labels}
    batch |= {"position_ids": positions} if has_positions else {"attention_mask": attention_mask}
    found: dict[str, Any] = {name: torch.from_numpy(value) for name, value in batch.items()}
    if rows.is_flat:
        borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        found |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        found |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return found


def _restarts(positions_BT: np.ndarray) -> bool:
    return bool(np.count_nonzero(positions_BT[:, 1:] - positions_BT[:, :-1] != 1))


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A micro-batch on a device, without waiting for it; numbers stay numbers.

    What a pass would otherwise have to ask the device for, and wait, is found here: `targets` instead of labels,
    and of transformers' masks `is_full` (no padding) and `is_packed` (several rows in one).
    """
    from launcher.base.targets import targets_of

    found = dict(batch)
    if "labels" in found:
        found["targets"] = targets_of(found.pop("labels"))
    mask, positions = found.get("attention_mask"), found.get("position_ids")
    found["is_full"] = mask is None or bool(mask.numpy().all())
    found["is_packed"] = positions is not None and _restarts(positions.numpy())

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(moved, value))
        if isinstance(value, int) or value.device == device:
            return value
        pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
        return pinned.to(device, non_blocking=True)

    return {name: moved(value) for name, value in found.items()}
