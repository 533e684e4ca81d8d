"""Requests to stop before the handlers of the agent or the sweep stand: nothing runs yet, so they are obeyed at once.

Modules are imported and settings composed in that time. Standard library only, and little of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any

from launcher.base.errors import EXIT_STOPPED


def obey_signals() -> None:
    """SIGTERM, SIGINT and SIGUSR1 end this process with 75 until others handle them."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """No exception: a library that is being imported might catch it."""
    try:
        os.write(2, b"launcher: stopped before the start; nothing was running\n")
    finally:
        os._exit(EXIT_STOPPED)


def put_back(handlers: Iterable[tuple[int, Any]]) -> None:
    """Signal handlers as they were, but these first moments are over: what comes after the end is ignored."""
    for number, handler in handlers:
        signal.signal(number, signal.SIG_IGN if handler is _end else handler)
