"""Checkpoints from the Hub: `hf://ORG/NAME[@revision]` to a verified folder. Models for `launcher prefetch`.

Of a repository exactly the files that one manifest names are asked for, each once for all processes: output_dir is
shared, and together they read every byte of the weights and optimizer states, whatever their number.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base import files, manifest
from launcher.base.errors import DamagedCheckpointError, HubError, ResumeError, UnsafeFileError, UserError
from launcher.base.paths import CheckpointPaths, RunPaths
from launcher.hub.answers import counted, expecting, is_commit_id
from launcher.hub.items import checkpoint_item

_URI = re.compile(r"^hf://(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+?))?/?(?:@(?P<revision>.+))?$")
_TOKENIZER_FILE = re.compile(r"^([^/]+\.(json|txt|model|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja)$")
_WEIGHTS_FILE = re.compile(r"^(?!consolidated)[^/]+\.safetensors$")  # Mistral's own format has the same weights again
_PICKLED_WEIGHTS_FILE = re.compile(r"^(pytorch_model[^/]*|adapter_model)\.bin$")
_CODE_FILE = re.compile(r"^[^/]+\.py$")
_MAX_DOWNLOADS = 8
_BUCKET_PREFIX = "hf://buckets/"
_BUCKET_URI = re.compile(r"^hf://buckets/([\w.-]+/[\w.-]+)(?:/(checkpoint-[0-9]{1,19}))?/?$")
_FOLDER = re.compile(r"last-checkpoint|checkpoint-[0-9]{1,19}")
_STEP_TAG = re.compile(r"step-([0-9]{1,19})")
_MAX_NAMES_PER_CALL = 500


class NothingThereError(ResumeError):
    """The Hub answers, and there is no checkpoint at that place."""


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is asked from: repository, revision (None: main), folder (None: the newest there)."""

    repo_id: str
    revision: str | None
    folder: str | None


def parse_uri(uri: str) -> Source:
    """`@` takes a branch, tag or commit, or the name of a checkpoint folder.

    Raises:
        ResumeError: it is no such address.
    """
    match = _URI.match(uri)
    if not match:
        raise ResumeError(
            f"checkpoint.resume_from_checkpoint={uri} is no Hub address. Valid: hf://ORG/NAME, hf://ORG/NAME@REVISION, "
            "hf://ORG/NAME@last-checkpoint, hf://ORG/NAME/checkpoint-500"
        )
    revision, folder = match["revision"], match["path"]
    if revision and not folder:
        if _FOLDER.fullmatch(revision):
            revision, folder = None, revision
        elif step := _STEP_TAG.fullmatch(revision):
            folder = f"checkpoint-{step[1]}"
    return Source(match["repo"], revision, folder)


def choose_folder(paths: Iterable[str], wanted: str | None) -> str | None:
    """The folder with the highest step that holds a manifest, or `wanted` if that has one.

    `last-checkpoint` counts as the newest: it is replaced as a whole at every save.
    """
    suffix = f"/{manifest.NAME}"
    folders = [p.removesuffix(suffix) for p in paths if p.endswith(suffix)]
    folders = [f for f in folders if _FOLDER.fullmatch(f)]
    if wanted is not None:
        return wanted if wanted in folders else None
    if "last-checkpoint" in folders:
        return "last-checkpoint"
    return max(folders, key=lambda f: int(f.rpartition("-")[2]), default=None)


