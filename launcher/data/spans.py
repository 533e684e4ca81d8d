"""Which tokens hold which characters of a text, and arithmetic with such spans."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np


def within(spans: list[tuple[int, int]], low: int, high: int) -> Iterator[tuple[int, int]]:
    """What of these spans, which follow each other, lies in [low, high)."""
    for a, b in spans[bisect_right(spans, low, key=itemgetter(1)) :]:
        if a >= high:
            return
        yield max(a, low), min(b, high)


def without(spans: list[tuple[int, int]], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of the spans lies in none of the holes; both follow each other."""
    left = []
    for start, end in spans:
        for low, high in holes:
            if start < low < end:
                left.append((start, low))
            if low < end and high > start:
                start = min(max(start, high), end)
        if start < end:
            left.append((start, end))
    return left


def token_span(batch: Any, place: int, start: int, end: int, length: int) -> slice:
    """The tokens that hold any of the characters [start, end) of a text of `length` characters.

    Asks for single characters, which is far cheaper than all offsets of a long row. A character may have several
    tokens, of which the first is named, or none, where a tokenizer drops white space.
    """

    def first_token(begin: int, stop: int) -> int | None:
        found = (batch.char_to_token(place, character) for character in range(begin, stop))
        return next((token for token in found if token is not None), None)

    first = first_token(start, end)
    if first is None:
        return slice(0, 0)
    after = first_token(end, length)
    if after is None:
        after = len(batch["input_ids"][place])
    last = next(token for c in reversed(range(start, end)) if (token := batch.char_to_token(place, c)) is not None)
    return slice(first, max(after, last + 1))


def spans_at_once(batch: Any, place: int, length: int) -> Callable[[int, int], slice]:
    """`token_span` for a row with many spans: each question to the tokenizer takes time that grows with the row."""
    offsets = np.asarray(batch[place].offsets, dtype=np.int64).reshape(-1, 2)
    num_tokens, widths = len(offsets), np.maximum(offsets[:, 1] - offsets[:, 0], 0)
    tokens = np.repeat(np.arange(num_tokens), widths)
    characters = offsets[tokens, 0] + np.arange(len(tokens)) - np.repeat(np.cumsum(widths) - widths, widths)
    first_token = np.full(length + 1, -1, dtype=np.int64)  # of each character
    first_token[characters[::-1]] = tokens[::-1]
    places = np.flatnonzero(first_token >= 0)  # characters that have one

    def find(start: int, end: int) -> slice:
        low, high = np.searchsorted(places, [start, end]).tolist()
        if low == high:
            return slice(0, 0)
        after = int(first_token[places[high]]) if high < len(places) else num_tokens
        return slice(int(first_token[places[low]]), max(after, int(first_token[places[high - 1]]) + 1))

    return find


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    if a[:] == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
