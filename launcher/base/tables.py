"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDE = 10_000


def print_whole(table: Table, *, markup: bool = False) -> None:
    """Prints a table with every cell whole: where the terminal is narrower, a row goes on in its next line. rich would
    cut the cells, down to nothing.

    Args:
        markup: whether [bold] and so on in cells are rich's.
    """
    wide = Console(width=_WIDE, markup=markup)
    width = Measurement.get(wide, wide.options, table).maximum
    Console(width=max(width, 1), markup=markup, highlight=False, emoji=False).print(table, soft_wrap=True)


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of whole cells, one below the other; for thousands of them, which take rich seconds."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
