"""The rank's side of the writer process: the shared buffer, commands, answers, restart after a death."""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import os
import select
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.writer import Writer

_PIPE_BYTES = select.PIPE_BUF
"""What is written to a pipe whole or not at all; longer commands (the file headers and ranges of a save) are put into a
memfd: training would stand still until the low-priority writer has read them."""
_STOPPED_S, _SILENT_S = 10.0, 60.0
"""How long a writer with work may do nothing: where a signal has stopped it; else (one long fsync looks the same)."""


class SnapshotBuffer:
    """Host memory that the writer process sees too: a memfd, so that a small /dev/shm does not matter.

    Reused by every save; pinned (page-locked) where CUDA copies into it. torch's own allocator of pinned memory has
    none that another process could map.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.size = 0
        self.is_pinned = False
        self._map: mmap.mmap | None = None
        self.tensor = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int, *, pin: bool) -> bool:
        """Makes room for `size` bytes; True where the buffer is a new one, which the writer must learn of."""
        if size <= self.size:
            return False
        self.close()
        self.fd = os.memfd_create("launcher-snapshot")
        os.set_inheritable(self.fd, True)
        os.posix_fallocate(self.fd, 0, size)  # now, not page by page inside the first save
        self._map, self.size = mmap.mmap(self.fd, size), size
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.is_pinned = pin and _pin(self.tensor)
        return True

    def view(self) -> memoryview:
        return memoryview(self._map) if self._map is not None else memoryview(b"")

    def close(self) -> None:
        """Frees the memory (the writer's mapping ends with the writer). No copy into it may be under way."""
        if self.is_pinned:  # else CUDA goes on taking these addresses for pinned, whatever the kernel puts there next
            _cudart().cudaHostUnregister(self.tensor.data_ptr())
            self.is_pinned = False
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if self.fd >= 0:
            os.close(self.fd)
        self._map, self.fd, self.size = None, -1, 0


def _cudart() -> Any:
    cuda: Any = torch.cuda
    return cuda.cudart()


def _pin(tensor: torch.Tensor) -> bool:
    """Pins the memory of a tensor; False where CUDA refuses (locked memory is limited, or the driver cannot)."""
    runtime = _cudart()
    if runtime.cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0) == runtime.cudaError.success:
        return True
    # The refusal stays CUDA's last error, and torch would raise it after the next kernel: this one takes it.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False


class WriterDied(Exception):
    """The writer process ended (killed, out of memory), or takes no more commands."""


