"""A storage bucket as the target: mutable and without commits, so a marker written last says what is complete.

```
checkpoint-500/…               complete.json   {"files": {path: {bytes, sha256, xet_hash}}}
model/…                        complete.json   the final model
latest.json                    {"folder": "checkpoint-500"}
```
A folder without its marker is not complete. A marker goes away before, and comes back after, its folder changes.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_xet
from huggingface_hub import HfApi

from launcher.base import manifest
from launcher.base.inner_files import read_json_object
from launcher.hub.answers import counted
from launcher.hub.items import Item, UploadSettings
from launcher.hub.layout import BUCKET_MARKER as MARKER
from launcher.hub.layout import HashCache, LocalFile, best_step, outdated_folders
from launcher.hub.remote import Throttle, require_xet
from launcher.hub.spool import reached

LATEST = "latest.json"
_CHECKPOINT = re.compile(r"checkpoint-[0-9]{1,19}")
MAX_FILES_PER_CALL = 100
CAPPED_CALL_BYTES = 8 * 2**20
"""With a bandwidth cap a call takes no further file beyond these: what a finished call sent survives a kill."""
_SLICE_BYTES = 1 << 16


@dataclass(frozen=True)
class Stored:
    """What one push left; a bucket has no commits."""

    commit: str = ""
    url: str | None = None


class BucketTarget:
    """Pushes by comparing hashes; sizes and times are never trusted."""

    def __init__(self, api: HfApi, settings: UploadSettings, journal: dict[str, Any], throttle: Throttle) -> None:
        self._api = api
        self._settings = settings
        self._throttle = throttle
        self._journal = journal
        self._hashes = HashCache()
        self.card_level = 0

    @property
    def name(self) -> str:
        return self._journal["repo_id"] or str(self._settings.bucket)

    def push(self, items: Sequence[Item], save_journal: Callable[[], None]) -> Stored:
        """Brings every item's folder to the bucket and takes away what is outdated.

        Raises:
            Exception: anything the client raises; calling again sends only what is missing.
        """
        require_xet(self.name)
        name = str(self._settings.bucket)  # a journal may come from elsewhere
        if "/" not in name:
            name = f"{self._api.whoami()['name']}/{name}"
        if self._journal["repo_id"] != name:
            self._api.create_bucket(name, private=self._settings.private, exist_ok=True)
            self._journal["repo_id"] = name
            save_journal()
        for item in items:
            if item.kind == "checkpoint":
                self._note_unmarked([item.name], save_journal)
            self._push_folder(item.name if item.kind == "checkpoint" else "model", self._wanted(item))
            self._add({LATEST: json.dumps({"folder": item.name if item.kind == "checkpoint" else "model"}).encode()})
            reached("committed")
        self._retain(items, save_journal)
        return Stored()

    def _note_unmarked(self, folders: Sequence[str], save_journal: Callable[[], None]) -> None:
        """Before these checkpoints lose their marker or get their first file: what a kill, or a newer checkpoint that
        makes them pointless, leaves of them is taken away later."""
        self._journal["unmarked"] = sorted({*self._journal["unmarked"], *folders})
        save_journal()

    def _wanted(self, item: Item) -> dict[str, LocalFile]:
        """All of a checkpoint; with every_save, and of a final model, the files at the top."""
        is_whole = item.kind == "checkpoint" and self._settings.strategy != "every_save"
        return {
            f.path: LocalFile(item.source(f.path), f.bytes, f.sha256, item.name, f.path)
            for f in item.files
            if is_whole or ("/" not in f.path and f.path not in (manifest.NAME, "trainer_state.json"))
        }

    def _push_folder(self, folder: str, wanted: dict[str, LocalFile]) -> None:
        there = self._tree(folder)
        known = self._read_marker(folder, there)
        hashes = {path: file.sha256 or self._hashes.sha256(file.source) for path, file in wanted.items()}
        same = {
            p for p in wanted if known.get(p, {}).get("sha256") == hashes[p] and known[p]["xet_hash"] == there.get(p)
        }
        if same == set(wanted) == set(known):
            return
        if MARKER in there:
            self._delete([f"{folder}/{MARKER}"])
            reached("unmarked")
        same |= self._equal_content(wanted, there, set(wanted) - same)
        missing = {p: wanted[p] for p in wanted if p not in same}
        self._hashes.check(missing.values())
        self._add({f"{folder}/{p}": str(file.source) for p, file in missing.items()})
        reached("uploaded")
        self._delete([f"{folder}/{p}" for p in there if p not in wanted and p != MARKER])
        after = self._tree(folder)
        described = {p: {"bytes": f.bytes, "sha256": hashes[p], "xet_hash": after[p]} for p, f in wanted.items()}
        self._add({f"{folder}/{MARKER}": json.dumps({"files": described}, indent=1).encode()})

    def _equal_content(self, wanted: dict[str, LocalFile], there: dict[str, str], candidates: set[str]) -> set[str]:
        """Of files that a killed upload may have left, those whose content is right: by hash, which reads them."""
        paths = sorted(p for p in candidates if p in there)
        infos = hf_xet.hash_files([str(wanted[p].source) for p in paths]) if paths else []
        return {p for p, info in zip(paths, infos, strict=True) if info.hash == there[p]}

    def _tree(self, folder: str) -> dict[str, str]:
        """Path below the folder → Xet hash."""
        found = {}
        for entry in counted(self._api.list_bucket_tree(self.name, prefix=f"{folder}/", recursive=True)):
            if entry.type == "file" and entry.path.startswith(f"{folder}/"):
                found[entry.path.removeprefix(f"{folder}/")] = entry.xet_hash
        return found

    def _read_marker(self, folder: str, there: dict[str, str]) -> dict[str, Any]:
        """What an earlier push noted of a folder; nothing where that is not ours."""
        if MARKER not in there:
            return {}
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary) / MARKER
            self._api.download_bucket_files(self.name, [(f"{folder}/{MARKER}", target)])
            try:
                files = read_json_object(target).get("files")
            except ValueError:
                return {}
        entries = files.items() if isinstance(files, dict) else ()
        return {path: e for path, e in entries if isinstance(e, dict) and {"sha256", "xet_hash"} <= set(e)}

    def _add(self, files: dict[str, Any]) -> None:
        pairs = [(source, path) for path, source in files.items()]
        if self._throttle.is_capped:
            for group in _capped_groups(pairs):
                self._add_slowly(group)
            return
        for start in range(0, len(pairs), MAX_FILES_PER_CALL):
            self._api.batch_bucket_files(self.name, add=pairs[start : start + MAX_FILES_PER_CALL])

    def _add_slowly(self, pairs: Sequence[tuple[Any, str]]) -> None:
        """Hands the bytes over no faster than the cap allows.

        hf_xet has no cap of its own. It cuts what it is given into blocks of at most 64 MB and sends each as fast as
        the link allows, so the cap holds on average over such a block. Bytes that Xet need not send count as well.
        """
        # The client's own parts: needed for a cap only, so that a newer client can at most break that.
        from huggingface_hub._buckets import _BucketAddFile
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._xet import get_xet_session

        api, headers = self._api, build_hf_headers()
        group = {
            "token_refresh_url": f"{api.endpoint}/api/buckets/{self.name}/xet-write-token",
            "token_refresh_headers": headers,
            "custom_headers": {k: v for k, v in headers.items() if k.lower() != "authorization"},
        }
        operations = [_BucketAddFile(source, path) for source, path in pairs]
        session: Any = get_xet_session()  # type: ignore[no-untyped-call]
        with session.new_upload_commit(**group) as commit:
            for operation in operations:
                stream = commit.start_upload_stream(name=operation.destination, sha256=hf_xet.SKIP_SHA256)
                for piece in _slices(operation.source):
                    self._throttle.pass_through(len(piece))
                    stream.write(piece)
                stored = stream.finish().xet_info
                operation.xet_hash, operation.size = stored.hash, stored.file_size
        api._batch_bucket_files(self.name, add=[*operations])

    def _delete(self, paths: list[str]) -> None:
        if paths:
            self._api.batch_bucket_files(self.name, delete=paths)

    def _retain(self, items: Sequence[Item], save_journal: Callable[[], None]) -> None:
        """Takes old checkpoints away once the new one is complete: marker first, so that none looks whole. And those
        that never became complete."""
        coming = [f"{i.name}/{manifest.NAME}" for i in items if i.kind == "checkpoint"]
        if not coming:
            return
        listed = counted(self._api.list_bucket_tree(self.name, recursive=True))
        paths = [e.path for e in listed if e.type == "file"]
        marked = {p.removesuffix(f"/{MARKER}") for p in paths if p.endswith(f"/{MARKER}")}
        limit = 1 if self._settings.is_newest_enough else self._settings.save_total_limit
        best = None if self._settings.is_newest_enough else best_step(items)
        complete = [f"{folder}/{manifest.NAME}" for folder in marked]
        outdated = outdated_folders(coming, complete, limit, best)
        halves = [name for name in self._journal["unmarked"] if _CHECKPOINT.fullmatch(name) and name not in marked]
        self._note_unmarked(outdated, save_journal)
        for folder in outdated:
            self._delete([f"{folder}/{MARKER}"])
        for folder in [*outdated, *halves]:
            self._delete([p for p in paths if p.startswith(f"{folder}/") and not p.endswith(f"/{MARKER}")])
        self._journal["unmarked"] = []

    def maybe_squash(self, now: float, save_journal: Callable[[], None]) -> bool:
        """A bucket keeps no history."""
        return False


def _capped_groups(pairs: Sequence[tuple[Any, str]]) -> Iterator[list[tuple[Any, str]]]:
    group: list[tuple[Any, str]] = []
    used = 0
    for source, path in pairs:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        if group and (used + size > CAPPED_CALL_BYTES or len(group) == MAX_FILES_PER_CALL):
            yield group
            group, used = [], 0
        group.append((source, path))
        used += size
    if group:
        yield group


def _slices(source: Any) -> Iterator[bytes]:
    """The content of a file, or bytes themselves, in small pieces."""
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        while piece := file.read(_SLICE_BYTES):
            yield piece
