"""The spool: what still has to go to the Hub, as folders of hard links, and the journal of what arrived.

```
.hub/settings.json   where and how to push                              written by the trainer
     ledger.json     uploads passed over or dropped                     written by the trainer
     queue/N-NAME/   item.json and files/, complete once it is here     made by the trainer
     active/N-NAME/  claimed                                            renamed by the uploader
     trash/          given up or done; deleted by the uploader
     journal.json    what is on the Hub, times of commits               written by the uploader
     status.json     what it does now        events.jsonl  news for the progress line
```
Every change of hands is one rename, so a kill of either side at any moment leaves each upload in exactly one place.
An item changes nothing on the Hub twice: the uploader compares with what is there before it commits.
Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from launcher.base import files, manifest
from launcher.base.errors import DamagedCheckpointError

on_state: Callable[[str], None] | None = None
"""Called with the name of every state that is reached; the fault tests kill the process there."""

_MODEL_FILE = re.compile(r"^[^.].*\.(safetensors|json|txt|model|jinja|tiktoken)$")
_NOT_MODEL = {"run.json", "manifest.json", "trainer_state.json", "report.json"}
_ITEM_NAME = re.compile(r"^(\d{8})-(.+)$")


def reached(state: str) -> None:
    """Marks a state of the journal for the fault tests."""
    if on_state is not None:
        on_state(state)


@dataclass(frozen=True)
class UploadSettings:
    """Everything the uploader process needs to know. Never a token.

    The last six are not settings of a run: the Hub's limits and our patience, changed in tests only.
    """

    run_dir: str
    strategy: str
    run_name: str = "run"
    repo_id: str | None = None
    bucket: str | None = None
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    save_total_limit: int | None = None
    max_bytes_per_s: float | None = None
    timeout_s: float = 60.0
    commits_per_hour: int = 100
    squash_interval_s: float = 3600.0
    backoff_base_s: float = 2.0
    backoff_max_s: float = 300.0
    recheck_s: float = 1800.0
    """Seconds between tries after an error that only the user can mend."""

    @property
    def is_newest_enough(self) -> bool:
        """Whether a newer checkpoint makes an older one in the queue pointless."""
        return self.strategy in ("every_save", "checkpoint")


@dataclass(frozen=True)
class SpoolFile:
    """A file to upload: path relative to the item's folder, length in bytes, sha256 in hex where it is known."""

    path: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Item:
    """One upload. `kind`: checkpoint, final (the model at the end), or folder (pushed by hand)."""

    kind: str
    name: str
    step: int | None
    files: tuple[SpoolFile, ...]
    folder: str | None = None
    """Where the files lie if not in the spool itself."""
    home: Path = field(default=Path(), compare=False)

    @property
    def root(self) -> Path:
        return Path(self.folder) if self.folder else self.home / "files"

    @property
    def total_bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    @property
    def missing(self) -> list[str]:
        """Files that are not there at their length (an item that a power cut left incomplete)."""
        return [f.path for f in self.files if _size(self.root / f.path) != f.bytes]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def checkpoint_item(step: int, folder: Path) -> Item:
    """Describes a committed checkpoint; names, lengths and hashes come from its manifest, nothing is read again.

    Raises:
        OSError, DamagedCheckpointError: the manifest cannot be read.
    """
    entries = [SpoolFile(e.path, e.bytes, e.sha256) for e in manifest.read(folder).files]
    entries.append(SpoolFile(manifest.NAME, (folder / manifest.NAME).stat().st_size))
    return Item("checkpoint", f"checkpoint-{step}", step, tuple(entries), str(folder))


def model_item(folder: Path, step: int | None, kind: str = "final", name: str = "model") -> Item:
    """Describes the model files at the top of a folder; whatever else lies there is left out."""
    entries = [
        SpoolFile(p.name, p.stat().st_size)
        for p in sorted(folder.iterdir())
        if p.is_file() and not p.is_symlink() and _MODEL_FILE.match(p.name) and p.name not in _NOT_MODEL
    ]
    return Item(kind, name, step, tuple(_with_known_hashes(folder, entries)), str(folder))