def fetch(uri: str, paths: RunPaths) -> Path:
    """See `launcher.hub.fetch_checkpoint`. After a crash only `.hub/fetch` can remain, which the next call uses."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    from launcher.hub.remote import connected, readable_errors

    if uri.startswith(_BUCKET_PREFIX):
        return _fetch_from_bucket(uri, paths)
    source = parse_uri(uri)
    with readable_errors(uri), connected() as api:
        try:
            info = api.model_info(source.repo_id, revision=source.revision)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if getattr(error.response, "status_code", None) == 401:
                raise
            raise NothingThereError(
                f"checkpoint.resume_from_checkpoint={uri}: there is no such repository or revision, or the token may "
                "not see it. Set HF_TOKEN or run `hf auth login` for a private one"
            ) from None
        commit = info.sha
        if commit is None or not is_commit_id(commit):  # it becomes the name of a folder
            raise HubError(f"{uri} cannot be read: the endpoint names {commit!r} as its commit")
        listed = [s.rfilename for s in info.siblings or []]
        folder = choose_folder(listed, source.folder)
        if folder is None:
            what = f"no {source.folder}/ with a manifest" if source.folder else "no checkpoint of ours"
            raise NothingThereError(
                f"checkpoint.resume_from_checkpoint={uri}: there is {what}. Repositories pushed with "
                "hub.hub_strategy=checkpoint or all_checkpoints hold them; to start from the weights alone: "
                f"model.model_name_or_path={source.repo_id}"
            )
        place = _Place(api, source.repo_id, commit, folder)
        download_dir = _download_dir(paths, f"{source.repo_id.replace('/', '--')}-{commit}")
        checkpoint = download_dir / folder
        manifest_bytes = place.sizes([manifest.NAME]).get(manifest.NAME, 0)
        if not 0 < manifest_bytes <= files.MAX_JSON_BYTES:
            raise DamagedCheckpointError(f"{folder}/{manifest.NAME} of {uri} is no manifest: {manifest_bytes} bytes")
        with expecting(manifest_bytes):
            place.download(manifest.NAME, download_dir)
        wanted = _read_manifest(checkpoint, folder, uri)
        target = paths.checkpoint_dir(wanted.step)
        _refuse_taken(target, uri)
        if target.is_dir() and manifest.verify(target) == []:
            return target
        _refuse_model_only(wanted, folder, uri, source.repo_id)
        _refuse_other_sizes(wanted, place.sizes([e.path for e in wanted.files]), folder, uri)
        _refuse_without_room(wanted, paths, uri)
        for abandoned in (download_dir / ".cache").rglob("*.incomplete"):  # a killed client's, never used again
            abandoned.unlink()
        with expecting(wanted.total_bytes), ThreadPoolExecutor(_MAX_DOWNLOADS) as pool:
            largest_first = sorted(wanted.files, key=lambda entry: -entry.bytes)
            for _ in pool.map(lambda entry: _fetch_file(place, entry, download_dir), largest_first):
                pass  # the first error gives up what has not begun
    return _move_into_place(checkpoint, target, paths)


@dataclass(frozen=True)
class _Place:
    """A checkpoint's folder in one commit of a repository."""

    api: Any
    repo_id: str
    commit: str
    folder: str

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Name of a file in the folder → the bytes that the Hub declares; those that it does not have are left out."""
        found = {}
        for start in range(0, len(names), _MAX_NAMES_PER_CALL):
            asked = [f"{self.folder}/{name}" for name in names[start : start + _MAX_NAMES_PER_CALL]]
            for entry in self.api.get_paths_info(self.repo_id, asked, revision=self.commit):
                if hasattr(entry, "size"):
                    found[str(entry.path).removeprefix(f"{self.folder}/")] = int(entry.size)
        return found

    def download(self, name: str, download_dir: Path) -> None:
        self.api.hf_hub_download(self.repo_id, f"{self.folder}/{name}", revision=self.commit, local_dir=download_dir)


def _download_dir(paths: RunPaths, name: str) -> Path:
    """The folder of one download, in the only one that we ever delete; what an odd hand left there goes first."""
    root = _fetch_root(paths)
    holds_link = any((Path(f) / n).is_symlink() for f, folders, names in os.walk(root) for n in [*folders, *names])
    if holds_link:
        files.remove_tree(root)
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch_root(paths: RunPaths) -> Path:
    """
    Raises:
        UnsafeFileError: it is a link.
    """
    root = paths.hub_dir / "fetch"
    for folder in (paths.hub_dir, root):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UnsafeFileError(f"{folder} must be a folder and is a link or a file: remove it")
    return root


def _read_manifest(checkpoint: Path, folder: str, uri: str) -> manifest.Manifest:
    """A downloaded manifest, which may be anybody's.

    Raises:
        DamagedCheckpointError: it is none, or names what no checkpoint holds.
    """
    try:
        item = checkpoint_item(0, checkpoint)  # checks the names, lengths and hashes
        wanted = manifest.read(checkpoint)
    except (OSError, ValueError, OverflowError, RecursionError, UserError) as error:
        raise DamagedCheckpointError(f"{folder}/{manifest.NAME} of {uri} cannot be read: {error}") from error
    names = [file.path for file in item.files]
    if len(set(names)) != len(names) or any(file.sha256 is None for file in item.files[:-1]):
        raise DamagedCheckpointError(f"{folder}/{manifest.NAME} of {uri} names a file twice or without its hash")
    if not 0 <= wanted.step < 2**63 or folder not in ("last-checkpoint", f"checkpoint-{wanted.step}"):
        raise DamagedCheckpointError(f"{folder}/{manifest.NAME} of {uri} is of step {wanted.step}")
    return wanted


def _refuse_other_sizes(wanted: manifest.Manifest, there: dict[str, int], folder: str, uri: str) -> None:
    """Before anything is downloaded: what the Hub declares must be what the manifest says."""
    for entry in wanted.files:
        if (size := there.get(entry.path)) != entry.bytes:
            found = "is not there" if size is None else f"has {size} bytes"
            raise DamagedCheckpointError(
                f"{folder}/{entry.path} of {uri} is not what its manifest says: it {found}, not {entry.bytes} bytes"
            )


def _refuse_taken(target: Path, uri: str) -> None:
    """A folder that is not ours is never moved: before anything is downloaded in its place."""
    if files.is_taken(target) and not (target / manifest.NAME).is_file():
        raise ResumeError(
            f"{uri} is of step {target.name.rpartition('-')[2]}, and {target} is there already and is not of this run: "
            "move it away, or set another output_dir=…"
        )


def _refuse_without_room(wanted: manifest.Manifest, paths: RunPaths, uri: str) -> None:
    free = files.free_bytes(_fetch_root(paths))
    if wanted.total_bytes > free:
        raise UserError(f"{uri} has {wanted.total_bytes:,} bytes, and {paths.root} has room for {free:,}")


def _fetch_from_bucket(uri: str, paths: RunPaths) -> Path:
    """From a bucket only folders that hold their marker: the others are being written, or were left by a kill."""
    from launcher.hub.layout import BUCKET_MARKER
    from launcher.hub.remote import connected, readable_errors, require_xet

    match = _BUCKET_URI.match(uri)
    if not match:
        raise ResumeError(f"checkpoint.resume_from_checkpoint={uri} must be hf://buckets/ORG/NAME[/checkpoint-N]")
    bucket, wanted_folder = match[1], match[2]
    with readable_errors(uri), connected() as api:
        require_xet(bucket)
        listed = {e.path: e.size for e in counted(api.list_bucket_tree(bucket, recursive=True)) if e.type == "file"}
        complete = [p for p in listed if f"{p.split('/')[0]}/{BUCKET_MARKER}" in listed]
        folder = choose_folder(complete, wanted_folder)
        if folder is None:
            raise NothingThereError(f"checkpoint.resume_from_checkpoint={uri}: there is no complete checkpoint of ours")
        checkpoint = _download_dir(paths, f"bucket-{bucket.replace('/', '--')}") / folder
        checkpoint.mkdir(exist_ok=True)
        if (manifest_bytes := listed[f"{folder}/{manifest.NAME}"]) > files.MAX_JSON_BYTES:
            raise DamagedCheckpointError(f"{folder}/{manifest.NAME} of {uri} is no manifest: {manifest_bytes} bytes")
        api.download_bucket_files(bucket, [(f"{folder}/{manifest.NAME}", checkpoint / manifest.NAME)])
        wanted = _read_manifest(checkpoint, folder, uri)
        _refuse_taken(paths.checkpoint_dir(wanted.step), uri)
        _refuse_model_only(wanted, folder, uri, None)
        there = {path.removeprefix(f"{folder}/"): size for path, size in listed.items()}
        _refuse_other_sizes(wanted, there, folder, uri)
        _refuse_without_room(wanted, paths, uri)
        missing = [e for e in wanted.files if not _is_right(checkpoint / e.path, e)]
        api.download_bucket_files(bucket, [(f"{folder}/{e.path}", checkpoint / e.path) for e in missing])
    for entry in missing:
        if not _is_right(checkpoint / entry.path, entry):
            raise DamagedCheckpointError(f"{folder}/{entry.path} of {uri} is not what its manifest says")
    return _move_into_place(checkpoint, paths.checkpoint_dir(wanted.step), paths)


def _refuse_model_only(wanted: manifest.Manifest, folder: str, uri: str, repo_id: str | None) -> None:
    """Says before the download what resume would say after it."""
    state = CheckpointPaths(Path()).run_state.as_posix()
    if any(entry.path == state for entry in wanted.files):
        return
    cure = f". To train on from the weights at its top: model.model_name_or_path={repo_id}" if repo_id else ""
    raise ResumeError(
        f"checkpoint.resume_from_checkpoint={uri}: {folder} holds only the model (it was saved with "
        f"checkpoint.save_only_model=true) and cannot be resumed{cure}"
    )


def _is_right(path: Path, entry: manifest.FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and _sha256(path) == entry.sha256


def _fetch_file(place: _Place, entry: manifest.FileEntry, download_dir: Path) -> None:
    """Downloads one file and compares it with the manifest; a file that is there and right is kept."""
    local = download_dir / place.folder / entry.path
    for attempt in range(2):
        if _is_right(local, entry):
            return
        if attempt == 0:
            local.unlink(missing_ok=True)
            place.download(entry.path, download_dir)
    raise DamagedCheckpointError(
        f"{place.folder}/{entry.path} of hf://{place.repo_id}@{place.commit} is not what its manifest says. Choose "
        f"another: checkpoint.resume_from_checkpoint=hf://{place.repo_id}@REVISION"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move_into_place(checkpoint: Path, target: Path, paths: RunPaths) -> Path:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                files.fsync_file(file.fileno(), path)
    if target.exists() or target.is_symlink():  # it is not whole, or we would have used it
        damaged = target.with_name(f"{target.name}.damaged")
        target.rename(damaged if not damaged.exists() else damaged.with_name(f"{damaged.name}.{time.time_ns()}"))
    files.rename(checkpoint, target)
    files.remove_tree(_fetch_root(paths))
    return target


def model_files(paths: Iterable[str], *, with_weights: bool, with_code: bool) -> list[str]:
    """Of a repository's files those at the top that from_pretrained reads; .bin only where there is no safetensors.

    What lies in folders are our own checkpoints, and the same weights in other formats.
    """
    listed = list(paths)
    kinds = [_TOKENIZER_FILE, *([_CODE_FILE] if with_code else [])]
    if with_weights:
        kinds.append(_WEIGHTS_FILE if any(map(_WEIGHTS_FILE.match, listed)) else _PICKLED_WEIGHTS_FILE)
    return [path for path in listed if any(kind.match(path) for kind in kinds)]


def download_model(name: str, revision: str | None, *, with_weights: bool, with_code: bool) -> Path:
    """See `launcher.hub.fetch_model`."""
    from huggingface_hub import snapshot_download

    from launcher.hub.remote import connected, readable_errors

    with readable_errors(name), connected() as api:
        info = api.model_info(name, revision=revision, files_metadata=True)
        sizes = {s.rfilename: s.size for s in info.siblings or []}
        wanted = model_files(sizes, with_weights=with_weights, with_code=with_code)
        if with_weights and not any(p.endswith((".safetensors", ".bin")) for p in wanted):
            raise UserError(
                f"{name} (model.model_name_or_path or adapter_name_or_path): the repository has no weights at its top"
            )
        declared = [sizes[path] for path in wanted]
        bound = sum(s for s in declared if s is not None)
        if None in declared:  # a gateway that tells no sizes
            bound = files.free_bytes(Path.home())
        with expecting(bound):
            patterns = [glob.escape(path) for path in wanted]
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
