"""The spool: what still has to go to the Hub, as folders of hard links, and the journal of what arrived.

```
.hub/owner.lock      held by the trainer that fills it              uploader.lock   held by the one that sends
     settings.json   where and how to push                              written by the trainer
     ledger.json     uploads passed over or dropped                     written by the trainer
     queue/N-NAME/   item.json and files/, complete once it is here     made by the trainer
     active/N-NAME/  claimed                                            renamed by the uploader
     trash/          given up or done; deleted by the uploader
     journal.json    what is on the Hub, times of commits               written by the uploader
     status.json     what it does now        events.jsonl  news for the progress line
```
Every change of hands is one rename, so a kill of either side at any moment leaves each upload in exactly one place.
An item changes nothing on the Hub twice: the uploader compares with what is there before it commits.
No file of it is opened through a link, and none that exists is opened for writing: the files of an item are the very
files of a checkpoint. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from launcher.base import files, json_lines
from launcher.base.errors import UnsafeFileError
from launcher.base.inner_files import read_json_object
from launcher.hub import records
from launcher.hub.copies import Copies, Copy
from launcher.hub.items import Item, UploadSettings

on_state: Callable[[str], None] | None = None
"""Called with the name of every state that is reached; the fault tests kill the process there."""

_ITEM_NAME = re.compile(r"[0-9]{8}-[A-Za-z0-9][A-Za-z0-9._-]*")
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
"""What os.link says where hard links cannot be made here: another file system, or one (or a file) without them."""


def reached(state: str) -> None:
    """Marks a state of the journal for the fault tests."""
    if on_state is not None:
        on_state(state)


class Spool:
    """The folder `.hub` of a run. The trainer adds, the uploader claims and finishes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.queue_dir = root / "queue"
        self.active_dir = root / "active"
        self.trash_dir = root / "trash"
        self.settings_path = root / "settings.json"
        self.ledger_path = root / "ledger.json"
        self.journal_path = root / "journal.json"
        self.status_path = root / "status.json"
        self.events_path = root / "events.jsonl"
        self.log_path = root / "uploader.log"
        self.copies = Copies()
        self._last_number = 0
        self._owner_fd: int | None = None
        self._folders: dict[str, Path] = {}  # of items that were added as they lie; never read from a file

    # ------------------------------------------------------------------ both sides

    def prepare(self) -> None:
        """Makes the folders; leaves what is there.

        Raises:
            UnsafeFileError: one of them is a link.
        """
        self.refuse_links()
        is_new = not self.trash_dir.is_dir()
        for folder in (self.root, self.queue_dir, self.active_dir, self.trash_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_new:
            files.fsync_dir(self.root)
            files.fsync_dir(self.root.parent)

    def refuse_links(self) -> None:
        """Files are taken from these folders and deleted in them, which must not happen elsewhere.

        Raises:
            UnsafeFileError: one of them is a link, or no folder.
        """
        for folder in (self.root, self.queue_dir, self.active_dir, self.trash_dir):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if not stat.S_ISDIR(folder.lstat().st_mode):
                    raise UnsafeFileError(f"{folder} must be a folder and is a link or a file: remove it")

    def read_settings(self) -> UploadSettings:
        """
        Raises:
            OSError, ValueError: they are not there or not ours.
        """
        return UploadSettings.from_dict(read_json_object(self.settings_path))

    def write_settings(self, settings: UploadSettings) -> None:
        files.write_json(self.settings_path, asdict(settings), mode=0o600)

    def names(self, folder: Path) -> list[str]:
        """Entries of queue or active, oldest first."""
        try:
            return sorted(path.name for path in folder.iterdir() if _ITEM_NAME.fullmatch(path.name))
        except FileNotFoundError:
            return []

    def read_item(self, home: Path) -> Item:
        """
        Raises:
            OSError, ValueError: it is not there, not whole, or not ours.
        """
        root = self._folders.get(home.name, home / "files")
        if not all(stat.S_ISDIR(path.lstat().st_mode) for path in (home, root)):
            raise ValueError("it is no folder with files/")
        return Item.from_dict(read_json_object(home / "item.json"), root, home)

    def pending(self) -> list[str]:
        """Plain names of what has not arrived, oldest first."""
        # In the order in which an item goes through them, so that none moves past us.
        copied = self.copies.names
        found = {*self.names(self.queue_dir)} | {*self.names(self.active_dir)}
        plain = [_plain(name) for name in sorted(found)]
        return plain + [name for name in copied if name not in plain]

    def discard(self, home: Path) -> bool:
        """Gives an item up; its files are deleted later. False if the other side was faster."""
        try:
            home.rename(self.trash_dir / f"{home.name}.{time.monotonic_ns()}")
        except FileNotFoundError:
            return False
        return True

    # ------------------------------------------------------------------ trainer

    def try_own(self) -> bool:
        """Makes this the one process that fills the spool, until `release` or its end. False: another one is."""
        if self._owner_fd is None:
            self._owner_fd = _locked(self.root / "owner.lock")
        return self._owner_fd is not None

    def release(self) -> None:
        if self._owner_fd is not None:
            os.close(self._owner_fd)
            self._owner_fd = None

    def add(self, item: Item) -> Path:
        """Puts hard links of the item's files into the queue; returns before any content is read.

        Where links are impossible (other file system, no such feature), the files are opened and copied in the
        background (`copies`). Nothing is fsynced, because the training loop waits here: a kill loses nothing, and
        after a power cut `problems` tells and the checkpoint is linked again.
        Who deletes the checkpoint makes the queue durable before (`Hub.pending_dirs`).

        Raises:
            UnsafeFileError: a file of it is a link. OSError: it is not there, or the disk refuses.
        """
        present = [int(n[:8]) for d in (self.queue_dir, self.active_dir) for n in self.names(d)]
        self._last_number = 1 + max([self._last_number, *present])
        home = self.root / f"tmp-{self._last_number:08d}-{item.name}-{os.getpid()}"
        target = self.queue_dir / f"{self._last_number:08d}-{item.name}"
        (home / "files").mkdir(parents=True)
        try:
            return self._fill(item, home, target)
        except (OSError, UnsafeFileError):
            files.remove_tree(home)
            raise

    def _fill(self, item: Item, home: Path, target: Path) -> Path:
        copies: list[tuple[BinaryIO, Path]] = []
        with contextlib.ExitStack() as opened:
            for entry in item.files:
                path = home / "files" / entry.path
                path.parent.mkdir(parents=True, exist_ok=True)
                source = item.source(entry.path)
                if not _try_link(source, path):
                    copies.append((opened.enter_context(files.open_read(source)), path))
                reached("linked")
            records.write_new(home / "item.json", json.dumps(item.to_dict()).encode())
            reached("described")
            if copies:
                is_checkpoint = item.kind == "checkpoint"
                self.copies.add(Copy(item.name, is_checkpoint, copies, opened.pop_all(), home, target))
                return target
        home.rename(target)
        reached("queued")
        return target

    def add_reference(self, item: Item) -> None:
        """Queues a folder as it lies, without links: for a push by hand from this process, which nobody overtakes."""
        home = self.queue_dir / f"00000001-{item.name}"
        home.mkdir()
        records.write_new(home / "item.json", json.dumps(item.to_dict()).encode())
        self._folders[home.name] = item.root

    def clean_up(self) -> dict[str, str]:
        """Removes what a killed trainer left half linked and a power cut left incomplete; only the owner may.

        Returns: what is wrong with each upload that was given up, by plain name.
        """
        broken: dict[str, str] = {}
        for path in self.root.glob("tmp-*"):
            files.remove_tree(path)
        for path in self.root.glob(".*.tmp-*"):
            files.remove_file(path)
        for home in [folder / name for folder in (self.queue_dir, self.active_dir) for name in self.names(folder)]:
            if (problem := self._problem(home)) is not None and self.discard(home):
                broken[_plain(home.name)] = problem
        return broken

    def _problem(self, home: Path) -> str | None:
        try:
            return next(self.read_item(home).problems(), None)
        except (OSError, ValueError) as error:
            return str(error)

    def pass_over(self, keep: str, prefix: str = "checkpoint-") -> list[str]:
        """Gives up queued items of this prefix older than item `keep`: the newest wins. Returns their plain names."""
        older = [n for n in self.names(self.queue_dir) if n < keep and _plain(n).startswith(prefix)]
        return [_plain(n) for n in older if self.discard(self.queue_dir / n)]

    def drop_beyond(self, limit_bytes: int) -> list[str]:
        """Gives up the oldest queued checkpoints until the spool holds at most `limit_bytes`. Returns plain names."""
        sizes = {n: self._bytes(self.queue_dir / n) for n in self.names(self.queue_dir)}
        held = sum(sizes.values()) + sum(self._bytes(self.active_dir / n) for n in self.names(self.active_dir))
        dropped = []
        for name, size in sizes.items():
            is_checkpoint = _plain(name).startswith("checkpoint-")  # the final model is never given up
            if held > limit_bytes and is_checkpoint and self.discard(self.queue_dir / name):
                dropped.append(_plain(name))
                held -= size
        return dropped

    def held_bytes(self) -> int:
        homes = [d / n for d in (self.queue_dir, self.active_dir) for n in self.names(d)]
        return sum(self._bytes(home) for home in homes)

    def _bytes(self, home: Path) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self.read_item(home).total_bytes
        return 0

    def record(self, *, passed_over: Iterable[str] = (), dropped: Iterable[str] = ()) -> None:
        """Counts uploads that will not be made, for run.json."""
        ledger = self.read_ledger()
        ledger["passed_over"] = [*ledger["passed_over"], *passed_over]
        ledger["dropped"] = [*ledger["dropped"], *dropped]
        records.write_quietly(self.ledger_path, ledger)

    def read_ledger(self) -> dict[str, Any]:
        return records.read_ledger(self.ledger_path)

    # ------------------------------------------------------------------ uploader

    def claim(self, limit: int = 1) -> list[Item]:
        """Takes over the oldest queued items; those already claimed (by an uploader that died) come first."""
        for name in self.names(self.queue_dir):
            if len(self.names(self.active_dir)) >= limit:
                break
            with contextlib.suppress(FileNotFoundError):  # the trainer may just have dropped it
                (self.queue_dir / name).rename(self.active_dir / name)
                reached("claimed")
        return [item for name in self.names(self.active_dir)[:limit] if (item := self._claimed(self.active_dir / name))]

    def _claimed(self, home: Path) -> Item | None:
        try:
            return self.read_item(home)
        except (OSError, ValueError) as error:
            self.tell(f"Hub: {home} is no upload of this run and was put aside: {error}")
            self.discard(home)
            return None

    def empty_trash(self) -> None:
        for path in self.trash_dir.glob("*"):
            files.remove_tree(path)

    def read_journal(self) -> dict[str, Any]:
        return records.read_journal(self.journal_path)

    def write_journal(self, journal: dict[str, Any]) -> None:
        files.write_json(self.journal_path, journal, mode=0o600)

    def write_status(self, status: dict[str, Any]) -> None:
        records.write_quietly(self.status_path, status)

    def read_status(self) -> dict[str, Any]:
        return records.read_status(self.status_path)

    def tell(self, text: str) -> None:
        """Adds a line for the run's progress display."""
        line = json.dumps({"time": time.time(), "text": text}) + "\n"
        with contextlib.suppress(OSError):
            json_lines.append(self.events_path, line.encode(), mode=0o600)

    @contextlib.contextmanager
    def uploader_lock(self, wait_s: float) -> Iterator[bool]:
        """Held by the one process that uploads; yields False where another holds it for longer than `wait_s`."""
        end = time.monotonic() + wait_s
        while (fd := _locked(self.root / "uploader.lock")) is None and time.monotonic() < end:
            time.sleep(0.1)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)


def _plain(name: str) -> str:
    """`checkpoint-500` of `00000007-checkpoint-500`."""
    return name.partition("-")[2]


def _try_link(source: Path, path: Path) -> bool:
    """Makes a hard link. False where links cannot be made here; any other error is one, a file in the way too."""
    try:
        os.link(source, path, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _locked(path: Path) -> int | None:
    """A descriptor that holds this file's lock until it is closed; None where another process holds it.

    On a file system without locks everybody gets it: a second uploader would only compare with the Hub once more, and
    the lock of output_dir keeps a second run away.
    """
    fd = files.open_fd(path, os.O_RDWR | os.O_CREAT, mode=0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        pass
    return fd
