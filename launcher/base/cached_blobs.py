"""The one kind of link that is followed: a file of a snapshot in the Hub client's cache. Standard library only."""

from __future__ import annotations

import os
import re
from pathlib import Path

_CACHED_REPO = re.compile(r"(models|datasets)--[\w.-]+(--[\w.-]+)?")
_SHARED_BLOB = re.compile(r"blobs/[0-9a-f]{2}/[0-9a-f]{64}")


def cached_blob(link: Path) -> Path | None:
    """The blob behind a link of a Hub cache's `models--ORG--NAME/snapshots/COMMIT`; None where it leads elsewhere.

    It lies in the `blobs` beside the snapshots, or is itself a link to one that several repositories share.
    """
    link = Path(os.path.normpath(link.absolute()))
    repo = next(
        (p.parent for p in link.parents if p.name == "snapshots" and _CACHED_REPO.fullmatch(p.parent.name)), None
    )
    if repo is None:
        return None
    blob = Path(os.path.normpath(link.parent / link.readlink()))
    if blob.parent != repo / "blobs" or blob.parent.is_symlink():
        return None
    if blob.is_symlink():
        blob = Path(os.path.normpath(blob.parent / blob.readlink()))
        inside = blob.relative_to(repo.parent).as_posix() if blob.is_relative_to(repo.parent) else ""
        if not _SHARED_BLOB.fullmatch(inside) or blob.parent.is_symlink() or blob.parent.parent.is_symlink():
            return None
    return blob
