"""Several rows in one sample: which rows each pack holds, as arrays, or computed for the packs that are asked for."""

from __future__ import annotations

from array import array
from typing import NamedTuple, Protocol

import numpy as np

_PIECE_ROWS = 1 << 20
_MAX_INDEX_BYTES = 1 << 29
_MIN_BLOCK_ROWS = 1 << 12


class Lengths(Protocol):
    """Tokens of every row, a piece at a time: those of a billion rows need not be in memory."""

    def __len__(self) -> int: ...
    def piece(self, start: int, end: int) -> np.ndarray:
        """Of rows [start, end)."""


class Run(NamedTuple):
    """Neighbouring packs, upwards (step 1) or downwards (step -1)."""

    first: int
    num: int
    step: int
    placement: int
    """The last one that put rows into them; -1: they are empty."""

    def head(self, num: int) -> Run:
        return self._replace(num=num)

    def tail(self, num: int) -> Run:
        return self._replace(first=self.first + (self.num - num) * self.step, num=num)

    def reversed(self) -> Run:
        return self._replace(first=self.first + (self.num - 1) * self.step, step=-self.step)


class Placements:
    """Best-fit decreasing: whole rows into as few sequences of max_length tokens as this rule finds.

    Rows of one length are placed together: of all packs with the smallest space that takes such a row, each takes as
    many as fit. The result is that of placing one row after the other, and follows from the number of rows of each
    length alone. Rows are counted from the longest to the shortest, those of one length in their own order.

    Args:
        counts: rows by length.
    """

    def __init__(self, counts: np.ndarray, max_length: int) -> None:
        self.num_rows = int(counts.sum())
        columns = [array("q") for _ in range(7)]
        spaces, full, at = _Spaces(max_length), [], 0
        for length in np.flatnonzero(counts)[::-1].tolist():
            left = int(counts[length])
            while left:
                space, packs = spaces.take(length, left)
                each = space // length
                placed = min(left, packs.num * each)
                row = (packs.first, packs.step, each, at, at + placed, length, packs.placement)
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
                packs = packs._replace(placement=len(columns[0]) - 1)
                in_last = placed - (packs.num - 1) * each
                whole = packs if in_last == each else packs.head(packs.num - 1)
                for run, free in ((whole, space - each * length), (packs.tail(1), space - in_last * length)):
                    if run.num and (run is whole or in_last < each):
                        spaces.put(free, run) if free else full.append(run)
                at, left = at + placed, left - placed
        self.num_packs = spaces.num_packs
        self._first, self._step, self._each, self._at, self._end, self._length, self._before = map(np.asarray, columns)
        self._runs(full + spaces.all())

    def _runs(self, runs: list[Run]) -> None:
        low = np.array([min(run.first, run.first + (run.num - 1) * run.step) for run in runs])
        order = np.argsort(low)
        self._low, self._last = low[order], np.array([run.placement for run in runs])[order]

    def pack_of_rows(self) -> np.ndarray:
        """Of every row, from the longest to the shortest."""
        found = np.empty(self.num_rows, dtype=np.int64)
        for first, step, each, at, end in zip(
            *(column.tolist() for column in (self._first, self._step, self._each, self._at, self._end)), strict=True
        ):
            num = -(-(end - at) // each)
            found[at:end] = np.repeat(np.arange(first, first + num * step, step), each)[: end - at]
        return found

    def rows_of(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, their lengths, number of rows of each pack), pack after pack."""
        placement = self._last[np.searchsorted(self._low, packs, side="right") - 1]
        owner = np.arange(len(packs))
        nothing = np.zeros(0, dtype=np.int64)
        found = [(nothing, nothing, nothing)]
        while len(owner):
            start = (
                self._at[placement]
                + (packs[owner] - self._first[placement]) * self._step[placement] * (self._each[placement])
            )
            num = np.minimum(self._each[placement], self._end[placement] - start)
            rows = np.repeat(start - np.cumsum(num) + num, num) + np.arange(num.sum())
            found.append((np.repeat(owner, num), rows, np.repeat(self._length[placement], num)))
            placement = self._before[placement]
            owner, placement = owner[placement >= 0], placement[placement >= 0]
        owners, rows, lengths = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((rows, owners))
        return rows[order], lengths[order], np.bincount(owners, minlength=len(packs))


class _Spaces:
    """Packs by their free tokens; of those with equal space, the one that got it last comes first."""

    def __init__(self, max_length: int) -> None:
        self.num_packs = 0
        self._max_length = max_length
        self._stacks: list[list[Run]] = [[] for _ in range(max_length + 1)]
        self._available = 0  # bit s: some pack has exactly s tokens free

    def take(self, length: int, num_rows: int) -> tuple[int, Run]:
        """(free tokens, packs): those that take up to `num_rows` rows of a length, the next one first."""
        fitting = self._available >> length
        if not fitting:
            num = -(-num_rows // (self._max_length // length))
            self.num_packs += num
            return self._max_length, Run(self.num_packs - num, num, 1, -1)
        space = length + (fitting & -fitting).bit_length() - 1
        stack = self._stacks[space]
        packs, num = stack.pop(), -(-num_rows // (space // length))
        if num < packs.num:
            stack.append(packs.head(packs.num - num))
            packs = packs.tail(num)
        if not stack:
            self._available &= ~(1 << space)
        return space, packs.reversed()

    def put(self, space: int, packs: Run) -> None:
        self._stacks[space].append(packs)
        self._available |= 1 << space

    def all(self) -> list[Run]:
        return [run for stack in self._stacks for run in stack]


class Packs:
    """The packs of rows whose lengths are in memory, as arrays: pack i holds rows order[bounds[i]:bounds[i+1]]."""

    def __init__(self, lengths: np.ndarray, max_length: int) -> None:
        smallest = np.uint16 if max_length < 1 << 16 else np.uint32  # numpy sorts 16 bits in linear time
        rows = np.argsort((max_length - lengths).astype(smallest), kind="stable")
        placements = Placements(np.bincount(lengths, minlength=1), max_length)
        pack_of = placements.pack_of_rows()
        self.order = rows[np.argsort(pack_of, kind="stable")]
        self.bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=placements.num_packs))])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def rows_of(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row numbers, number of rows of each pack), pack after pack."""
        starts, counts = self.bounds[packs], self.bounds[packs + 1] - self.bounds[packs]
        places = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return self.order[places], counts


class PackPlan:
    """The packs of many rows, without a number of each row in memory: only how many there are of each length.

    The packs are those of `Packs`. A row is found by its length and its place among the rows of that length: in a table
    of how many there are before each block of rows, and then in that block.
    """

    def __init__(self, lengths: Lengths, max_length: int) -> None:
        self._lengths = lengths
        self._block_rows = _MIN_BLOCK_ROWS
        item = np.dtype(np.uint32 if len(lengths) < 1 << 32 else np.uint64)
        longest_table = (max_length + 1) * item.itemsize * len(lengths)
        while longest_table // self._block_rows > _MAX_INDEX_BYTES:
            self._block_rows *= 2
        num_blocks = -(-len(lengths) // self._block_rows)
        # before[l, b]: rows of length l before block b. One block more, so that the last column is all of them.
        self._before = np.zeros((max_length + 1, num_blocks + 1), dtype=item)
        per_piece = max(1, _PIECE_ROWS // self._block_rows)
        for block in range(0, num_blocks, per_piece):
            start = block * self._block_rows
            piece = lengths.piece(start, min(len(lengths), start + per_piece * self._block_rows))
            counts = np.stack(
                [
                    np.bincount(piece[i : i + self._block_rows], minlength=max_length + 1)
                    for i in range(0, len(piece), self._block_rows)
                ]
            )
            end = block + len(counts)
            self._before[:, block + 1 : end + 1] = self._before[:, block, None] + np.cumsum(counts, axis=0).T
        counts = self._before[:, -1].astype(np.int64)
        self._placements = Placements(counts, max_length)
        self._start_of = len(lengths) - np.cumsum(counts)
        """Of each length, its first row in the order from the longest to the shortest."""
        self.num_tokens = int(counts @ np.arange(max_length + 1))

    def __len__(self) -> int:
        return self._placements.num_packs

    def rows_of(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row numbers, number of rows of each pack), pack after pack."""
        places, lengths, counts = self._placements.rows_of(packs)
        ranks = places - self._start_of[lengths]
        pairs = zip(lengths.tolist(), ranks.tolist(), strict=True)
        return np.array([self._find(length, rank) for length, rank in pairs], dtype=np.int64), counts

    def _find(self, length: int, rank: int) -> int:
        """The row that has `rank` others of its length before it."""
        before = self._before[length]
        block = int(np.searchsorted(before, before.dtype.type(rank), side="right")) - 1
        start = block * self._block_rows
        piece = self._lengths.piece(start, min(len(self._lengths), start + self._block_rows))
        return start + int(np.flatnonzero(piece == length)[rank - int(before[block])])
