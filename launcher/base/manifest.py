"""manifest.json: what a whole checkpoint consists of. Written last; standard library only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from launcher.base import block_io, files
from launcher.base.errors import DamagedCheckpointError
from launcher.base.inner_files import is_inner_path

FORMAT = "launcher-checkpoint"
FORMAT_VERSION = 2
"""1: every state under its parameter's name, experts under their names in memory, frozen parameters left out."""
NAME = "manifest.json"
_HASH = "manifest_sha256"
CHUNK_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**21
_READ_BYTES = 2**18
"""Of the page cache at once, into memory that stays in the processor's cache; hashing is all that is left to pay."""


_MAX_VERSION = 1000
_MAX_COUNT = 2**53
"""Of steps, processes and bytes: beyond it JSON numbers are not exact any more."""
_HASH_TEXT = re.compile(r"[0-9a-f]{64}")

Role = Literal["weights", "model", "card", "state"]
"""`model`: what from_pretrained reads beside the weights: config, tokenizer, chat template."""


def role_of(path: str) -> Role:
    """What a file of a checkpoint is there for, by its path in the folder."""
    if path.startswith("state/") or path in ("trainer_state.json", NAME):
        return "state"
    if path == "README.md":
        return "card"
    return "weights" if ".safetensors" in path else "model"


_TEMPLATES_DIR = "additional_chat_templates"
"""Where transformers keeps a tokenizer's templates beside the default one."""
_MODEL_FILE = re.compile(r"[^.][^/]*\.(safetensors|json|txt|model|jinja|tiktoken)")
_OF_A_RUN = {"run.json", "sweep.json", "report.json", "trainer_state.json", NAME}


def model_files(folder: Path) -> list[str]:
    """The weights and model files of a folder without a manifest: the top of a run, an exported model; links too."""
    with os.scandir(folder) as entries:
        kinds = {e.name: e.is_symlink() or e.is_file(follow_symlinks=False) for e in entries}
    names = [n for n, is_file in kinds.items() if is_file and _MODEL_FILE.fullmatch(n) and n not in _OF_A_RUN]
    if kinds.get(_TEMPLATES_DIR) is False:
        names += [f"{_TEMPLATES_DIR}/{n}" for n in os.listdir(folder / _TEMPLATES_DIR) if n.endswith(".jinja")]  # noqa: PTH208
    return sorted(names)


def holds_model(folder: Path) -> bool:
    """Whether a model or an adapter lies at the top of a folder, with every shard that its index names."""
    try:
        names = set(model_files(folder))
    except OSError:
        return False
    maps = [files.read_json_or(folder / n, {}).get("weight_map") for n in names if n.endswith(".index.json")]
    shards = {str(shard) for found in maps if isinstance(found, dict) for shard in found.values()}
    has_weights = any(name.endswith(".safetensors") for name in names)
    return has_weights and shards <= names and not names.isdisjoint({"config.json", "adapter_config.json"})


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: path relative to its folder, length in bytes, and hashes in hex."""

    path: str
    bytes: int
    sha256: str
    chunk_sha256: tuple[str, ...]

    @property
    def role(self) -> Role:
        return role_of(self.path)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "chunk_sha256": list(self.chunk_sha256)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> FileEntry:
        """
        Raises:
            ValueError: it describes no file of a checkpoint. KeyError, TypeError: it is of another form.
        """
        path, size, whole, chunks = raw["path"], _count(raw, "bytes"), raw["sha256"], raw["chunk_sha256"]
        if not is_inner_path(path) or path == NAME:
            raise ValueError(f"it names a file outside its folder: {path!r:.200}")
        if not isinstance(chunks, list) or len(chunks) != -(-size // CHUNK_BYTES):
            raise ValueError(f"the hashes of {path} are not those of {size} bytes")
        if not all(isinstance(h, str) and _HASH_TEXT.fullmatch(h) for h in (whole, *chunks)):
            raise ValueError(f"the hashes of {path} are no hashes")
        if len(chunks) == 1 and chunks[0] != whole:
            raise ValueError(f"the hashes of {path} contradict each other")
        return cls(path, size, whole, tuple(chunks))


def _count(raw: dict[str, Any], key: str, low: int = 0, high: int = _MAX_COUNT) -> int:
    value = raw[key]
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key} is {value!r:.100}")
    return value


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

    @property
    def paths(self) -> frozenset[str]:
        """The only files that a load of this checkpoint reads, whatever else lies beside them."""
        return frozenset(entry.path for entry in self.files)

    def to_json(self) -> bytes:
        value = {"format": FORMAT, **vars(self), "files": [entry.to_dict() for entry in self.files]}
        return (json.dumps({**value, _HASH: _own_hash(value)}, indent=1) + "\n").encode()


_KEYS = {"format", *(f.name for f in fields(Manifest))}


def _own_hash(value: dict[str, Any]) -> str:
    """Of a manifest's content without this hash, so that a flipped bit in the manifest itself is found too."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path, within: Path | None = None) -> FileEntry:
    """Reads every byte once, past the page cache where the file system can do that.

    Returns: an entry whose path is only the file's name.
    """
    size = path.lstat().st_size
    whole, chunks = hashlib.sha256(), []
    chunk, read = hashlib.sha256(), 0
    for block in block_io.read_blocks(path, min(_BLOCK_BYTES, CHUNK_BYTES), within):
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
        hashed = pool.map(lambda path: hash_file(folder / path, folder.parent), ordered)
        return [replace(entry, path=path) for entry, path in zip(hashed, ordered, strict=True)]


