"""Saves where host memory is short: no copy of the state, but one piece of it after another through a small buffer,
while training waits. The files are the same, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from launcher.base.block_io import BLOCK_BYTES
from launcher.base.words import size
from launcher.checkpoint.snapshot import Copy, SnapshotPlan

PIECE_BYTES = 64 * 2**20
_SHARE_OF_FREE = 0.9
"""Of the host's free memory that copies may take."""


@dataclass
class Piece:
    """What goes through the buffer at once: copies and ranges as in a plan, offsets from the buffer's begin."""

    copies: list[Copy] = field(default_factory=list)
    ranges: list[tuple[str, int, int, int]] = field(default_factory=list)


def pieces(plan: SnapshotPlan, piece_bytes: int) -> Iterator[Piece]:
    """A plan cut at whole blocks, so that no block of a file is written by two pieces. At least one.

    Args:
        piece_bytes: whole blocks.
    """
    assert piece_bytes % BLOCK_BYTES == 0
    found: dict[int, Piece] = {0: Piece()}
    for copy in plan.copies:
        item = copy.dtype.itemsize
        for number, low, high in _cuts(copy.offset, copy.end, piece_bytes):
            first, last = copy.low + (low - copy.offset) // item, copy.low + (high - copy.offset) // item
            part = replace(copy, low=first, high=last, offset=low - number * piece_bytes)
            found.setdefault(number, Piece()).copies.append(part)
    for path, file_offset, offset, num_bytes in plan.ranges:
        for number, low, high in _cuts(offset, offset + num_bytes, piece_bytes):
            part_range = (path, file_offset + low - offset, low - number * piece_bytes, high - low)
            found.setdefault(number, Piece()).ranges.append(part_range)
    for number in sorted(found):
        yield found[number]


def _cuts(start: int, end: int, piece_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(number of the piece, start, end) of the parts of a range of bytes."""
    while start < end:
        number = start // piece_bytes
        until = min(end, (number + 1) * piece_bytes)
        yield number, start, until
        start = until


def shortage(told: list[tuple[str, int, int]]) -> dict[str, str]:
    """The hosts on which the copies of a save do not fit, each with why.

    Args:
        told: of every process its host, the bytes of its copy, and what is free on that host.
    """
    found = {}
    for host in {where for where, _, _ in told}:
        needed = sum(num_bytes for where, num_bytes, _ in told if where == host)
        free = min(num_free for where, _, num_free in told if where == host)
        if needed > _SHARE_OF_FREE * free:
            found[host] = f"{size(needed)} for the copies of a save, {size(free)} free on {host}"
    return found


def notice(reasons: dict[str, str], buffer_bytes: int) -> str:
    """What is said once, with what it costs."""
    return (
        f"host memory is short ({'; '.join(sorted(reasons.values()))}): no copy is made, and each save stops training "
        f"while {size(buffer_bytes)} of every process there are written. To have copies made all the same: "
        "checkpoint.low_memory=false"
    )
