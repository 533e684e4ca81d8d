"""Token rows as samples: one row each, or several packed into one, and their batches as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.data.cache import TokenStore

if TYPE_CHECKING:
    import torch

NO_LOSS = -100
_EMPTY_LENGTH = 2  # tokens in a zero-weight slot: a query of one token would look like a decoding step


class TokenRows:
    """Samples over the rows of several stores.

    Args:
        stores: their rows are numbered through, store after store.
        order: those numbers, in sample order; repeats are allowed.
        pack_bounds: sample i holds order[pack_bounds[i]:pack_bounds[i+1]]; None: a sample is one row.
        is_flat: batches are one long sequence without padding, for attention kernels that take packed input only so.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        order: np.ndarray,
        *,
        pack_bounds: np.ndarray | None = None,
        is_flat: bool = False,
    ) -> None:
        self._stores = list(stores)
        self._starts = np.cumsum([0, *(len(store) for store in stores)])
        self._order = order
        self._pack_bounds = pack_bounds
        self.is_flat = is_flat
        self._lengths: np.ndarray | None = None
        self._labelled = np.concatenate([store.labelled for store in stores])[order]
        if pack_bounds is not None:
            self._labelled = np.add.reduceat(self._labelled, pack_bounds[:-1])

    @property
    def is_packed(self) -> bool:
        return self._pack_bounds is not None

    def __len__(self) -> int:
        return len(self._labelled)

    @property
    def num_rows(self) -> int:
        return len(self._order)

    def sample_lengths(self) -> np.ndarray:
        """Tokens of every sample."""
        if self._lengths is None:
            lengths = row_lengths(self._stores)[self._order]
            self._lengths = lengths if self._pack_bounds is None else np.add.reduceat(lengths, self._pack_bounds[:-1])
        return self._lengths

    def num_labelled_tokens(self, ids: np.ndarray) -> int:
        """Tokens of these samples that bear loss."""
        return int(self._labelled[ids].sum())

    def segments(self, sample: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, mask) of every row in a sample."""
        bounds = self._pack_bounds
        own = slice(sample, sample + 1) if bounds is None else slice(bounds[sample], bounds[sample + 1])
        return [self._row(int(number)) for number in self._order[own]]

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        store, i = self._stores[part], number - int(self._starts[part])
        span = slice(store.offsets[i], store.offsets[i + 1])
        return store.tokens[span], store.mask[span]


def row_lengths(stores: Sequence[TokenStore]) -> np.ndarray:
    """Tokens of every row, store after store."""
    return np.concatenate([np.diff(store.offsets) for store in stores])


def pack(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: whole rows into as few sequences of max_length tokens as this rule finds.

    Rows of one length are placed together: of all packs with the smallest space that takes such a row, each takes as
    many as fit. The result is that of placing one row after the other.

    Returns:
        (order, bounds): pack i holds rows order[bounds[i]:bounds[i+1]].
    """
    smallest = np.uint16 if max_length < 1 << 16 else np.uint32  # numpy sorts 16 bits in linear time
    rows = np.argsort((max_length - lengths).astype(smallest), kind="stable")
    counts = np.bincount(lengths, minlength=1)
    pack_of = np.empty(len(rows), dtype=np.int64)  # of each of `rows`
    spaces = _Spaces(max_length)
    at = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            space, packs = spaces.take(length, left)
            each = space // length
            placed = min(left, len(packs) * each)
            pack_of[at : at + placed] = np.repeat(packs, each)[:placed]
            in_last = placed - (len(packs) - 1) * each
            spaces.put(space - each * length, packs if in_last == each else packs[:-1])
            if in_last < each:
                spaces.put(space - in_last * length, packs[-1:])
            at, left = at + placed, left - placed
    order = rows[np.argsort(pack_of, kind="stable")]
    return order, np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=spaces.num_packs))])


class _Spaces:
    """Packs by their free tokens; of those with equal space, the one that got it last comes first."""

    def __init__(self, max_length: int) -> None:
        self.num_packs = 0
        self._max_length = max_length
        self._stacks: list[list[np.ndarray]] = [[] for _ in range(max_length + 1)]
        self._available = 0  # bit s: some pack has exactly s tokens free

    def take(self, length: int, num_rows: int) -> tuple[int, np.ndarray]:
        """(free tokens, packs): those that take up to `num_rows` rows of a length, the next one first."""
        fitting = self._available >> length
        if not fitting:
            num = -(-num_rows // (self._max_length // length))
            self.num_packs += num
            return self._max_length, np.arange(self.num_packs - num, self.num_packs)
        space = length + (fitting & -fitting).bit_length() - 1
        stack = self._stacks[space]
        packs, num = stack.pop(), -(-num_rows // (space // length))
        if num < len(packs):
            stack.append(packs[:-num])
            packs = packs[-num:]
        if not stack:
            self._available &= ~(1 << space)
        return space, packs[::-1]

    def put(self, space: int, packs: np.ndarray) -> None:
        if space and len(packs):
            self._stacks[space].append(packs)
            self._available |= 1 << space


def collate(rows: TokenRows, ids: np.ndarray, pad_token_id: int) -> dict[str, Any]:
    """A micro-batch, padded on the right: input_ids_BT, labels_BT and

    - attention_mask_BT, where a sample is one row;
    - cu_seq_lens_q and _k, max_length_q and _k: where the rows end, if batches are flat (B = 1, no padding);
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
    shape = (max(1, len(samples)), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, NO_LOSS, dtype=np.int64)
    positions = np.tile(np.arange(length), (shape[0], 1))
    attention_mask = np.zeros(shape, dtype=np.int64) if samples else np.ones(shape, dtype=np.int64)
    for i, sample in enumerate(samples):
        end = 0
        for tokens, mask in sample:
            start, end = end, end + len(tokens)
            input_ids[i, start:end] = tokens
            labels[i, start:end][mask] = tokens[mask]
            positions[i, start:end] = np.arange(end - start)
        positions[i, end:] = np.arange(length - end)  # padding is a row of its own
        attention_mask[i, :end] = 1
    batch = {"input_ids": input_ids, "labels": labels}
    has_positions = rows.is_packed or rows.is_flat
    batch |= {"position_ids": positions} if has_positions else {"attention_mask": attention_mask}
    found: dict[str, Any] = {name: torch.from_numpy(value) for name, value in batch.items()}
    if rows.is_flat:
        lengths = [len(tokens) for sample in samples for tokens, _ in sample] or [_EMPTY_LENGTH]
        borders = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        found |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        found |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return found


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
    found["is_packed"] = positions is not None and bool((np.diff(positions.numpy(), axis=-1) != 1).any())

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(moved, value))
        if isinstance(value, int) or value.device == device:
            return value
        pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
        return pinned.to(device, non_blocking=True)

    return {name: moved(value) for name, value in found.items()}
