"""Which file goes to which path of the repository, and what is taken away there. Standard library only."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.base import files, manifest
from launcher.base.errors import UnsafeFileError
from launcher.base.inner_files import read_json_object
from launcher.hub.items import Item

BUCKET_MARKER = "complete.json"
_BLOCK_BYTES = 2**20
_CHECKPOINT_FILE = re.compile(r"^checkpoint-(\d+)/")
_WEIGHTS = re.compile(
    r"^(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors$|^model\.safetensors\.index\.json$|^adapter_config\.json$"
)
"""What may be deleted at the top of a repository. Fewer than have the role: others may keep files there too."""


@dataclass(frozen=True)
class LocalFile:
    """A file of an upload to have on the Hub; sha256 in hex where it is known without reading."""

    source: Path
    bytes: int
    sha256: str | None
    item: str
    path: str
    """Inside of the upload's folder."""


class DamagedFileError(Exception):
    """A file is not what the manifest of its checkpoint says; `item` is the upload's name."""

    def __init__(self, file: LocalFile) -> None:
        super().__init__(f"{file.path} does not match its hash in {manifest.NAME}")
        self.item = file.item


@dataclass(frozen=True)
class RemoteFile:
    """A file that is on the Hub: sha256 in hex for large files, git's blob id for the others."""

    bytes: int
    sha256: str | None
    blob_id: str


def wanted_files(items: Sequence[Item], strategy: str) -> dict[str, LocalFile]:
    """Path in the repository → local file, for uploads in the order of their age: the newest model is at the top.

    end, every_save: the model at the top. checkpoint: also `last-checkpoint/`. all_checkpoints: also `checkpoint-N/`.
    Each of these folders, and the top, is of one upload: never a mixture of two models' shards or templates.

    Raises:
        UnsafeFileError, OSError: a file is a link, or not there.
    """
    folders: dict[str, dict[str, LocalFile]] = {"": {}}
    for item in items:
        found = [LocalFile(item.source(f.path), f.bytes, f.sha256, item.name, f.path) for f in item.files]
        folders[""] = {f.path: f for f in found if manifest.role_of(f.path) != "state"}
        folder = {"checkpoint": "last-checkpoint", "all_checkpoints": item.name}.get(strategy)
        if item.kind == "checkpoint" and folder:
            folders[folder] = {f"{folder}/{f.path}": f for f in found}
    return {path: file for wanted in folders.values() for path, file in wanted.items()}


def stale_paths(wanted: Iterable[str], remote: Iterable[str]) -> list[str]:
    """Files on the Hub that would be mixed with what is sent: old shards at the top, leftovers in replaced folders."""
    names = set(wanted)
    replaced = {p.split("/")[0] for p in names if p.startswith(("last-checkpoint/", "checkpoint-"))}
    has_weights = any(_WEIGHTS.match(p) for p in names)
    return [
        path
        for path in remote
        if path not in names
        and ((has_weights and _WEIGHTS.match(path)) or ("/" in path and path.split("/")[0] in replaced))
    ]


def outdated_folders(wanted: Iterable[str], remote: Iterable[str], limit: int | None, best: int | None) -> list[str]:
    """Checkpoint folders on the Hub beyond `limit`; never the best or the newest, and only those with a manifest."""
    if limit is None:
        return []
    there = {p.split("/")[0] for p in remote if re.fullmatch(rf"checkpoint-\d+/{re.escape(manifest.NAME)}", p)}
    coming = {p.split("/")[0] for p in wanted if _CHECKPOINT_FILE.match(p)}
    steps = sorted({int(name.rpartition("-")[2]) for name in there | coming})
    protected = {s for s in (best, steps[-1] if steps else None) if s in steps}
    others = [s for s in steps if s not in protected]
    keep = protected | set(others[len(others) - max(0, limit - len(protected)) :] if others else [])
    return [f"checkpoint-{s}" for s in steps if s not in keep and f"checkpoint-{s}" not in coming]


def best_step(items: Iterable[Item]) -> int | None:
    """The step of the best checkpoint, as the newest upload's trainer_state.json knows it."""
    best = None
    for item in items:
        try:
            state = read_json_object(item.source("trainer_state.json"))
            best = int(str(state["best_model_checkpoint"]).rpartition("-")[2])
        except (OSError, ValueError, KeyError, UnsafeFileError):
            continue
    return best


def is_same(local: LocalFile, remote: RemoteFile, hashes: HashCache) -> bool:
    """Whether the Hub holds these bytes already. Small files are read for git's hash, large ones only if unhashed."""
    if local.bytes != remote.bytes:
        return False
    if remote.sha256 is not None:
        return (local.sha256 or hashes.sha256(local.source)) == remote.sha256
    return hashes.git_blob_id(local.source) == remote.blob_id


def is_content(data: bytes, remote: RemoteFile) -> bool:
    """The same of bytes in memory."""
    if remote.sha256 is not None:  # pictures, where the Hub keeps all that is no text as large files
        return hashlib.sha256(data).hexdigest() == remote.sha256
    return git_blob_id(data) == remote.blob_id


def git_blob_id(data: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class HashCache:
    """Hashes of local files, each read once for as long as it is the same file."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], str] = {}

    def sha256(self, path: Path) -> str:
        return self._hash("sha256", path)

    def git_blob_id(self, path: Path) -> str:
        return self._hash("blob", path)

    def _hash(self, kind: str, path: Path) -> str:
        with files.open_read(path) as file:
            stat = os.fstat(file.fileno())
            key = (kind, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if key not in self._known:
                digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
                if kind == "blob":
                    digest.update(b"blob %d\0" % stat.st_size)
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                self._known[key] = digest.hexdigest()
        return self._known[key]

    def check(self, wanted: Iterable[LocalFile]) -> None:
        """Reads files that are about to be sent (which leaves them in the page cache) and compares their hashes.

        Raises:
            DamagedFileError: one is not what the manifest of its checkpoint says.
        """
        for file in wanted:
            if file.sha256 is not None and self.sha256(file.source) != file.sha256:
                raise DamagedFileError(file)
