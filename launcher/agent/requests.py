"""What somebody asks of this agent by signals: stop and save, or (a second Ctrl-C) end at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from launcher.base.first_moments import put_back

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Requests:
    """Only noted here; the supervisor acts on them between two looks at its processes."""

    def __init__(self) -> None:
        self.is_stop_asked = False
        self.is_kill_asked = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_kill_asked |= self.is_stop_asked and number == signal.SIGINT
        self.is_stop_asked = True

    @contextmanager
    def installed(self) -> Iterator[Requests]:
        before: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal ends no run
        try:
            yield self
        finally:
            put_back(before.items())
