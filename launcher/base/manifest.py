"""manifest.json: what a whole checkpoint consists of. Written last; standard library only."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from launcher.base import block_io
from launcher.base.errors import DamagedCheckpointError

FORMAT = "launcher-checkpoint"
FORMAT_VERSION = 1
NAME = "manifest.json"
_HASH = "manifest_sha256"
CHUNK_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**21
_READ_BYTES = 2**18
"""Of the page cache at once, into memory that stays in the processor's cache; hashing is all that is left to pay."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: path relative to its folder, length in bytes, and hashes in hex."""

    path: str
    bytes: int
    sha256: str
    chunk_sha256: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "chunk_sha256": list(self.chunk_sha256)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> FileEntry:
        return cls(str(raw["path"]), int(raw["bytes"]), str(raw["sha256"]), tuple(raw["chunk_sha256"]))


@dataclass(frozen=True)
class Manifest:
    """What the folder holds and how it was made; `step` counts optimizer steps."""

    step: int
    world_size: int
    zero_stage: int
    files: tuple[FileEntry, ...]
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    def to_json(self) -> bytes:
        value = {"format": FORMAT, **vars(self), "files": [entry.to_dict() for entry in self.files]}
        return (json.dumps({**value, _HASH: _own_hash(value)}, indent=1) + "\n").encode()


_KEYS = {"format", *(f.name for f in fields(Manifest))}


def _own_hash(value: dict[str, Any]) -> str:
    """Of a manifest's content without this hash, so that a flipped bit in the manifest itself is found too."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> FileEntry:
    """Reads every byte once, past the page cache where the file system can do that.

    Returns: an entry whose path is only the file's name.
    """
    size = path.stat().st_size
    whole, chunks = hashlib.sha256(), []
    chunk, read = hashlib.sha256(), 0
    for block in block_io.read_blocks(path, min(_BLOCK_BYTES, CHUNK_BYTES)):
        whole.update(block)
        read += len(block)
        if size > CHUNK_BYTES:  # else the file's hash is that of its only chunk
            chunk.update(block)
            if read % CHUNK_BYTES == 0 or read == size:
                chunks.append(chunk.hexdigest())
                chunk = hashlib.sha256()
    if read != size:
        raise OSError(errno.EIO, f"{read} of {size} bytes could be read", str(path))
    if 0 < size <= CHUNK_BYTES:
        chunks = [whole.hexdigest()]
    return FileEntry(path.name, size, whole.hexdigest(), tuple(chunks))


def hash_files(folder: Path, paths: Iterable[str], threads: int = 2) -> list[FileEntry]:
    """Hashes files of a folder, as they are read back from the file system. `paths` are relative to it."""
    ordered = list(paths)
    with ThreadPoolExecutor(threads) as pool:  # hashlib releases the GIL
        hashed = pool.map(lambda path: hash_file(folder / path), ordered)
        return [replace(entry, path=path) for entry, path in zip(hashed, ordered, strict=True)]


def build(folder: Path, *, step: int, world_size: int, zero_stage: int, hashed: Iterable[FileEntry] = ()) -> Manifest:
    """Lists every file below `folder`; hashes those that are not among `hashed`.

    Raises:
        OSError: one of `hashed` has another length than it had.
    """
    known = {entry.path: entry for entry in hashed}
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME)
    names = [p.relative_to(folder).as_posix() for p in paths]
    for name, path in zip(names, paths, strict=True):
        if name in known and path.stat().st_size != known[name].bytes:
            raise OSError(errno.EIO, "its length has changed since it was hashed", str(path))
    known |= {entry.path: entry for entry in hash_files(folder, [n for n in names if n not in known])}
    return Manifest(step, world_size, zero_stage, tuple(known[name] for name in names))


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        FileNotFoundError: there is none, so the folder is not ours.
        DamagedCheckpointError: it cannot be read, or a newer version of the product wrote it.
    """
    path = folder / NAME
    try:
        text = path.read_bytes()
        raw = json.loads(text)
        version = raw["format_version"]
        if _is_newer(raw):
            raise DamagedCheckpointError(
                f"{folder} was written by a newer launcher (format_version {version}, this one reads "
                f"{FORMAT_VERSION}): pip install --upgrade accelerate-launcher"
            )
        own_hash = raw.pop(_HASH, None)
        if set(raw) != _KEYS or (own_hash is not None and (own_hash != _own_hash(raw) or text[-1:] != b"\n")):
            raise ValueError("it does not match its own hash")
        entries = tuple(map(FileEntry.from_dict, raw["files"]))
        manifest = Manifest(int(raw["step"]), int(raw["world_size"]), int(raw["zero_stage"]), entries, int(version))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error!r}") from error
    for entry in manifest.files:
        if entry.path.startswith("/") or ".." in Path(entry.path).parts:
            raise DamagedCheckpointError(f"{path} names a file outside its folder: {entry.path}")
    return manifest


def is_newer_format(folder: Path) -> bool:
    """Whether a later version wrote it: then it is whole, but not for us."""
    try:
        return _is_newer(json.loads((folder / NAME).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_newer(raw: dict[str, Any]) -> bool:
    version = raw["format_version"]
    if not isinstance(version, int) or version <= FORMAT_VERSION:
        return False
    # One flipped bit makes a 3, 5 or 9 of our 1: then the hash is still that of our version.
    ours = {**raw, "format_version": FORMAT_VERSION}
    is_flipped = (version ^ FORMAT_VERSION).bit_count() == 1 and ours.pop(_HASH, None) == _own_hash(ours)
    return not is_flipped


def structural_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Missing files and wrong lengths; reads no content."""
    problems = []
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            problems.append(f"{entry.path} is missing")
        elif (size := path.stat().st_size) != entry.bytes:
            problems.append(f"{entry.path} has {size} bytes instead of {entry.bytes}")
    return problems


def chunks(manifest: Manifest) -> Iterator[tuple[FileEntry, int]]:
    """Every (file, chunk index): the units in which processes share the reading."""
    for entry in manifest.files:
        for index in range(len(entry.chunk_sha256)):
            yield entry, index


def chunk_problem(folder: Path, entry: FileEntry, index: int) -> str | None:
    """Re-reads one chunk; says what is wrong with it, or None."""
    offset = start = index * CHUNK_BYTES
    end = min(start + CHUNK_BYTES, entry.bytes)
    digest, view = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    try:
        with (folder / entry.path).open("rb", buffering=0) as file:
            file.seek(start)
            while offset < end and (count := file.readinto(view[: end - offset])):
                digest.update(view[:count])
                offset += count
    except OSError as error:
        return f"{entry.path} cannot be read: {error}"
    if digest.hexdigest() != entry.chunk_sha256[index]:
        return f"{entry.path} does not match its hash in bytes {start} to {end}"
    return None


def verify(folder: Path, share: int = 0, shares: int = 1, threads: int = 2) -> list[str]:
    """Every problem of a checkpoint, re-reading the `share`-th of `shares` parts of its bytes.

    Raises:
        FileNotFoundError: no manifest.
    """
    try:
        manifest = read(folder)
    except DamagedCheckpointError as error:
        return [str(error)]
    problems = structural_problems(folder, manifest)
    if problems:
        return problems
    mine = [unit for i, unit in enumerate(chunks(manifest)) if i % shares == share]
    with ThreadPoolExecutor(threads) as pool:
        return [p for p in pool.map(lambda unit: chunk_problem(folder, *unit), mine) if p]


def unknown_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are in the folder but not in the manifest; they are ignored."""
    known = {f.path for f in manifest.files} | {NAME}
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name not in known)