def _with_known_hashes(folder: Path, entries: list[SpoolFile]) -> Iterator[SpoolFile]:
    """Takes the hash of a file that is a hard link of a checkpoint's from that checkpoint's manifest."""
    known: dict[int, str] = {}
    for path in (p for p in folder.glob("checkpoint-*") if (p / manifest.NAME).is_file()):
        with contextlib.suppress(OSError, DamagedCheckpointError):
            for hashed in manifest.read(path).files:
                if "/" not in hashed.path:
                    known[(path / hashed.path).stat().st_ino] = hashed.sha256
    for entry in entries:
        yield SpoolFile(entry.path, entry.bytes, known.get((folder / entry.path).stat().st_ino))


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
        self._copies: list[threading.Thread] = []

    # ------------------------------------------------------------------ both sides

    def prepare(self) -> None:
        """Makes the folders; leaves what is there."""
        for folder in (self.queue_dir, self.active_dir, self.trash_dir):
            folder.mkdir(parents=True, exist_ok=True)

    def read_settings(self) -> UploadSettings:
        known = {f.name for f in fields(UploadSettings)}
        raw: dict[str, Any] = files.read_json(self.settings_path)
        return UploadSettings(**{k: v for k, v in raw.items() if k in known})

    def names(self, folder: Path) -> list[str]:
        """Entries of queue or active, oldest first."""
        try:
            return sorted(path.name for path in folder.iterdir() if _ITEM_NAME.match(path.name))
        except FileNotFoundError:
            return []

    def read_item(self, home: Path) -> Item:
        """
        Raises:
            OSError, ValueError, KeyError: it is not there or not whole.
        """
        raw = files.read_json(home / "item.json")
        entries = tuple(SpoolFile(**f) for f in raw["files"])
        return Item(raw["kind"], raw["name"], raw["step"], entries, raw["folder"], home)

    def pending(self) -> list[str]:
        """Plain names of what has not arrived, oldest first."""
        # In the order in which an item goes through them, so that none moves past us.
        copied = [t.name for t in self._copies if t.is_alive()]
        found = {*self.names(self.queue_dir)} | {*self.names(self.active_dir)}
        plain = [name.split("-", 1)[1] for name in sorted(found)]
        return plain + [name for name in copied if name not in plain]

    def discard(self, home: Path) -> bool:
        """Gives an item up; its files are deleted later. False if the other side was faster."""
        try:
            home.rename(self.trash_dir / f"{home.name}.{time.monotonic_ns()}")
        except FileNotFoundError:
            return False
        return True

    # ------------------------------------------------------------------ trainer

    def add(self, item: Item) -> Path:
        """Puts hard links of the item's files into the queue; returns before any content is read.

        Where links are impossible (other file system, no such feature), the files are opened and copied in the
        background: an open file survives the deletion of its folder. Nothing is fsynced, because the training loop
        waits here: a kill loses nothing, and after a power cut `missing` tells and the checkpoint is linked again.
        """
        number = 1 + max((int(n[:8]) for d in (self.queue_dir, self.active_dir) for n in self.names(d)), default=0)
        home = self.root / f"tmp-{number:08d}-{item.name}"
        shutil.rmtree(home, ignore_errors=True)
        target = self.queue_dir / f"{number:08d}-{item.name}"
        copies: list[tuple[BinaryIO, Path]] = []
        for entry in item.files:
            path = home / "files" / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            source = item.root / entry.path
            try:
                os.link(source, path)
            except OSError:
                copies.append((source.open("rb"), path))
            reached("linked")
        description = {**asdict(item), "folder": None}
        del description["home"]
        (home / "item.json").write_text(json.dumps(description), encoding="utf-8")
        reached("described")
        if copies:
            thread = threading.Thread(target=self._copy, args=(copies, home, target), name=item.name, daemon=True)
            self._copies = [t for t in self._copies if t.is_alive()] + [thread]
            thread.start()
        else:
            home.rename(target)
            reached("queued")
        return target

    def add_reference(self, item: Item) -> None:
        """Queues a folder as it is, without links: for a push by hand, where nobody deletes it meanwhile."""
        home = self.root / f"tmp-00000001-{item.name}"
        home.mkdir(parents=True, exist_ok=True)
        description = {k: v for k, v in asdict(item).items() if k != "home"}
        (home / "item.json").write_text(json.dumps(description), encoding="utf-8")
        home.rename(self.queue_dir / f"00000001-{item.name}")

    @staticmethod
    def _copy(copies: list[tuple[BinaryIO, Path]], home: Path, target: Path) -> None:
        try:
            for source, path in copies:
                with source, path.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 24)
            home.rename(target)
        except OSError:  # full disk: the checkpoint itself is safe, and the next start queues it again
            shutil.rmtree(home, ignore_errors=True)

    def wait_for_copies(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        for thread in self._copies:
            thread.join(max(0.0, end - time.monotonic()))

    def clean_up(self) -> None:
        """Removes what a killed trainer left half linked."""
        for path in self.root.glob("tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def pass_over(self, keep: str, prefix: str = "checkpoint-") -> list[str]:
        """Gives up queued items of this prefix older than item `keep`: the newest wins. Returns their plain names."""
        older = [n for n in self.names(self.queue_dir) if n < keep and n.split("-", 1)[1].startswith(prefix)]
        return [n.split("-", 1)[1] for n in older if self.discard(self.queue_dir / n)]

    def drop_beyond(self, limit_bytes: int) -> list[str]:
        """Gives up the oldest queued checkpoints until the spool holds at most `limit_bytes`. Returns plain names."""
        sizes = {n: self._bytes(self.queue_dir / n) for n in self.names(self.queue_dir)}
        held = sum(sizes.values()) + sum(self._bytes(self.active_dir / n) for n in self.names(self.active_dir))
        dropped = []
        for name, size in sizes.items():
            is_checkpoint = name.split("-", 1)[1].startswith("checkpoint-")  # the final model is never given up
            if held > limit_bytes and is_checkpoint and self.discard(self.queue_dir / name):
                dropped.append(name.split("-", 1)[1])
                held -= size
        return dropped

    def held_bytes(self) -> int:
        homes = [d / n for d in (self.queue_dir, self.active_dir) for n in self.names(d)]
        return sum(self._bytes(home) for home in homes)

    def _bytes(self, home: Path) -> int:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return self.read_item(home).total_bytes
        return 0

    def record(self, *, passed_over: Iterable[str] = (), dropped: Iterable[str] = ()) -> None:
        """Counts uploads that will not be made, for run.json."""
        ledger = self.read_ledger()
        ledger["passed_over"] = [*ledger["passed_over"], *passed_over]
        ledger["dropped"] = [*ledger["dropped"], *dropped]
        _write_quietly(self.ledger_path, ledger)

    def read_ledger(self) -> dict[str, list[str]]:
        return {"passed_over": [], "dropped": [], **files.read_json_or(self.ledger_path, {})}

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
        except (OSError, ValueError, KeyError, TypeError):
            self.discard(home)
            return None

    def empty_trash(self) -> None:
        for path in self.trash_dir.glob("*"):
            files.remove_tree(path)

    def read_journal(self) -> dict[str, Any]:
        return {
            "repo_id": None,
            "pushed": {},
            "failed": {},
            "passed_over": [],
            "commit_times": [],
            "last_squash": None,
            "commits_since_squash": 0,
            "card": {},
            **files.read_json_or(self.journal_path, {}),
        }

    def write_journal(self, journal: dict[str, Any]) -> None:
        files.write_json(self.journal_path, journal)

    def write_status(self, status: dict[str, Any]) -> None:
        _write_quietly(self.status_path, status)

    def read_status(self) -> dict[str, Any]:
        status = files.read_json_or(self.status_path, {})
        return status if isinstance(status, dict) else {}

    def tell(self, text: str) -> None:
        """Adds a line for the run's progress display."""
        with contextlib.suppress(OSError), self.events_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "text": text}) + "\n")

    @contextlib.contextmanager
    def uploader_lock(self, wait_s: float) -> Iterator[bool]:
        """Held by the one process that uploads; yields False where another holds it for longer than `wait_s`."""
        with (self.root / "uploader.lock").open("a") as file:
            end, is_mine = time.monotonic() + wait_s, False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_mine = True
                except BlockingIOError:
                    if time.monotonic() < end:
                        time.sleep(0.1)
                        continue
                except OSError:  # a file system without locks: two uploaders would only compare twice
                    is_mine = True
                break
            yield is_mine


def _write_quietly(path: Path, value: Any) -> None:
    """Replaces a JSON file atomically but without fsync: it may be lost in a power cut, and nobody waits for a disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.rename(path)
