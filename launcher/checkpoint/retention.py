"""Which checkpoints may go. By step number alone: never by time stamp, never by path text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from launcher.base.files import remove_file, remove_tree
from launcher.base.paths import RunPaths
from launcher.checkpoint.writer import DELETED_PREFIX

_HALF_REPLACED = re.compile(r"^\.(.+\.tmp(-[0-9a-f]+)?|lock-.+)$")
"""The temporary names of `files.replace_file` and `files.copy_file` (earlier versions too) and the lock."""


def our_steps(paths: RunPaths) -> list[int]:
    """Steps of our checkpoints but for links: one that was moved to another disk and linked is read, but it is not ours
    to delete any more.
    """
    return [step for step, folder in paths.own_checkpoints().items() if not folder.is_symlink()]


def kept_words(paths: RunPaths) -> str:
    """What a failed save leaves to go on from, as the end of a sentence."""
    try:
        steps = our_steps(paths)
    except OSError:  # the disk that failed the save
        return "what was committed before is as it was"
    return f"checkpoint-{max(steps)} is as it was" if steps else "no checkpoint is here yet"


def expired_steps(
    steps: Iterable[int], limit: int | None, best_step: int | None, needed_steps: Collection[int] = ()
) -> list[int]:
    """The steps to delete so that `limit` folders remain, the best, the newest and the needed ones among them.

    A limit of 1 keeps two where best and newest differ.
    """
    ordered = sorted(steps)
    if limit is None or not ordered:
        return []
    kept = {ordered[-1]} | ({best_step, *needed_steps} & set(ordered))
    for step in reversed(ordered):
        if len(kept) >= limit:
            break
        kept.add(step)
    return [step for step in ordered if step not in kept]


def sweep_leftovers(paths: RunPaths) -> None:
    """Removes what a crash left behind: half saves, deletions and replacements. Only while holding the lock.

    Of a link only the link itself.
    """
    for path in list(paths.root.iterdir()):
        if path.name.startswith((".tmp-checkpoint-", DELETED_PREFIX)):
            remove_tree(path)
        elif _HALF_REPLACED.match(path.name) and (path.is_symlink() or not path.is_dir()):
            remove_file(path)
