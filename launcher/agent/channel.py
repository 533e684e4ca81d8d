"""Two agents of a run talk: JSON lines over TCP, with a heartbeat, so that each notices the end of the other."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from typing import Any

from launcher.base import files

_BEAT_S = 5.0
_LOST_S = 60.0
"""A killed agent's connection ends at once; a machine without power or network is given up after this silence."""
_SEND_S = 20.0
_MAX_LINE_BYTES = 16 * 1024**2
_MAX_HELLO_BYTES = 2**16


class Channel:
    """One connection. `is_lost` stays true once the peer has gone; nothing here raises for that."""

    def __init__(self, connection: socket.socket) -> None:
        """Of somebody who may be anybody, until `trust` is called."""
        connection.settimeout(_SEND_S)
        self._max_line_bytes = _MAX_HELLO_BYTES
        self._socket = connection
        self._sending = threading.Lock()
        self._unread = b""
        self._heard = time.monotonic()
        self.is_lost = False
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="agent heartbeat", daemon=True).start()

    def trust(self) -> None:
        """It is an agent of this run: its reports may be long."""
        self._max_line_bytes = _MAX_LINE_BYTES

    def send(self, kind: str, **fields: Any) -> None:
        data = json.dumps({"kind": kind, **fields}).encode() + b"\n"
        with self._sending:
            try:
                self._socket.sendall(data)
            except OSError:
                self.is_lost = True

    def receive(self) -> list[dict[str, Any]]:
        """What has come since the last call; never waits."""
        self._read()
        *whole, self._unread = self._unread.split(b"\n")
        messages = []
        for line in whole:
            try:
                message = files.parse_json(line)
            except ValueError:
                message = None
            if not isinstance(message, dict) or not isinstance(message.get("kind"), str):  # no agent of ours
                self.is_lost = True
                break
            if message["kind"] != "beat":
                messages.append(message)
        return messages

    def _read(self) -> None:
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(self._socket, select.POLLIN)
        while not self.is_lost and poll.poll(0):
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data or len(self._unread) > self._max_line_bytes:
                self.is_lost = True
                break
            self._unread += data
            self._heard = time.monotonic()
        if time.monotonic() - self._heard > _LOST_S:  # after reading: this process may itself have stood still
            self.is_lost = True

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_S) and not self.is_lost:
            self.send("beat")

    def close(self, drain_s: float = 0.0) -> None:
        """Ends the connection.

        Args:
            drain_s: waits so long for the peer to close first. A heartbeat that nobody has read would otherwise turn
                the end into a reset, which can swallow what was sent last.
        """
        self._closed.set()
        with self._sending, contextlib.suppress(OSError):
            if drain_s and not self.is_lost:
                self._socket.shutdown(socket.SHUT_WR)
                self._socket.settimeout(drain_s)
                while self._socket.recv(1 << 16):
                    pass
            self._socket.close()
