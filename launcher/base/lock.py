"""One run per output_dir: a lock file with a heartbeat. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from launcher.base.errors import RunLockedError
from launcher.base.files import fsync_dir, read_json_or
from launcher.base.process import host, is_alive, start_ticks

HEARTBEAT_S = 10.0
STALE_S = 90.0
DYING_S = 30.0


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock: host, pid, job_id, pids; None where it is free or its holder is dead."""
    info = read_json_or(path, None)
    if not isinstance(info, dict):
        if not path.exists():
            return None
        info = {"host": "unknown", "pid": 0, "pids": []}
    if info.get("host") == host():
        return info if _living(info) else None
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return None
    return info if age < STALE_S else None


def _living(info: dict[str, Any]) -> list[int]:
    return [pid for pid, ticks in info.get("pids", []) if is_alive(pid, ticks)]


class RunLock:
    """Held by the main process from before the first read of output_dir until its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, pids: list[int]) -> None:
        """Waits up to 30 s for a holder on this host that is dying.

        Args:
            pids: all processes of this run on this host; the lock is stale when none of them lives.

        Raises:
            RunLockedError: another run is alive.
        """
        deadline = time.monotonic() + DYING_S
        info = {
            "host": host(), "pid": os.getpid(), "job_id": os.environ.get("SLURM_JOB_ID"),
            "parent": [os.getppid(), start_ticks(os.getppid())], "started": time.time(),
            "pids": [[pid, start_ticks(pid)] for pid in pids],
        }  # fmt: skip
        while (other := self._take(info)) is not None:
            if other.get("host") != host() or time.monotonic() > deadline:
                raise RunLockedError(describe(self._path.parent, other))
            time.sleep(0.2)
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def _take(self, info: dict[str, Any]) -> dict[str, Any] | None:
        """Takes the lock, a stale one too; gives its live holder where there is one."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # where the file system has none, two starters in one moment may collide
                fcntl.flock(folder, fcntl.LOCK_EX)
            while not self._try(info):
                other = holder(self._path)
                if other is not None:
                    return other
                with contextlib.suppress(FileNotFoundError):
                    self._path.unlink()
            return None
        finally:
            os.close(folder)

    def _try(self, info: dict[str, Any]) -> bool:
        temporary = self._path.with_name(f".lock-{host()}-{os.getpid()}")
        temporary.write_text(json.dumps(info), encoding="utf-8")
        try:
            os.link(temporary, self._path)  # atomic on NFS too, and never an empty lock
        except FileExistsError:
            return False
        except OSError:  # no hard links here
            try:
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(json.dumps(info))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        fsync_dir(self._path.parent)
        return True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            info = read_json_or(self._path, {})
            if isinstance(info, dict) and (info.get("host"), info.get("pid")) == (host(), os.getpid()):
                with contextlib.suppress(OSError):  # not one that another host took while this one stood still
                    self._path.unlink()


def describe(root: Path, info: dict[str, Any]) -> str:
    """The refusal, naming the run that holds output_dir."""
    job = f", job {info['job_id']}" if info.get("job_id") else ""
    return (
        f"output_dir={root} is in use by a run on host {info.get('host')}, pid {info.get('pid')}{job}. "
        "Wait for it, stop it, or set another output_dir=…"
    )
