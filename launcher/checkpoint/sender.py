"""Copies a process's state beside the training, and sends the writer its command behind the last copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from launcher.checkpoint import snapshot
from launcher.checkpoint.snapshot import HostCopies, SnapshotPlan
from launcher.checkpoint.writer_client import SnapshotBuffer

_LOOK_S = 0.002
"""How often a thread asks whether the copies from a device are done: waiting for it would burn a core."""


class SnapshotSender:
    """One snapshot at a time; nothing here is collective.

    Args:
        send: takes the command, from either thread; must not raise.
        in_background: send as soon as the copies are done, in the midst of a step, rather than in `finish`.
    """

    def __init__(
        self, buffer: SnapshotBuffer, send: Callable[[dict[str, Any]], None], *, is_cuda: bool, in_background: bool
    ) -> None:
        self._buffer, self._send = buffer, send
        self._is_cuda, self._in_background = is_cuda, in_background
        self._stream: torch.cuda.Stream | None = None
        self._host_copies = HostCopies()
        self._unsent: dict[str, Any] | None = None
        self._sending = threading.Lock()

    @property
    def is_pending(self) -> bool:
        """Whether a command waits for its copies."""
        return self._unsent is not None

    def begin(self, plan: SnapshotPlan, command: dict[str, Any]) -> None:
        """Begins the copies, and has `command` sent behind them; `finish` waits for them.

        Why they see the state of this step, and all of it: what a forward pass may change is copied in the call, on
        the stream of the training. The side stream begins behind everything that is queued there (the last update, and
        those copies), so that its end is the end of them all. What it reads changes in an optimizer step only, and
        before that `finish` waits on the host until the side stream is empty: no kernel that writes is queued before.
        The same for masters in host memory (offload), which a thread copies.
        """
        self._unsent = command
        live, waiting = plan.copies[: plan.num_live], plan.copies[plan.num_live :]
        snapshot.take(live, self._buffer.tensor)
        if self._is_cuda:
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                on_device = [c for c in waiting if c.source().device.type != "cpu"]
                snapshot.take(on_device, self._buffer.tensor, self._stream)
        on_host = [c for c in waiting if c.source().device.type == "cpu"]
        self._host_copies.begin(on_host, self._buffer.tensor, then=lambda: self._copied(command))

    def _copied(self, command: dict[str, Any]) -> None:
        """By the thread that copies."""
        if not self._in_background:
            return
        while self._stream is not None and not self._stream.query():
            time.sleep(_LOOK_S)
        self._send_once(command)

    def finish(self) -> float:
        """Waits for the copies and has the command sent. Gives the seconds that it waited."""
        started = time.monotonic()
        self._wait()
        waited_s = time.monotonic() - started
        self._send_once(self._unsent)
        return waited_s

    def _wait(self) -> None:
        self._host_copies.finish()
        if self._stream is not None:
            self._stream.synchronize()

    def _send_once(self, command: dict[str, Any] | None) -> None:
        """Whoever comes first sends it; it is on its way when this returns."""
        with self._sending:
            if command is not None and self._unsent is command:
                self._unsent = None
                self._send(command)

    def drop(self) -> None:
        """Nothing is sent any more: a command that was not, will not be."""
        with self._sending:
            self._unsent = None

    def end(self) -> None:
        """Before the next snapshot: waits for copies that a failed save left, and drops its command."""
        self._wait()
        self.drop()
