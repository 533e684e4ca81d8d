"""What a lock file says, and whether who wrote it still lives. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import RunLockedError, UserError
from launcher.base.process import boot_id, host, is_alive, is_same_machine, pid_namespace
from launcher.base.text import printable

STALE_S = 60.0
"""A lock that cannot be judged by its processes is free once its heartbeat stood still for so long."""
DYING_S = 30.0
_MAX_BYTES = 2**20

Process = tuple[int, int | None]
"""(pid, start in clock ticks since boot)"""


@dataclass(frozen=True)
class Holder:
    """Who wrote a lock file. Fields of a wrong type are left out: a lock may come from anywhere."""

    path: Path
    id: str
    """Of this very lock, given by its writer; of the file where its content is not readable."""
    beat: str
    """Changes with every heartbeat."""
    age_s: float
    """By two machines' clocks: good enough to show, not to decide."""
    is_readable: bool = True
    host: str = "unknown"
    pid: int = 0
    job_id: str | None = None
    boot_id: str | None = None
    machine_id: str | None = None
    pid_namespace: str | None = None
    parent: Process | None = None
    pids: tuple[Process, ...] = ()

    def is_alive(self) -> bool | None:
        """None where only its heartbeat can tell: on another machine, in another container, or not readable.

        A host's name says nothing about that: containers share names, and pids mean something in one namespace only.
        """
        if self.boot_id is None or self.pid_namespace is None:
            return None
        if self.boot_id == boot_id():
            if self.pid_namespace != pid_namespace():
                return None
            return any(is_alive(*process) for process in self.pids)
        rebooted = self.host == host() and is_same_machine(self.machine_id, self.pid_namespace)
        return False if rebooted else None

    @property
    def is_dying(self) -> bool:
        """Its processes are here and have lost their launcher: they end within seconds."""
        return bool(self.is_alive()) and self.parent is not None and not is_alive(*self.parent)

    def __str__(self) -> str:
        if not self.is_readable:
            return f"somebody whose lock is not readable ({self.path})"
        job = f", job {self.job_id}" if self.job_id else ""
        is_here = self.boot_id == boot_id() and self.pid_namespace != pid_namespace()
        return f"a run on host {self.host}, pid {self.pid}{job}{' (in another container)' if is_here else ''}"


def read(path: Path) -> Holder | None:
    """Who holds a lock; None where there is none. Never follows a link and never waits for a FIFO.

    Raises:
        UserError: what is there is not a file, or may not be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        kind = _kind(path)
        if kind is None:
            raise UserError(f"the lock {path} cannot be read: {error.strerror}") from error
        raise _odd(path, kind) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _odd(path, _KINDS.get(stat.S_IFMT(found.st_mode), "device"))
        return _parsed(path, os.pread(fd, _MAX_BYTES, 0), found)
    except OSError as error:
        raise UserError(f"the lock {path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


_KINDS = {stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


def _kind(path: Path) -> str | None:
    try:
        return _KINDS.get(stat.S_IFMT(path.lstat().st_mode))
    except OSError:
        return None


def is_odd(path: Path) -> bool:
    """Whether something that is no file is in a lock's place."""
    return _kind(path) is not None


def _odd(path: Path, kind: str) -> UserError:
    return UserError(
        f"{path} is a {kind}; the lock of a run is a file. Nothing was changed. Once you know who put it there: "
        f"{'rm -r' if kind == 'folder' else 'rm'} {path}"
    )


def _parsed(path: Path, content: bytes, found: os.stat_result) -> Holder:
    beat = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{hashlib.sha256(content).hexdigest()[:16]}"
    age_s = time.time() - found.st_mtime
    try:
        info = json.loads(content)
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        return Holder(path, f"file-{found.st_ino:x}", beat, age_s, is_readable=False)

    def text(key: str) -> str | None:
        return printable(info[key]) if isinstance(info.get(key), str) else None

    given = text("id")
    is_name = given is not None and given.isalnum() and len(given) <= 32
    return Holder(
        path, str(given) if is_name else f"file-{found.st_ino:x}", beat, age_s, host=text("host") or "unknown",
        pid=info["pid"] if _is_int(info.get("pid")) else 0, job_id=text("job_id"), boot_id=text("boot_id"),
        machine_id=text("machine_id"), pid_namespace=text("pid_namespace"), parent=_process(info.get("parent")),
        pids=_processes(info.get("pids")),
    )  # fmt: skip


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**62


def _process(value: Any) -> Process | None:
    if not isinstance(value, list) or len(value) != 2 or not _is_int(value[0]):
        return None
    return (value[0], value[1]) if value[1] is None or _is_int(value[1]) else None


def _processes(value: Any) -> tuple[Process, ...]:
    found = [_process(item) for item in value] if isinstance(value, list) else []
    return tuple(process for process in found if process is not None)


class Waiting:
    """One reader's view of a lock over time: it says whether the holder is gone, on this reader's own clock."""

    def __init__(self, say: Callable[[str], None], *, is_claim: bool = False) -> None:
        """
        Args:
            is_claim: the lock is only held for a moment, by somebody who takes over another one.
        """
        self._say, self._is_claim = say, is_claim
        self._deadline = time.monotonic() + DYING_S
        self._seen: Holder | None = None
        self._since = 0.0
        self._was_told = False

    def is_gone(self, other: Holder) -> bool:
        """False where it is not known yet: ask again.

        Raises:
            RunLockedError: it lives.
        """
        now, alive = time.monotonic(), other.is_alive()
        if alive is not None:
            if alive and (now > self._deadline or not (self._is_claim or other.is_dying)):
                raise RunLockedError(describe(other))
            if alive:
                self._tell(f"waiting up to {DYING_S:.0f} s for the end of {other}, which has lost its launcher")
            return not alive
        if self._seen is None or self._seen.id != other.id:
            self._seen, self._since = other, now
            self._tell(f"output_dir={other.path.parent} is locked by {other}: waiting up to {STALE_S:.0f} s to see "
                       "whether it is alive")  # fmt: skip
        elif self._seen.beat != other.beat:
            raise RunLockedError(describe(other))
        return now - self._since >= STALE_S

    def _tell(self, text: str) -> None:
        if not self._was_told and not self._is_claim:
            self._was_told = True
            self._say(text)


def describe(other: Holder) -> str:
    """The refusal, naming the run that holds output_dir."""
    return f"output_dir={other.path.parent} is in use by {other}. Wait for it, stop it, or set another output_dir=…"
