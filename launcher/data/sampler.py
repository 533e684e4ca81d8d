"""Which samples an optimizer step takes, on which process: a function of (seed, step) alone."""

from __future__ import annotations

import math
from collections import OrderedDict
from fractions import Fraction

import numpy as np

_MAX_PERMUTATIONS = 2  # a step may straddle an epoch boundary


class StepSampler:
    """Step k takes samples [k·B, (k+1)·B) of the concatenated epoch permutations, whatever the number of processes.

    There is no state to save: a resume asks for the next step. Memory: 8 bytes per row and cached epoch.
    """

    def __init__(self, num_rows: int, train_batch_size: int, seed: int) -> None:
        if num_rows < 1 or train_batch_size < 1:
            raise ValueError(f"num_rows ({num_rows}) and train_batch_size ({train_batch_size}) must be at least 1")
        self.num_rows = num_rows
        self.train_batch_size = train_batch_size
        self.seed = seed
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()

    def rows_of_step(self, step: int) -> np.ndarray:
        """Row numbers (int64, shape [B]) of a step, counted from 0. Where B exceeds the rows, rows repeat."""
        position, end = step * self.train_batch_size, (step + 1) * self.train_batch_size
        pieces = []
        while position < end:
            epoch, start = divmod(position, self.num_rows)
            piece = self._permutation(epoch)[start : start + end - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces)

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
    own = np.array_split(rows, world_size)[rank]
    return np.array_split(own, num_micro_steps) if num_micro_steps else []
