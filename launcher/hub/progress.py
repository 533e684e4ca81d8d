"""The progress line while uploads are waited for."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from launcher.hub.spool import Spool

PLAIN_INTERVAL_S = 30.0
_BAR_WIDTH = 20


class ProgressLine:
    """Rewrites one line on a terminal; elsewhere prints a line every 30 s."""

    def __init__(self, spool: Spool, stream: TextIO | None = None) -> None:
        self._spool = spool
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._total = max(1, len(spool.pending()))
        self._total_bytes = max(1, spool.held_bytes())
        self._next = 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def show(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.2 if self._is_terminal else PLAIN_INTERVAL_S)
        text = self.text()
        self._stream.write(f"\r\x1b[K{text}" if self._is_terminal else f"{text}\n")
        self._stream.flush()

    def text(self) -> str:
        """`Hub: [#####     ] 1 of 3 uploads, waiting: …`."""
        pending, status = len(self._spool.pending()), self._spool.read_status()
        self._total = max(self._total, pending)
        sent = self._total_bytes - self._spool.held_bytes() + int(status["sent_bytes"])
        filled = min(_BAR_WIDTH, max(0, _BAR_WIDTH * sent // self._total_bytes))
        bar = "#" * filled + " " * (_BAR_WIDTH - filled)
        what, error = status["state"] or "starting", status["last_error"]
        note = f", {what}: {error}" if error and what != "uploading" else f", {what} {status['item'] or ''}".rstrip()
        return f"Hub: [{bar}] {self._total - pending} of {self._total} uploads{note}"