def build(folder: Path, *, step: int, world_size: int, zero_stage: int, hashed: Iterable[FileEntry] = ()) -> Manifest:
    """Lists every file below `folder`; hashes those that are not among `hashed`.

    Raises:
        OSError: one of `hashed` has another length than it had.
    """
    known = {entry.path: entry for entry in hashed}
    names = [name for name in files.list_files(folder) if name != NAME]
    for name in names:
        if name in known and (folder / name).lstat().st_size != known[name].bytes:
            raise OSError(errno.EIO, "its length has changed since it was hashed", str(folder / name))
    known |= {entry.path: entry for entry in hash_files(folder, [n for n in names if n not in known])}
    return Manifest(step, world_size, zero_stage, tuple(known[name] for name in names))


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        FileNotFoundError: there is none, so it is no checkpoint of ours. DamagedCheckpointError: see `parse`.
    """
    path = folder / NAME
    try:
        data = files.read_bytes(path, files.MAX_JSON_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    return parse(data, path)


def bytes_of(folder: Path) -> int:
    """What a checkpoint of ours takes on disk; 0 where it is none, or damaged."""
    try:
        return read(folder).total_bytes
    except (OSError, DamagedCheckpointError):
        return 0


def parse(data: bytes, path: Path) -> Manifest:
    """A manifest from its text; `path` is for messages.

    Raises:
        DamagedCheckpointError: it cannot be read, is of a newer version, or names files outside its folder.
    """
    try:
        raw = files.parse_json(data)
        if _is_newer(raw):
            raise DamagedCheckpointError(
                f"{path.parent} was written by a newer launcher (format_version {raw['format_version']}, this one "
                f"reads {FORMAT_VERSION}): pip install --upgrade accelerate-launcher"
            )
        own_hash = raw.pop(_HASH, None)
        if set(raw) != _KEYS or (own_hash is not None and (own_hash != _own_hash(raw) or data[-1:] != b"\n")):
            raise ValueError("it does not match its own hash")
        if raw["format"] != FORMAT:
            raise ValueError(f"format is {raw['format']!r:.100}")
        entries = tuple(map(FileEntry.from_dict, raw["files"]))
        if len({entry.path for entry in entries}) != len(entries):
            raise ValueError("it names a file twice")
        step, world_size = _count(raw, "step"), _count(raw, "world_size", low=1)
        zero_stage, version = (
            _count(raw, "zero_stage", high=3),
            _count(raw, "format_version", low=1, high=FORMAT_VERSION),
        )
        return Manifest(step, world_size, zero_stage, entries, version)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error!r:.500}") from error


def is_newer_format(folder: Path) -> bool:
    """Whether a later version wrote it: then it is whole, but not for us."""
    try:
        return _is_newer(files.read_json(folder / NAME))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_newer(raw: dict[str, Any]) -> bool:
    version = raw["format_version"]
    if type(version) is not int or not FORMAT_VERSION < version <= _MAX_VERSION:
        return False
    # One flipped bit makes a 3, 5 or 9 of a 1: then the hash is still that of a version that we know.
    return not any(
        (version ^ known).bit_count() == 1 and _hash_fits({**raw, "format_version": known})
        for known in range(1, FORMAT_VERSION + 1)
    )


def _hash_fits(raw: dict[str, Any]) -> bool:
    own_hash: object = raw.pop(_HASH, None)
    return own_hash == _own_hash(raw)


def structural_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Missing files and wrong lengths; reads no content."""
    problems = []
    for entry in manifest.files:
        try:
            with files.open_read(folder / entry.path, within=folder) as file:
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            problems.append(f"{entry.path} is missing")
        except (OSError, ValueError) as error:
            problems.append(f"{entry.path} cannot be read: {error}")
        else:
            if size != entry.bytes:
                problems.append(f"{entry.path} has {size} bytes instead of {entry.bytes}")
    return problems


def is_complete(folder: Path, manifest: Manifest) -> bool:
    """Whether every file is there at its length, without opening any: for long lists of checkpoints."""
    root = str(folder)
    for entry in manifest.files:
        try:
            info = os.lstat(f"{root}/{entry.path}")
        except (OSError, ValueError):
            return False
        if not stat.S_ISREG(info.st_mode) or info.st_size != entry.bytes:
            return False
    return True


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
        with files.open_read(folder / entry.path, within=folder) as file:
            while offset < end and (count := os.preadv(file.fileno(), [view[: end - offset]], offset)):
                digest.update(view[:count])
                offset += count
    except OSError as error:
        return f"{entry.path} cannot be read: {error}"
    if digest.hexdigest() != entry.chunk_sha256[index]:
        return f"{entry.path} does not match its hash in bytes {start} to {end}"
    return None


def verify(
    folder: Path, share: int = 0, shares: int = 1, threads: int = 2, *, without_state: bool = False
) -> list[str]:
    """Every problem of a checkpoint, re-reading the `share`-th of `shares` parts of its bytes.

    Args:
        without_state: look at the model alone, not at what a resume needs beside it.

    Raises:
        FileNotFoundError: no manifest.
    """
    try:
        manifest = read(folder)
    except DamagedCheckpointError as error:
        return [str(error)]
    if without_state:
        manifest = replace(manifest, files=tuple(entry for entry in manifest.files if entry.role != "state"))
    problems = structural_problems(folder, manifest)
    if problems:
        return problems
    mine = [unit for i, unit in enumerate(chunks(manifest)) if i % shares == share]
    with ThreadPoolExecutor(threads) as pool:
        return [p for p in pool.map(lambda unit: chunk_problem(folder, *unit), mine) if p]


def unknown_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are in the folder but not in the manifest; they are ignored."""
    known = {f.path for f in manifest.files} | {NAME}
    try:
        return [name for name in files.list_files(folder) if name not in known]
    except OSError as error:
        return [str(error)]
