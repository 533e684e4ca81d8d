"""Copies into the spool where hard links cannot be made (another file system, or one without them), in the background.

One copy is made at a time and one checkpoint waits at most: what is copied or waits is held back from retention, so
that a kill loses no upload, and no more than two checkpoints are held. Where saves come faster than they can be
copied, the one that waits gives way to the newer one and is named. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launcher.base import files


@dataclass
class Copy:
    """The files of one upload, open already: they outlive their folder.

    home: where they go; renamed to `target` once all are there.
    """

    name: str
    is_checkpoint: bool
    sources: list[tuple[BinaryIO, Path]]
    opened: contextlib.ExitStack
    home: Path
    target: Path


class Copies:
    """A thread that copies in the order in which it is told to; the process's end ends it."""

    def __init__(self) -> None:
        self._waiting: list[Copy] = []
        self._current: Copy | None = None
        self._lock = threading.Lock()
        self._gave_way: list[str] = []
        self._failed: list[tuple[str, OSError]] = []

    @property
    def names(self) -> list[str]:
        """What is being copied, and what waits for it."""
        with self._lock:
            return [copy.name for copy in (self._current, *self._waiting) if copy is not None]

    def add(self, copy: Copy) -> None:
        """Returns at once."""
        with self._lock:
            if copy.is_checkpoint and (older := next((c for c in self._waiting if c.is_checkpoint), None)) is not None:
                self._waiting.remove(older)
                self._gave_way.append(older.name)
                _give_up(older)
            self._waiting.append(copy)
            if self._current is None:
                self._current = self._waiting.pop(0)
                threading.Thread(target=self._run, daemon=True).start()

    def take_gave_way(self) -> list[str]:
        """Checkpoints that gave way to newer ones since the last call."""
        with self._lock:
            found, self._gave_way = self._gave_way, []
        return found

    def take_failed(self) -> list[tuple[str, OSError]]:
        """Copies that the disk refused since the last call."""
        with self._lock:
            found, self._failed = self._failed, []
        return found

    def wait(self, timeout_s: float, is_stopping: Callable[[], bool]) -> None:
        """Until all are made, the time is over, or somebody asks for a stop."""
        end = time.monotonic() + timeout_s
        while self.names and time.monotonic() < end and not is_stopping():
            time.sleep(0.05)

    def _run(self) -> None:
        while (copy := self._current) is not None:
            try:
                _make(copy)
            except OSError as error:
                _give_up(copy)
                with self._lock:
                    self._failed.append((copy.name, error))
            with self._lock:
                self._current = self._waiting.pop(0) if self._waiting else None


def _make(copy: Copy) -> None:
    with copy.opened:
        for source, path in copy.sources:
            with path.open("xb") as out:
                shutil.copyfileobj(source, out, 1 << 24)
                out.flush()
                os.fsync(out.fileno())  # else a power cut leaves the right length and other bytes
    copy.home.rename(copy.target)


def _give_up(copy: Copy) -> None:
    copy.opened.close()
    with contextlib.suppress(OSError):
        files.remove_tree(copy.home)
