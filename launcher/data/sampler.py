"""Which samples an optimizer step takes, on which process: a function of (seed, step) alone."""

from __future__ import annotations

import math
from collections import OrderedDict
from fractions import Fraction

import numpy as np

_MAX_PERMUTATIONS = 2  # a step may straddle an epoch boundary


SORTED, COMPUTED = "sorted", "computed"
_MAX_SORTED_ROWS = 1 << 22


def order_for(num_rows: int) -> str:
    """How a new run shuffles: sorting draws costs 16 bytes and 0.1 µs a row at the start of every epoch."""
    return SORTED if num_rows <= _MAX_SORTED_ROWS else COMPUTED


_NUM_ROUNDS = 8
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # SplitMix64's


def shuffled(positions: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows at some positions of an epoch's permutation, each computed by itself.

    A Feistel network permutes the numbers of an even number of bits; one that falls outside of the rows goes through it
    again until it does not (Black and Rogaway, "Ciphers with arbitrary finite domains", cycle walking).
    """
    half = np.uint64(max(1, -(-(num_rows - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch, 1]).generate_state(_NUM_ROUNDS, np.uint64)
    found = np.asarray(positions, dtype=np.uint64).copy()
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            mixed = (right ^ key) * _MIX_1
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        found[outside] = (left << half) | right
        outside = found >= np.uint64(num_rows)
    return found.astype(np.int64)


class StepSampler:
    """Step k takes samples [k·B, (k+1)·B) of the concatenated epoch permutations, whatever the number of processes.

    There is no state to save: a resume asks for the next step. Memory: 8 bytes per row and cached epoch with the order
    SORTED, none with COMPUTED.

    Args:
        order: by which method an epoch is shuffled; part of a run, since a resume must find the same order.
    """

    def __init__(self, num_rows: int, train_batch_size: int, seed: int, order: str | None = None) -> None:
        if num_rows < 1 or train_batch_size < 1:
            raise ValueError(f"num_rows ({num_rows}) and train_batch_size ({train_batch_size}) must be at least 1")
        self.num_rows = num_rows
        self.train_batch_size = train_batch_size
        self.seed = seed
        self.order = order or order_for(num_rows)
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()

    def rows_of_step(self, step: int) -> np.ndarray:
        """Row numbers (int64, shape [B]) of a step, counted from 0. Where B exceeds the rows, rows repeat."""
        position, end = step * self.train_batch_size, (step + 1) * self.train_batch_size
        pieces = []
        while position < end:
            epoch, start = divmod(position, self.num_rows)
            until = min(self.num_rows, start + end - position)
            if self.order == COMPUTED:
                piece = shuffled(np.arange(start, until), self.num_rows, self.seed, epoch)
            else:
                piece = self._permutation(epoch)[start:until]
            pieces.append(piece)
            position += len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def total_steps(self, num_train_epochs: float) -> int:
        """ceil(epochs · rows / B), exact: the decimal that was typed, not its binary neighbour."""
        return math.ceil(Fraction(repr(float(num_train_epochs))) * self.num_rows / self.train_batch_size)

    def epoch_after(self, step: int) -> float:
        """Passes over the rows once `step` steps are done."""
        return step * self.train_batch_size / self.num_rows

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # Sorting raw 64-bit draws, not Generator.permutation: numpy guarantees that the former stays the same
            # in every version (NEP 19), and a run must find its order again after an upgrade.
            draws = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_rows)
            self._permutations[epoch] = np.argsort(draws, kind="stable")
            if len(self._permutations) > _MAX_PERMUTATIONS:
                self._permutations.popitem(last=False)
        return self._permutations[epoch]


def split_step(rows: np.ndarray, rank: int, world_size: int, per_device: int) -> list[np.ndarray]:
    """The micro-batches of one process: as many on every process, at most `per_device` rows each, some maybe empty.

    Rows are spread as evenly as possible, over processes first and over micro-batches next.
    """
    num_micro_steps = -(-len(rows) // (world_size * per_device))
    own = _part(rows, rank, world_size)
    return [_part(own, i, num_micro_steps) for i in range(num_micro_steps)]


def _part(rows: np.ndarray, i: int, count: int) -> np.ndarray:
    """The i-th of `np.array_split(rows, count)`, without making the others."""
    size, num_larger = divmod(len(rows), count)
    start = i * size + min(i, num_larger)
    return rows[start : start + size + (i < num_larger)]
