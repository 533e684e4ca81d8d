"""What an upload is, and how the uploader process is told to send it. Standard library only.

An item or settings file may come from elsewhere with a whole run folder, so every value is checked when it is read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.base import manifest
from launcher.base.errors import DamagedCheckpointError, UnsafeFileError
from launcher.base.inner_files import inner_file, is_inner_path
from launcher.base.paths import RunPaths

STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
_KINDS = ("checkpoint", "final", "folder")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 2**60
_OF_EVERY_MODEL = ("config.json", "generation_config.json")


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
    def target(self) -> str | None:
        """The repository or bucket, as the settings name it."""
        return self.bucket or self.repo_id

    @property
    def is_newest_enough(self) -> bool:
        """Whether a newer checkpoint makes an older one in the queue pointless."""
        return self.strategy in ("every_save", "checkpoint")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> UploadSettings:
        """
        Raises:
            ValueError: a value has another type than it should.
        """
        values = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        types: dict[str, tuple[type, ...]] = {
            "str": (str,), "str | None": (str, type(None)), "bool": (bool,), "bool | None": (bool, type(None)),
            "int": (int,), "int | None": (int, type(None)), "float": (int, float),
            "float | None": (int, float, type(None)),
        }  # fmt: skip
        for f in fields(cls):
            if f.name in values and not isinstance(values[f.name], types[str(f.type)]):
                raise ValueError(f"{f.name}={values[f.name]!r} must be {f.type}")
        if values.get("strategy") not in STRATEGIES or "run_dir" not in values:
            raise ValueError(f"strategy={values.get('strategy')!r} must be one of {', '.join(STRATEGIES)}")
        return cls(**values)


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
    root: Path = field(compare=False)
    """Where the files lie."""
    home: Path = field(default=Path(), compare=False)
    """Its own folder in the spool."""

    @property
    def total_bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    def source(self, path: str) -> Path:
        """Where one of its files lies.

        Raises:
            UnsafeFileError: it is a link, or no regular file. OSError: it is not there.
        """
        return inner_file(self.root, path)

    def problems(self) -> Iterator[str]:
        """Files that are not there at their length (a power cut), or that are not this folder's own."""
        for file in self.files:
            try:
                size = self.source(file.path).lstat().st_size
            except UnsafeFileError as error:
                yield str(error)
            except OSError:
                yield f"{file.path} is missing from {self.root}"
            else:
                if size != file.bytes:
                    yield f"{file.path} has {size} bytes instead of {file.bytes}"

    def to_dict(self) -> dict[str, Any]:
        """What item.json holds: no folder, because an item of the spool brings its files with it."""
        return {"kind": self.kind, "name": self.name, "step": self.step, "files": [vars(f) for f in self.files]}

    @classmethod
    def from_dict(cls, raw: dict[str, Any], root: Path, home: Path) -> Item:
        """
        Raises:
            ValueError: it is no upload of ours; says what is wrong with it.
        """
        kind, name, step, entries = (raw.get(key) for key in ("kind", "name", "step", "files"))
        if kind not in _KINDS or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"kind={kind!r}, name={name!r} is no upload")
        if step is not None and (type(step) is not int or not 0 <= step < 2**63):
            raise ValueError(f"step={step!r} is no step")
        if kind == "checkpoint" and name != f"checkpoint-{step}":
            raise ValueError(f"name={name!r} is not the one of step {step}")
        if raw.get("folder") is not None:
            raise ValueError(f"it names another folder, {raw['folder']!r}")
        if not isinstance(entries, list):
            raise ValueError("files is no list")
        return cls(kind, name, step, tuple(map(_file, entries)), root, home)


def _file(raw: Any) -> SpoolFile:
    path, size, sha256 = (raw.get(k) for k in ("path", "bytes", "sha256")) if isinstance(raw, dict) else (None,) * 3
    if not isinstance(path, str) or not is_inner_path(path):
        raise ValueError(f"path={path!r} is no name of a file inside of a checkpoint")
    if type(size) is not int or not 0 <= size < _MAX_BYTES:
        raise ValueError(f"{path}: bytes={size!r} is no length")
    if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise ValueError(f"{path}: sha256={sha256!r} is no hash")
    return SpoolFile(path, size, sha256)


def default_repo_name(run_name: str) -> str:
    """The repository of a run without `hub.hub_model_id`, under the user's own name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", run_name).strip("-.")


def checkpoint_item(step: int, folder: Path) -> Item:
    """Describes a committed checkpoint; names, lengths and hashes come from its manifest, nothing is read again.

    Raises:
        OSError, DamagedCheckpointError, ValueError: the manifest cannot be read. UnsafeFileError: it is a link.
    """
    size = inner_file(folder, manifest.NAME).lstat().st_size
    entries = [{"path": e.path, "bytes": e.bytes, "sha256": e.sha256} for e in manifest.read(folder).files]
    entries.append({"path": manifest.NAME, "bytes": size})
    raw = {"kind": "checkpoint", "name": f"checkpoint-{step}", "step": step, "files": entries}
    return Item.from_dict(raw, folder, Path())


def model_item(folder: Path, step: int | None, kind: str = "final", name: str = "model") -> Item:
    """Describes the model files at the top of a folder; whatever else lies there is left out.

    Raises:
        UnsafeFileError: one of them is a link that is not followed.
    """
    sizes = {n: inner_file(folder, n).lstat().st_size for n in _own_model_files(folder)}
    return Item(kind, name, step, tuple(SpoolFile(n, size) for n, size in sizes.items()), folder)


def _own_model_files(folder: Path) -> list[str]:
    """Of a run with checkpoints those that they hold too, and what a merged model has besides: a user may keep notes
    or credentials beside them, and those are nobody else's."""
    names = manifest.model_files(folder)
    for _, checkpoint in reversed(list(RunPaths(folder).checkpoint_dirs())):
        with contextlib.suppress(OSError, DamagedCheckpointError):
            known = {*manifest.read(checkpoint).paths, *_OF_EVERY_MODEL}
            return [n for n in names if n in known or manifest.role_of(n) == "weights"]
    return names
