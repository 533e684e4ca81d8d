"""Text that others wrote, made safe to show. Standard library only."""

from __future__ import annotations

from typing import Any

_MAX_SHOWN = 1000


def printable(value: Any) -> str:
    """One line without control characters: no escape sequence of a foreign file reaches a terminal.

    What is not printable (also bidirectional overrides and lone surrogates) is shown as Python would write it.
    """
    text = str(value)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_MAX_SHOWN])
    return shown if len(text) <= _MAX_SHOWN else f"{shown}…"
