"""One run per output_dir: a lock file with a heartbeat, on any file system. Standard library only.

Who takes a lock creates the file in one step (a hard link, else O_EXCL). Who takes a stale one over first creates
`.lock-<id of the stale lock>` in the same way, which only one can, reads the lock again, and only then renames its own
over it. So nobody ever removes a lock that he has not seen, and no two replace the same one. No file locks are used:
many cluster file systems have none, or keep them per machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from launcher.base import lock_file
from launcher.base.errors import LauncherError, RunLockedError, RunLockLostError, UserError
from launcher.base.lock_file import Holder, Waiting
from launcher.base.process import boot_id, host, machine_id, pid_namespace, start_ticks

HEARTBEAT_S = 5.0
_POLL_S = 0.1
_SHOWN_AGE_S = 600.0
_FIRST_BEAT = 1_000_000_000
_BEAT_OFFSET = len('{"beat": ')


def holder(path: Path) -> Holder | None:
    """Who seems to hold the lock, told at once: to show, or to refuse early. `wait_until_free` decides.

    Of one on another machine only the age of the file is known here, by two clocks that may differ.
    """
    try:
        other = lock_file.read(path)
    except UserError:
        return None
    if other is None or other.is_alive() is False:
        return None
    return other if other.is_alive() or abs(other.age_s) < _SHOWN_AGE_S else None


def wait_until_free(path: Path, say: Callable[[str], None], may_wait: Callable[[], bool] = lambda: True) -> None:
    """Returns when nobody alive holds the lock, which may take STALE_S; takes nothing.

    Args:
        may_wait: asked while it waits; False gives up as if the holder lived.

    Raises:
        RunLockedError: another run is alive. UserError: what is there is not a lock.
    """
    waiting = Waiting(say)
    while (other := lock_file.read(path)) is not None and not waiting.is_gone(other):
        if not may_wait():
            raise RunLockedError(lock_file.describe(other))
        time.sleep(_POLL_S)


def is_holder(path: Path, own: str) -> bool:
    """Whether the lock at `path` has the id `own`, read anew."""
    try:
        if (other := lock_file.read(path)) is None:
            time.sleep(_POLL_S)  # a network file system may lose a name for a moment
            other = lock_file.read(path)
        return other is not None and other.id == own
    except UserError:
        return not lock_file.is_odd(path)  # it cannot be read now: nothing is known


class Fence(TypedDict):
    """A lock, and the id that it must have: as plain data."""

    path: str
    id: str


class RunLock:
    """Held by the main process from before the first read of output_dir until its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._id = uuid.uuid4().hex[:16]
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_lost = False
        self.on_lost: Callable[[RunLockLostError], None] | None = None
        """Called once, from a thread, where another run has taken the lock over."""

    def acquire(
        self, pids: list[int], say: Callable[[str], None] = lambda text: None, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Waits for a holder on this machine that is dying, and for the heartbeat of one elsewhere.

        Args:
            pids: all processes of this run on this machine; the lock is stale when none of them lives.
            alive: called while it waits; what it raises ends that.

        Raises:
            RunLockedError: another run is alive. UserError: something that is not a lock is in its place.
        """
        _take(self._path, self._id, pids, Waiting(say), {}, alive)
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def is_held(self) -> bool:
        """Whether the lock is still this run's, read anew: to be asked before anything is committed."""
        self._is_lost = self._is_lost or not is_holder(self._path, self._id)
        return not self._is_lost

    def check(self) -> None:
        """Raises: RunLockLostError, where another run has taken the lock over."""
        if not self.is_held():
            raise self.loss()

    def fence(self) -> Fence:
        """For a process of this run that commits in its name: the same question as `is_held`."""
        return {"path": str(self._path), "id": self._id}

    def loss(self) -> RunLockLostError:
        """What to tell where the lock is no longer held."""
        other: Holder | None = None
        if not self._path.parent.is_dir():
            return RunLockLostError(
                f"output_dir={self._path.parent} cannot be reached any more: it was moved, removed or unmounted. "
                "The run ends; what was saved before is whole. Start it again where the folder is"
            )
        with contextlib.suppress(UserError):
            other = lock_file.read(self._path)
        how = "was taken over by " + str(other) if other is not None else "is gone"
        return RunLockLostError(
            f"this run no longer holds output_dir={self._path.parent}: its lock {how}. It must have stood still for "
            f"more than {lock_file.STALE_S:.0f} s, or somebody removed {self._path}. It ends and writes nothing more; "
            "what was saved before is whole"
        )

    def _beat(self) -> None:
        count = _FIRST_BEAT
        while not self._stop.wait(HEARTBEAT_S):
            count += 1
            with contextlib.suppress(OSError, UserError):
                self._write_beat(count)
            if not self.is_held() and not self._stop.is_set():
                if self.on_lost is not None:
                    self.on_lost(self.loss())
                return

    def _write_beat(self, count: int) -> None:
        """Changes the counter in place, in the very file that was found to be ours.

        A lock that has taken its place meanwhile is another file. Closing it is what makes NFS send it.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if f'"id": "{self._id}"'.encode() in os.pread(fd, 4096, 0):
                os.pwrite(fd, str(count).encode(), _BEAT_OFFSET)
        finally:
            os.close(fd)

    def release(self) -> None:
        """Removes the lock if it is still ours."""
        self._stop.set()
        if self._thread is None:
            return
        if self._thread is not threading.current_thread():
            self._thread.join(HEARTBEAT_S)
        with contextlib.suppress(OSError, LauncherError):
            claim = _claim_path(self._path, self._id)
            own = uuid.uuid4().hex[:16]
            if _create(claim, own, [os.getpid()]):
                if self.is_held():  # nobody can take it over now, so that what is removed is ours
                    self._path.unlink()
                _remove_own(claim, own)


def _take(
    path: Path, own: str, pids: list[int], waiting: Waiting, claims: dict[Path, Waiting],
    alive: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Returns when the lock at `path` has our id.

    Args:
        claims: what was seen of other starters' claims so far.
    """
    while not _create(path, own, pids):
        other = lock_file.read(path)
        if other is None:
            continue
        if other.id == own:  # NFS may answer the repetition of a request that it has carried out
            return
        if waiting.is_gone(other) and _replace(path, other, own, pids, claims):
            return
        alive()
        time.sleep(_POLL_S)


def _replace(path: Path, stale: Holder, own: str, pids: list[int], claims: dict[Path, Waiting]) -> bool:
    """Takes a stale lock over; False where somebody else is at it, or has been.

    Raises:
        RunLockedError: who is taking it over does not come to an end.
    """
    claim, claim_id, began = _claim_path(path, stale.id), uuid.uuid4().hex[:16], time.monotonic()
    if not _create(claim, claim_id, [os.getpid()]):
        other = lock_file.read(claim)
        waiting = claims.setdefault(claim, Waiting(lambda text: None, is_claim=True))
        if other is None or not waiting.is_gone(other) or not _replace(claim, other, claim_id, [os.getpid()], claims):
            return False
    try:
        now = lock_file.read(path)
        if now is None or (now.id, now.beat) != (stale.id, stale.beat):
            return False
        temporary = _write_temporary(path, own, pids)
        if time.monotonic() - began > lock_file.STALE_S / 2:  # we stood still: others may have given this claim up
            temporary.unlink(missing_ok=True)
            return False
        try:
            temporary.rename(path)
        except FileNotFoundError:  # swept up, by a run that had the lock for a moment
            return False
        found = lock_file.read(path)
        return found is not None and found.id == own
    finally:
        _remove_own(claim, claim_id)


def _claim_path(path: Path, stale_id: str) -> Path:
    return path.with_name(f"{path.name}-{stale_id}")


def _create(path: Path, own: str, pids: list[int]) -> bool:
    """Creates a lock, whole from its first moment; False where there is one."""
    temporary = _write_temporary(path, own, pids)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except FileNotFoundError:  # the temporary file: swept up by a run that has just taken the lock
        return False
    except OSError:  # no hard links here
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(fd, "wb") as file:
            file.write(_content(own, pids))
    finally:
        temporary.unlink(missing_ok=True)
    found = lock_file.read(path)  # one that stood still while it wrote may have lost it again
    return found is not None and found.id == own


def _write_temporary(path: Path, own: str, pids: list[int]) -> Path:
    temporary = path.with_name(f"{path.name}-new-{own}")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(_content(own, pids))
        file.flush()
        with contextlib.suppress(OSError):  # never an empty lock after a power loss
            os.fsync(fd)
    return temporary


def _content(own: str, pids: list[int]) -> bytes:
    info = {
        "beat": _FIRST_BEAT, "id": own, "host": host(), "pid": os.getpid(), "job_id": os.environ.get("SLURM_JOB_ID"),
        "boot_id": boot_id(), "machine_id": machine_id(), "pid_namespace": pid_namespace(),
        "parent": [os.getppid(), start_ticks(os.getppid())], "started": time.time(),
        "pids": [[pid, start_ticks(pid)] for pid in pids],
    }  # fmt: skip
    return json.dumps(info).encode()


def _remove_own(path: Path, own: str) -> None:
    with contextlib.suppress(OSError, UserError):
        found = lock_file.read(path)
        if found is not None and found.id == own:
            path.unlink()
