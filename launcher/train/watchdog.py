"""Ends a process that makes no progress, after writing where each of its threads stands."""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import IO

from launcher.base import files


class Watchdog:
    """faulthandler's own C thread watches: it needs neither the GIL nor a reachable peer.

    After `timeout_s` without `alive()` the stacks of all threads are appended to `path` and the process exits with 1;
    the agent then ends the others, and the run restarts from its last checkpoint.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._timeout_s = timeout_s
        self._file: IO[bytes] = files.open_append(path)

    def alive(self) -> None:
        """Starts the time anew."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=self._file)

    def pause(self) -> None:
        """No limit until the next `alive()`: for what may rightly take long (generation, uploads)."""
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
