"""A model repository as the target: one checkpoint is one atomic commit, whatever fails on the way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from launcher.hub import card
from launcher.hub.answers import counted, expecting
from launcher.hub.items import Item, UploadSettings
from launcher.hub.layout import (
    HashCache,
    LocalFile,
    RemoteFile,
    best_step,
    git_blob_id,
    is_content,
    is_same,
    outdated_folders,
    stale_paths,
    wanted_files,
)
from launcher.hub.spool import reached

MAX_README_BYTES = 2**20
"""A README on the Hub beyond it is no card that we could have written, and is left as it is."""
SINGLE_UPLOAD_BYTES = 8 * 2**20
_COMMIT_ID = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class Pushed:
    """What one push did: the head that holds everything, and whether it needed a commit (bytes: sent anew at most)."""

    commit: str
    is_new: bool
    url: str | None = None


class RepoTarget:
    """Pushes by comparing and committing: called again after any failure, it sends only what is still missing.

    A reply that got lost therefore makes no second commit, and unchanged files are neither sent nor read again.
    """

    def __init__(self, api: HfApi, settings: UploadSettings, journal: dict[str, Any]) -> None:
        self._api = api
        self._settings = settings
        self._journal = journal
        self._hashes = HashCache()
        self._is_ready = False
        self.card_level = 0
        """0: the whole card; 1: without metadata that the Hub may refuse; 2: none."""

    @property
    def name(self) -> str:
        return self._journal["repo_id"] or self._settings.repo_id or self._settings.run_name

    @property
    def _branch(self) -> str:
        return self._settings.revision or "main"

    def ensure(self) -> None:
        """Finds the full name, and creates the repository and its branch where they are missing, once per process.

        A repository that was there and is gone is not made again: somebody deleted it on purpose.
        """
        if self._is_ready:
            return
        repo_id = self._settings.repo_id or self._settings.run_name  # a journal may come from elsewhere
        if "/" not in repo_id:
            repo_id = f"{self._api.whoami()['name']}/{repo_id}"
        if self._journal["repo_id"] != repo_id:
            self._api.create_repo(repo_id, private=self._settings.private, exist_ok=True)
            self._journal["repo_id"] = repo_id
            reached("created")
        if self._settings.revision is not None:
            try:
                self._api.repo_info(self.name, revision=self._branch)
            except RevisionNotFoundError:
                self._api.create_branch(self.name, branch=self._branch, exist_ok=True)
        self._is_ready = True

    def push(self, items: Sequence[Item], save_journal: Callable[[], None]) -> Pushed:
        """Brings the repository to the state that `items` (oldest first) describe.

        Raises:
            Exception: anything the client raises; nothing or everything of the commit is there then.
        """
        self.ensure()
        save_journal()
        head = self._head()
        remote = self._tree(head)
        wanted = wanted_files(items, self._settings.strategy)
        if self._settings.create_pr and (found := self._opened_pull_request(wanted)):
            return Pushed(found, is_new=False)
        outdated = outdated_folders(wanted, remote, self._settings.save_total_limit, best_step(items))
        operations = self._operations(wanted, remote, outdated)
        if not operations and any(item.kind != "checkpoint" for item in items):
            operations = [*self._card_operations(items, wanted, remote, head, outdated)]
        if not operations:
            self._tag(items, head, save_journal)
            return Pushed(head, is_new=False)
        self._note_tags(operations, outdated)
        save_journal()
        commit, url = self._commit(items, operations, wanted, remote, head, outdated)
        reached("committed")
        now = time.time()
        recent = [t for t in self._journal["commit_times"] if t > now - 3600.0]
        self._journal["commit_times"] = [*recent, now]
        self._journal["commits_since_squash"] += 1
        save_journal()
        if not self._settings.create_pr:
            self._tag(items, commit, save_journal)
        return Pushed(commit, is_new=True, url=url)

    def _head(self) -> str:
        """The commit of the branch; empty for a repository without any."""
        return str(self._api.repo_info(self.name, revision=self._settings.revision).sha or "")

    def _tree(self, head: str) -> dict[str, RemoteFile]:
        if not head:
            return {}
        found: dict[str, RemoteFile] = {}
        try:
            for entry in counted(self._api.list_repo_tree(self.name, recursive=True, revision=head)):
                if isinstance(entry, RepoFile):
                    lfs = entry.lfs
                    found[entry.path] = RemoteFile(entry.size, lfs.sha256 if lfs else None, entry.blob_id)
        except EntryNotFoundError:
            return {}
        return found

    def _operations(
        self, wanted: dict[str, LocalFile], remote: dict[str, RemoteFile], outdated: list[str]
    ) -> list[CommitOperationAdd | CommitOperationDelete]:
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for path, local in wanted.items():
            there = remote.get(path)
            if there is None or not is_same(local, there, self._hashes):
                operation = CommitOperationAdd(path, str(local.source))
                if local.sha256 is not None:
                    operation.upload_info.sha256 = bytes.fromhex(local.sha256)  # so that the client need not read
                operations.append(operation)
        gone = [p for p in stale_paths(wanted, remote) if p.split("/")[0] not in outdated]
        operations += [CommitOperationDelete(path, is_folder=False) for path in gone]
        operations += [CommitOperationDelete(f"{folder}/", is_folder=True) for folder in outdated]
        return operations

    def _commit(
        self,
        items: Sequence[Item],
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        wanted: dict[str, LocalFile],
        remote: dict[str, RemoteFile],
        head: str,
        outdated: list[str],
    ) -> tuple[str, str | None]:
        """One commit on top of `head`, refused by the server where the head has moved since."""
        for group in upload_groups([op for op in operations if isinstance(op, CommitOperationAdd)]):
            self._check(group, wanted)
            self._api.preupload_lfs_files(
                self.name, group, revision=self._branch, create_pr=self._settings.create_pr, free_memory=False
            )
            reached("uploaded")
        self._check(operations, wanted)
        paths = {op.path_in_repo for op in operations}  # of a push of the card alone, they are the card's
        if "README.md" not in paths:
            more = self._card_operations(items, wanted, remote, head, outdated)
            operations = [*operations, *(op for op in more if op.path_in_repo not in paths)]
        reached("committing")
        title = "Push " + ", ".join(item.name for item in items)
        info = self._api.create_commit(
            self.name,
            operations,
            commit_message=title[:120],
            revision=self._branch,
            parent_commit=head if _COMMIT_ID.match(head) else None,
            create_pr=self._settings.create_pr,
        )
        return str(info.oid), info.pr_url

    def _check(self, operations: Iterable[Any], wanted: dict[str, LocalFile]) -> None:
        """Reads what is about to be sent, each file once: a damaged one must not arrive."""
        additions = [op.path_in_repo for op in operations if isinstance(op, CommitOperationAdd)]
        self._hashes.check(wanted[path] for path in additions if path in wanted)

    def _card_operations(
        self,
        items: Sequence[Item],
        wanted: dict[str, LocalFile],
        remote: dict[str, RemoteFile],
        head: str,
        outdated: list[str],
    ) -> list[CommitOperationAdd]:
        there = remote.get("README.md")
        if self.card_level >= 2 or (there is not None and there.bytes > MAX_README_BYTES):
            return []
        steps = self._steps_there(items, [*remote, *wanted], outdated)
        existing = self._readme(remote, head)
        made = card.build_card(
            self._settings, self.name, items, steps, existing, self._journal["card"], self.card_level
        )
        self._journal["card"] = {"metadata": made.metadata, "text": made.text, "notices": made.notices}
        additions = {"README.md": made.text.encode(), **made.pictures}
        return [
            CommitOperationAdd(path, data)
            for path, data in additions.items()
            if path not in remote or not is_content(data, remote[path])
        ]

    def _steps_there(self, items: Sequence[Item], paths: Sequence[str], outdated: list[str]) -> list[int]:
        """The steps of the checkpoints that the repository will hold, for the card's table."""
        if self._settings.strategy == "checkpoint":
            # The last one pushed, not the highest: a run may have begun again.
            pushed = [entry["step"] for entry in self._journal["pushed"].values()]
            return [s for s in [*pushed, *(i.step for i in items)] if s is not None][-1:]
        matches = (re.match(r"checkpoint-(\d+)/", path) for path in paths if path.split("/")[0] not in outdated)
        return sorted({int(match[1]) for match in matches if match})

    def _readme(self, remote: dict[str, RemoteFile], head: str) -> str | None:
        """The README on the Hub; it is downloaded only if it is not what we sent last."""
        there = remote.get("README.md")
        if there is None:
            return None
        last = self._journal["card"].get("text")
        if last is not None and git_blob_id(last.encode()) == there.blob_id:
            return str(last)
        url = hf_hub_url(self.name, "README.md", revision=head, endpoint=self._api.endpoint)
        with expecting(there.bytes):
            response = get_session().get(url, headers=build_hf_headers())
        hf_raise_for_status(response)
        return str(response.content.decode("utf-8", "replace"))

    def _note_tags(self, operations: Sequence[Any], outdated: list[str]) -> None:
        """Writes down, before the commit, which tags it makes wrong: a kill after it must not leave them so."""
        touched = {m[1] for op in operations if (m := re.match(r"checkpoint-(\d+)/", op.path_in_repo))}
        gone = {name.rpartition("-")[2] for name in outdated}
        due = self._journal["tags_due"] or {"move": [], "delete": []}
        move = (touched | set(due["move"])) - gone
        self._journal["tags_due"] = {"move": sorted(move), "delete": sorted((gone | set(due["delete"])) - move)}

    def _tag(self, items: Sequence[Item], commit: str, save_journal: Callable[[], None]) -> None:
        """`step-N` on the commit of each checkpoint; the tags of folders that went away go too."""
        if self._settings.strategy != "all_checkpoints":
            return
        due = self._journal["tags_due"] or {"move": [], "delete": []}
        steps = [str(i.step) for i in items if i.kind == "checkpoint"]
        there = {tag.name: tag.target_commit for tag in self._api.list_repo_refs(self.name).tags}
        for step in steps:
            tag = f"step-{step}"
            if tag in there and step in due["move"] and there[tag] != commit:
                self._api.delete_tag(self.name, tag=tag)
                del there[tag]
            if tag not in there:
                self._api.create_tag(self.name, tag=tag, revision=commit, exist_ok=True)
        for step in due["delete"]:
            if f"step-{step}" in there:
                self._api.delete_tag(self.name, tag=f"step-{step}")
        reached("tagged")
        self._journal["tags_due"] = None
        save_journal()

    def _opened_pull_request(self, wanted: dict[str, LocalFile]) -> str | None:
        """The pull request that an earlier try opened although its reply was lost; remembers those that were there."""
        refs = self._api.list_repo_refs(self.name, include_pull_requests=True).pull_requests or []
        if self._journal["pull_requests_before"] is None:
            self._journal["pull_requests_before"] = [ref.ref for ref in refs]
        before = self._journal["pull_requests_before"]
        for ref in refs:
            if ref.ref not in before:
                there = self._tree(ref.target_commit)
                if all(p in there and is_same(f, there[p], self._hashes) for p, f in wanted.items()):
                    return ref.target_commit
        return None

    def maybe_squash(self, now: float, save_journal: Callable[[], None]) -> bool:
        """Squashes the branch's history if `save_total_limit` asks for retention and an hour has passed.

        Without it every replaced file would go on using storage. The tags keep their commits.
        """
        last, settings = self._journal["last_squash"], self._settings
        if settings.save_total_limit is None or settings.create_pr or self._journal["commits_since_squash"] < 2:
            return False
        if last is not None and 0.0 <= now - last < settings.squash_interval_s:  # else the clock was set back
            return False
        self._journal["last_squash"] = now  # before it is done, and also where it fails: at most one try in an hour
        save_journal()
        self._api.super_squash_history(self.name, branch=self._branch)
        reached("squashed")
        self._journal["commits_since_squash"] = 0
        self._journal["commit_times"].append(now)
        return True


def upload_groups(additions: Sequence[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """What to upload ahead of the commit, and in which calls.

    Each large file in a call of its own: what is finished is not sent again after a kill. Of small files with equal
    content the first one: the commit finds the bytes there and sends them once.
    """
    seen: set[bytes] = set()
    repeated: set[bytes] = set()
    for operation in additions:
        info = operation.upload_info
        if info.size >= SINGLE_UPLOAD_BYTES:
            yield [operation]
        elif info.is_hashed:
            (repeated if info.sha256 in seen else seen).add(info.sha256)
    firsts = {op.upload_info.sha256: op for op in reversed(additions) if op.upload_info.is_hashed}
    if repeated:
        yield [firsts[sha256] for sha256 in sorted(repeated)]
