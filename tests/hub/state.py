"""What the test server keeps: repositories with real commits, and buckets. Content by sha256 in a folder."""

from __future__ import annotations

import hashlib
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt")
LFS_BYTES = 10 * 2**20


class ApiError(Exception):
    """An answer of the Hub's API that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers
        if code:
            self.headers["X-Error-Code"] = code
        self.headers["X-Error-Message"] = message


@dataclass(frozen=True)
class Blob:
    """A file in a commit: sha256 and git's id; is_lfs says how it was committed."""

    sha256: str
    size: int
    git_id: str
    is_lfs: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]
    time: float


@dataclass
class Repo:
    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    squashes: int = 0

    def add_commit(
        self, ref: dict[str, str], key: str, title: str, files: dict[str, Blob], parent: str | None
    ) -> Commit:
        oid = hashlib.sha1(f"{self.name}{title}{time.time_ns()}{len(self.commits)}".encode()).hexdigest()
        commit = Commit(oid, parent, title, files, time.time())
        self.commits[oid] = commit
        ref[key] = oid
        return commit

    def resolve(self, revision: str) -> Commit:
        for names in (self.branches, self.tags, self.pull_requests):
            if revision in names:
                return self.commits[names[revision]]
        if revision in self.commits:
            return self.commits[revision]
        raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, branch: str = "main") -> list[Commit]:
        """Newest first."""
        found, oid = [], self.branches.get(branch)
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found

    @property
    def files(self) -> dict[str, Blob]:
        return self.resolve("main").files


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Store:
    """Bytes by sha256: uploaded over LFS or committed inline here, uploaded over Xet in the local CAS folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cas_dir = root / "cas"
        self.cas_dir.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.root / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file() or sha256 in self.xet_hashes()

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.path(sha256).write_bytes(data)
        return sha256

    def read(self, sha256: str, size: int) -> bytes:
        if self.path(sha256).is_file():
            return self.path(sha256).read_bytes()
        return self.read_xet(self.xet_hashes()[sha256], size)

    def read_xet(self, xet_hash: str, size: int) -> bytes:
        import hf_xet

        target = self.root / f"xet-{xet_hash}"
        session = hf_xet.XetSession()
        with session.new_file_download_group(endpoint=f"local://{self.cas_dir}") as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))
        return target.read_bytes()

    def xet_hashes(self) -> dict[str, str]:
        """sha256 → Xet hash of every file in the CAS, from its shards.

        Source: Xet protocol specification, shard format: a 48-byte header, then per file a 48-byte header (hash,
        flags, number of entries), its entries, verification entries (flag bit 31) and a metadata entry (bit 30).
        """
        return {sha256: xet for sha256, xet, _ in self._files_of_shards() if sha256 is not None}

    def xet_sizes(self) -> dict[str, int]:
        """Xet hash → bytes."""
        return {xet: size for _, xet, size in self._files_of_shards()}

    def _files_of_shards(self) -> list[tuple[str | None, str, int]]:
        shards = [p for p in self.cas_dir.rglob("*.mdb") if p.is_file()]
        return [entry for path in shards for entry in _shard_files(path.read_bytes())]


def _hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _shard_files(data: bytes) -> list[tuple[str | None, str, int]]:
    found: list[tuple[str | None, str, int]] = []
    at = 48
    while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
        file_hash = data[at : at + 32]
        flags, count = struct.unpack_from("<II", data, at + 32)
        size = sum(struct.unpack_from("<I", data, at + 48 * (i + 1) + 36)[0] for i in range(count))
        at += 48 * (1 + count + (count if flags >> 31 & 1 else 0))
        sha256 = None
        if flags >> 30 & 1:
            sha256 = _hex(data[at : at + 32])
            at += 48
        found.append((sha256, _hex(file_hash), size))
    return found


@dataclass
class Bucket:
    """Mutable files by path: (Xet hash, size, time)."""

    name: str
    files: dict[str, tuple[str, int, float]] = field(default_factory=dict)


def card_problems(text: str, licenses: set[str]) -> list[str]:
    """What the Hub refuses in a README's header."""
    if not text.startswith("---\n"):
        return []
    try:
        header: Any = yaml.safe_load(text.split("---\n", 2)[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if header is None:
        return []
    if not isinstance(header, dict):
        return ["metadata is not a mapping"]
    problems = []
    if header.get("license") is not None and header["license"] not in licenses:
        problems.append('"license" must be one of the known licenses')
    base = header.get("base_model")
    for name in base if isinstance(base, list) else [base] if base else []:
        if not isinstance(name, str) or name.startswith(("/", ".")) or name.count("/") > 1:
            problems.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    languages = header.get("language") or []
    for name in [languages] if isinstance(languages, str) else languages:
        if not isinstance(name, str) or len(name) > 3:
            problems.append(f'"language" with value "{name}" is not valid')
    for entry in header.get("model-index") or []:
        for result in entry.get("results", []):
            if not {"task", "dataset", "metrics"} <= set(result) or not {"type", "name"} <= set(result["dataset"]):
                problems.append('"model-index[0].results[0]" is incomplete')
            for metric in result.get("metrics", []):
                value = metric.get("value")
                if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
                    problems.append('"model-index[0].results[0].metrics[0].value" is not a number')
    return problems
