"""Which checkpoints may go. By step number alone: never by time stamp, never by path text."""

from __future__ import annotations

import re
from collections.abc import Iterable

from launcher.base.files import remove_tree
from launcher.base.manifest import NAME
from launcher.base.paths import RunPaths
from launcher.checkpoint.writer import DELETED_PREFIX

_HALF_REPLACED = re.compile(r"^\.(.+\.tmp(-\d+)?|lock-.+)$")
"""The temporary names of `files.replace_file`, `finish.publish` and the lock."""


def our_steps(paths: RunPaths) -> list[int]:
    """Steps of the folders that carry our manifest; foreign `checkpoint-N` folders do not count and are not touched."""
    return [step for step, folder in paths.checkpoint_dirs() if (folder / NAME).is_file()]


def expired_steps(steps: Iterable[int], limit: int | None, best_step: int | None) -> list[int]:
    """The steps to delete so that `limit` folders remain, the best and the newest among them.

    A limit of 1 keeps two where best and newest differ.
    """
    ordered = sorted(steps)
    if limit is None or not ordered:
        return []
    kept = {ordered[-1]} | ({best_step} & set(ordered))
    for step in reversed(ordered):
        if len(kept) >= limit:
            break
        kept.add(step)
    return [step for step in ordered if step not in kept]


def sweep_leftovers(paths: RunPaths) -> None:
    """Removes what a crash left behind: half saves, deletions and replacements. Only while holding the lock."""
    for path in list(paths.root.iterdir()):
        if path.name.startswith((".tmp-checkpoint-", DELETED_PREFIX)) and path.is_dir():
            remove_tree(path)
        elif _HALF_REPLACED.match(path.name) and path.is_file():
            path.unlink(missing_ok=True)
