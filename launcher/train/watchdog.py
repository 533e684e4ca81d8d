"""Ends a process that makes no progress, after writing where each of its threads stands."""

from __future__ import annotations

import faulthandler
import time
from pathlib import Path
from typing import IO

from launcher.base import files

_MAX_SLACK_S = 1.0


class Watchdog:
    """faulthandler's own C thread watches: it needs neither the GIL nor a reachable peer.

    After `timeout_s` without `alive()` the stacks of all threads are appended to `path` and the process exits with 1;
    the agent then ends the others, and the run restarts from its last checkpoint. It may be up to a second more: each
    new start of the time ends one thread and begins another, which would be a hundredth of a short step.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._timeout_s, self._slack_s = timeout_s, min(_MAX_SLACK_S, timeout_s / 10)
        self._is_fresh_until = 0.0
        self._file: IO[bytes] = files.open_append(path)

    def alive(self) -> None:
        """Starts the time anew."""
        now = time.monotonic()
        if now < self._is_fresh_until:
            return
        faulthandler.dump_traceback_later(self._timeout_s + self._slack_s, exit=True, file=self._file)
        self._is_fresh_until = now + self._slack_s

    def pause(self) -> None:
        """No limit until the next `alive()`: for what may rightly take long (generation, uploads)."""
        self._is_fresh_until = 0.0
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
