"""What says that a run still trains on the same samples: a hash of their tokens, masks and order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from launcher.data.cache import TokenStore
from launcher.data.packing import Packs
from launcher.data.rows import RowLengths
from launcher.data.sampler import COMPUTED, order_for

_BY_RULE = "rule:"
_PIECE_ROWS = 1 << 20


class Fingerprint:
    """Of the training samples, in one of two ways, so that the checkpoints of every version find their own again.

    Small sets and older versions: a hash of every row's place. Where an order has so many rows that places are computed
    when they are asked for, a hash of the rule that computes them.

    Args:
        order: numbers of rows, store after store; None: every row once, as they are.
        packed_to: tokens of a pack; None: no packs.
    """

    def __init__(self, stores: Sequence[TokenStore], order: np.ndarray | None, packed_to: int | None) -> None:
        self._stores, self._order, self._packed_to = list(stores), order, packed_to

    def like(self, known: str | None) -> str:
        """In the way of a fingerprint that a checkpoint has; of None in the way of a new run."""
        num_rows = len(RowLengths(self._stores, self._order))
        is_by_rule = order_for(num_rows) == COMPUTED if known is None else known.startswith(_BY_RULE)
        return self._by_rule() if is_by_rule else self._by_place()

    def _by_rule(self) -> str:
        rule = {"packing": "best fit decreasing", "max_length": self._packed_to} if self._packed_to else {}
        digest = self._contents()
        digest.update(json.dumps(rule, sort_keys=True).encode())
        self._add(digest, self._order)
        return _BY_RULE + digest.hexdigest()

    def _by_place(self) -> str:
        lengths, digest = RowLengths(self._stores, self._order), self._contents()
        if self._packed_to is not None:
            packs = Packs(lengths.piece(0, len(lengths)), self._packed_to)
            self._add(digest, packs.order if self._order is None else self._order[packs.order])
            self._add(digest, packs.bounds)
            return digest.hexdigest()
        if self._order is not None:
            self._add(digest, self._order)
        else:
            for start in range(0, len(lengths), _PIECE_ROWS):
                self._add(digest, np.arange(start, min(len(lengths), start + _PIECE_ROWS)))
        digest.update(b"none")
        return digest.hexdigest()

    def _contents(self) -> hashlib._Hash:
        return hashlib.sha256("".join(store.content for store in self._stores).encode())

    @staticmethod
    def _add(digest: hashlib._Hash, places: np.ndarray | None) -> None:
        if places is not None:
            digest.update(np.ascontiguousarray(places, dtype=np.int64).data)