class Activity:
    """What a process has done so far, as the kernel counts it: nothing that it would have to tell itself.

    Time on a core and bytes read and written, of all its threads. They stand still where it was stopped, and where a
    file system does not answer. While it waits for a core they do too, but it does not.
    """

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self._last = self._now()
        self._moved_at = time.monotonic()

    def _now(self) -> tuple[str, ...]:
        found = []
        for name in ("stat", "schedstat", "io"):
            with contextlib.suppress(OSError):
                text = (self._folder / name).read_text(errors="replace")
                found.append(" ".join(text.rpartition(")")[2].split()[11:15]) if name == "stat" else text)
        return tuple(found)

    def restart(self) -> None:
        """It has new work: what it did not do before does not count."""
        self._moved_at = time.monotonic()

    def standstill_s(self) -> float:
        """Seconds since it was last seen doing something."""
        now = self._now()
        if now != self._last or self._state == "R":
            self._last, self._moved_at = now, time.monotonic()
        return time.monotonic() - self._moved_at

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return self._state in ("T", "t")

    @property
    def _state(self) -> str:
        """As the kernel names it; R runs or would, had it a core."""
        with contextlib.suppress(OSError, IndexError):
            return (self._folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        return ""


class WriterClient:
    """Sends commands to a writer process and collects its answers without waiting.

    Commands come from two threads: the one that trains, and the one that makes the copies of a save.
    """

    def __init__(self, buffer: SnapshotBuffer, statics: dict[str, bytes]) -> None:
        self._buffer = buffer
        self._statics = statics
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._commands: list[int] = []
        self._num_unanswered = 0
        self._activity: Activity | None = None
        self._killed: list[subprocess.Popen[bytes]] = []  # that may not be gone yet
        self._priority = self._own_priority = "idle"  # of the next process, of the one that runs
        self._lock = threading.RLock()

    def start(self) -> None:
        """Starts the process if none runs (at the first save, after a death, or when the buffer is a new one), or anew
        where the last one hardly got a core."""
        with self._lock:
            is_kept = self._own_priority == self._priority or self._num_unanswered > 0  # answers would be lost
            if self.is_alive and is_kept:
                return
            self.stop()
            self._own_priority = self._priority
            command = [
                sys.executable, "-m", "launcher.checkpoint.writer", str(self._buffer.fd), str(self._buffer.size),
                self._priority,
            ]  # fmt: skip
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                pass_fds=[self._buffer.fd] if self._buffer.size else [],
                process_group=0,  # torchrun signals a rank's, before a starting writer has learned to ignore it
            )  # fmt: skip
            assert self._process.stdout is not None and self._process.stdin is not None
            os.set_blocking(self._process.stdout.fileno(), False)
            os.set_blocking(self._process.stdin.fileno(), False)
            self._activity, self._num_unanswered = Activity(self._process.pid), 0
            encoded = {path: base64.b64encode(data).decode() for path, data in self._statics.items()}
            self.send({"cmd": "static", "files": encoded})

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, command: dict[str, Any]) -> None:
        """Returns at once, however long the writer takes to read it. Raises WriterDied where the process is gone."""
        with self._lock:
            if self._process is None or self._process.stdin is None:
                raise WriterDied("the writer process was ended")
            line = json.dumps(command).encode() + b"\n"
            if len(line) > _PIPE_BYTES:
                line = json.dumps({"cmd": "read", "path": self._in_memory(line)}).encode() + b"\n"
            is_first = not self._num_unanswered or command["cmd"] == "write"  # what went ahead leaves answers unread
            if self._activity is not None and is_first:
                self._activity.restart()
            try:
                is_taken = self._process.stdin.write(line) is not None
            except OSError as error:
                raise WriterDied(self._death()) from error
            if not is_taken:
                raise WriterDied(f"the writer process {self._process.pid} reads no more commands")
            self._num_unanswered += command["cmd"] != "static"

    def _in_memory(self, line: bytes) -> str:
        """Keeps a command in memory for the writer to open.

        One save is in flight at a time, so of the last three at most two (static files, a write) are still unread.
        """
        fd = os.memfd_create("launcher-command")
        self._commands.append(fd)
        if len(self._commands) > 3:
            os.close(self._commands.pop(0))
        view = memoryview(line)
        while view:
            view = view[os.write(fd, view) :]
        return f"/proc/{os.getpid()}/fd/{fd}"

    def poll(self, timeout_s: float = 0.0) -> list[dict[str, Any]]:
        """The answers that have arrived; waits up to `timeout_s` for the first. Raises WriterDied."""
        if self._process is None or self._process.stdout is None:
            return []
        if timeout_s:
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                selector.select(timeout_s)
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                self._pending += chunk
        *lines, self._pending = self._pending.split(b"\n")
        answers = [json.loads(line) for line in lines if line.startswith(b'{"')]
        with self._lock:
            self._num_unanswered -= sum("ahead" not in answer for answer in answers)
        if any(answer["is_starved"] for answer in answers):
            self._priority = "nice"
        if not answers and self._process.poll() is not None:
            raise WriterDied(self._death())
        return answers

    def standstill_s(self) -> float:
        """Seconds for which the process has had work and done nothing."""
        if self._process is None or self._activity is None or self._num_unanswered <= 0:
            return 0.0
        return self._activity.standstill_s()

    def patience_s(self) -> float:
        """The standstill from which on it counts as stuck."""
        return _STOPPED_S if self._activity is not None and self._activity.is_stopped else _SILENT_S

    def _death(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        return (
            f"the writer process was killed by signal {-code}" if code < 0 else f"the writer process ended with {code}"
        )

    def kill(self) -> None:
        """Ends the process and hardly waits, since a training step does: one that hangs in a file system dies when
        that answers, and does nothing more."""
        with self._lock:
            if self._process is None:
                return
            self._process.kill()
            self._killed.append(self._process)
            self._reap(0.1)
            self._forget()

    def _reap(self, timeout_s: float) -> None:
        """Collects those that were killed and are gone within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for process in self._killed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._killed = [process for process in self._killed if process.poll() is None]

    def close(self) -> None:
        """Stops the process for good."""
        self.stop()
        self._reap(1.0)

    def stop(self) -> None:
        """Lets the process finish what it was told and end; one that is stuck is killed."""
        with self._lock:
            if self._process is None:
                return
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._num_unanswered += 1  # by its end
            if self._activity is not None:
                self._activity.restart()
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.5)
                    break
                if self.standstill_s() > self.patience_s():
                    return self.kill()
            self._forget()

    def _forget(self) -> None:
        assert self._process is not None
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        while self._commands:
            os.close(self._commands.pop())
        self._process, self._pending, self._activity, self._num_unanswered = None, b"", None, 0


class InlineWriter:
    """`checkpoint.async_save=false`: the same commands, executed in the rank before `send` returns."""

    def __init__(self, buffer: SnapshotBuffer, statics: dict[str, bytes]) -> None:
        self._buffer = buffer
        self._writer = Writer(memoryview(b""))
        encoded = {path: base64.b64encode(data).decode() for path, data in statics.items()}
        self._writer.execute({"cmd": "static", "files": encoded})
        self._answers: list[dict[str, Any]] = []
        self.pid: int | None = os.getpid()
        self.is_alive = True

    def start(self) -> None:
        self._writer.set_buffer(self._buffer.view())

    def send(self, command: dict[str, Any]) -> None:
        self._answers += self._writer.execute(command)

    def poll(self, timeout_s: float = 0.0) -> list[dict[str, Any]]:
        answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        pass

    def stop(self) -> None:
        self._writer.set_buffer(memoryview(b""))

    def standstill_s(self) -> float:
        return 0.0  # whoever asks is the process that writes

    def patience_s(self) -> float:
        return _SILENT_S

    def kill(self) -> None:
        raise AssertionError("an inline writer has no process of its own")
